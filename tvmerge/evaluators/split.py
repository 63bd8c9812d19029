"""Which questions a search sees, and which it is judged on."""

from __future__ import annotations

import heapq
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from tvmerge.errors import TaskError

__all__ = ["STAGES", "Split", "n_heldout", "share_out", "split_questions", "why_so_few_heldout", "why_so_many"]

#: Where the stages of a trial end, as shares of each task's questions.
STAGES = (0.25, 0.5, 1.0)


def why_so_many(n_asked: int, n_left: int, *, flag: str) -> str:
    """A note on how many questions a trial sees if nobody says how many.

    Args:
        n_asked: so many.
        n_left: of so many that are not held out.
        flag: that says how many.
    """
    if n_asked == n_left:
        return f"{n_asked:,} questions per trial: all that are not held out"
    return (
        f"{n_asked:,} of {n_left:,} questions per trial: at the same cost more trials of about 300 find more than "
        f"fewer trials of more; {flag} takes another number, or all"
    )


def why_so_few_heldout(n_asked: int, n_heldout: int) -> str:
    """A note on held-out questions of which not all are asked."""
    return (
        f"{n_asked:,} of {n_heldout:,} held-out questions are asked, of the models of the last table: --heldout_limit "
        "takes another number, or all"
    )


@dataclass(frozen=True)
class Split:
    """The questions of one task, as sorted indices."""

    search: Sequence[int]  # that a search sees
    heldout: Sequence[int]  # to judge what it found
    stages: Sequence[Sequence[int]] = ()  # those of the search, divided at STAGES; each has the shares of the labels


def n_heldout(n_questions: int, holdout: float) -> int:
    """How many of a task's questions the search never sees."""
    return round(holdout * n_questions)


def share_out(total: int, *, available: Mapping[str, int], weights: Mapping[str, float], least: int) -> dict[str, int]:
    """Share a number of questions over tasks: each question goes to the task that has the fewest for its weight.

    By weight, since the error of a weighted mean is least if tasks have questions by weight; Neyman 1934, section III,
    for answers that spread alike; rounded as seats are, by Sainte-Laguë.

    Args:
        total: of questions, if there are as many.
        available: task → how many it has.
        weights: task → its weight, at least 0.
        least: what each task gives, if it has as many, even if they are then more than `total`.
    """
    if total >= sum(available.values()):
        return dict(available)
    given = dict.fromkeys(available, 0)
    places = {name: place for place, name in enumerate(available)}
    waiting = [(0.5 / weights[name], places[name], name) for name, n in available.items() if n and weights[name] > 0]
    heapq.heapify(waiting)
    for _ in range(total):
        if not waiting:
            break
        _, place, name = heapq.heappop(waiting)
        given[name] += 1
        if given[name] < available[name]:
            heapq.heappush(waiting, ((given[name] + 0.5) / weights[name], place, name))
    return {name: max(n, min(least, available[name])) for name, n in given.items()}


def split_questions(
    *,
    name: str,
    n_questions: int,
    holdout: float,
    limit: int | None,
    seed: int,
    labels: Sequence[Hashable] | None = None,
    heldout_limit: int | None = None,
) -> Split:
    """Split a task's questions by seed, the shares of the labels kept.

    Args:
        name: the task's name, which seeds its own shuffle.
        n_questions: how many the task has.
        holdout: the share that is held out, in [0, 1).
        limit: the most questions that the search sees; None for all that are not held out.
        seed: of the shuffle.
        labels: the label of each question; None if they have none.
        heldout_limit: the most held-out questions that are asked; the search sees none of the others either.

    Raises:
        TaskError: too few questions to have both.
    """
    order = _shuffled(random.Random(f"{seed}/{name}"), n_questions, labels)
    end = n_heldout(n_questions, holdout)
    heldout, rest = order[:end], order[end:]
    if not rest or (holdout > 0 and not heldout):
        raise TaskError(f"task {name}: {n_questions} questions are too few to hold out a share of {holdout}")
    search = rest[:limit]
    ends = [round(share * len(search)) for share in STAGES]
    stages = [sorted(search[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return Split(search=sorted(search), heldout=sorted(heldout[:heldout_limit]), stages=stages)


def _shuffled(generator: random.Random, n: int, labels: Sequence[Hashable] | None) -> list[int]:
    """Indices in an order whose every stretch has about the same share of each label.

    The k-th of the m questions of a label stands at a random place in the k-th of m equal parts of the order.
    """
    order = list(range(n))
    generator.shuffle(order)
    if labels is None:
        return order
    members: dict[Hashable, list[int]] = {}
    for index in order:
        members.setdefault(labels[index], []).append(index)
    places = {
        index: (k + generator.random()) / len(questions)
        for questions in members.values()
        for k, index in enumerate(questions)
    }
    return sorted(order, key=places.__getitem__)
