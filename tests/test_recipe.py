"""Recipes: the same bytes again, and one line for what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Trio
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvmerge.cli import main
from tvmerge.errors import ConfigError, RecipeError, RunError, TvmergeError
from tvmerge.rebuild import apply_recipe
from tvmerge.recipe import Recipe


def content(trio: Trio, **changes: Any) -> dict[str, Any]:
    weights = {"embed_tokens": 0.1, "layers.0": 0.7, "layers.1": 1.3, "lm_head": 0, "norm": 2.0}
    recipe = {
        "tvmerge": "0.1.0",
        **{role: {"model": str(getattr(trio, role)), "revision": None} for role in ("target", "base", "tuned")},
        "granularity": "layer",
        "weights": weights,
    }
    return {key: value for key, value in {**recipe, **changes}.items() if value != "drop"}


def written(path: Path, value: Any) -> Path:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


def test_a_recipe_rebuilds_the_same_bytes_and_a_model_that_loads(trio: Trio, tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", content(trio))
    apply_recipe(recipe, output=tmp_path / "one")
    apply_recipe(tmp_path / "one" / "recipe.yaml", output=tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / d).iterdir()} for d in ("one", "two"))
    assert one == two
    assert one.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "a staging folder was left"
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert AutoTokenizer.from_pretrained(tmp_path / "one").decode([3, 4, 5]) == "abc"


def test_saving_and_loading_keeps_every_digit(trio: Trio, tmp_path: Path) -> None:
    weights = {"embed_tokens": 1 / 3, "layers.0": 1e-17, "layers.1": 0.1 + 0.2, "lm_head": -1.0, "norm": 5e-324}
    recipe = Recipe.load(written(tmp_path / "a.yaml", content(trio, weights=weights)))
    recipe.save(tmp_path / "b.yaml")
    assert Recipe.load(tmp_path / "b.yaml").weights == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "drop"}, "missing keys: weights"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"granularity": "layers"}, "unknown granularity 'layers', known are uniform, block:k, all, layer, parameter"),
        ({"method": "ties"}, "unknown method 'ties', known are task_arithmetic"),
        ({"weights": [1]}, "weights must map"),
        ({"weights": {"layers.0": "1e3"}}, "the weight of layers.0 is 1e3, not a number that float32 can hold"),
        ({"weights": {"layers.0": float("nan")}}, "the weight of layers.0 is nan"),
        ({"weights": {"layers.0": 10**400}}, "the weight of layers.0 is 1000.*, not a number that float32 can hold"),
        ({"weights": {"layers.0": 1e39}}, "not a number that float32 can hold"),
        ({"score": 5}, "score must be a mapping"),
        ({"weights": {"layers.0": True}}, "the weight of layers.0 is True"),
        ({"weights": {"layers.0": 1.0}}, "4 names differ, the first is embed_tokens"),
        ({"target": "x"}, "target must hold a model"),
        ({"base": {"model": "no/such/model"}}, "the base model was the local folder no/such/model, which is not here"),
        ({"base": {"model": "models/ja"}}, "the base model was the local folder models/ja"),
        ({"base": {"model": "m", "revision": 1}}, "base must hold text only"),
        ({"granularity": ["layer"]}, "granularity must be text"),
        ({"granularity": "block"}, "unknown granularity"),
        ({"granularity": "block:x"}, "k of block:k is a number"),
        ({"dtype": "int8"}, "unknown dtype 'int8', known are float32, float16, bfloat16"),
        ({"vocabulary": "union"}, "unknown vocabulary 'union'"),
        ({"freeze": ["("]}, "no regular expression"),
        ({"freeze": ["nowhere"]}, "'nowhere' is found in no tensor name"),
        ({"weight_groups": ["a"]}, "weight_groups map names"),
        ({"task_vectors": []}, "unknown keys: base, tuned"),
        ({"weights": {1: 1.0}}, "1 is no name of a weight"),
        ({"omit": "lm_head.weight"}, "omit must be a list"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(
    trio: Trio, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = written(tmp_path / "recipe.yaml", content(trio, **changes))
    with pytest.raises(TvmergeError, match=message) as caught:
        apply_recipe(recipe, output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not readable as YAML"), ("- a", "not a recipe"), ("!!python/object/apply:os.getcwd []", "not readable")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        apply_recipe(tmp_path / "recipe.yaml", output=tmp_path / "out")
    with pytest.raises(RecipeError, match="no such recipe"):
        apply_recipe(tmp_path / "none.yaml", output=tmp_path / "out")


def test_other_weights_than_the_recipe_was_made_of_are_refused(trio: Trio, tmp_path: Path) -> None:
    changed = {"model": str(trio.tuned), "revision": None, "fingerprint": "0" * 16}
    recipe = written(tmp_path / "recipe.yaml", content(trio, tuned=changed))
    with pytest.raises(RecipeError, match="are not those of the recipe's tuned model"):
        apply_recipe(recipe, output=tmp_path / "out")


def test_staging_folders_of_others_are_left_alone(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / ".out.backup.tmp").mkdir()
    (tmp_path / ".out.backup.tmp" / "thesis.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    apply_recipe(written(tmp_path / "recipe.yaml", content(trio)), output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / ".out.backup.tmp" / "thesis.txt").read_text() == "mine"


def test_the_current_folder_can_be_the_output(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = written(tmp_path / "recipe.yaml", content(trio))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    apply_recipe(recipe, output=Path("."))
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_a_folder_with_something_in_it_is_not_overwritten(trio: Trio, tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", content(trio))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        apply_recipe(recipe, output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failure_while_writing_leaves_nothing(trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvmerge.rebuild.copy_model_files", full_disk)
    recipe = written(tmp_path / "recipe.yaml", content(trio))
    with pytest.raises(RunError, match="cannot be written, nothing was kept: No space"):
        apply_recipe(recipe, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_gives_a_model_of_another_dtype(trio: Trio, tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", content(trio))
    assert main(["apply", str(recipe), "--output_dir", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    apply_recipe(recipe, output=tmp_path / "same")
    wide, same = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("wide", "same"))
    assert (wide.dtype, same.dtype) == (torch.float32, torch.bfloat16)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor.bfloat16(), same.state_dict()[name])
    apply_recipe(tmp_path / "wide" / "recipe.yaml", output=tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("wide", "again")]
    assert files[0] == files[1]
