"""Whole runs whose model is a mixture: searched, killed and resumed, proven, saved, and rebuilt byte for byte."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHARACTERS, ROOT, TASKS, Trio, save_mistral, save_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import assert_refused
from test_moe import save
from test_run import best, trials
from test_run_merges import ABOUT, assert_it_scores_what_the_study_says
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvmerge.checkpoint import Checkpoint
from tvmerge.cli import main
from tvmerge.evaluators import QuestionScore, mean_score
from tvmerge.hub import resolve
from tvmerge.merge import MergedStateDict
from tvmerge.models.transformers import TransformersModel
from tvmerge.state_dict import Array, StateDict

N_TRIALS = 9


@pytest.fixture(scope="module")
def targets(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("targets")
    return [save_mistral(root / f"t{seed}", seed=seed, drift_from=trio.base) for seed in (37, 5, 6)]


def flags(trio: Trio, targets: list[Path], output: Path, *more: str) -> list[str]:
    return [
        *("jglue", "--target_model", *map(str, targets), "--base_model", str(trio.base)),
        *("--tuned_model", str(trio.tuned), "--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS)),
        *("--jglue_limit", "12,6", "--n_trials", str(N_TRIALS), "--output_dir", str(output), *more),
    ]


@pytest.fixture(scope="module")
def finished(trio: Trio, targets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    assert main(flags(trio, targets[:2], output, "--save_experts", "--search_gate")) == 0
    return output


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_mixture_that_loads_and_scores_as_the_study_says(finished: Path) -> None:
    recipe = yaml.safe_load((finished / "best" / "recipe.yaml").read_text())
    groups = ("embed_tokens", "layers.0", "layers.1", "lm_head", "norm")
    names = {f"expert1/{group}" for group in groups} | {"expert2/layers.0", "expert2/layers.1"}
    assert set(recipe["weights"]) == names | {"gate/layers.0", "gate/layers.1"}
    assert all(0.25 <= recipe["weights"][f"gate/layers.{n}"] <= 4 for n in range(2))
    assert_it_scores_what_the_study_says(finished)
    model = AutoModelForCausalLM.from_pretrained(finished / "best", dtype="auto")
    assert (type(model).__name__, model.dtype, model.config.num_local_experts) == (
        "MixtralForCausalLM",
        torch.bfloat16,
        2,
    )
    ids = AutoTokenizer.from_pretrained(finished / "best")("東京", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    for n in (1, 2):
        expert = AutoModelForCausalLM.from_pretrained(finished / "best" / "experts" / f"expert{n}", dtype="auto")
        assert type(expert).__name__ == "MistralForCausalLM"
    # No trial left a model behind.
    left = {path.name for path in finished.iterdir() if not path.name.startswith(".") and path.suffix != ".png"}
    assert left == {"best", "config.yaml", "report.html", "router.npy", "scores.jsonl", "study.db"}
    card = (finished / "best" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "moe", "tvmerge"]
    assert "Each of the 2 experts is" in card


def test_the_mixture_is_made_of_the_experts_that_are_saved_beside_it(finished: Path) -> None:
    whole = load_file(finished / "best" / "model.safetensors")
    experts = [load_file(finished / "best" / "experts" / f"expert{n}" / "model.safetensors") for n in (1, 2)]
    router = np.load(finished / "best" / "router.npy")
    weights = yaml.safe_load((finished / "best" / "recipe.yaml").read_text())["weights"]
    for name, tensor in whole.items():
        layer = name.split(".")[2] if "layers" in name else ""
        if name.endswith("gate.weight"):
            expected = torch.from_numpy(router[int(layer)].astype(np.float64) / weights[f"gate/layers.{layer}"])
            assert torch.equal(tensor, expected.float().bfloat16()), name
        elif "experts" in name:
            inside = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[name.split(".")[-2]]
            own = experts[int(name.split(".")[5])][f"model.layers.{layer}.mlp.{inside}.weight"]
            assert torch.equal(tensor, own), name
        else:
            assert torch.equal(tensor, experts[0][name]), name


def test_the_recipe_rebuilds_the_mixture_and_its_experts(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "best" / "recipe.yaml"
    expected = {name: content for name, content in tree(finished / "best").items() if name not in ABOUT}
    assert main(["apply", str(recipe), "--output_dir", str(tmp_path / "all"), "--save_experts"]) == 0
    assert tree(tmp_path / "all") == expected
    # A router that was drawn is drawn again where its file is missing.
    shutil.copy(recipe, tmp_path / "recipe.yaml")
    assert main(["apply", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "whole")]) == 0
    assert tree(tmp_path / "whole") == {name: c for name, c in expected.items() if not name.startswith("experts/")}
    for n in (1, 2):
        own = finished / "best" / "experts" / f"expert{n}"
        assert main(["apply", str(own / "recipe.yaml"), "--output_dir", str(tmp_path / f"e{n}")]) == 0
        assert tree(tmp_path / f"e{n}") == tree(own)
    assert main(["apply", str(recipe), "--output_dir", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"further_targets": []}, "further_targets must list the 1 to 7 other experts"),
        ({"gate_mode": "best"}, "unknown gate_mode 'best'"),
        ({"base": ["first"]}, "unknown base ['first']"),
        ({"share_weights": "yes"}, "unknown share_weights 'yes'"),
        ({"experts_per_token": 3}, "experts_per_token is 3, of 2 experts"),
        ({"experts_per_token": True}, "experts_per_token must be a whole number"),
        ({"gate_seed": 1}, "router.npy: holds another router than that of the recipe"),
        ({"router": 7}, "router must be text"),
        ({"gate_mode": "hidden"}, "router.npy: no such file, which holds the router"),
        ({"search_gate": False}, "2 names differ, the first is gate/layers.0"),
        ({"share_weights": True}, "names differ, the first is embed_tokens"),
        ({"speed": 1}, "unknown keys of mixture: speed"),
        ({"router": None}, "router must be text"),
        (None, "mixture must map keys to values"),
    ],
)
def test_a_recipe_of_a_mixture_that_cannot_be_is_refused(
    changes: dict[str, Any] | None,
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = yaml.safe_load((finished / "best" / "recipe.yaml").read_text())
    content["mixture"] = [1] if changes is None else {**content["mixture"], **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    capsys.readouterr()
    command = ["apply", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    assert_refused(command, message, tmp_path / "out", capsys)


def test_a_temperature_that_cannot_be_and_a_damaged_router_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((finished / "best" / "recipe.yaml").read_text())
    content["weights"]["gate/layers.1"] = 0.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ["apply", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert_refused(command, "gate/layers.1 is a temperature, which must be at least 0.001", tmp_path / "out", capsys)
    good = (finished / "best" / "router.npy").read_bytes()
    for damaged, message in ((good[:20], "cannot be read"), (good[:-4] + b"\0\0\0\1", "holds another router")):
        (tmp_path / "router.npy").write_bytes(damaged)
        assert_refused(command, f"router.npy: {message}", tmp_path / "out", capsys)


def test_every_setting_of_a_mixture_runs_and_is_rebuilt(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    own = [
        {"positive_prompts": ["東京", "ab"]},
        {"positive_prompts": ["cd"], "negative_prompts": ["j"]},
        {"positive_prompts": ["タ"]},
    ]
    prompts.write_text(yaml.safe_dump({"experts": own}, allow_unicode=True), encoding="utf-8")
    gated = ("--gate_prompts", str(prompts))
    for name, more in {
        "average": ("--moe_base", "average", "--gate_mode", "hidden", *gated, "--optimize_mode", "uniform"),
        "shared": ("--share_weights", "--gate_mode", "cheap_embed", *gated, "--experts_per_token", "1"),
        "uniform": ("--gate_mode", "uniform", "--experts_per_token", "3", "--optimize_mode", "parameter"),
        "wide": ("--dtype", "float32", "--delta_storage", "memory", "--optuna_sampler", "CMA-ES", "--search_gate"),
    }.items():
        output = tmp_path / name
        assert main(flags(trio, targets, output, "--n_trials", "5", *more)) == 0
        assert_it_scores_what_the_study_says(output)
        rebuilt = tmp_path / f"{name} rebuilt"
        assert main(["apply", str(output / "best" / "recipe.yaml"), "--output_dir", str(rebuilt)]) == 0
        of_best = {file: content for file, content in best(rebuilt.parent / name).items() if file not in ABOUT}
        assert of_best == {path.name: path.read_bytes() for path in rebuilt.iterdir()}
    names = {name: set(trials(tmp_path / name)[0][1]) for name in ("average", "shared", "uniform", "wide")}
    assert names["average"] == {f"expert{n}/uniform" for n in (1, 2, 3)}
    assert names["shared"] == {"embed_tokens", "layers.0", "layers.1", "lm_head", "norm"}
    assert "expert3/down_proj" in names["uniform"]
    assert "expert3/q_proj" not in names["uniform"]
    assert "gate/layers.1" in names["wide"]


def test_the_table_compares_mixtures_with_the_best_expert_and_the_targets(
    finished: Path, trio: Trio, targets: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(trio, targets[:2], finished, "--save_experts", "--search_gate")) == 0
    said = capsys.readouterr().out
    heads = [cell.strip() for cell in said.splitlines()[1].split("|")[3:-1]]
    lines = lines_of(finished)
    assert heads[:5] == ["target 1", "target 2", "tuned", "MoE at 0", "MoE at 1"]
    assert heads[-1] == "recommended"
    expert = next(head for head in heads if head.startswith("best expert"))
    assert expert in ("best expert (1)", "best expert (2)")

    def mean(model: str, trial: int | None, split: str) -> float:
        found = [x for x in lines if (x["model"], x["trial"], x["split"]) == (model, trial, split)]
        assert found
        score = mean_score([QuestionScore(x["task"], x["question"], x["score"]) for x in found])
        assert score is not None
        return score

    # The best expert was chosen by the questions of the search, and is proven on the others.
    tried = {(x["model"], x["trial"]) for x in lines if x["model"].startswith("expert")}
    assert {model for model, _ in tried} == {"expert1", "expert2"}
    assert {trial for _, trial in tried} == {None}
    chosen = f"expert{expert[-2]}"
    searched = {key: mean(*key, "search") for key in tried}
    assert searched[chosen, None] == max(searched.values())
    row = next(line for line in said.splitlines() if "**mean**" in line)
    shown = dict(zip(heads, [cell.strip() for cell in row.split("|")[3:-1]], strict=True))
    for head, model in (("target 1", "target/1"), ("target 2", "target/2"), ("tuned", "tuned")):
        assert shown[head] == f"{mean(model, None, 'heldout'):.3f}"
    assert shown["recommended"] == f"{mean('recommended', None, 'heldout'):.3f}"
    assert shown[expert] == f"{mean(chosen, None, 'heldout'):.3f}"
    assert "recommended is " in said
    assert "The saved mixture is recommended, of " in said


def test_targets_in_a_mixture_score_as_they_do_alone(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    """In float32: the column of a target is what a dense run says of it, question by question."""
    dense = flags(trio, targets[:1], tmp_path / "dense", "--n_trials", "2", "--dtype", "float32")
    assert main(dense) == 0
    assert main(flags(trio, targets[:2], tmp_path / "out", "--n_trials", "2", "--dtype", "float32")) == 0
    scores = [
        {(x["task"], x["question"]): x["score"] for x in lines_of(tmp_path / folder) if wanted.items() <= x.items()}
        for folder, wanted in (
            ("dense", {"model": "merge", "trial": 0, "split": "heldout"}),
            ("out", {"model": "target/1", "split": "heldout"}),
        )
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) > 4


def test_stopped_and_gone_on_with_a_run_ends_like_one_that_is_not(
    trio: Trio, targets: list[Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(yaml.safe_dump({"experts": [{"positive_prompts": ["東京"]}, {"positive_prompts": ["ab"]}]}))
    more = ("--gate_mode", "hidden", "--gate_prompts", str(prompts), "--search_gate", "--moe_base", "average")
    assert main(flags(trio, targets[:2], tmp_path / "straight", *more)) == 0
    command = flags(trio, targets[:2], tmp_path / "stopped", *more)
    for n_trials in ("2", "4", "7"):
        assert main([*command, "--n_trials", n_trials]) == 0
    arguments = [sys.executable, "-m", "tvmerge", *command]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if b"trial 8/" in line)
        process.kill()
    assert main(command) == 0
    assert trials(tmp_path / "stopped") == trials(tmp_path / "straight")
    assert best(tmp_path / "stopped") == best(tmp_path / "straight")


def test_the_router_is_that_of_the_study_or_the_run_is_refused(
    trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(yaml.safe_dump({"experts": [{"positive_prompts": ["東京"]}, {"positive_prompts": ["ab"]}]}))
    output = tmp_path / "out"
    more = ("--gate_mode", "hidden", "--gate_prompts", str(prompts), "--n_trials", "2")
    assert main(flags(trio, targets[:2], output, *more)) == 0
    router = (output / "router.npy").read_bytes()
    capsys.readouterr()
    for content in (None, b"junk", router[:-4] + b"\0\0\0\1"):
        (output / "router.npy").unlink()
        if content is not None:
            (output / "router.npy").write_bytes(content)
        assert main([*flags(trio, targets[:2], output, *more), "--n_trials", "3"]) == 2
        error = capsys.readouterr().err
        assert "router.npy" in error
        assert error.rstrip().endswith("restore it, or begin anew")
        (output / "router.npy").write_bytes(router)
    prompts.write_text(yaml.safe_dump({"experts": [{"positive_prompts": ["京"]}, {"positive_prompts": ["ab"]}]}))
    assert main([*flags(trio, targets[:2], output, *more), "--n_trials", "3"]) == 2
    assert "holds a study of another configuration: gate_prompts was" in capsys.readouterr().err


class Faults:
    """Reads of merged tensors fail in some trials."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, own: MergedStateDict, name: str, *, out: Array | None = None) -> Array:
        if self.left and "layers.1.mlp" in name:
            self.left -= 1
            raise RuntimeError("a tensor went missing")
        return READ(own, name, out=out)


