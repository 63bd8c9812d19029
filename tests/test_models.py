"""The live model: any decoder, filled in place, equal to what loading the written merge gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import save_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import ModelId
from tvmerge.models.transformers import TransformersModel, unread_tensors
from tvmerge.recipe import Recipe, Sources, write_model

IDS = torch.tensor([[1, 5, 9, 13, 4, 8]])


def save(name: str, folder: Path, *, seed: int, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    build(name, seed=seed).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint(ModelId(name=str(folder), revision=None, path=folder))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live_merge_equals_the_written_merge_loaded_anew(name: str, tmp_path: Path) -> None:
    models = {role: save(name, tmp_path / role, seed=seed) for seed, role in enumerate(("target", "base", "tuned"))}
    sources = Sources(**models)
    omit = unread_tensors(sources.target)
    merge = sources.merge(granularity="layer", method="task_arithmetic", omit=omit)
    weights = {weight: 0.3 + 0.2 * i for i, weight in enumerate(merge.weight_names)}
    live = TransformersModel.from_folder(tmp_path / "target", checkpoint_names=merge.target.names, device="cpu")
    with torch.no_grad():
        assert torch.equal(live.model(IDS).logits, logits(tmp_path / "target"))
        live.load(merge.at(weights))
        merged = live.model(IDS).logits
        live.load(merge.at(dict.fromkeys(weights, 0.0)))
        assert torch.equal(live.model(IDS).logits, logits(tmp_path / "target"))
    source: dict[str, str | None] = {"model": "m", "revision": None}
    recipe = Recipe(target=source, base=source, tuned=source, granularity="layer", weights=weights, omit=omit)
    (tmp_path / "best").mkdir()
    write_model(recipe, sources, tmp_path / "best")
    assert torch.equal(merged, logits(tmp_path / "best"))
    assert not torch.equal(merged, logits(tmp_path / "target"))


def test_a_tied_head_that_is_stored_twice_moves_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for seed, role in enumerate(("target", "base", "tuned")):
        save("gpt2", tmp_path / role, seed=seed)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, file, metadata={"format": "pt"})
    models = {
        role: Checkpoint(ModelId(name=role, revision=None, path=tmp_path / role))
        for role in ("target", "base", "tuned")
    }
    omit = unread_tensors(models["target"])
    assert omit == ["lm_head.weight"]
    merge = Sources(**models).merge(granularity="all", method="task_arithmetic", omit=omit)
    live = TransformersModel.from_folder(tmp_path / "target", checkpoint_names=merge.target.names, device="cpu")
    live.load(merge.at(dict.fromkeys(merge.weight_names, 1.0)))
    embedding = live.model.get_input_embeddings().weight
    expected = merge.at(dict.fromkeys(merge.weight_names, 1.0)).read("transformer.wte.weight")
    assert torch.equal(embedding, expected)
    assert live.model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()


def test_a_checkpoint_of_the_bare_decoder_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = save("gpt2", tmp_path, seed=0)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(file).items()}
    del checkpoint
    save_file(tensors, file, metadata={"format": "pt"})
    assert unread_tensors(Checkpoint(ModelId(name="m", revision=None, path=tmp_path))) == []
    TransformersModel.from_folder(tmp_path, checkpoint_names=sorted(tensors), device="cpu")


def test_an_architecture_that_stores_other_tensors_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(ModelId(name="m", revision=None, path=tmp_path))
    with pytest.raises(IncompatibleError, match="not supported yet"):
        unread_tensors(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"model_type": "no_such_thing"}', "no_such_thing"), ('{"model_type": "gpt2", "n_layer": "two"}', "n_layer")],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_line(tmp_path: Path, config: str, message: str) -> None:
    save("gpt2", tmp_path, seed=0)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        unread_tensors(Checkpoint(ModelId(name="m", revision=None, path=tmp_path)))
    assert "\n" not in str(caught.value)
