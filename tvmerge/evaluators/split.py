"""Which questions a search sees, and which it is judged on."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tvmerge.errors import TaskError

__all__ = ["Split", "split_questions"]


@dataclass(frozen=True)
class Split:
    """The questions of one task, as sorted indices."""

    search: Sequence[int]  # that a search sees
    heldout: Sequence[int]  # to judge what it found


def split_questions(
    *,
    name: str,
    n_questions: int,
    holdout: float,
    limit: int | None,
    seed: int,
    labels: Sequence[Hashable] | None = None,
) -> Split:
    """Split a task's questions by seed, the shares of the labels kept.

    Args:
        name: the task's name, which seeds its own shuffle.
        n_questions: how many the task has.
        holdout: the share that is held out, in [0, 1).
        limit: the most questions that the search sees; None for all that are not held out.
        seed: of the shuffle.
        labels: the label of each question; None if they have none.

    Raises:
        TaskError: too few questions to have both.
    """
    order = _shuffled(random.Random(f"{seed}/{name}"), n_questions, labels)
    n_heldout = round(holdout * n_questions)
    heldout, rest = order[:n_heldout], order[n_heldout:]
    if not rest or (holdout > 0 and not heldout):
        raise TaskError(f"task {name}: {n_questions} questions are too few to hold out a share of {holdout}")
    return Split(search=sorted(rest[:limit]), heldout=sorted(heldout))


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
