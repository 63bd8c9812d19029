"""Mixtures of merges: each tensor against its formula in float64, and the live model against transformers' own."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conformance_state_dict import check_state_dict
from test_moe import IDS, VARIANTS, described, mixture, random_router, save, written
from torch import Tensor

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.merge import Merge
from tvmerge.mixture import MixtureMerge, MixtureSettings
from tvmerge.models.device import DeviceWriter
from tvmerge.models.transformers import TransformersModel
from tvmerge.moe import LAYOUTS, MixtureOfExperts, is_mlp
from tvmerge.moe_config import moe_config
from tvmerge.state_dict import Array, StateDict, TensorSpec, WithTensors
from tvmerge.task_vector import Difference
from tvmerge.writer import copy_model_files

BLOCK = "model.layers.{}.block_sparse_moe."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("mixtures")
    roles = ("a", "b", "c", "base", "tuned", "other")
    return {role: save(root / role, seed=n, dtype=torch.bfloat16) for n, role in enumerate(roles)}


def merged(
    models: Mapping[str, Checkpoint],
    *settings: Any,
    targets: Sequence[str] = ("a", "b"),
    tuned: Sequence[str] = ("tuned",),
    grouping: Grouping | None = None,
    **more: Any,
) -> MixtureMerge:
    vectors = {name: Difference(tuned=models[name], base=models["base"]) for name in tuned}
    grouping = grouping or Grouping("layer")
    merges = [Merge(target=models[name], task_vectors=vectors, grouping=grouping, **more) for name in targets]
    router = random_router(models["a"], len(targets))
    chosen = settings[0] if settings else MixtureSettings()
    return MixtureMerge(merges=merges, layout=LAYOUTS["mistral"], router=router, settings=chosen)


def numbers(mixture: MixtureMerge, seed: int = 0) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    names = [*mixture.weight_names, *mixture.gate_names]
    return {name: float(generator.uniform(0.3, 1.7)) for name in names}


def rounded(value: Array) -> Array:
    """float64 → bfloat16 by way of float32, as torch."""
    return value.astype(np.float32).astype(ml_dtypes.bfloat16)


def summed(models: Mapping[str, Checkpoint], target: str, name: str, weight: float) -> Array:
    t, u, b = (models[role].array(name).astype(np.float64) for role in (target, "tuned", "base"))
    total: Array = t + float(np.float32(weight)) * (u - b)
    return total


def test_each_expert_has_a_weight_for_each_group_that_moves_the_mixture(models: dict[str, Checkpoint]) -> None:
    groups = ["embed_tokens", "layers.0", "layers.1", "layers.2", "lm_head", "norm"]
    layers = [group for group in groups if group.startswith("layers")]
    average = merged(models, MixtureSettings(base="average"))
    assert average.weight_names == [f"expert{n}/{group}" for n in (1, 2) for group in groups]
    first = merged(models, targets="abc")
    assert first.weight_names == [
        *(f"expert1/{group}" for group in groups),
        *(f"expert{n}/{group}" for n in (2, 3) for group in layers),
    ]
    shared = merged(models, MixtureSettings(share_weights=True))
    assert shared.weight_names == groups
    gated = merged(models, MixtureSettings(share_weights=True, search_gate=True))
    assert (gated.weight_names, gated.gate_names) == (groups, [f"gate/layers.{n}" for n in range(3)])
    both = merged(models, tuned=("tuned", "other"))
    assert {"expert1/tuned/layers.0", "expert2/other/layers.2"} < set(both.weight_names)
    kinds = merged(models, grouping=Grouping("parameter"))
    assert [name for name in kinds.weight_names if name.startswith("expert2")] == [
        f"expert2/{part}_proj" for part in ("down", "gate", "up")
    ]


def test_every_weight_moves_a_tensor_of_the_mixture(models: dict[str, Checkpoint]) -> None:
    for base in ("first", "average"):
        for grouping in (Grouping("layer"), Grouping("all"), Grouping("parameter"), Grouping("uniform")):
            mixture = merged(models, MixtureSettings(base=base, search_gate=True), grouping=grouping)
            point = dict.fromkeys(mixture.weight_names, 0.5) | dict.fromkeys(mixture.gate_names, 1.0)
            before = mixture.at(point)
            for name in point:
                after = mixture.at({**point, name: 0.75})
                assert any(before.version(tensor) != after.version(tensor) for tensor in before.names), name


@pytest.mark.parametrize("dtype", [None, np.dtype(np.float32)])
@pytest.mark.parametrize("base", ["first", "average"])
def test_tensors_are_the_targets_plus_weights_times_differences_rounded_once(
    models: dict[str, Checkpoint], base: str, dtype: Any
) -> None:
    mixture = merged(models, MixtureSettings(base=base, search_gate=True), dtype=dtype)
    weights = numbers(mixture)
    state_dict = mixture.at(weights)
    check_state_dict(state_dict)
    round_off = rounded if dtype is None else lambda value: value.astype(np.float32)
    for layer in range(3):
        for n, target in enumerate("ab"):
            for inside, dense in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                made = state_dict.array(f"{BLOCK.format(layer)}experts.{n}.{inside}.weight")
                whole = summed(
                    models, target, f"model.layers.{layer}.mlp.{dense}.weight", weights[f"expert{n + 1}/layers.{layer}"]
                )
                np.testing.assert_array_equal(made, round_off(whole))
        temperature = weights[f"gate/layers.{layer}"]
        gate = (mixture.router[layer].astype(np.float64) / temperature).astype(np.float32)
        made = state_dict.array(f"{BLOCK.format(layer)}gate.weight")
        np.testing.assert_array_equal(made, gate if dtype is not None else gate.astype(ml_dtypes.bfloat16))
    for name, group in (("model.layers.1.self_attn.q_proj.weight", "layers.1"), ("model.norm.weight", "norm")):
        each = [summed(models, t, name, weights.get(f"expert{n}/{group}", 0)) for n, t in enumerate("ab", start=1)]
        expected = each[0]
        if base == "average":
            mean = float(np.float32((weights[f"expert1/{group}"] + weights[f"expert2/{group}"]) / 2))
            expected = (summed(models, "a", name, mean) + summed(models, "b", name, mean)) / 2
            np.testing.assert_allclose(expected, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state_dict.array(name), round_off(expected))


def test_experts_are_rounded_once_to_the_dtype_of_the_first(tmp_path: Path, models: dict[str, Checkpoint]) -> None:
    wide = {**models, "b": save(tmp_path / "b", seed=9, dtype=torch.float32)}
    vectors = {"tuned": Difference(tuned=models["tuned"], base=models["base"])}
    merges = [
        Merge(target=wide[name], task_vectors=vectors, grouping=Grouping("uniform"), like=wide["a"]) for name in "ab"
    ]
    mixture = MixtureMerge(
        merges=merges,
        layout=LAYOUTS["mistral"],
        router=random_router(wide["a"], 2),
        settings=MixtureSettings(base="average"),
    )
    state_dict = mixture.at({"expert1/uniform": 0.37, "expert2/uniform": 0.71})
    made = state_dict.array(f"{BLOCK.format(0)}experts.1.w2.weight")
    np.testing.assert_array_equal(made, rounded(summed(wide, "b", "model.layers.0.mlp.down_proj.weight", 0.71)))
    assert {state_dict.spec(name).dtype for name in state_dict.names} == {np.dtype(ml_dtypes.bfloat16)}


def test_the_mean_of_three_experts_is_rounded_once(models: dict[str, Checkpoint]) -> None:
    frozen = Grouping("uniform", freeze=("norm",))
    mixture = merged(
        models, MixtureSettings(base="average"), targets="abc", grouping=frozen, dtype=np.dtype(np.float32)
    )
    weights = numbers(mixture)
    state_dict = mixture.at(weights)
    for name, is_frozen in (("model.layers.1.self_attn.q_proj.weight", False), ("model.norm.weight", True)):
        each = [
            summed(models, t, name, 0.0 if is_frozen else weights[f"expert{n}/uniform"])
            for n, t in enumerate("abc", start=1)
        ]
        np.testing.assert_allclose(state_dict.array(name), sum(each) / 3, rtol=2e-6, atol=2e-7)


class Spied(WithTensors):
    """A state dict that writes down what is read of it."""

    def __init__(self, state_dict: StateDict) -> None:
        self.names = state_dict.names
        self.read_names: list[str] = []
        self._state_dict = state_dict

    def spec(self, name: str) -> TensorSpec:
        return self._state_dict.spec(name)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        self.read_names.append(name)
        return self._state_dict.array(name, out=out)

    def version(self, name: str) -> Hashable:
        return self._state_dict.version(name)


def live_of(experts: Sequence[Checkpoint], state_dict: StateDict, folder: Path) -> TransformersModel:
    folder.mkdir()
    copy_model_files(experts[0].model.path, folder)
    (folder / "config.json").write_text(json.dumps(moe_config([described(expert) for expert in experts])))
    return TransformersModel.from_config(folder, state_dict=state_dict, device="cpu")


def test_between_trials_only_what_changed_is_rewritten_in_place(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    mixture = merged(models, MixtureSettings(search_gate=True))
    weights = numbers(mixture)
    live = live_of([models["a"], models["b"]], mixture.at(weights), tmp_path / "live")
    places = {name: parameter.data_ptr() for name, parameter in live.model.named_parameters()}
    for changed, expected in (
        ({}, []),
        ({"expert2/layers.1": 0.123}, [f"{BLOCK.format(1)}experts.1.{part}.weight" for part in ("w1", "w2", "w3")]),
        ({"gate/layers.2": 2.5}, [f"{BLOCK.format(2)}gate.weight"]),
        ({"expert1/norm": 0.0}, ["model.norm.weight"]),
    ):
        weights = {**weights, **changed}
        spied = Spied(mixture.at(weights))
        live.load(spied)
        assert sorted(spied.read_names) == sorted(expected)
    assert places == {name: parameter.data_ptr() for name, parameter in live.model.named_parameters()}
    fresh = live_of([models["a"], models["b"]], mixture.at(weights), tmp_path / "fresh")
    for name, parameter in fresh.model.named_parameters():
        assert torch.equal(parameter, live.model.get_parameter(name)), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_built_from_its_configuration_is_the_one_that_loads_from_a_folder(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    experts = [save(tmp_path / f"e{n}", kind, seed=n, dtype=torch.bfloat16, **changes) for n in range(2)]
    state_dict = mixture(experts)
    live = live_of(experts, state_dict, tmp_path / "live").model
    loaded = written(state_dict, moe_config([described(expert) for expert in experts]), tmp_path / "out")
    for kept in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(live, kept)()), dict(getattr(loaded, kept)())
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    assert live.config._experts_implementation == loaded.config._experts_implementation
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, loaded(IDS).logits)


def test_a_dense_model_alone_in_a_mixture_answers_as_it_does(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    mixture = merged(models, MixtureSettings(search_gate=True), targets="abc", dtype=np.dtype(np.float32))
    weights = numbers(mixture)
    folder = tmp_path / "live"
    experts = [models[name] for name in "abc"]
    folder.mkdir()
    copy_model_files(experts[0].model.path, folder)
    config = moe_config([described(expert) for expert in experts], dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    live = TransformersModel.from_config(folder, state_dict=mixture.at(weights), device="cpu")
    with torch.no_grad():
        mixed = live.model(IDS).logits
        for n, target in enumerate("abc"):
            expert = mixture.expert(n, weights)
            live.load(mixture.alone(expert))
            dense = TransformersModel.from_folder(
                models[target].model.path, checkpoint=expert, device="cpu", dtype="float32"
            )
            dense.load(expert)
            expected = dense.model(IDS).logits
            torch.testing.assert_close(live.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(mixed, expected, atol=0.1)
        live.load(mixture.at(weights))
        assert torch.equal(live.model(IDS).logits, mixed)


def test_an_expert_keeps_its_target_where_nothing_was_searched(models: dict[str, Checkpoint]) -> None:
    mixture = merged(models)
    weights = numbers(mixture)
    expert = mixture.expert(1, weights)
    for name in expert.names:
        group = name.removeprefix("model.").partition(".weight")[0]
        group = ".".join(group.split(".")[:2]) if "layers" in group else group
        expected = rounded(summed(models, "b", name, weights.get(f"expert2/{group}", 0.0)))
        np.testing.assert_array_equal(expert.array(name), expected)
    assert not is_mlp("model.layers.0.self_attn.q_proj.weight")
    assert is_mlp("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("room", [1 << 40, 0])
@pytest.mark.parametrize("base", ["first", "average"])
def test_a_device_holds_the_same_bits(models: dict[str, Checkpoint], base: str, room: int, tmp_path: Path) -> None:
    # In float32, where the CPU's sum is one fused multiply-add as on a GPU.
    wide = {name: save(tmp_path / name, seed=n) for n, name in enumerate(("a", "b", "base", "tuned"))}
    mixture = merged(wide, MixtureSettings(base=base, search_gate=True))
    writer = DeviceWriter(torch.device("cpu"), room=room)
    views: list[tuple[str, Tensor]] = []
    first = mixture.at(numbers(mixture))
    views = [(name, torch.zeros(first.spec(name).shape)) for name in first.names]
    for state_dict in (first, mixture.at(numbers(mixture, 1)), mixture.alone(wide["tuned"]), first):
        writer.write(state_dict, views)
        assert all(torch.equal(view, state_dict.read(name)) for name, view in views)
    # Experts share their differences: each lies there once.
    parts = [(merge, name) for merge, names in mixture.parts() for name in names]
    moved = {
        (merge.task_vectors[label], name)
        for merge, name in parts
        for label, _ in (*merge.weights_of[name], *merge.fixed(name))
    }
    assert set(writer._terms) == (moved if room else set())


def test_numbers_that_are_not_those_of_the_mixture_are_refused(models: dict[str, Checkpoint]) -> None:
    mixture = merged(models, MixtureSettings(search_gate=True))
    weights = numbers(mixture)
    for wrong in ({**weights, "expert3/layers.0": 1.0}, {k: v for k, v in weights.items() if k != "gate/layers.0"}):
        with pytest.raises(ValueError, match="numbers are needed"):
            mixture.at(wrong)
    with pytest.raises(ValueError, match="temperatures must be above 0"):
        mixture.at({**weights, "gate/layers.0": 0.0})


def test_a_weight_and_a_temperature_of_one_name_are_refused(models: dict[str, Checkpoint]) -> None:
    named = {**models, "gate": models["other"]}
    with pytest.raises(IncompatibleError, match="a tuned model called gate"):
        merged(named, MixtureSettings(share_weights=True, search_gate=True), tuned=("tuned", "gate"))
    one: MixtureOfExperts = merged(named, MixtureSettings(search_gate=True), tuned=("tuned", "gate")).at(
        numbers(merged(named, MixtureSettings(search_gate=True), tuned=("tuned", "gate")))
    )
    assert one.names
