"""`tvmerge moe` against what mergekit-moe made of the same tiny models, which golden/make_mergekit_moe.py wrote down.

Every tensor has mergekit's bytes, but for routers: those that are drawn at random, and those that are made of hidden
states or written in float32, which are mergekit's up to the noise of sums.

Where they differ on purpose:
- mergekit answers the prompts of `hidden` in bfloat16, whatever the weights are in; ours in the dtype of the weights.
- mergekit averages the padding of shorter prompts into `hidden_avg`; ours does not.
- mergekit takes the sliding window from a mixture of Mistrals, which then computes what none of them did on a text that
  is longer than it; ours keeps it.
- mergekit wants a shared expert in a mixture of Qwen2; ours has one of zeros, so that the experts alone speak.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from make_mergekit_moe import CASES, CONFIG_KEYS, GOLDEN, LAYERS, Case, fingerprint, read_tensors, save_models, yaml_of

from tvmerge.cli import main
from tvmerge.moe import SHARED_WIDTH

THEIRS: Mapping[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
GATES = [f"model.layers.{n}.mlp.gate.weight" for n in range(LAYERS)]
PADDED = "mistral, hidden_avg"
#: Of the coordinates of a row of length 1 in float32, where sums in another order differed by up to 1.5·2⁻²⁴.
NOISE = 2.0**-20
#: The same in bfloat16, of 8 bits, where they differed by up to 0.0121, most where negative prompts are subtracted.
NOISE_OF_BFLOAT16 = 2.0**-6

Made = Callable[[str], Path]
Arrays = dict[str, npt.NDArray[Any]]


def cases(keep: Callable[[Case], bool]) -> list[str]:
    return [name for name, case in CASES.items() if keep(case)]


OF_HIDDEN_STATES = [name for name in cases(lambda case: case.gate_mode.startswith("hidden")) if name != PADDED]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What our command writes for a case, once."""
    root = tmp_path_factory.mktemp("golden")

    @cache
    def make(name: str) -> Path:
        save_models(CASES[name], root)
        file, out = root / f"{name}.yaml", root / f"mixture of {name}"
        file.write_text(yaml.safe_dump(yaml_of(CASES[name], root), allow_unicode=True), encoding="utf-8")
        assert main(["moe", str(file), "--output_dir", str(out), "--device", "cpu"]) == 0
        return out

    return make


def respelled(tensors: Mapping[str, npt.NDArray[Any]], case: Case) -> Arrays:
    """Our tensors under mergekit's names.

    Ours are spelled as published checkpoints of Mixtral and Qwen3-MoE are, which more than transformers 5 can read.
    mergekit 0.1.5 writes what transformers 5 makes of those in memory: the experts of a layer in one tensor, the gate
    of each followed by its up projection. The bytes stay what they are, one tensor's behind the other's.
    """
    found = {name.replace(".block_sparse_moe.", ".mlp."): array for name, array in tensors.items()}
    if case.family == "qwen2":  # which mergekit spells as we do
        return found
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if case.family == "qwen3" else ("w1", "w3", "w2")

    def joined(layer: int, *projections: str) -> npt.NDArray[Any]:
        prefix = f"model.layers.{layer}.mlp.experts."
        return np.stack(
            [
                np.concatenate([found.pop(f"{prefix}{n}.{own}.weight") for own in projections])
                for n in range(case.experts)
            ]
        )

    for layer in range(LAYERS):
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = joined(layer, gate, up)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = joined(layer, down)
    return found


def our_router(folder: Path, case: Case) -> npt.NDArray[Any]:
    tensors = respelled(read_tensors(folder), case)
    return np.stack([tensors[name] for name in GATES])


def assert_rounded(ours: npt.NDArray[Any], exact: npt.NDArray[np.float32], *, noise: float) -> None:
    """Ours are those values, but for noise, rounded to their dtype: by half the distance of two neighbours at most."""
    half = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}[str(ours.dtype)]
    np.testing.assert_allclose(ours.astype(np.float64), exact.astype(np.float64), rtol=half, atol=noise)


