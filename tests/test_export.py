"""Recipes for mergekit: what its configuration means, read by its own rules, is the recipe's sum of models."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Trio, save_mistral, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tvmerge.cli import main
from tvmerge.export import filters
from tvmerge.rebuild import rebuild
from tvmerge.recipe import Recipe

GROUPS = {"weight_groups": {"attention": "self_attn", "mlp": r"mlp\.(up|down)"}, "freeze": ["embed", r"1\.mlp"]}


def value_of(setting: Any, name: str) -> float:
    """A parameter of mergekit for one tensor: of a list of conditions the first whose filter is part of its name."""
    if not isinstance(setting, list):
        return float(setting)
    return next(float(each["value"]) for each in setting if each.get("filter") is None or each["filter"] in name)


def meaning(config: Mapping[str, Any], read: Callable[[Any], Mapping[str, np.ndarray[Any, Any]]]) -> dict[str, Any]:
    """What mergekit's `linear` makes of a configuration: the sum of all models times their weights, in float64."""
    assert config["merge_method"] == "linear"
    assert config["parameters"] == {"normalize": False}
    assert config["dtype"] == "float64"
    assert config.keys() <= {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}
    models = [(read(entry["model"]), entry["parameters"]["weight"]) for entry in config["models"]]
    assert len({str(entry["model"]) for entry in config["models"]}) == len(models)  # mergekit takes each name once
    return {
        name: sum(model[name].astype(np.float64) * value_of(weight, name) for model, weight in models)
        for name in read(config["base_model"])
    }


def folder_tensors(model: Any) -> Mapping[str, np.ndarray[Any, Any]]:
    """The tensors of a model as mergekit names it: text, or a mapping."""
    path = model if isinstance(model, str) else model["model"]["path"]
    assert Path(path).is_absolute()
    tensors: dict[str, np.ndarray[Any, Any]] = load_file(Path(path) / "model.safetensors")
    return tensors


