"""The command `moe`, from mergekit-moe's YAML to a model that generates; and one line for all that cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHARACTERS, Trio, reshard, save_mistral, save_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import assert_refused
from test_moe import opened, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvmerge import assembly
from tvmerge.cli import main
from tvmerge.moe import Average
from tvmerge.router import ExpertPrompts, GateInputs, make_gates
from tvmerge.state_dict import StateDict
from tvmerge.writer import NotFiniteError

BLOCK = "model.layers.{}.block_sparse_moe."


def content(trio: Trio, **changes: Any) -> dict[str, Any]:
    experts = [
        {"source_model": str(trio.target), "positive_prompts": ["東京タワー", "a"], "negative_prompts": ["j"]},
        {"source_model": str(trio.tuned), "positive_prompts": ["abc"]},
    ]
    found = {"base_model": str(trio.base), "gate_mode": "hidden", "experts": experts, **changes}
    return {key: value for key, value in found.items() if value != "drop"}


def file_of(folder: Path, value: Any) -> Path:
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    return path


def moe(folder: Path, value: Any, *more: str, name: str = "out") -> Path:
    assert main(["moe", str(file_of(folder, value)), "--output_dir", str(folder / name), *more]) == 0
    return folder / name


def gate(model: Any, layer: int) -> torch.Tensor:
    tensor: torch.Tensor = model.model.layers[layer].mlp.gate.weight
    return tensor


def test_a_mixture_is_written_whole_and_generates(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = content(trio, experts_per_token=1, gate_mode="cheap_embed")
    out = moe(tmp_path, value)
    assert capsys.readouterr().out == f"{out}: the mixture of experts of {tmp_path / 'moe.yaml'}\n"
    again = moe(tmp_path, value, name="again")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: (again / name).read_bytes() for name in files} == files
    assert files.keys() >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "moe.yaml", "out"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (model.dtype, model.config.num_local_experts, model.config.num_experts_per_tok) == (torch.bfloat16, 2, 1)
    ids = tokenizer("東京", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    written, base, tuned = (opened(folder) for folder in (out, trio.base, trio.tuned))
    assert torch.equal(written.read("lm_head.weight"), base.read("lm_head.weight"))
    made = written.read(f"{BLOCK.format(1)}experts.1.w2.weight")
    assert torch.equal(made, tuned.read("model.layers.1.mlp.down_proj.weight"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "moe", "tvmerge"]
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == value


@pytest.mark.parametrize("base", ["named", "first", "average"])
@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_the_base_that_gives_the_attention_answers_the_prompts(
    mode: str, base: str, trio: Trio, tmp_path: Path
) -> None:
    value = content(trio, gate_mode=mode, base_model=str(trio.base) if base == "named" else "drop", dtype="float32")
    out = moe(tmp_path, value, *(["--moe_base", "average"] if base == "average" else []))
    experts = [opened(trio.target), opened(trio.tuned)]
    givers: dict[str, StateDict] = {"named": opened(trio.base), "first": experts[0], "average": Average(experts)}
    giver = givers[base]
    model = AutoModelForCausalLM.from_pretrained(trio.base, dtype="auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            giver.read(name, out=parameter.data)
    prompts = [ExpertPrompts(["東京タワー", "a"], ["j"]), ExpertPrompts(["abc"])]
    inputs = GateInputs(
        layers=2,
        hidden=16,
        prompts=prompts,
        seed=0,
        tokenizer=lambda: AutoTokenizer.from_pretrained(trio.base),
        embeddings=lambda: giver.array("model.embed_tokens.weight"),
        model=lambda: model,
    )
    expected = make_gates(mode, inputs)
    written = opened(out)
    for layer in range(2):
        made = written.array(f"{BLOCK.format(layer)}gate.weight")
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, expected[layer], rtol=1e-4, atol=1e-5)
    assert torch.equal(written.read("model.norm.weight"), giver.read("model.norm.weight").float())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_random_routers_follow_the_seed(trio: Trio, tmp_path: Path) -> None:
    value = content(trio, gate_mode="random")
    for expert in value["experts"]:
        expert.pop("positive_prompts")
    outs = [moe(tmp_path, value, *more, name=f"o{n}") for n, more in enumerate(([], [], ["--gate_seed", "1"]))]
    same, again, other = ((out / "model.safetensors").read_bytes() for out in outs)
    assert same == again != other


def test_equal_experts_and_uniform_scores_say_what_they_do(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = content(trio, gate_mode="uniform", experts=[{"source_model": str(trio.target)}] * 3, base_model="drop")
    out = moe(tmp_path, value)
    assert "all 3 experts tie, so that every token goes to the same 2" in capsys.readouterr().err
    moe(tmp_path, {**value, "experts_per_token": 3}, name="all")
    assert capsys.readouterr().err == ""
    dense = AutoModelForCausalLM.from_pretrained(trio.target, dtype=torch.float32)
    mixed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 7]])
    torch.testing.assert_close(mixed(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_other_architectures_sharded_and_tied(kind: str, tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / f"e{n}", kind, seed=n, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "e0" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some save it, and no model reads it
    save_file(tensors, tmp_path / "e0" / "model.safetensors", {"format": "pt"})
    reshard(tmp_path / "e1", shard_bytes=4000)
    experts = [{"source_model": str(tmp_path / f"e{n}"), "positive_prompts": ["ab"[n]]} for n in range(2)]
    out = moe(tmp_path, {"experts": experts})
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in opened(out).names
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_mod": "random"}, "unknown keys: gate_mod; known are base_model, gate_mode, dtype, experts_per_token"),
        ({"shared_experts": []}, "unknown keys: shared_experts"),
        ({"experts": "drop"}, "the key experts is missing"),
        ({"experts": []}, "experts must be a list"),
        ({"experts": ["a", "b"]}, "expert 1: must be a mapping of keys to values, which are source_model, positive"),
        ({"experts": [{"model": "a"}]}, "expert 1: unknown keys: model; known are source_model"),
        ({"experts": [{"positive_prompts": ["a"]}]}, "expert 1: the key source_model is missing"),
        ({"experts": [{"source_model": 3}]}, "expert 1: source_model must be a folder or a Hub id, got 3"),
        ({"experts": [{"source_model": "a", "positive_prompts": "a"}]}, "expert 1: positive_prompts must be a list"),
        ({"experts": [{"source_model": "a", "negative_prompts": [" "]}]}, "negative_prompts must be a list of text"),
        ({"experts": [{"source_model": "a"}] * 2}, "expert 1 has no positive_prompts, which gate_mode hidden is made"),
        ({"gate_mode": "hiden"}, "unknown gate_mode 'hiden', known are hidden, hidden_last, hidden_avg, cheap_embed"),
        ({"gate_mode": ["random"]}, "unknown gate_mode ['random']"),
        ({"dtype": "int8"}, "unknown dtype 'int8', known are float32, float16, bfloat16"),
        ({"experts_per_token": "two"}, "experts_per_token must be a whole number, got 'two'"),
        ({"experts_per_token": True}, "experts_per_token must be a whole number, got True"),
        ({"experts_per_token": 3}, "experts_per_token is 3, of 2 experts: must be 1 to 2"),
        ({"experts_per_token": 0}, "experts_per_token is 0, of 2 experts: must be 1 to 2"),
        ({"base_model": ""}, "base_model must be a folder or a Hub id, got ''"),
        ({"base_model": "no/such/folder"}, "model no/such/folder: no such folder"),
    ],
)
def test_a_file_that_cannot_work_is_refused(
    changes: dict[str, Any], message: str, trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path, content(trio, **changes))
    assert_refused(["moe", str(path), "--output_dir", str(tmp_path / "out")], message, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "moe.yaml: no such file, name a YAML file"),
        ("experts: [", "not readable as YAML"),
        ("- a", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        ("experts: !!python/object/apply:os.system ['false']", "not readable as YAML"),
        ("experts: \x00", "not readable as YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moe.yaml"
    if text is not None:
        path.write_text(text)
    assert_refused(["moe", str(path), "--output_dir", str(tmp_path / "out")], message, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--moe_base", "average"], "names the base_model"),
        (["--moe_base", "second"], "second"),
        (["--gate_seed", "-1"], "--gate_seed must be at least 0, got -1"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--output_dir", "."], "exists and is not empty"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    more: list[str], message: str, trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["moe", str(file_of(tmp_path, content(trio))), "--output_dir", str(tmp_path / "out"), *more]
    assert_refused(arguments, message, tmp_path / "out", capsys)


def _one_expert(value: dict[str, Any], _: Path) -> None:
    del value["experts"][1]


def _nine_experts(value: dict[str, Any], _: Path) -> None:
    value["experts"] = value["experts"][:1] * 8 + value["experts"][1:]


def _wider(_: dict[str, Any], folder: Path) -> None:
    save_mistral(folder, seed=3, hidden_size=32)


def _deeper(_: dict[str, Any], folder: Path) -> None:
    save_mistral(folder, seed=3, num_hidden_layers=3)


def _gelu(_: dict[str, Any], folder: Path) -> None:
    save_mistral(folder, seed=3, hidden_act="gelu")


def _biases(value: dict[str, Any], folder: Path) -> None:
    save(folder, "llama", seed=0, attention_bias=True)
    value["base_model"] = value["experts"][0]["source_model"] = str(folder)


def _other_tokens(_: dict[str, Any], folder: Path) -> None:
    save_tokenizer(folder, characters=CHARACTERS[::-1])


def _not_a_number(_: dict[str, Any], folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _adapter(_: dict[str, Any], folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    save_file({"base_model.model.model.norm.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


def _same_prompts(value: dict[str, Any], _: Path) -> None:
    for expert in value["experts"]:
        expert.update(positive_prompts=["a"], negative_prompts=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_expert, "a mixture needs 2 to 8 experts, got 1"),
        (_nine_experts, "a mixture needs 2 to 8 experts, got 9"),
        (_wider, "hidden_size is 16 in the former and 32 in the latter"),
        (_deeper, "num_hidden_layers is 2 in the former and 3 in the latter"),
        (_gelu, "hidden_act is silu in the former and gelu in the latter"),
        (_biases, "which MixtralForCausalLM has no place for"),
        (_other_tokens, "with another id: use experts of one tokenizer"),
        (_not_a_number, "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
        (_adapter, "adapter"),
        (_same_prompts, "all experts have the same prompts"),
    ],
)
def test_models_that_cannot_work_are_refused(
    change: Callable[[dict[str, Any], Path], None],
    message: str,
    trio: Trio,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trio.tuned, tmp_path / "e1")
    value = content(trio)
    value["experts"][1]["source_model"] = str(tmp_path / "e1")
    change(value, tmp_path / "e1")
    capsys.readouterr()
    arguments = ["moe", str(file_of(tmp_path, value)), "--output_dir", str(tmp_path / "out")]
    assert_refused(arguments, message, tmp_path / "out", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e1", "moe.yaml"], "something was left"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "cannot be written, nothing was kept: No space left on device"),
        (NotFiniteError("lm_head.weight"), "lm_head.weight: values are too large for the dtype"),
    ],
)
def test_a_failure_while_writing_leaves_nothing(
    error: Exception,
    message: str,
    trio: Trio,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(assembly, "write_weights", fail)
    assert main(["moe", str(file_of(tmp_path, content(trio))), "--output_dir", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["moe.yaml"]
