"""What a run says of its result: the score table, the verdict, the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from tvmerge.evaluators import Goals, QuestionScore, TaskGoal, mean_score, task_scores, unscored_questions
from tvmerge.recipe import Recipe
from tvmerge.search import Gain, paired_gain

__all__ = ["Candidate", "model_card", "score_table", "verdict"]


@dataclass(frozen=True)
class Candidate:
    """A model in the table."""

    label: str  # the column's head
    scores: Sequence[QuestionScore]


def score_table(
    candidates: Sequence[Candidate],
    goals: Goals | None = None,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A Markdown table, aligned for a terminal: a row for each task and one for the score, a column for each model.

    Args:
        candidates: models scored on the same questions, in the order of their columns.
        goals: how the scores of tasks make that of a model.
        categories: task → the category of each of its questions; such a task has a row for each of them.
    """
    goals = goals or {}
    by_task = [task_scores(_rows(candidate.scores, categories or {})) for candidate in candidates]
    counts = {task: 0 for task in by_task[0]}
    for task, _ in {(s.task, s.question) for s in _rows(candidates[0].scores, categories or {})}:
        counts[task] += 1
    rows = [["task", "questions", *(candidate.label for candidate in candidates)]]
    for task, n in counts.items():
        goal = goals.get(task, TaskGoal())
        rows.append(
            [_label(task, goal).replace("|", r"\|"), str(n), *(_shown(scores[task], goal) for scores in by_task)]
        )
    means = [_number(mean_score(candidate.scores, goals)) for candidate in candidates]
    alike = len({(goal.weight, goal.higher_is_better, goal.logarithmic) for goal in goals.values()}) <= 1
    is_mean = alike and all(goal.higher_is_better for goal in goals.values())
    rows.append(["**mean**" if is_mean else "**score**", str(sum(counts.values())), *means])
    unscored = [unscored_questions(candidate.scores) for candidate in candidates]
    if any(n for n, _ in unscored):
        rows.append(["unscored", "", *(f"{n / of:.1%}" for n, of in unscored)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_row(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def _rows(scores: Sequence[QuestionScore], categories: Mapping[str, Sequence[str]]) -> list[QuestionScore]:
    """Scores, named by what their rows are called."""
    return [replace(s, task=categories[s.task][s.question]) if s.task in categories else s for s in scores]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[0] = cells[0].ljust(widths[0])
    return "| " + " | ".join(padded) + " |"


def _label(task: str, goal: TaskGoal) -> str:
    """A task, with what the reader could not guess of its goal."""
    metric = goal.metric.removesuffix(",none")
    parts = [metric] if metric not in ("acc", "exact_match") or not goal.higher_is_better else []
    parts += ["lower is better"] if not goal.higher_is_better else []
    parts += [f"weight {goal.weight:g}"] if goal.weight != 1 else []
    return f"{task} ({', '.join(parts)})" if parts else task


def _shown(mean: float | None, goal: TaskGoal) -> str:
    return _number(None if mean is None else goal.shown(mean))


def _number(score: float | None) -> str:
    return "unscored" if score is None else f"{score:.3f}"


def verdict(best: Candidate, references: Sequence[Candidate], *, heldout: bool, goals: Goals | None = None) -> str:
    """In words: is the best merge better than each of the other models, on the questions of the table?

    Args:
        best: the model that the run recommends.
        references: the models it is compared with.
        heldout: whether the search never saw these questions.
        goals: how the scores of tasks make that of a model.
    """
    lines = []
    for reference in references:
        gain = paired_gain(best.scores, reference.scores, goals)
        if gain is None:
            lines.append(
                f"{best.label} cannot be compared with {reference.label}: a task has no question scored for both"
            )
            continue
        difference = f"{gain.mean:+.3f} ± {gain.standard_error:.3f} (standard error)"
        lines.append(f"{best.label} is {_comparison(gain)} {reference.label}: {difference}")
    where = "questions that the search did not see" if heldout else "the very questions that were searched on"
    return f"On {where}:\n" + "\n".join(f"- {line}" for line in lines)


def _comparison(gain: Gain) -> str:
    if not gain.is_clear:
        return "not clearly different from"
    return "clearly better than" if gain.mean > 0 else "clearly worse than"


def model_card(recipe: Recipe, *, table: str, verdict_text: str, weights: Mapping[str, float]) -> str:
    """README.md of the merged model, as the Hub reads it."""
    mixture = recipe.mixture
    tags = ["merge", "tvmerge"] if mixture is None else ["merge", "moe", "tvmerge"]
    metadata: dict[str, object] = {"library_name": "transformers", "tags": tags}
    # The Hub takes ids only, and refuses a folder of somebody's machine.
    sources = {"target": recipe.target}
    if mixture is not None:
        sources = {f"target {n}": source for n, source in enumerate((recipe.target, *mixture.further_targets), start=1)}
    for entry in recipe.task_vectors:
        name = f" {entry['label']}" if len(recipe.task_vectors) > 1 else ""
        sources |= {f"{role}{name}": entry[role] for role in ("base", "tuned") if entry[role]}
    of_hub = [source["model"] for source in sources.values() if source["revision"]]
    if of_hub:
        metadata["base_model"] = list(dict.fromkeys(of_hub))
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    weight_rows = "\n".join(f"| {name} | {weight:.4f} |" for name, weight in weights.items())
    listed = "\n".join(f"- {role}: `{_source(source)}`" for role, source in sources.items())
    return f"""---
{header}---

{_what(recipe)}

{listed}

`tvmerge apply recipe.yaml --output_dir DIR` rebuilds this model from them.

## Scores

{table}

{verdict_text}

## Weights

| weight | value |
|---|---:|
{weight_rows}
"""


def _what(recipe: Recipe) -> str:
    mixture, per = recipe.mixture, _per(recipe)
    if mixture is None:
        return f"# A merge found by tvmerge\n\n`target + Σ w·(tuned − base)`, with {per}."
    n = 1 + len(mixture.further_targets)
    whose = "shared by all experts" if mixture.share_weights else "for each expert"
    base = "the mean of all experts" if mixture.base == "average" else "the first expert"
    seed = f" (seed {mixture.gate_seed})" if mixture.gate_mode.endswith("random") else ""
    searched = ", with a temperature for each layer that was searched" if mixture.search_gate else ""
    return f"""# A mixture of experts found by tvmerge

Each of the {n} experts is `target + Σ w·(tuned − base)`, with {per}, {whose}. Attention, norms and embeddings are
those of {base}. The router picks {mixture.experts_per_token} experts for a token; it was not trained but made by
`gate_mode: {mixture.gate_mode}`{seed}{searched}, and its values lie in `router.npy`."""


def _per(recipe: Recipe) -> str:
    kind, _, size = recipe.granularity.partition(":")
    per = {"uniform": "one weight", "all": "one weight per tensor", "block": f"one weight per {size} layers"}
    split = f", split into {', '.join(recipe.weight_groups)}" if recipe.weight_groups else ""
    return per.get(kind, f"one weight per {kind}") + split


def _source(source: Mapping[str, str | None]) -> str:
    revision = source.get("revision")
    return f"{source['model']}@{revision}" if revision else str(source["model"])
