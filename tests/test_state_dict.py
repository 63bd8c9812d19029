"""All lazy state dicts against one conformance suite, and the merge against float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conformance_state_dict import check_state_dict
from conftest import Trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvmerge.checkpoint import Checkpoint, ModelId, write_weights
from tvmerge.errors import IncompatibleError
from tvmerge.merge import Merge
from tvmerge.methods import METHODS, task_arithmetic
from tvmerge.state_dict import StateDict, TensorSpec, Without, check_same_tensors, deliver
from tvmerge.task_vector import TaskVector


class InMemory:
    """The slow reference: a state dict over a plain dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(shape=tuple(self.tensors[name].shape), dtype=self.tensors[name].dtype)

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        return deliver(self.tensors[name], out)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(ModelId(name=str(folder), revision=None, path=folder))


def merge_of(trio: Trio, granularity: str = "layer") -> Merge:
    vector = TaskVector(tuned=opened(trio.tuned), base=opened(trio.base))
    return Merge(target=opened(trio.target), task_vectors=[vector], granularity=granularity)


def implementations(trio: Trio) -> dict[str, StateDict]:
    merge = merge_of(trio)
    checkpoint = opened(trio.target)
    integers = InMemory({"a": torch.arange(6).reshape(2, 3), "b.weight": torch.ones(2, dtype=torch.float16)})
    ones = TaskVector(tuned=integers, base=integers)
    return {
        "in memory": integers,
        "checkpoint": checkpoint,
        "task vector": merge.task_vectors[0],
        "merge": merge.at(dict.fromkeys(merge.weight_names, 0.7)),
        "merge at 0": merge.at(dict.fromkeys(merge.weight_names, 0.0)),
        "merge with integers": Merge(target=integers, task_vectors=[ones], granularity="all").at({"b": 0.5}),
        "without": Without(checkpoint, ["lm_head.weight"]),
    }


@pytest.mark.parametrize(
    "name",
    ["in memory", "checkpoint", "task vector", "merge", "merge at 0", "merge with integers", "without"],
)
def test_conformance(name: str, trio: Trio) -> None:
    check_state_dict(implementations(trio)[name])


def test_weight_zero_is_the_target_bit_for_bit(trio: Trio) -> None:
    merge, target = merge_of(trio), opened(trio.target)
    merged = merge.at(dict.fromkeys(merge.weight_names, 0.0))
    assert all(torch.equal(merged.read(name), target.read(name)) for name in target.names)


def test_weight_one_on_the_base_is_the_tuned_model(trio: Trio) -> None:
    base, tuned = opened(trio.base), opened(trio.tuned)
    merge = Merge(target=base, task_vectors=[TaskVector(tuned=tuned, base=base)], granularity="layer")
    merged = merge.at(dict.fromkeys(merge.weight_names, 1.0))
    assert all(torch.equal(merged.read(name), tuned.read(name)) for name in base.names)


def test_a_weight_moves_its_group_and_no_other(trio: Trio) -> None:
    merge, target = merge_of(trio), opened(trio.target)
    merged = merge.at({**dict.fromkeys(merge.weight_names, 0.0), "layers.1": 0.8})
    changed = {name for name in target.names if not torch.equal(merged.read(name), target.read(name))}
    assert changed == {name for name in target.names if ".layers.1." in name}


@pytest.mark.parametrize("weights", [{}, {"layers.0": 1.0}])
def test_weights_must_be_those_of_the_merge(trio: Trio, weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights are needed"):
        merge_of(trio).at(weights)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of a dtype at a float64 value."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), weight=st.floats(-2, 2))
def test_merge_is_within_one_ulp_of_float64(dtype: torch.dtype, seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, base, tuned = (torch.randn(64, generator=generator).to(dtype) for _ in range(3))
    sources = [InMemory({"x.weight": tensor}) for tensor in (target, base, tuned)]
    merge = Merge(target=sources[0], task_vectors=[TaskVector(base=sources[1], tuned=sources[2])], granularity="all")
    merged = merge.at({"x": weight}).read("x.weight")
    exact = target.double() + weight * (tuned.double() - base.double())
    assert merged.dtype == dtype
    # Where target and delta cancel, float32 accumulation is limited by the largest summand: two roundings of it.
    scale = torch.stack([exact.abs(), target.double().abs(), (weight * (tuned.double() - base.double())).abs()]).amax(0)
    allowed = ulp(exact, dtype) + 2 * ulp(scale, torch.float32)
    assert bool(((merged.double() - exact).abs() <= allowed).all())


def test_mixed_dtypes_round_to_the_target(trio: Trio) -> None:
    target = InMemory({"x.weight": torch.ones(4, dtype=torch.float16)})
    base = InMemory({"x.weight": torch.zeros(4, dtype=torch.bfloat16)})
    tuned = InMemory({"x.weight": torch.full((4,), 0.25, dtype=torch.float32)})
    merge = Merge(target=target, task_vectors=[TaskVector(tuned=tuned, base=base)], granularity="layer")
    merged = merge.at({"x": 2.0}).read("x.weight")
    assert torch.equal(merged, torch.full((4,), 1.5, dtype=torch.float16))


def test_every_method_with_weight_zero_is_the_target() -> None:
    target, delta = torch.randn(8), torch.randn(8)
    for method in METHODS.values():
        assert torch.equal(method(target, [delta], [0.0]), target)


def test_task_arithmetic_adds_several_task_vectors() -> None:
    merged = task_arithmetic(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([4.0])], [0.5, 0.25])
    assert merged.item() == 3.0


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool]),
    shard_bytes=st.integers(1, 300),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"layers.{i}.weight": torch.randn(shape).mul(9).to(dtype) for i, shape in enumerate(shapes)}
    write_weights(InMemory(tensors), folder, shard_bytes=shard_bytes)
    back = opened(folder)
    assert back.names == sorted(tensors)
    assert all(torch.equal(back.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.ones(2, 3)}, "lacks 1 of the 2 tensors of left, the first is b"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(1)}, "left lacks 1 of the 3 tensors of right"),
        ({"a": torch.ones(4, 3), "b": torch.ones(2)}, r"\[2, 3\] in left and \[4, 3\] in right \(vocabularies of 2"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.int8)}, "unquantized"),
    ],
)
def test_tensors_that_differ_are_refused(changed: dict[str, Tensor], message: str) -> None:
    reference = InMemory({"a": torch.ones(2, 3), "b": torch.ones(2)})
    with pytest.raises(IncompatibleError, match=message):
        check_same_tensors(reference, InMemory(changed), reference_name="left", other_name="right")


def test_float16_and_bfloat16_fit_together() -> None:
    a, b = (InMemory({"a": torch.ones(2, dtype=dtype)}) for dtype in (torch.float16, torch.bfloat16))
    check_same_tensors(a, b, reference_name="left", other_name="right")
