"""The live model: any architecture, filled in place, equal to what loading the written merge gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, CONVERTED, load, save

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.hub import ModelId
from tvmerge.models.transformers import TransformersModel, unread_tensors
from tvmerge.rebuild import write_model
from tvmerge.recipe import Recipe
from tvmerge.sources import MergeSettings, Sources, TunedModel

IDS = torch.tensor([[1, 5, 9, 13, 4, 8]])


def sources_of(models: Mapping[str, Checkpoint]) -> Sources:
    return Sources(targets=[models["target"]], tuned=[TunedModel("tuned", models["tuned"], models["base"])])


def assert_same_model(live: TransformersModel, name: str, folder: Path) -> None:
    """All tensors, so also those of a tower that text does not pass through, and what the model makes of a text."""
    anew = load(name, folder)
    tensors = live.model.state_dict()
    assert tensors.keys() == anew.state_dict().keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in anew.state_dict().items())
    with torch.no_grad():
        assert torch.equal(live.model(IDS).logits, anew(IDS).logits)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *CONVERTED])
def test_live_merge_equals_the_written_merge_loaded_anew(name: str, tmp_path: Path) -> None:
    models = {role: save(name, tmp_path / role, seed=seed) for seed, role in enumerate(("target", "base", "tuned"))}
    sources = sources_of(models)
    omit = unread_tensors(sources.target)
    merge = sources.merge(MergeSettings(omit=omit))
    weights = {weight: 0.3 + 0.2 * i for i, weight in enumerate(merge.weight_names)}
    live = TransformersModel.from_folder(tmp_path / "target", checkpoint=merge.target, device="cpu")
    assert_same_model(live, name, tmp_path / "target")
    before = {key: tensor.clone() for key, tensor in live.model.state_dict().items()}
    source: dict[str, str | None] = {"model": "m", "revision": None}
    entry = {"label": "tuned", "tuned": source, "base": source}
    recipe = Recipe(target=source, task_vectors=[entry], granularity="layer", weights=weights, omit=omit)
    (tmp_path / "best").mkdir()
    write_model(recipe, sources, tmp_path / "best")
    live.load(merge.at(weights))
    assert_same_model(live, name, tmp_path / "best")
    assert not any(torch.equal(tensor, before[key]) for key, tensor in live.model.named_parameters())
    live.load(merge.at(dict.fromkeys(weights, 0.0)))
    assert_same_model(live, name, tmp_path / "target")


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
    merge = sources_of(models).merge(MergeSettings(grouping=Grouping("all"), omit=omit))
    live = TransformersModel.from_folder(tmp_path / "target", checkpoint=merge.target, device="cpu")
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
    bare = Checkpoint(ModelId(name="m", revision=None, path=tmp_path))
    assert unread_tensors(bare) == []
    live = TransformersModel.from_folder(tmp_path, checkpoint=bare, device="cpu")
    assert type(live.model).__name__ == "GPT2LMHeadModel"


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("llama", tmp_path, seed=0)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"2 of \d+ parameters .* first is model.layers.1.mlp.up_proj.weight"):
        unread_tensors(Checkpoint(ModelId(name="m", revision=None, path=tmp_path)))


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    checkpoint = save("mixtral", tmp_path, seed=0)
    live = TransformersModel.from_folder(tmp_path, checkpoint=checkpoint, device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in live.model.parameters()} == {torch.float32}
    before = {key: tensor.clone() for key, tensor in live.model.state_dict().items()}
    live.load(checkpoint)
    assert all(torch.equal(before[key], tensor) for key, tensor in live.model.state_dict().items())


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
