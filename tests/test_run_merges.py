"""Whole runs over what can be merged and how: several models, adapters, dtypes, vocabularies, groups, storages."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHARACTERS, TASKS, Trio, save_mistral, save_tokenizer, saved_lines
from safetensors.torch import load_file
from test_lora import save_adapter
from test_run import best, trials
from transformers import AutoModelForCausalLM

from tvmerge.checkpoint import Checkpoint
from tvmerge.cli import main
from tvmerge.evaluators import mean_score
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel
from tvmerge.sources import MergeSettings, open_sources
from tvmerge.state_dict import Array, StateDict, WithTensors

N_TRIALS = 8


@pytest.fixture(scope="module")
def trio(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A target that most merges score higher than, so that the best trial is not the target itself."""
    folder = tmp_path_factory.mktemp("poor") / "target"
    return Trio(target=save_mistral(folder, seed=37, drift_from=trio.base), base=trio.base, tuned=trio.tuned)


def flags(target: Path, base: Path | None, tuned: Sequence[object], output: Path, *more: str) -> list[str]:
    return [
        *("jglue", "--target_model", str(target), "--tuned_model", *map(str, tuned)),
        *(() if base is None else ("--base_model", str(base))),
        *("--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS), "--jglue_limit", "12,6"),
        *("--n_trials", str(N_TRIALS), "--output_dir", str(output), *more),
    ]


#: What is in best/ and is not part of the model.
ABOUT = {"README.md", "weights.png"}


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(output / "best" / "model.safetensors")
    return tensors


def recipe_of(output: Path) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = yaml.safe_load((output / "best" / "recipe.yaml").read_text())
    return content


def assert_its_recipe_rebuilds_it(output: Path) -> None:
    rebuilt = output.with_name(output.name + " rebuilt")
    assert main(["apply", str(output / "best" / "recipe.yaml"), "--output_dir", str(rebuilt)]) == 0
    found = {path.name: path.read_bytes() for path in rebuilt.iterdir()}
    assert found == {name: content for name, content in best(output).items() if name not in ABOUT}


def assert_it_scores_what_the_study_says(output: Path) -> None:
    """Score best/ as it loads from its folder, on the questions of the search."""
    recipe = recipe_of(output)
    mine = saved_lines(output)
    tasks = ("tiny_choice", "tiny_extract")
    questions = {task: [line["question"] for line in mine if line["task"] == task] for task in tasks}
    evaluator = LmEvalEvaluator(tasks=load_tasks(tasks, task_dir=TASKS), questions=questions)
    checkpoint = Checkpoint(resolve(str(output / "best")))
    live = TransformersModel.from_folder(output / "best", checkpoint=checkpoint, device="cpu")
    scores = evaluator.score(HarnessModel(live, batch_size=16), lambda _: None).scores
    assert [score.score for score in scores] == [line["score"] for line in mine]
    assert mean_score(scores) == recipe["score"]["search"]


def test_several_tuned_models_however_they_are_named(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_mistral(tmp_path / "other", seed=7, drift_from=trio.base)
    one = flags(trio.target, trio.base, [trio.tuned, other], tmp_path / "one")
    assert main(one) == 0
    heads = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| task "))
    assert [cell.strip() for cell in heads.split("|")[3:6]] == ["target", "tuned", "other"]
    groups = ("embed_tokens", "layers.0", "layers.1", "lm_head", "norm")
    names = [f"{label}/{group}" for label in ("tuned", "other") for group in groups]
    assert all(sorted(params) == sorted(names) for number, params, _, _ in trials(tmp_path / "one") if params)
    assert sorted(recipe_of(tmp_path / "one")["weights"]) == sorted(names)
    assert_its_recipe_rebuilds_it(tmp_path / "one")
    assert_it_scores_what_the_study_says(tmp_path / "one")

    repeated = flags(trio.target, trio.base, [trio.tuned], tmp_path / "two", "--tuned_model", f"{other}:{trio.base}")
    assert main(repeated) == 0
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["tuned_model"] == [str(trio.tuned), str(other)]
    (tmp_path / "three.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / "three")}))
    assert main(["jglue", "--config", str(tmp_path / "three.yaml")]) == 0
    for name in ("two", "three"):
        assert trials(tmp_path / name) == trials(tmp_path / "one")
        assert best(tmp_path / name) == best(tmp_path / "one")
    # The same command in another spelling resumes it.
    capsys.readouterr()
    assert main([*one[: one.index("--tuned_model")], *repeated[3:], "--output_dir", str(tmp_path / "one")]) == 0
    assert f"{N_TRIALS} of {N_TRIALS} trials done" in capsys.readouterr().err


def test_other_tuned_models_are_another_study(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_mistral(tmp_path / "other", seed=7, drift_from=trio.base)
    assert main(flags(trio.target, trio.base, [trio.tuned, other], tmp_path / "out", "--n_trials", "2")) == 0
    capsys.readouterr()
    assert main(flags(trio.target, trio.base, [trio.tuned], tmp_path / "out", "--n_trials", "2")) == 2
    assert "tuned_model was ['tuned: weights " in capsys.readouterr().err


def test_a_tuned_model_at_another_place_is_the_same(trio: Trio, tmp_path: Path) -> None:
    moved = shutil.copytree(trio.tuned, tmp_path / "moved")
    assert main(flags(trio.target, trio.base, [trio.tuned], tmp_path / "out", "--n_trials", "2")) == 0
    before = trials(tmp_path / "out")
    assert main(flags(trio.target, trio.base, [moved], tmp_path / "out", "--n_trials", "3")) == 0
    assert trials(tmp_path / "out")[:2] == before


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_with_and_without_its_base(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    settings: dict[str, Any] = {"modules_to_save": ["lm_head"]} if whole else {}
    adapter = save_adapter(trio.base, tmp_path / "adapter", **settings)
    groups = ["layers.0", "layers.1", *(["lm_head"] if whole else [])]
    capsys.readouterr()
    assert main(flags(trio.target, trio.base, [adapter], tmp_path / "based")) == 0
    assert "| tuned |" in re.sub(" +", " ", capsys.readouterr().out)
    assert sorted(recipe_of(tmp_path / "based")["weights"]) == groups
    if whole:
        assert main(flags(trio.target, None, [adapter], tmp_path / "alone")) == 2
        assert "holds lm_head.weight whole: name the base model" in capsys.readouterr().err
        assert not (tmp_path / "alone").exists()
    else:
        assert main(flags(trio.target, None, [adapter], tmp_path / "alone")) == 0
        assert "| tuned |" not in re.sub(" +", " ", capsys.readouterr().out), "without a base there is no tuned model"
        assert trials(tmp_path / "alone") == trials(tmp_path / "based")
        assert weights_of(tmp_path / "alone").keys() == weights_of(tmp_path / "based").keys()
        assert best(tmp_path / "alone")["model.safetensors"] == best(tmp_path / "based")["model.safetensors"]
        assert_its_recipe_rebuilds_it(tmp_path / "alone")
    assert_its_recipe_rebuilds_it(tmp_path / "based")
    assert_it_scores_what_the_study_says(tmp_path / "based")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_saved_scored_and_loaded(trio: Trio, tmp_path: Path, dtype: str) -> None:
    assert main(flags(trio.target, trio.base, [trio.tuned], tmp_path / "out", "--dtype", dtype)) == 0
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {expected}
    config = json.loads((tmp_path / "out" / "best" / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    saved = weights_of(tmp_path / "out")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert_it_scores_what_the_study_says(tmp_path / "out")
    assert_its_recipe_rebuilds_it(tmp_path / "out")


def test_where_differences_are_kept_changes_no_bit(trio: Trio, tmp_path: Path) -> None:
    for storage in ("mmap", "memory"):
        given = flags(trio.target, trio.base, [trio.tuned], tmp_path / storage, "--delta_storage", storage)
        assert main(given) == 0
    turned = flags(trio.target, trio.base, [trio.tuned], tmp_path / "turned")
    assert main([*turned, "--delta_storage", "memory", "--n_trials", "4"]) == 0
    assert main([*turned, "--delta_storage", "mmap"]) == 0
    for name in ("memory", "turned"):
        assert trials(tmp_path / name) == trials(tmp_path / "mmap")
        assert best(tmp_path / name) == best(tmp_path / "mmap")


def test_other_vocabularies_end_to_end(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = save_mistral(tmp_path / "wide", seed=3, vocab_size=len(CHARACTERS) + 5)
    save_tokenizer(wide, CHARACTERS[::-1] + "終")
    given = flags(wide, trio.base, [trio.tuned], tmp_path / "out")
    assert main(given) == 2
    assert "--vocabulary intersect" in capsys.readouterr().err
    assert main([*given, "--vocabulary", "intersect", "--weight_min", "0.5"]) == 0
    assert_its_recipe_rebuilds_it(tmp_path / "out")
    assert_it_scores_what_the_study_says(tmp_path / "out")
    w = np.float32(recipe_of(tmp_path / "out")["weights"]["lm_head"])
    assert w != 0, "the best trial is not that of w = 0"
    target, base, tuned, merged = (
        load_file(folder / "model.safetensors")["lm_head.weight"]
        for folder in (wide, trio.base, trio.tuned, tmp_path / "out" / "best")
    )
    characters = CHARACTERS[::-1] + "終"
    for row in range(len(target)):
        token = characters[row - 3] if 3 <= row < len(characters) + 3 else None
        theirs = row if row < 3 else 3 + CHARACTERS.index(token) if token and token in CHARACTERS else None
        moved = 0.0 if theirs is None else float(w) * (tuned[theirs].double() - base[theirs].double())
        assert torch.equal(merged[row], (target[row].double() + moved).bfloat16()), row


@pytest.mark.parametrize(
    ("more", "weights", "frozen"),
    [
        (
            ["--weight_groups", "attention=self_attn", "mlp=mlp"],
            "embed_tokens,layers.0,layers.0.attention,layers.0.mlp,layers.1,layers.1.attention,layers.1.mlp,lm_head,norm",
            "^$",
        ),
        (["--freeze", "norm", "embed"], "layers.0,layers.1,lm_head", "norm|embed"),
        (["--optimize_mode", "block:1"], "embed_tokens,layers.0,layers.1,lm_head,norm", "^$"),
        (["--optimize_mode", "block:2", "--freeze", "lm_head"], "embed_tokens,layers.0-1,norm", "lm_head"),
        (["--optimize_mode", "uniform"], "uniform", "^$"),
        (
            ["--optimize_mode", "uniform", "--weight_groups", "attention=self_attn", "--freeze", "k_proj"],
            "attention,uniform",
            "k_proj",
        ),
    ],
)
def test_groups_and_frozen_tensors_end_to_end(
    trio: Trio, tmp_path: Path, more: list[str], weights: str, frozen: str
) -> None:
    output = tmp_path / "out"
    assert main(flags(trio.target, trio.base, [trio.tuned], output, *more, "--weight_min", "0.5")) == 0
    recipe = recipe_of(output)
    assert sorted(recipe["weights"]) == weights.split(",")
    assert all(sorted(params) == weights.split(",") for _, params, _, _ in trials(output) if params)
    target, base, tuned = (load_file(f / "model.safetensors") for f in (trio.target, trio.base, trio.tuned))
    merged = weights_of(output)
    for name, tensor in target.items():
        if re.search(frozen, name):
            assert torch.equal(merged[name], tensor)
        else:
            assert not torch.equal(merged[name], tensor), "the best trial is not that of w = 0"
    if "uniform" in weights.split(","):
        w = float(np.float32(recipe["weights"]["uniform"]))
        name = "model.layers.1.mlp.up_proj.weight"
        expected = target[name].double() + w * (tuned[name].double() - base[name].double())
        assert torch.equal(merged[name], expected.bfloat16())
    assert_its_recipe_rebuilds_it(output)
    assert_it_scores_what_the_study_says(output)


class Torn(WithTensors):
    """A state dict that cannot read one of its tensors."""

    def __init__(self, state_dict: StateDict, bad: str) -> None:
        self._state_dict = state_dict
        self._bad = bad
        self.names = state_dict.names
        self.spec = state_dict.spec
        self.version = state_dict.version

    def array(self, name: str, *, out: Array | None = None) -> Array:
        if name == self._bad:
            raise OSError(5, "Input/output error")
        return self._state_dict.array(name, out=out)


def test_after_a_thousand_loads_the_live_model_is_a_fresh_merge(trio: Trio) -> None:
    sources = open_sources(
        target=str(trio.target), tuned=[str(trio.tuned)], base=str(trio.base), vocabulary="same", cache_dir=None
    )
    merges = [
        sources.merge(MergeSettings(grouping=Grouping("layer"))),
        sources.merge(MergeSettings(grouping=Grouping("all")), keep=True),
    ]
    live = TransformersModel.from_folder(trio.target, checkpoint=sources.target, device="cpu")
    tensors = dict(live.model.state_dict())
    generator = random.Random(0)
    weights = [dict.fromkeys(merge.weight_names, 0.0) for merge in merges]

    def assert_live_is(which: int) -> None:
        fresh = sources.merge(MergeSettings(grouping=Grouping(("layer", "all")[which]))).at(weights[which])
        assert all(torch.equal(tensors[name], fresh.read(name)) for name in fresh.names)

    failures = 0
    for step in range(1000):
        which = int(step % 10 == 9)  # another merge now and then
        names = list(weights[which]) if generator.random() < 0.5 else [generator.choice(list(weights[which]))]
        weights[which] |= {name: generator.choice([0.0, 1.0, generator.uniform(-2, 2)]) for name in names}
        merged = merges[which].at(weights[which])
        if step % 7 == 3:
            other = merges[which].at({name: generator.uniform(-2, 2) for name in weights[which]})
            with pytest.raises(OSError, match="Input/output error"):
                live.load(Torn(other, generator.choice(list(merged.names))))
            failures += 1
        live.load(merged)
        if step % 20 == 0 or step > 990:
            assert_live_is(which)
    assert failures > 100
    assert_live_is(1)
    live.load(sources.target)
    assert all(torch.equal(tensors[name], sources.target.read(name)) for name in sources.target.names)
