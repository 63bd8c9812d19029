"""Is what mergekit makes of an exported recipe the model that the recipe describes?

    python perf/mergekit.py PATH/mergekit-yaml     # of an environment of its own

Applies and exports recipes of the embedded models and of random ones, runs mergekit on each export, and compares all
tensors: the share of elements that are the same, and the largest difference in units in the last place. The weights
are drawn from [0, 2].
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from models import Shape, make_models
from safetensors.numpy import save_file

from tvmerge.checkpoint import Checkpoint
from tvmerge.export import MERGEKIT_FILE, export_recipe
from tvmerge.hub import resolve
from tvmerge.rebuild import apply_recipe
from tvmerge.recipe import Recipe
from tvmerge.state_dict import Array

DEMO = Path(__file__).parent.parent / "demo" / "models"
SHAPE = Shape(hidden=512, inner=512, layers=4, vocabulary=128)
GRANULARITIES = ("uniform", "layer", "block:3", "parameter", "all")
GROUPS = {"weight_groups": {"attention": "self_attn", "mlp": r"mlp\.(up|down)"}, "freeze": ["embed", r"1\.mlp"]}


@dataclass(frozen=True)
class Case:
    """A recipe whose weights are still to be drawn."""

    label: str
    models: Path
    vectors: Mapping[str, str | None] = field(default_factory=lambda: {"tuned": "base"})  # tuned → base, names
    target: str = "target"
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)  # what is tried in place of what is exported

    def write(self, path: Path) -> None:
        """Write the recipe."""

        def source(name: str) -> dict[str, str]:
            return {"model": str(self.models / name)}

        content: dict[str, Any] = {
            "target": source(self.target),
            "task_vectors": [
                {"label": tuned, "tuned": source(tuned), "base": source(base) if base else None}
                for tuned, base in self.vectors.items()
            ],
            "granularity": "layer",
            "weights": {},
            **self.settings,
        }
        path.write_text(yaml.safe_dump(content))
        recipe = Recipe.load(path)
        names = recipe.open_sources().merge(recipe.settings()).weight_names
        drawn = np.random.default_rng(len(names)).uniform(0, 2, len(names))
        content["weights"] = {name: float(weight) for name, weight in zip(names, drawn, strict=True)}
        path.write_text(yaml.safe_dump(content))


def cases(folder: Path) -> Iterator[Case]:
    """Every granularity of both families, and what is special."""
    random = folder / "random"
    make_models(random, SHAPE)
    adapter(random / "adapter")
    for family, models in (("demo", DEMO), ("random", random)):
        for granularity in GRANULARITIES:
            yield Case(f"{family}, {granularity}", models, settings={"granularity": granularity})
        yield Case(f"{family}, layer, groups and frozen tensors", models, settings=GROUPS)
    yield Case("demo, two task vectors, two bases", DEMO, {"tuned": "base", "expert": "target"})
    yield Case("random, an adapter and a task vector", random, {"adapter": None, "tuned": "base"})
    yield Case("random, dtype: float32 in place of float64", random, changes={"dtype": "float32"})
    linear: dict[str, Any] = {"models": random, "target": "base", "settings": {"granularity": "uniform"}}
    yield Case("random, target is the base", **linear)
    yield Case("the same, task_arithmetic in float32", **linear, changes={"dtype": "float32", **arithmetic(random)})
    yield Case("the same, task_arithmetic in bfloat16", **linear, changes={"dtype": "bfloat16", **arithmetic(random)})


def arithmetic(models: Path) -> dict[str, Any]:
    """The method that mergekit has for task vectors of the target itself; its weight is filled in later."""
    return {"merge_method": "task_arithmetic", "models": [{"model": str(models / "tuned"), "parameters": {}}]}


def adapter(folder: Path) -> None:
    """A random LoRA adapter of rank 4."""
    folder.mkdir()
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(SHAPE.layers):
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{module}.lora_A.weight"] = random.normal(0, 0.1, (4, SHAPE.inner)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = random.normal(0, 0.1, (SHAPE.hidden, 4)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run_mergekit(mergekit: Path, config: Path, output: Path) -> Checkpoint:
    """The model that mergekit makes of a configuration."""
    command = [str(mergekit), str(config), str(output)]
    if "--lora-merge-cache" in config.read_text(encoding="utf-8"):
        command += ["--lora-merge-cache", str(output.parent / "lora"), "--lora-merge-dtype", "float32"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Checkpoint(resolve(str(output)))


def ordered(values: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers as their places in the order of all numbers of 16 bits: neighbours are one unit apart."""
    bits = values.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def compare(ours: Checkpoint, theirs: Checkpoint) -> tuple[float, int, float]:
    """The share of equal elements, the largest difference in units, and the same as a share of the tensor's largest."""
    assert set(ours.names) == set(theirs.names), sorted(set(ours.names) ^ set(theirs.names))
    equal = total = furthest = 0
    relative = 0.0
    for name in ours.names:
        a, b = ours.array(name), theirs.array(name)
        assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
        assert a.shape == b.shape, f"{name}: {a.shape} and {b.shape}"
        units = np.abs(ordered(a) - ordered(b))
        equal, total, furthest = equal + int((units == 0).sum()), total + units.size, max(furthest, int(units.max()))
        wide = a.astype(np.float64)
        relative = max(relative, float(np.abs(wide - b.astype(np.float64)).max() / np.abs(wide).max()))
    return equal / total, furthest, relative


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mergekit", type=Path, help="path of mergekit-yaml")
    parser.add_argument("--only", default="", help="cases whose label holds this text")
    options = parser.parse_args()
    print("| merge | weights | filters | equal elements | furthest | of the largest element |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen = [case for case in cases(folder) if options.only in case.label]
        for n, case in enumerate(chosen):
            here = folder / str(n)
            here.mkdir()
            case.write(here / "recipe.yaml")
            apply_recipe(here / "recipe.yaml", output=here / "ours")
            config = export_recipe(here / "recipe.yaml", tool="mergekit", output=here / "export")
            assert config.name == MERGEKIT_FILE
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
            weights = yaml.safe_load((here / "recipe.yaml").read_text())["weights"]
            conditions = [model["parameters"]["weight"] for model in content["models"]]
            if case.changes:
                content |= case.changes
                if content["merge_method"] == "task_arithmetic":
                    content["models"][0]["parameters"]["weight"] = weights["uniform"]
                config.write_text(yaml.safe_dump(content))
            theirs = run_mergekit(options.mergekit, config, here / "theirs")
            share, furthest, relative = compare(Checkpoint(resolve(str(here / "ours"))), theirs)
            n_filters = sum(len(each) for each in conditions if isinstance(each, list))
            print(
                f"| {case.label} | {len(weights)} | {n_filters} | {share:.4%} | {furthest} ulp | {relative:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
