"""README.md of a merged model: a model card as the Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from tvmerge.recipe import Recipe

__all__ = ["model_card"]


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
