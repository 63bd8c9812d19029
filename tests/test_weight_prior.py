"""The prior over weights: what is near in a model goes together."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmerge.granularity import GRANULARITIES, Grouping, group_tensors
from tvmerge.samplers.weight_prior import LOG_TEMPERATURE_SD, MAX_MODES, OWN, WEIGHT_SD, correlation, modes, places

TENSORS = [
    *(f"model.layers.{n}.{kind}.weight" for n in range(12) for kind in ("self_attn.q_proj", "mlp.down_proj", "norm")),
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
]


def names_of(granularity: str) -> list[str]:
    groups = group_tensors(TENSORS, Grouping(granularity))
    return list(dict.fromkeys(groups.values()))


def between(names: list[str], first: str, second: str) -> float:
    return float(correlation(names)[names.index(first), names.index(second)])


@pytest.mark.parametrize("granularity", [*(name for name in GRANULARITIES if name != "block"), "block:5"])
@pytest.mark.parametrize("prefixes", [[""], ["expert1/", "expert2/"], ["expert1/a/", "expert1/b/", "expert2/a/"]])
def test_any_names_have_a_covariance(granularity: str, prefixes: list[str]) -> None:
    names = [prefix + name for prefix in prefixes for name in names_of(granularity)]
    matrix = correlation(names)
    assert np.allclose(matrix, matrix.T)
    assert np.allclose(np.diag(matrix), 1.0)
    assert np.linalg.eigvalsh(matrix).min() > 0.9 * OWN
    assert (matrix >= 0).all()
    assert (matrix - np.eye(len(names)) <= 1 - OWN).all()


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=12, unique=True))
def test_a_name_that_nobody_thought_of_has_a_place(names: list[str]) -> None:
    assert all(0 <= place.depth <= 1 for place in places(names))
    assert np.linalg.eigvalsh(correlation(names)).min() > 0.9 * OWN


def test_neighbouring_layers_go_together_and_distant_ones_do_not() -> None:
    names = names_of("layer")
    near, next_but_one, far = (between(names, "layers.3", f"layers.{n}") for n in (4, 5, 11))
    assert 0.6 < next_but_one < near < 0.95
    assert far < 0.1
    # One layer of 12 is 1/11 of the depth.
    assert near == pytest.approx(0.95 * np.exp(-0.5 * (1 / 11 / 0.2) ** 2))


def test_embeddings_are_at_the_bottom_and_the_head_at_the_top() -> None:
    names = names_of("layer")
    assert between(names, "embed_tokens", "layers.0") == pytest.approx(0.95 * 0.7)
    assert between(names, "lm_head", "layers.11") == pytest.approx(0.95 * 0.7)
    assert between(names, "embed_tokens", "lm_head") < 1e-4


def test_blocks_are_at_their_middle() -> None:
    assert [place.depth for place in places(["layers.0-4", "layers.5-9", "layers.10-11"])] == pytest.approx(
        [2 / 10.5, 7 / 10.5, 1.0]
    )


def test_without_layers_all_weights_are_at_one_depth() -> None:
    names = names_of("parameter")
    assert between(names, "embed_tokens", "q_proj") == pytest.approx(0.95 * 0.7)


def test_kinds_experts_and_task_vectors_go_together_less_and_less() -> None:
    names = [f"expert{n}/{label}/layers.{i}.{k}" for n in (1, 2) for label in "xy" for i in (0, 1) for k in ("q", "v")]
    first = "expert1/x/layers.0.q"
    kind, expert, vector, both = (
        between(names, first, other)
        for other in (
            "expert1/x/layers.0.v",
            "expert2/x/layers.0.q",
            "expert1/y/layers.0.q",
            "expert2/y/layers.0.q",
        )
    )
    assert (kind, expert, vector, both) == pytest.approx((0.95 * 0.7, 0.95 * 0.5, 0.95 * 0.3, 0.95 * 0.15))


def test_two_stacks_of_layers_are_two_kinds() -> None:
    names = ["decoder.layers.0", "decoder.layers.3", "encoder.layers.0", "encoder.layers.7"]
    assert between(names, "decoder.layers.3", "encoder.layers.7") == pytest.approx(0.95 * 0.7)


def test_modes_are_orthogonal_and_as_long_as_the_prior_says() -> None:
    names = tuple(names_of("all"))
    found = modes(names, (False,) * len(names))
    gram = found.T @ found
    assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    assert np.allclose(np.diag(gram), WEIGHT_SD**2 * np.linalg.eigvalsh(correlation(names))[::-1], rtol=1e-4)
    assert np.allclose(found @ found.T, WEIGHT_SD**2 * correlation(names), atol=1e-5)
    assert (found[:, 0] > 0).all(), "the first is all up"
    assert not found.flags.writeable


def test_temperatures_are_apart_from_weights_and_among_the_leading_modes() -> None:
    weights = [f"expert{e}/layers.{n}" for e in range(1, 9) for n in range(8)]
    gates = [f"gate/layers.{n}" for n in range(8)]
    is_temperature = (False,) * len(weights) + (True,) * len(gates)
    found = modes((*weights, *gates), is_temperature)
    mixed = (np.abs(found[: len(weights)]).max(axis=0) > 1e-12) & (np.abs(found[len(weights) :]).max(axis=0) > 1e-12)
    assert not mixed.any()
    of_gates = found[len(weights) :, np.abs(found[: len(weights)]).max(axis=0) < 1e-12]
    assert np.allclose((of_gates**2).sum(axis=1), LOG_TEMPERATURE_SD**2)
    assert (np.abs(found[len(weights) :, :3]).max(axis=0) > 0).any(), "64 weights do not crowd 8 temperatures out"


def test_every_process_finds_the_same_modes() -> None:
    # Kinds are interchangeable here, so that eigenvalues coincide and only the tie-break chooses eigenvectors.
    code = (
        "from tvmerge.samplers.weight_prior import modes\n"
        "names = tuple(f'layers.{n}.{k}' for n in range(9) for k in 'abcdef')\n"
        "print(modes(names, (False,) * 54).tobytes().hex())"
    )
    names = tuple(f"layers.{n}.{k}" for n in range(9) for k in "abcdef")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == modes(names, (False,) * 54).tobytes().hex()


def test_of_many_weights_the_leading_modes_are_kept() -> None:
    names = tuple(f"layers.{n}.{k}" for n in range(20) for k in "abcdef")
    found = modes(names, (False,) * 120)
    assert found.shape == (120, MAX_MODES)
    assert (found**2).sum() > 0.85 * 120 * WEIGHT_SD**2