def recipe_file(
    path: Path,
    target: Path,
    vectors: Mapping[str, tuple[Path, Path | None]],
    *,
    weights: Mapping[str, float] | None = None,
    **settings: Any,
) -> Path:
    """A recipe; its weights are drawn if none are given."""
    content: dict[str, Any] = {
        "target": {"model": str(target)},
        "task_vectors": [
            {"label": label, "tuned": {"model": str(tuned)}, "base": base and {"model": str(base)}}
            for label, (tuned, base) in vectors.items()
        ],
        "granularity": "layer",
        "weights": dict(weights or {}),
        **settings,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    if weights is None:
        recipe = Recipe.load(path)
        draw = random.Random(0)
        names = recipe.open_sources().merge(recipe.settings()).weight_names
        content["weights"] = {name: draw.uniform(-1, 2) for name in names}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def export(recipe: Path, output: Path, *more: str) -> dict[str, Any]:
    assert main(["apply", str(recipe), "--export", "mergekit", "--output_dir", str(output), *more]) == 0
    assert [path.name for path in output.iterdir()] == ["mergekit.yaml"]
    config: dict[str, Any] = yaml.safe_load((output / "mergekit.yaml").read_text(encoding="utf-8"))
    return config


def assert_same_sum(config: Mapping[str, Any], recipe: Path, read: Any = folder_tensors) -> None:
    """The configuration means the model that the recipe describes, both with nothing rounded."""
    loaded = dataclasses.replace(Recipe.load(recipe), dtype="float32")
    merged = rebuild(loaded, loaded.open_sources())
    found = meaning(config, read)
    assert sorted(found) == list(merged.names)
    for name, values in found.items():
        np.testing.assert_array_equal(values.astype(np.float32), merged.array(name), err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [{"granularity": g} for g in ("uniform", "layer", "block:2", "parameter", "all")]
    + [{"granularity": g, **GROUPS} for g in ("uniform", "layer", "parameter", "all")],
    ids=str,
)
def test_every_granularity_means_the_same(trio: Trio, tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = recipe_file(tmp_path / "recipe.yaml", trio.target, {"tuned": (trio.tuned, trio.base)}, **settings)
    config = export(recipe, tmp_path / "out")
    assert config["out_dtype"] == "bfloat16"
    assert config["base_model"] == str(trio.target)
    assert_same_sum(config, recipe)


def test_a_weight_is_said_once_for_all_tensors_that_have_it(trio: Trio, tmp_path: Path) -> None:
    vectors: dict[str, tuple[Path, Path | None]] = {"tuned": (trio.tuned, trio.base)}
    uniform = recipe_file(tmp_path / "a.yaml", trio.target, vectors, granularity="uniform", weights={"uniform": 0.5})
    models = {entry["model"]: entry["parameters"]["weight"] for entry in export(uniform, tmp_path / "a")["models"]}
    assert models == {str(trio.target): 1.0, str(trio.tuned): 0.5, str(trio.base): -0.5}
    layers = recipe_file(tmp_path / "b.yaml", trio.target, vectors)
    tuned = export(layers, tmp_path / "b")["models"][1]["parameters"]["weight"]
    # Two layers and three modules outside of them, of which the largest is what the last condition is for.
    assert len(tuned) == 5
    assert {each.get("filter") for each in tuned} & {"model.layers.0.", "model.layers.1."}


def test_models_of_several_roles_are_named_once(trio: Trio, tmp_path: Path) -> None:
    """mergekit knows a model by its name, so what it is multiplied by is added up."""
    vectors: dict[str, tuple[Path, Path | None]] = {
        "tuned": (trio.tuned, trio.base),
        "target": (trio.target, trio.base),
        "back": (trio.base, trio.tuned),
    }
    recipe = recipe_file(tmp_path / "recipe.yaml", trio.target, vectors, granularity="parameter")
    assert_same_sum(export(recipe, tmp_path / "out"), recipe)
    itself = recipe_file(tmp_path / "itself.yaml", trio.base, {"tuned": (trio.tuned, trio.base)})
    assert_same_sum(export(itself, tmp_path / "itself"), itself)


def test_what_adds_nothing_is_left_out(trio: Trio, tmp_path: Path) -> None:
    vectors: dict[str, tuple[Path, Path | None]] = {"tuned": (trio.tuned, trio.base)}
    recipe = recipe_file(tmp_path / "r.yaml", trio.target, vectors, granularity="uniform", weights={"uniform": 0.0})
    config = export(recipe, tmp_path / "out", "--dtype", "float32")
    assert config["models"] == [{"model": str(trio.target), "parameters": {"weight": 1.0}}]
    assert config["out_dtype"] == "float32"


def adapter(folder: Path, hidden: int = 16, inner: int = 24) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.1.mlp.down_proj.lora_{factor}.weight": draw.normal(size=shape).astype("f4")
        for factor, shape in {"A": (2, inner), "B": (hidden, 2)}.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_adapter(model: Any) -> Mapping[str, np.ndarray[Any, Any]]:
    """`base+adapter` as mergekit merges it: scale·B·A added to the base."""
    base, _, lora = model.partition("+")
    tensors = {name: values.astype(np.float64) for name, values in folder_tensors(base).items()}
    if lora:
        factors = load_file(Path(lora) / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{f}.weight"] for f in "AB")
        tensors["model.layers.1.mlp.down_proj.weight"] += 2 * (b.astype(np.float64) @ a)
    return tensors


@pytest.mark.parametrize("has_base", [True, False])
def test_an_adapter_is_added_to_its_base_or_to_the_target(trio: Trio, tmp_path: Path, has_base: bool) -> None:
    lora = adapter(tmp_path / "lora")
    recipe = recipe_file(tmp_path / "recipe.yaml", trio.target, {"lora": (lora, trio.base if has_base else None)})
    config = export(recipe, tmp_path / "out")
    assert f"{trio.base if has_base else trio.target}+{lora}" in [entry["model"] for entry in config["models"]]
    assert "--lora-merge-cache" in (tmp_path / "out" / "mergekit.yaml").read_text(encoding="utf-8")
    loaded = dataclasses.replace(Recipe.load(recipe), dtype="float32")
    merged = rebuild(loaded, loaded.open_sources())
    for name, values in meaning(config, with_adapter).items():
        np.testing.assert_allclose(values, merged.array(name), rtol=1e-6, atol=1e-6)


def test_paths_that_mean_something_to_mergekit_are_given_as_mappings(tmp_path: Path) -> None:
    base = save_mistral(tmp_path / "a@b+c 'd'", seed=0)
    tuned = save_mistral(tmp_path / "tuned", seed=1, drift_from=base)
    recipe = recipe_file(tmp_path / "recipe.yaml", base, {"tuned": (tuned, base)})
    config = export(recipe, tmp_path / "out")
    assert config["base_model"] == {"model": {"path": str(base)}}
    assert_same_sum(config, recipe)


def refusal(recipe: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["apply", str(recipe), "--export", "mergekit", "--output_dir", str(output), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert not output.exists()
    return err


def test_what_mergekit_cannot_express_is_refused(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors: dict[str, tuple[Path, Path | None]] = {"tuned": (trio.tuned, trio.base)}
    mixture = {"further_targets": [{"model": str(trio.base)}], "gate_mode": "random", "gate_seed": 0, "router": ""}
    moe = recipe_file(tmp_path / "moe.yaml", trio.target, vectors, weights={"expert1/layers.0": 1.0}, mixture=mixture)
    assert "mixture of experts" in refusal(moe, tmp_path / "out", capsys)

    other = save_mistral(tmp_path / "other", seed=3, vocab_size=20)
    save_tokenizer(other, characters="jihgfedcba 東京タワー")
    of_other = save_mistral(tmp_path / "of_other", seed=4, drift_from=other, vocab_size=20)
    save_tokenizer(of_other, characters="jihgfedcba 東京タワー")
    intersect = recipe_file(tmp_path / "i.yaml", trio.target, {"t": (of_other, other)}, vocabulary="intersect")
    assert "vocabularies differ" in refusal(intersect, tmp_path / "out", capsys)
    same = recipe_file(tmp_path / "same.yaml", trio.target, vectors, vocabulary="intersect")
    assert_same_sum(export(same, tmp_path / "same"), same)  # nothing is aligned

    mixed = save_mistral(tmp_path / "mixed", seed=5)
    tensors = load_file(mixed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_file(tmp_path / "mixed.yaml", mixed, vectors)
    assert "give --dtype" in refusal(recipe, tmp_path / "out", capsys)
    assert_same_sum(export(recipe, tmp_path / "one", "--dtype", "bfloat16"), recipe)

    tensors["model.norm.count"] = np.zeros(3, np.int64)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    own = recipe_file(tmp_path / "own.yaml", mixed, {"t": (mixed, mixed)}, dtype="float32")
    assert "model.norm.count holds no floating-point numbers" in refusal(own, tmp_path / "out", capsys)

    wide = save_mistral(tmp_path / "wide", seed=6, vocab_size=40)
    lora = recipe_file(tmp_path / "l.yaml", trio.target, {"lora": (adapter(tmp_path / "lora"), wide)})
    assert "is not of the target's shape" in refusal(lora, tmp_path / "out", capsys)
    assert "leave one out" in refusal(same, tmp_path / "out", capsys, "--save_experts")
    full = tmp_path / "one"
    assert main(["apply", str(same), "--export", "mergekit", "--output_dir", str(full)]) == 2
    assert "is not empty" in capsys.readouterr().err


WORDS = st.sampled_from(["a", "b", "ab", "0", "1", "10", "model", "layers", "norm", "weight"])


@given(st.dictionaries(st.lists(WORDS, min_size=1, max_size=5).map(".".join), st.integers(0, 3), min_size=1))
def test_filters_give_each_tensor_its_number(values: dict[str, int]) -> None:
    found = filters({name: float(value) for name, value in values.items()})
    assert {name: value_of(found, name) for name in values} == values
