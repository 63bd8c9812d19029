"""README.md of a merged model: a model card as the Hub reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from tvmerge.evaluators import Goals, TaskGoal, task_scores, unscored_questions
from tvmerge.recipe import RECIPE_FILE, Recipe
from tvmerge.report.sources import SourceCard, code, inherited_license, languages, source_name, sources_by_role
from tvmerge.results import Candidate

__all__ = ["model_card"]

#: A longer table of weights is folded up.
UNFOLDED = 50


def model_card(
    recipe: Recipe,
    *,
    table: str,
    verdict_text: str,
    weights: Mapping[str, float],
    best: Candidate | None = None,
    goals: Goals | None = None,
    heldout: bool = True,
    cards: Mapping[str, SourceCard] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """README.md of the merged model, as the Hub reads it.

    Args:
        recipe: what the model is.
        table: its scores and those of others, Markdown.
        verdict_text: the same in words, Markdown.
        weights: weight name → w.
        best: the model, with its scores of the table; None: the header holds none.
        goals: how the scores of tasks make that of a model.
        heldout: whether the search never saw the questions of the table.
        cards: what the sources say of themselves, as `read_cards` gives it; None: not looked at, and nothing is said
            of a license.
        pictures: names of files beside the card that it shows.

    Source:
        Hugging Face Hub, model card metadata (huggingface_hub.ModelCardData, EvalResult).
    """
    inherited, license_text = ({}, "") if cards is None else inherited_license(recipe, cards)
    metadata = _metadata(recipe, inherited, languages(recipe, cards or {}))
    if best is not None and (results := _results(best, goals or {}, heldout)):
        metadata["model-index"] = [{"name": _title(recipe), "results": results}]
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    listed = "\n".join(
        f"- {_line(role)}: {code(source_name(source))}" for role, source in sources_by_role(recipe).items()
    )
    shown = "".join(f"![{_line(name.rpartition('.')[0])}]({quote(name)})\n\n" for name in pictures)
    licensed = f"\n## License\n\n{license_text}\n" if license_text else ""
    return f"""---
{header}---

# {_title(recipe)}

{_what(recipe)}

{listed}

All that it is made of and how stands in [{RECIPE_FILE}]({RECIPE_FILE}): `tvmerge apply {RECIPE_FILE} --output_dir DIR`
rebuilds this model from its sources.

## Scores

{table}

{verdict_text}

## Weights

{shown}{_weight_table(weights)}
{licensed}"""


def _metadata(recipe: Recipe, inherited: Mapping[str, str], spoken: Sequence[str]) -> dict[str, Any]:
    """The header's keys but the scores."""
    tags = ["merge", "tvmerge"] if recipe.mixture is None else ["merge", "moe", "tvmerge"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if spoken:
        metadata["language"] = list(spoken)
    # The Hub takes ids only, and refuses a folder of somebody's machine.
    of_hub = [source["model"] for source in sources_by_role(recipe).values() if source.get("revision")]
    if of_hub:
        metadata |= {"base_model": list(dict.fromkeys(of_hub)), "base_model_relation": "merge"}
    return metadata | dict(inherited)


def _results(best: Candidate, goals: Goals, heldout: bool) -> list[dict[str, Any]]:
    """The results of a model-index: the mean of each task that was measured. Nobody but us has verified them."""
    found = []
    for task, mean in task_scores(best.scores).items():
        goal = goals.get(task, TaskGoal())
        value = math.nan if mean is None else goal.shown(mean)
        if not math.isfinite(value):
            continue
        metric, _, of = goal.metric.partition(",")
        details = [part for part in (of if of != "none" else "", "" if goal.higher_is_better else "lower is better")]
        name = ", ".join(filter(None, (metric, *details)))
        unscored, n = unscored_questions(score for score in best.scores if score.task == task)
        shown = " ".join(task.split()) or "task"  # PyYAML loses some line breaks of Unicode
        counts = {"questions": n, **({"unscored": unscored} if unscored else {})}
        found.append(
            {
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {
                    "name": shown,
                    "type": shown,
                    "split": "held out of the search" if heldout else "searched on",
                    "args": counts,
                },
                "metrics": [{"type": metric, "value": round(value, 6), "name": name, "verified": False}],
            }
        )
    return found


def _weight_table(weights: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {_line(name)} | {weight:.4f} |" for name, weight in weights.items())
    table = f"| weight | value |\n|---|---:|\n{rows}"
    if len(weights) <= UNFOLDED:
        return table
    return f"<details><summary>{len(weights)} weights</summary>\n\n{table}\n\n</details>"


def _line(text: str) -> str:
    """Text in one line of Markdown, whatever it holds."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def _title(recipe: Recipe) -> str:
    return "A merge found by tvmerge" if recipe.mixture is None else "A mixture of experts found by tvmerge"


def _what(recipe: Recipe) -> str:
    mixture, per = recipe.mixture, _per(recipe)
    if mixture is None:
        return f"`target + Σ w·(tuned − base)`, with {per}."
    n = 1 + len(mixture.further_targets)
    whose = "shared by all experts" if mixture.share_weights else "for each expert"
    base = "the mean of all experts" if mixture.base == "average" else "the first expert"
    seed = f" (seed {mixture.gate_seed})" if mixture.gate_mode.endswith("random") else ""
    searched = ", with a temperature for each layer that was searched" if mixture.search_gate else ""
    router = f"`gate_mode: {mixture.gate_mode}`{seed}{searched}"
    return f"""Each of the {n} experts is `target + Σ w·(tuned − base)`, with {per}, {whose}. Attention, norms and
embeddings are those of {base}. The router picks {mixture.experts_per_token} experts for a token; it was not trained
but made by {router}, and its values lie in `router.npy`."""


def _per(recipe: Recipe) -> str:
    kind, _, size = recipe.granularity.partition(":")
    per = {
        "uniform": "one weight",
        "all": "one weight per tensor",
        "block": f"one weight per {size} layers",
        "parameter": "one weight per kind of parameter",
    }
    split = f", split into {', '.join(map(_line, recipe.weight_groups))}" if recipe.weight_groups else ""
    return per.get(kind, f"one weight per {kind}") + split
