"""Merging into a model on a device, where everything lies there and where it does not.

The device is the CPU here, in float32, where torch's sum is one fused multiply-add as on a GPU: the same code runs, but
for streams and pinned memory, which need a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_mistral
from torch import Tensor
from transformers import MistralForCausalLM

from tvmerge.checkpoint import Checkpoint
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.merge import Merge
from tvmerge.models.device import DeviceWriter
from tvmerge.task_vector import Difference

ROOMS = {"resident": 1 << 40, "streamed": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("float32")
    folders = {"base": save_mistral(root / "base", seed=0)}
    folders |= {
        name: save_mistral(root / name, seed=seed, drift_from=folders["base"])
        for seed, name in enumerate(("target", "tuned", "other"), start=1)
    }
    for folder in folders.values():
        MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return {name: Checkpoint(resolve(str(folder))) for name, folder in folders.items()}


def merge_of(models: dict[str, Checkpoint], *tuned: str) -> Merge:
    vectors = {name: Difference(tuned=models[name], base=models["base"]) for name in tuned}
    return Merge(target=models["target"], task_vectors=vectors, grouping=Grouping("layer"))


def views_of(merge: Merge, *, strided: bool = False) -> list[tuple[str, Tensor]]:
    shapes = {name: merge.spec(name).shape for name in merge.target.names}
    if strided:
        return [(name, torch.zeros(*shape, 2)[..., 0]) for name, shape in shapes.items()]
    return [(name, torch.zeros(shape)) for name, shape in shapes.items()]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("tuned", [("tuned",), ("tuned", "other")])
@pytest.mark.parametrize("strided", [False, True])
def test_a_device_holds_the_same_bits(
    models: dict[str, Checkpoint], room: str, tuned: tuple[str, ...], strided: bool
) -> None:
    merge = merge_of(models, *tuned)
    writer, views = DeviceWriter(torch.device("cpu"), room=ROOMS[room]), views_of(merge, strided=strided)
    for base in (0.3, -1.1, 0.0):
        merged = merge.at({name: base and base + 0.1 * i for i, name in enumerate(merge.weight_names)})
        writer.write(merged, views)
        for name, view in views:
            assert torch.equal(view, merged.read(name)), name


def test_what_is_no_merge_is_streamed_and_another_merge_takes_its_place(models: dict[str, Checkpoint]) -> None:
    first, second = merge_of(models, "tuned"), merge_of(models, "other")
    writer, views = DeviceWriter(torch.device("cpu"), room=1 << 40), views_of(first)
    for state_dict in (
        first.at(dict.fromkeys(first.weight_names, 0.7)),
        models["tuned"],
        second.at(dict.fromkeys(second.weight_names, 0.7)),
        first.at(dict.fromkeys(first.weight_names, -0.2)),
    ):
        writer.write(state_dict, views)
        assert all(torch.equal(view, state_dict.read(name)) for name, view in views)


def test_what_does_not_fit_is_not_kept_there(models: dict[str, Checkpoint]) -> None:
    merge = merge_of(models, "tuned")
    needed = 2 * sum(merge.spec(name).nbytes for name in merge.target.names)
    for room, fits in ((int(needed * 1.11), True), (needed, False)):
        writer = DeviceWriter(torch.device("cpu"), room=room)
        writer.write(merge.at(dict.fromkeys(merge.weight_names, 0.5)), views_of(merge))
        assert writer._fits == fits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", ROOMS)
def test_a_gpu_holds_the_same_bits(tmp_path: Path, room: str) -> None:
    base = save_mistral(tmp_path / "base", seed=0)
    folders = {
        name: save_mistral(tmp_path / name, seed=i, drift_from=base) for i, name in enumerate(("target", "tuned"))
    }
    models = {name: Checkpoint(resolve(str(folder))) for name, folder in {**folders, "base": base}.items()}
    merge = merge_of(models, "tuned")
    views = [
        (name, torch.zeros(merge.spec(name).shape, dtype=torch.bfloat16, device="cuda")) for name in merge.target.names
    ]
    writer = DeviceWriter(torch.device("cuda"), room=ROOMS[room])
    for base_weight in (0.3, -1.1, 0.0):
        merged = merge.at(dict.fromkeys(merge.weight_names, base_weight))
        writer.write(merged, views)
        assert all(torch.equal(view.cpu(), merged.read(name)) for name, view in views)