def test_all_cases_were_measured() -> None:
    assert THEIRS.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_but_the_router_has_mergekits_bytes(name: str, made: Made) -> None:
    tensors = respelled(read_tensors(made(name)), CASES[name])
    ours = {key: fingerprint(array) for key, array in tensors.items()}
    theirs = dict(THEIRS[name]["tensors"])
    assert ours.keys() == theirs.keys()
    assert {key: ours.pop(key)[:2] for key in GATES} == {key: theirs.pop(key)[:2] for key in GATES}
    for key in [key for key in ours if ".shared_expert" in key]:  # of Qwen2
        assert not tensors[key].any()
        assert ours.pop(key)[1] == theirs.pop(key)[1]
    assert ours == theirs


@pytest.mark.parametrize("name", cases(lambda case: case.gate_mode == "cheap_embed"))
def test_routers_of_embeddings_are_mergekits(name: str, made: Made) -> None:
    ours = our_router(made(name), CASES[name])
    if ours.dtype == np.float32:  # in which mergekit sums, where ours are sums in float64
        np.testing.assert_allclose(ours, np.array(THEIRS[name]["router"]), rtol=0, atol=2.0**-23)
    else:
        theirs = [THEIRS[name]["tensors"][key] for key in GATES]
        assert [fingerprint(layer) for layer in ours] == theirs


@pytest.mark.parametrize("name", OF_HIDDEN_STATES)
def test_routers_of_hidden_states_are_mergekits_in_float32(name: str, made: Made) -> None:
    case = CASES[name]
    exact = np.array(THEIRS[name]["router_in_float32"], np.float32)
    ours = our_router(made(name), case)
    # What enters the first layer are embeddings, which no dtype changes.
    layers = slice(LAYERS if case.weights == "float32" else 1)
    assert_rounded(ours[layers], exact[layers], noise=NOISE)


@pytest.mark.parametrize("name", OF_HIDDEN_STATES)
def test_routers_of_hidden_states_are_mergekits_in_bfloat16(name: str, made: Made) -> None:
    theirs = np.array(THEIRS[name]["router"], np.float32)
    assert_rounded(our_router(made(name), CASES[name]), theirs, noise=NOISE_OF_BFLOAT16)


def test_an_average_without_padding_is_mergekits_and_with_padding_its_mistake(made: Made) -> None:
    """Of the three experts the second has one prompt, the others some of other lengths, which a batch pads."""
    theirs = np.array(THEIRS[PADDED]["router_in_float32"], np.float32)
    ours = our_router(made(PADDED), CASES[PADDED])
    assert_rounded(ours[:, 1], theirs[:, 1], noise=NOISE)
    assert (np.abs(ours - theirs).max(axis=-1)[:, [0, 2]] > 0.1).all()


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_computes_by_mergekits_settings(name: str, made: Made) -> None:
    config = json.loads((made(name) / "config.json").read_text(encoding="utf-8"))
    ours, theirs = {key: config[key] for key in CONFIG_KEYS if key in config}, dict(THEIRS[name]["config"])
    # For releases of transformers before 5, which know no rope_parameters.
    older = {"rope_theta": ours.pop("rope_theta"), **ours.pop("rope_scaling", {})}
    assert {"rope_type": "default", **older} == theirs["rope_parameters"]
    match CASES[name].family:
        case "mistral":
            assert (ours.pop("sliding_window"), theirs.pop("sliding_window")) == (8, None)
        case "llama":  # of which Mixtral knows nothing
            assert not theirs.pop("attention_bias")
        case "qwen2":
            assert (
                ours.pop("head_dim") == theirs["hidden_size"] // theirs["num_attention_heads"]
            )  # as where none is given
            inner = "shared_expert_intermediate_size"
            assert (ours.pop(inner), theirs.pop(inner)) == (SHARED_WIDTH, theirs["intermediate_size"])
        case "qwen3":  # a new name, which releases before 5 do not read; and windows, which a model without has none of
            theirs["num_experts"] = theirs.pop("num_local_experts")
            assert not theirs["use_sliding_window"]
            del theirs["layer_types"], theirs["max_window_layers"]
    assert ours == theirs