READ = MergedStateDict.array


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    found = Faults()
    monkeypatch.setattr(MergedStateDict, "array", lambda own, name, *, out=None: found(own, name, out=out))
    return found


def test_an_assembly_that_fails_fails_its_trial_and_no_stale_model_is_scored(
    trio: Trio,
    targets: list[Path],
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scored: list[tuple[dict[str, torch.Tensor], StateDict]] = []
    failing = {3, 5}
    load = TransformersModel.load
    n_loads = [0]

    def loaded(own: TransformersModel, state_dict: StateDict) -> None:
        if n_loads[0] - 1 in failing:  # the first load builds the model
            faults.left = 1
        n_loads[0] += 1
        load(own, state_dict)
        fresh = {name: state_dict.read(name) for name in state_dict.names}
        assert not faults.left
        live = {name: value.clone() for name, value in own.model.state_dict().items()}
        scored.append((live, state_dict))
        for layer in range(2):
            for expert in range(2):
                block = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                fused = live[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
                parts = torch.cat([fresh[f"{block}.w1.weight"], fresh[f"{block}.w3.weight"]])
                assert torch.equal(fused, parts)
                down = live[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
                assert torch.equal(down, fresh[f"{block}.w2.weight"])

    monkeypatch.setattr(TransformersModel, "load", loaded)
    assert main(flags(trio, targets[:2], tmp_path / "out")) == 0
    said = capsys.readouterr().err
    for number in failing:
        assert f"trial {number}: RuntimeError: a tensor went missing" in said
    numbers = [number for number, *_ in trials(tmp_path / "out")]
    assert numbers == [number for number in range(N_TRIALS) if number not in failing]
    assert {x["trial"] for x in lines_of(tmp_path / "out") if x["model"] == "merge"} <= set(numbers)
    assert scored


def test_numbered_targets_are_the_same_run(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    assert main(flags(trio, targets[:2], tmp_path / "out", "--n_trials", "2")) == 0
    before = trials(tmp_path / "out")
    command = flags(trio, targets[:2], tmp_path / "out", "--n_trials", "2")
    where = command.index("--target_model")
    numbered = ["--target_model_2", str(targets[1]), f"--target_model_1={targets[0]}", "--target_model_3", ""]
    assert main([*command[:where], *numbered, *command[where + 3 :]]) == 0
    assert trials(tmp_path / "out") == before
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["target_model"] == [str(target) for target in targets[:2]]
    assert main(["jglue", "--config", str(tmp_path / "out" / "config.yaml")]) == 0


def test_one_model_can_be_two_experts(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    assert main(flags(trio, [targets[0], targets[0]], tmp_path / "out", "--n_trials", "8")) == 0
    assert_it_scores_what_the_study_says(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "differ in the width: hidden_size is 16 in the former and 32 in the latter"),
        ({"num_hidden_layers": 3}, "differ in the depth: num_hidden_layers is 2 in the former and 3 in the latter"),
        ({"hidden_act": "gelu"}, "differ in the activation: hidden_act is silu in the former and gelu in the latter"),
        ({"intermediate_size": 8}, "differ in the inner width of the MLP: intermediate_size is 24 in the former and 8"),
    ],
)
def test_experts_that_differ_are_named_side_by_side(
    changes: Mapping[str, Any],
    message: str,
    trio: Trio,
    targets: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_mistral(tmp_path / "other", seed=3, **changes)
    capsys.readouterr()
    assert_refused(flags(trio, [targets[0], other], tmp_path / "out"), message, tmp_path / "out", capsys)
    command = flags(trio, [targets[0], other], tmp_path / "out")
    assert main(["plan", *command[1 : command.index("--jglue_tasks")]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "n", "message"),
    [
        ((), 9, "a mixture has 2 to 8 experts, got 9"),
        (("--share_weights",), 1, "--share_weights is for a mixture of experts: name 2 to 8 models as --target_model"),
        (("--moe_base", "average"), 1, "--moe_base is for a mixture"),
        (("--vocabulary", "union"), 1, "--vocabulary union is for a mixture"),
        (("--experts_per_token", "3"), 2, "--experts_per_token must be 1 to 2 of 2 experts, got 3"),
        (("--experts_per_token", "0"), 2, "--experts_per_token must be 1 to 2 of 2 experts, got 0"),
        (("--gate_seed", "-1"), 2, "--gate_seed must be at least 0"),
        (("--gate_mode", "hidden"), 2, "--gate_mode hidden needs --gate_prompts"),
        (("--gate_prompts", "x.yaml"), 2, "--gate_prompts needs --gate_mode hidden or cheap_embed, and it is random"),
        (("--search_gate", "--experts_per_token", "1"), 2, "has the weight 1 at any temperature"),
        (("--gate_mode", "uniform", "--search_gate"), 2, "has no scores that a temperature could change"),
        (("--gate_mode", "uniform"), 3, "use --experts_per_token 3, or --gate_mode random"),
        (("--gate_mode", "best"), 2, "gate_mode"),
        (("--target_model_2", "x"), 0, "--target_model_2 without --target_model_1"),
        (("--target_model_0", "x"), 0, "--target_model_0: count from 1"),
        (("--target_model_1", "x", "--target_model_1", "y"), 0, "--target_model_1 is given twice"),
        (("--target_model_1", "x"), 1, "--target_model and --target_model_1 are two ways"),
    ],
)
def test_settings_that_make_no_mixture_are_refused(
    more: tuple[str, ...],
    n: int,
    message: str,
    trio: Trio,
    targets: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = flags(trio, [targets[0]] * n, tmp_path / "out", *more)
    if not n:
        command.remove("--target_model")
    assert_refused(command, message, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"experts": [{"positive_prompts": ["a"]}]}, "a list of the prompts of 2 experts, got 1"),
        ({"experts": [{"positive_prompts": ["a"]}, {"positive_prompts": []}]}, "expert 2: positive_prompts is empty"),
        ({"experts": [{"positive_prompts": ["a"]}, {}]}, "expert 2: the key positive_prompts is missing"),
        ({"experts": [{"positive_prompts": ["a"]}, {"positive_prompts": [" "]}]}, "must be a list of text"),
        ({"experts": [{"positive_prompts": ["a"]}, {"positive_prompts": ["b"], "source_model": "c"}]}, "is c, where"),
        ({"experts": [{"positive_prompts": ["a"]}, {"positive_prompts": ["b"], "source": "c"}]}, "unknown keys"),
        ({"experts": [{"positive_prompts": ["a"]}] * 2}, "all experts have the same prompts"),
        ({"prompts": []}, "unknown keys: prompts"),
        ([], "must be a mapping"),
        (None, "no such file"),
    ],
)
def test_prompts_that_make_no_router_are_refused(
    content: Any, message: str, trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.yaml"
    if content is not None:
        path.write_text(yaml.safe_dump(content))
    more = ("--gate_mode", "cheap_embed", "--gate_prompts", str(path))
    assert_refused(flags(trio, targets[:2], tmp_path / "out", *more), message, tmp_path / "out", capsys)


def test_a_mixture_is_planned_before_it_is_made(
    trio: Trio, targets: list[Path], capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    command = flags(trio, targets[:2], Path("none"), "--search_gate")
    merge = command[1 : command.index("--jglue_tasks")]
    assert main(["plan", *merge, "--search_gate"]) == 0
    figures = {
        cells[1].strip(): cells[2].strip()
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.split("|")) == 4
    }
    tensors = load_file(finished / "best" / "model.safetensors")
    assert figures["experts"] == "2, 2 per token, weights of their own"
    assert figures["weights to search"].startswith("9 (expert1/embed_tokens, ")
    assert figures["tensors that move"] == f"{len(tensors) - 2} of {len(tensors)}"
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert figures["disk: saved model"].startswith(f"{nbytes / 1e3:.1f} kB of")
    moved = nbytes - sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("gate.weight"))
    assert figures["bytes per trial"] == f"{3 * moved / 1e3:.1f} kB read, {moved / 1e3:.1f} kB written"
    # The mean of all reads the second target's tensors too.
    shared = moved - sum(tensor.nbytes for name, tensor in tensors.items() if "experts" in name)
    assert main(["plan", *merge, "--moe_base", "average"]) == 0
    assert f"{(3 * moved + shared) / 1e3:.1f} kB read, {moved / 1e3:.1f} kB written" in capsys.readouterr().out


def test_answers_of_a_mixture_are_judged(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    bench.mkdir()
    questions = [
        {"question_id": n, "category": "c", "turns": [f"ab{c}東京"], "reference": ["abc"]}
        for n, c in enumerate("abcdefghij")
    ]
    (bench / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    output = tmp_path / "out"
    command = [
        *("mt_bench", "--target_model", *map(str, targets[:2]), "--base_model", str(trio.base)),
        *("--tuned_model", str(trio.tuned), "--bench_dir", str(bench), "--judge_model_name", "rouge_l"),
        *("--chat_template", "none", "--max_new_token", "6", "--n_trials", "3", "--output_dir", str(output)),
    ]
    assert main(command) == 0
    names = {path.stem for path in (output / "model_answer").iterdir()}
    assert {"trial-0000", "target-1-heldout", "target-2-heldout", "tuned-heldout"} < names
    assert any(name.startswith("expert") for name in names)
    before = (output / "scores.jsonl").read_bytes(), best(output)
    assert main(command) == 0
    assert ((output / "scores.jsonl").read_bytes(), best(output)) == before
    checkpoint = Checkpoint(resolve(str(output / "best")))
    assert any("block_sparse_moe" in name for name in checkpoint.names)


@pytest.mark.parametrize("base", ["first", "average"])
def test_experts_of_other_tokenizers_are_united(
    base: str, trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_mistral(tmp_path / "other", seed=8, vocab_size=len(CHARACTERS) + 4)
    save_tokenizer(other, "終" + CHARACTERS)  # a token more, and all others elsewhere
    models = [targets[0], other]
    refused = tmp_path / "refused"
    capsys.readouterr()
    assert_refused(flags(trio, models, refused), "--vocabulary union", refused, capsys)
    output = tmp_path / "out"
    more = ("--vocabulary", "union", "--save_experts", "--moe_base", base, "--n_trials", "8")
    assert main(flags(trio, models, output, *more)) == 0
    said = capsys.readouterr().out
    assert "| target 1 united | target 2 united | MoE at 0 |" in said
    assert_it_scores_what_the_study_says(output)
    tokenizer = AutoTokenizer.from_pretrained(output / "best")
    ids = tokenizer.encode("a終", add_special_tokens=False)
    assert ids == [CHARACTERS.index("a") + 3, len(CHARACTERS) + 3]
    made = Checkpoint(resolve(str(output / "best")))
    weights = yaml.safe_load((output / "best" / "recipe.yaml").read_text())["weights"]
    rows = made.read("model.embed_tokens.weight")
    assert rows.shape[0] == len(CHARACTERS) + 4
    # The task vector has no such token: its row is that of the only model that has it.
    assert torch.equal(rows[-1], Checkpoint(resolve(str(other))).read("model.embed_tokens.weight")[3])
    assert ("expert2/embed_tokens" in weights) == (base == "average")
    rebuilt = tmp_path / "rebuilt"
    recipe = str(output / "best" / "recipe.yaml")
    assert main(["apply", recipe, "--output_dir", str(rebuilt), "--save_experts"]) == 0
    assert tree(rebuilt) == {name: content for name, content in tree(output / "best").items() if name not in ABOUT}
    second = AutoTokenizer.from_pretrained(output / "best" / "experts" / "expert2")
    assert second.encode("終", add_special_tokens=False) == [3]
    assert main(flags(trio, models, output, *more)) == 0
    assert "8 of 8 trials done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "mixture"),
    [("llama", "MixtralForCausalLM"), ("qwen2", "Qwen2MoeForCausalLM"), ("qwen3", "Qwen3MoeForCausalLM")],
)
def test_other_architectures_are_searched_and_saved(kind: str, mixture: str, tmp_path: Path) -> None:
    names = ("base", "tuned", "one", "two")
    models = {name: save(tmp_path / name, kind, seed=n, dtype=torch.bfloat16) for n, name in enumerate(names)}
    trio = Trio(*(models[name].model.path for name in ("one", "base", "tuned")))
    output = tmp_path / "out"
    experts = [models[name].model.path for name in ("one", "two")]
    assert main(flags(trio, experts, output, "--n_trials", "8", "--search_gate", "--moe_base", "average")) == 0
    assert_it_scores_what_the_study_says(output)
    model, info = AutoModelForCausalLM.from_pretrained(output / "best", dtype="auto", output_loading_info=True)
    assert type(model).__name__ == mixture
    assert not any(info.values())


def test_eight_experts_are_searched_and_biases_are_refused(
    trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = ("--optimize_mode", "uniform", "--experts_per_token", "3", "--n_trials", "2")
    assert main(flags(trio, [*targets, *targets, *targets[:2]], output, *more)) == 0
    assert set(trials(output)[0][1]) == {f"expert{n}/uniform" for n in range(1, 9)}
    biased = [
        save(tmp_path / name, "llama", seed=n, attention_bias=True).model.path
        for n, name in enumerate(("a", "b", "c", "d"))
    ]
    capsys.readouterr()
    command = flags(Trio(biased[0], biased[1], biased[2]), [biased[0], biased[3]], tmp_path / "refused")
    message = "has biases (attention_bias: true), which MixtralForCausalLM has no place for: use experts without"
    assert_refused(command, message, tmp_path / "refused", capsys)


def test_experts_can_be_entered_by_everybody_and_are_mended_where_they_are_damaged(
    finished: Path, trio: Trio, targets: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    expected = tree(output / "best")
    for folder in ("experts", "experts/expert1", "experts/expert2"):
        assert (finished / "best" / folder).stat().st_mode & 0o555 == 0o555
    command = flags(trio, targets[:2], output, "--save_experts", "--search_gate")
    for damaged in (
        "experts/expert2/model.safetensors",
        "experts/expert1/recipe.yaml",
        "experts/expert2/config.json",
        "router.npy",
    ):
        for content in (None, b"junk"):
            if content is not None and damaged.endswith("config.json"):
                continue
            (output / "best" / damaged).unlink()
            if content is not None:
                (output / "best" / damaged).write_bytes(content)
            assert main(command) == 0
            assert tree(output / "best") == expected


def test_shared_weights_are_those_of_every_expert(trio: Trio, targets: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = ("--share_weights", "--save_experts", "--optimize_mode", "parameter")
    assert main(flags(trio, targets[:2], output, *more)) == 0
    weights = yaml.safe_load((output / "best" / "recipe.yaml").read_text())["weights"]
    for n in (1, 2):
        own = yaml.safe_load((output / "best" / "experts" / f"expert{n}" / "recipe.yaml").read_text())
        assert own["weights"] == weights
        assert "q_proj" in weights


def test_configurations_without_a_dtype_are_searched_in_that_of_their_weights(
    trio: Trio, targets: list[Path], tmp_path: Path
) -> None:
    models = [shutil.copytree(target, tmp_path / f"t{n}") for n, target in enumerate(targets[:2])]
    for model in models:
        config = json.loads((model / "config.json").read_text())
        config.pop("dtype")
        (model / "config.json").write_text(json.dumps(config))
    assert main(flags(trio, models, tmp_path / "out", "--n_trials", "2")) == 0
    assert json.loads((tmp_path / "out" / "best" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_it_scores_what_the_study_says(tmp_path / "out")


@pytest.mark.parametrize("where", ["up_proj", "down_proj"])
def test_a_mixture_that_is_infinite_in_its_dtype_is_no_best(
    where: str, trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the tokens would never see it, and the others' questions would have no score."""
    wide = tmp_path / "wide"
    shutil.copytree(targets[1], wide)
    weights = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}
    weights[f"model.layers.1.mlp.{where}.weight"] *= 1e6
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    command = flags(trio, [targets[0], wide], output, "--dtype", "float16", "--experts_per_token", "1")
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has values that float16 cannot hold: use --dtype bfloat16 or float32" in error
    assert not (output / "best").exists()


def test_prompts_that_give_experts_the_same_rows_are_refused(
    trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, prompts in {
        "hidden": [["Ω"], ["Ψ"]],
        "cheap_embed": [["ab"], ["ba"]],
        "hidden_avg": [["a", "Ω"], ["a", "Ψ"]],
    }.items():
        path = tmp_path / "prompts.yaml"
        path.write_text(yaml.safe_dump({"experts": [{"positive_prompts": own} for own in prompts]}))
        capsys.readouterr()
        command = flags(trio, targets[:2], tmp_path / "out", "--gate_mode", mode, "--gate_prompts", str(path))
        assert_refused(
            command, "the prompts give experts 1 and 2 the same rows in every layer", tmp_path / "out", capsys
        )
    path.write_text(
        yaml.safe_dump(
            {"experts": [{"positive_prompts": ["a"], "negative_prompts": ["a"]}, {"positive_prompts": ["b"]}]}
        )
    )
    command = flags(trio, targets[:2], tmp_path / "out", "--gate_mode", "hidden", "--gate_prompts", str(path))
    assert_refused(command, "the prompts give expert 1 rows of zeros in every layer", tmp_path / "out", capsys)


def test_targets_given_twice_are_refused(
    trio: Trio, targets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(trio, targets[:1], tmp_path / "out", "--target_model", str(targets[1]))
    assert_refused(command, "--target_model is given twice: name all models behind one flag", tmp_path / "out", capsys)
