"""Live tensors that are not the checkpoint's: fused, split, transposed, tied; all found by asking transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import CONVERTED, build, load, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError
from tvmerge.hub import ModelId
from tvmerge.models import conversion
from tvmerge.models.conversion import LiveTensors, find_live_tensors
from tvmerge.models.transformers import TransformersModel, unread_tensors
from tvmerge.state_dict import Array, TensorSpec, WithTensors, as_array, deliver

EXPERTS = {"mixtral": "block_sparse_moe.experts", "qwen3_moe": "mlp.experts"}


class InMemory(WithTensors):
    """Tensors as a state dict that remembers what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.had_read: list[str] = []

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(shape=tuple(self.tensors[name].shape), dtype=as_array(self.tensors[name]).dtype)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        self.had_read.append(name)
        return deliver(as_array(self.tensors[name]), out)

    def version(self, name: str) -> Hashable:
        return self, name, self.tensors[name]._version


def reopen(folder: Path) -> Checkpoint:
    return Checkpoint(ModelId(name="m", revision=None, path=folder))


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return reopen(folder)


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name → where the values differ, of the tensors that do."""
    return {key: before[key] != after[key] for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("name", CONVERTED)
def test_every_tensor_is_read_once(name: str, tmp_path: Path) -> None:
    checkpoint = save(name, tmp_path, seed=0)
    assert unread_tensors(checkpoint) == []
    live = find_live_tensors(build(name, seed=1), checkpoint)
    assert list(live.names) == list(checkpoint.names)
    split = {name for assembly in live.assemblies for name in assembly.names}
    assert split == (
        {name for name in checkpoint.names if "gqkv" in name or "gate_up" in name} if name == "hrm_text" else set()
    )
    reader = InMemory({name: checkpoint.read(name) for name in checkpoint.names})
    live.fill(reader)
    assert sorted(reader.had_read) == list(checkpoint.names)


@pytest.mark.parametrize("name", CONVERTED)
def test_filling_is_loading(name: str, tmp_path: Path) -> None:
    checkpoint = save(name, tmp_path, seed=0)
    model = build(name, seed=1).bfloat16()
    find_live_tensors(model, checkpoint).fill(checkpoint)
    assert not differing(snapshot(model), load(name, tmp_path).state_dict())


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_a_region_of_the_fused_parameter(name: str, tmp_path: Path) -> None:
    checkpoint = save(name, tmp_path, seed=0)
    model = load(name, tmp_path)
    live = find_live_tensors(model, checkpoint)
    experts = [tensor for tensor in checkpoint.names if EXPERTS[name] in tensor]
    assert len(experts) == 2 * 3 * 3
    assert not live.assemblies
    parameters = dict(model.named_parameters())
    for expert in experts:
        assert live.views[expert].shape == checkpoint.spec(expert).shape
        before = snapshot(model)
        live.views[expert].add_(1)
        ((key, changed),) = differing(before, model.state_dict()).items()
        assert live.views[expert].untyped_storage().data_ptr() == parameters[key].untyped_storage().data_ptr()
        assert changed.sum() == live.views[expert].numel()
        row = int(expert.split("experts.")[1].split(".")[0])
        assert changed.any(dim=2).any(dim=1).tolist() == [row == i for i in range(3)]


def test_filling_what_is_all_views_reads_into_place(tmp_path: Path) -> None:
    checkpoint = save("mixtral", tmp_path, seed=0)
    live = find_live_tensors(load("mixtral", tmp_path), checkpoint)

    class Placed(InMemory):
        def array(self, name: str, *, out: Array | None = None) -> Array:
            assert out is not None
            return super().array(name, out=out)

    live.fill(Placed({name: checkpoint.read(name) for name in checkpoint.names}))


def test_equal_layers_are_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save("mixtral", tmp_path, seed=0)
    probed = []
    find = conversion._find_regions

    def counted(*args: Any) -> Any:
        probed.append(args)
        return find(*args)

    monkeypatch.setattr(conversion, "_find_regions", counted)
    model = build("mixtral")
    state = torch.get_rng_state()
    find_live_tensors(model, checkpoint)
    assert len(probed) == 2  # gate and up, down; of two layers
    assert torch.equal(torch.get_rng_state(), state)


def test_no_values_are_probed_on_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save("mixtral", tmp_path, seed=0)
    monkeypatch.setattr(conversion, "_find_regions", None)
    assert unread_tensors(checkpoint) == []


def _more_experts(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["num_local_experts"] = 4


def _wider(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["intermediate_size"] = 32


def _lost_projection(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]


def _lost_expert(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.block_sparse_moe.experts.2" in name]:
        del tensors[name]


def _odd_expert(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name] = tensors[name][:, 1:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_more_experts, "experts.0.w1.weight with 5 others becomes .* which has .* where config.json asks for "),
        (_wider, "experts.0.w1.weight with 5 others becomes .* where config.json asks for "),
        (_lost_projection, r"layers.1.block_sparse_moe.experts.0.w1.weight with 4 others cannot become .*"),
        (_lost_expert, r"layers.1.*experts.0.w1.weight with 3 others becomes .* where config.json asks for \[3, "),
        (_odd_expert, r"layers.1.*experts.0.w2.weight with 2 others cannot become "),
    ],
)
def test_fused_tensors_of_other_shapes_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    save("mixtral", tmp_path, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    damage(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        unread_tensors(rewrite(tmp_path, tensors))
    assert str(caught.value).startswith(f"{tmp_path}: model.layers.")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_fused_already_loads(tmp_path: Path) -> None:
    save("mixtral", tmp_path, seed=0)
    model = load("mixtral", tmp_path)
    checkpoint = rewrite(tmp_path, snapshot(model))
    assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.names
    assert unread_tensors(checkpoint) == []
    live = TransformersModel.from_folder(tmp_path, checkpoint=checkpoint, device="cpu")
    assert not differing(snapshot(live.model), snapshot(model))


def test_a_tied_tensor_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    save("gpt2", tmp_path, seed=0)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    checkpoint = rewrite(tmp_path, tensors)
    assert unread_tensors(checkpoint) == []
    live = TransformersModel.from_folder(tmp_path, checkpoint=checkpoint, device="cpu")
    assert torch.equal(live.model.get_input_embeddings().weight, tensors["lm_head.weight"])
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    live.load(InMemory(doubled))
    assert torch.equal(live.model.get_input_embeddings().weight, doubled["lm_head.weight"])


ROWS, COLUMNS = 8, 6


class Tiny(torch.nn.Module):
    """As much of a model as a conversion asks for."""

    base_model_prefix = "model"

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=2)
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))


class Operation:
    """An operation that transformers does not have.

    Args:
        compute: tensors → the one result.
    """

    def __init__(self, compute: Callable[[list[Tensor]], Tensor]) -> None:
        self._compute = compute

    def convert(self, input_dict: dict[str, list[Tensor]], *, target_patterns: list[str], **_: Any) -> Any:
        return {target_patterns[0]: self._compute([tensor for tensors in input_dict.values() for tensor in tensors])}


CONVERSIONS: dict[str, tuple[list[str], dict[str, tuple[int, ...]], list[Any], bool]] = {
    # name: checkpoint tensors of ROWS × COLUMNS, live tensors, operations, whether these are views
    "transposed": (["a"], {"x": (COLUMNS, ROWS)}, [Transpose(0, 1)], True),
    "concatenated": (["a", "b", "c"], {"x": (ROWS, 3 * COLUMNS)}, [Concatenate(dim=1)], True),
    "split": (["a"], {"x": (ROWS // 2, COLUMNS), "y": (ROWS // 2, COLUMNS)}, [Chunk(dim=0)], False),
    "permuted": (["a"], {"x": (ROWS, COLUMNS)}, [PermuteForRope()], False),
    "interleaved": (["a"], {"x": (ROWS, COLUMNS)}, [Interleave(dim=0)], False),
    "summed": (["a", "b"], {"x": (ROWS, COLUMNS)}, [Operation(lambda t: t[0] + t[1])], False),
    "repeated": (["a"], {"x": (2 * ROWS, COLUMNS)}, [Operation(lambda t: torch.cat([t[0], t[0]]))], False),
    "padded": (["a"], {"x": (2 * ROWS, COLUMNS)}, [Operation(lambda t: torch.cat([t[0], 0 * t[0]]))], False),
    # What the markers, which are positive, cannot tell.
    "changed": (["a"], {"x": (ROWS, COLUMNS)}, [Operation(lambda t: t[0].abs())], False),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_any_conversion_is_filled_as_transformers_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, targets, operations, are_views = CONVERSIONS[name]
    converter = WeightConverter(list(sources), list(targets), operations)
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [converter])
    state_dict = InMemory({source: torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16) for source in sources})
    model = Tiny(**targets)
    live: LiveTensors = find_live_tensors(model, state_dict)
    assert (sorted(live.views), len(live.assemblies)) == ((sources, 0) if are_views else ([], 1))
    assert list(live.names) == sources
    kept = {source: tensor.clone() for source, tensor in state_dict.tensors.items()}
    live.fill(state_dict)
    by_hand = WeightConverter(list(sources), list(targets), operations)
    for source, tensor in state_dict.tensors.items():
        by_hand.add_tensor("x", source, source, tensor.clone())
    expected = by_hand.convert("x", model=model, config=model.config)
    assert expected.keys() == targets.keys()
    assert all(torch.equal(model.get_parameter(key), tensor) for key, tensor in expected.items())
    assert not differing(kept, state_dict.tensors), "filling a model changed what it was read from"
