"""All lazy state dicts against one conformance suite, and the merge against float64."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance_state_dict import check_state_dict
from conftest import Trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvmerge.checkpoint import Checkpoint
from tvmerge.delta import Delta
from tvmerge.errors import IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.hub import ModelId
from tvmerge.merge import Merge
from tvmerge.methods import METHODS
from tvmerge.moe import LAYOUTS, Average, MixtureOfExperts
from tvmerge.state_dict import (
    DTYPES,
    Array,
    StateDict,
    TensorSpec,
    Without,
    WithTensors,
    as_array,
    check_same_tensors,
    deliver,
)
from tvmerge.task_vector import Difference, KeptTaskVector, TaskVector
from tvmerge.vocabulary import Aligned, Rows
from tvmerge.writer import write_weights


class InMemory(WithTensors):
    """The slow reference: a state dict over a plain dict of torch's tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(shape=tuple(self.tensors[name].shape), dtype=as_array(self.tensors[name]).dtype)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        return deliver(as_array(self.tensors[name]), out)

    def version(self, name: str) -> Hashable:
        return self, name


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(ModelId(name=str(folder), revision=None, path=folder))


def merge_of(trio: Trio, granularity: str = "layer") -> Merge:
    vector = Difference(tuned=opened(trio.tuned), base=opened(trio.base))
    return merge_one(opened(trio.target), vector, granularity)


def merge_one(target: StateDict, vector: TaskVector, granularity: str = "layer") -> Merge:
    return Merge(target=target, task_vectors={"tuned": vector}, grouping=Grouping(granularity))


def implementations(trio: Trio) -> dict[str, StateDict]:
    merge = merge_of(trio)
    checkpoint = opened(trio.target)
    integers = InMemory({"a": torch.arange(6).reshape(2, 3), "b.weight": torch.ones(2, dtype=torch.float16)})
    floats = Without(integers, ["a"])
    ones = Difference(tuned=floats, base=floats)
    return {
        "in memory": integers,
        "checkpoint": checkpoint,
        "task vector": merge.task_vectors["tuned"],
        "merge": merge.at(dict.fromkeys(merge.weight_names, 0.7)),
        "merge at 0": merge.at(dict.fromkeys(merge.weight_names, 0.0)),
        "merge with integers": merge_one(integers, ones, "all").at({"b": 0.5}),
        "without": Without(checkpoint, ["lm_head.weight"]),
        "kept task vector": KeptTaskVector(Difference(tuned=opened(trio.tuned), base=opened(trio.base))),
        "average": Average([checkpoint, merge.at(dict.fromkeys(merge.weight_names, 0.7))]),
        "mixture of experts": MixtureOfExperts(
            experts=[checkpoint, merge.at(dict.fromkeys(merge.weight_names, 0.7))],
            router=np.ones((2, 2, 16), np.float32),
            layout=LAYOUTS["mistral"],
            base="average",
        ),
        "aligned": Aligned(integers, Rows(source=(1, -1, 0), names=frozenset({"a"}))),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("in memory", "checkpoint", "task vector", "merge", "merge at 0", "merge with integers", "without"),
        *("kept task vector", "aligned", "average", "mixture of experts"),
    ],
)
def test_conformance(name: str, trio: Trio) -> None:
    check_state_dict(implementations(trio)[name])


def test_weight_zero_is_the_target_bit_for_bit(trio: Trio) -> None:
    merge, target = merge_of(trio), opened(trio.target)
    merged = merge.at(dict.fromkeys(merge.weight_names, 0.0))
    assert all(torch.equal(merged.read(name), target.read(name)) for name in target.names)


def test_weight_one_on_the_base_is_the_tuned_model(trio: Trio) -> None:
    base, tuned = opened(trio.base), opened(trio.tuned)
    merge = merge_one(base, Difference(tuned=tuned, base=base))
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


def test_mixed_dtypes_round_to_the_target(trio: Trio) -> None:
    target = InMemory({"x.weight": torch.ones(4, dtype=torch.float16)})
    base = InMemory({"x.weight": torch.zeros(4, dtype=torch.bfloat16)})
    tuned = InMemory({"x.weight": torch.full((4,), 0.25, dtype=torch.float32)})
    merge = merge_one(target, Difference(tuned=tuned, base=base))
    merged = merge.at({"x": 2.0}).read("x.weight")
    assert torch.equal(merged, torch.full((4,), 1.5, dtype=torch.float16))


def test_every_method_with_weight_zero_is_the_target() -> None:
    target, delta = np.arange(8.0), Delta(minuend=np.ones(8))
    for method in METHODS.values():
        out = np.empty(8)
        method(target, [delta], [0.0], out)
        assert np.array_equal(out, target)


def test_several_task_vectors_have_weights_of_their_own(trio: Trio) -> None:
    base, tuned, target = (opened(folder) for folder in (trio.base, trio.tuned, trio.target))
    vectors = {"a": Difference(tuned=tuned, base=base), "b": KeptTaskVector(Difference(tuned=target, base=base))}
    merge = Merge(target=base, task_vectors=vectors, grouping=Grouping("uniform", freeze=("norm",)))
    assert merge.weight_names == ["a/uniform", "b/uniform"]
    both = merge.at({"a/uniform": 1.0, "b/uniform": 0.5})
    for name in base.names:
        t, u, b = (model.read(name).double() for model in (target, tuned, base))
        expected = b if "norm" in name else b + (u - b) + 0.5 * (t - b)
        assert torch.equal(both.read(name), expected.to(torch.bfloat16))
    alone = merge.at({"a/uniform": 1.0, "b/uniform": 0.0})
    assert torch.equal(alone.read("lm_head.weight"), tuned.read("lm_head.weight"))


def test_a_task_vector_moves_only_what_it_has(trio: Trio) -> None:
    base, tuned = (Without(opened(folder), ["lm_head.weight"]) for folder in (trio.base, trio.tuned))
    merge = merge_one(opened(trio.target), Difference(tuned=tuned, base=base))
    assert "lm_head" not in merge.weight_names
    merged = merge.at(dict.fromkeys(merge.weight_names, 1.5))
    assert torch.equal(merged.read("lm_head.weight"), opened(trio.target).read("lm_head.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_of_a_merge_is_rounded_to_once(trio: Trio, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    base, tuned, target = (opened(folder) for folder in (trio.base, trio.tuned, trio.target))
    vectors = {"tuned": Difference(tuned=tuned, base=base)}
    merge = Merge(target=target, task_vectors=vectors, grouping=Grouping("uniform"), dtype=DTYPES[name])
    merged = merge.at({"uniform": 0.3})
    check_state_dict(merged)
    for name in target.names:
        t, u, b = (model.read(name).double() for model in (target, tuned, base))
        assert torch.equal(merged.read(name), (t + float(np.float32(0.3)) * (u - b)).to(dtype))


def test_versions_tell_what_a_change_of_weights_changes(trio: Trio) -> None:
    merge = merge_of(trio)
    same = dict.fromkeys(merge.weight_names, 0.5)
    first, second, third = merge.at(same), merge.at(same), merge.at({**same, "layers.0": 0.6})
    for name in first.names:
        assert first.version(name) == second.version(name)
        assert (first.version(name) == third.version(name)) == (".layers.0." not in name)
    assert first.version("lm_head.weight") != merge_of(trio).at(same).version("lm_head.weight")


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
