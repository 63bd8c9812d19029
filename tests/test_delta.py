"""Sums of differences against float64, for all dtypes, parts, threads and ways of keeping them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvmerge import delta as module
from tvmerge.delta import Delta, together
from tvmerge.state_dict import DTYPES as NUMPY
from tvmerge.state_dict import as_array, as_tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FLOATS = DTYPES[:3]


def difference(minuend: Tensor, subtrahend: Tensor | None = None) -> Delta:
    return Delta(as_array(minuend), None if subtrahend is None else as_array(subtrahend))


def add_deltas(target: Tensor, deltas: list[Delta], weights: list[float], *, out: Tensor) -> Tensor:
    module.add_deltas(as_array(target), deltas, weights, out=as_array(out))
    return out


def keep_exactly(delta: Delta, dtype: torch.dtype) -> Delta:
    name = str(dtype).removeprefix("torch.")
    return module.keep_exactly(delta, NUMPY.get(name, np.dtype(np.float64)))


def all_finite(tensor: Tensor) -> bool:
    return module.all_finite(as_array(tensor))


def exact(target: Tensor, deltas: list[Delta], weights: list[float]) -> Tensor:
    """The reference: float64 over the stored values."""
    total = target.double()
    for term, weight in zip(deltas, weights, strict=True):
        minuend = as_tensor(term.minuend).double()
        total = total + weight * (minuend if term.subtrahend is None else minuend - as_tensor(term.subtrahend).double())
    return total


def ulps(value: Tensor, reference: Tensor) -> float:
    """Greatest distance from a float64 reference, in units of the last place that `value`'s dtype has there."""
    info = torch.finfo(value.dtype)
    # The last place of a number is that of its power of two, and in the subnormals that of the least normal number.
    _, exponent = torch.frexp(reference.abs().clamp_min(info.tiny))
    last_place = info.eps * torch.exp2(exponent.double() - 1)
    return float(((value.double() - reference).abs() / last_place).max())


def draw(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("target", "tuned", "base", "out"), list(itertools.product(FLOATS, repeat=4)))
def test_every_mixture_of_dtypes_is_float64_rounded_once(
    target: torch.dtype, tuned: torch.dtype, base: torch.dtype, out: torch.dtype
) -> None:
    n = 70_001
    t, a, b = draw(n, target, 0), draw(n, tuned, 1), draw(n, base, 2)
    weight = float(np.float32(0.7))
    result = add_deltas(t, [difference(a, b)], [weight], out=torch.empty(n, dtype=out))
    reference = exact(t, [difference(a, b)], [weight])
    assert torch.equal(result, reference.to(out))
    assert ulps(result, reference) <= 0.51


numbers = (
    st.floats(-1e4, 1e4, width=16) | st.floats(-(2**-10), 2**-10, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-8])
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=40),
    weight=st.floats(-3, 3, width=32),
    dtype=st.sampled_from(FLOATS),
    cancel=st.booleans(),
)
def test_no_element_is_further_than_one_ulp_from_float64(
    rows: list[tuple[float, float, float]], weight: float, dtype: torch.dtype, cancel: bool
) -> None:
    t, a, b = (torch.tensor(column, dtype=torch.float64).to(dtype) for column in zip(*rows, strict=True))
    if cancel:  # the worst case: the sum is a small part of its terms
        t = (-weight * (a.double() - b.double())).to(dtype)
    reference = exact(t, [difference(a, b)], [weight])
    reference = reference[keep := reference.abs() < torch.finfo(dtype).max]
    for delta in (difference(a, b), keep_exactly(difference(a, b), dtype)):
        result = add_deltas(t, [delta], [weight], out=torch.empty_like(t))[keep]
        assert not len(result) or ulps(result, reference) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_ways_of_keeping_and_adding_give_the_same_bits(dtype: torch.dtype) -> None:
    n = 300_007
    t, a = draw(n, dtype, 0), draw(n, dtype, 1)
    b = (a.double() + 0.02 * draw(n, torch.float64, 2)).to(dtype)
    both = difference(a, b)
    kept = keep_exactly(both, dtype)
    assert kept.subtrahend is None
    assert torch.equal(as_tensor(kept.exact()), a.double() - b.double())
    if dtype in (torch.bfloat16, torch.float16):
        assert kept.index is not None
        assert 0 < len(kept.index) < 0.02 * n, "near each other, models have differences of their own dtype"
    for terms, weights in (([0], [0.37]), ([0, 1], [0.37, -1.25])):
        weights = [float(np.float32(weight)) for weight in weights]
        other = difference(b, a)
        expected = exact(t, [[both, other][i] for i in terms], weights).to(dtype)
        for first in (both, kept):
            deltas = [[first, other][i] for i in terms]
            assert torch.equal(add_deltas(t, deltas, weights, out=torch.empty_like(t)), expected)


def test_what_would_be_listed_too_often_is_not_kept() -> None:
    delta = difference(draw(5000, torch.bfloat16, 0), draw(5000, torch.bfloat16, 1))
    assert keep_exactly(delta, torch.bfloat16) is delta
    empty = difference(torch.empty(0, 3), torch.empty(0, 3))
    assert keep_exactly(empty, torch.float32).exact().shape == (0, 3)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 500_003
    t, a, b = (draw(n, torch.bfloat16, seed) for seed in range(3))
    near = difference(a, (a.double() + 0.02 * b.double()).bfloat16())
    kept = keep_exactly(near, torch.bfloat16)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr(module, "_pool", None)
    assert module.n_threads() == threads
    for deltas, plain in (
        ([difference(a, b)],) * 2,
        ([kept], [near]),
        ([kept, difference(a, b)], [near, difference(a, b)]),
    ):
        weights = [0.5, 0.25][: len(deltas)]
        result = add_deltas(t, deltas, weights, out=torch.empty_like(t))
        assert torch.equal(result, exact(t, plain, weights).bfloat16())


def test_a_view_that_is_not_contiguous_is_filled_and_nothing_beside_it() -> None:
    t, a, b = (draw(24, torch.bfloat16, seed).reshape(4, 6) for seed in range(3))
    whole = torch.full((8, 6), 7.0, dtype=torch.bfloat16)
    add_deltas(t, [difference(a, b)], [1.0], out=whole[::2])
    assert torch.equal(whole[::2], exact(t, [difference(a, b)], [1.0]).bfloat16())
    assert bool((whole[1::2] == 7).all())
    transposed = torch.empty(6, 4, dtype=torch.bfloat16)
    add_deltas(t, [difference(a, b)], [1.0], out=transposed.T)
    assert torch.equal(transposed.T, whole[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_found_and_stay(dtype: torch.dtype, bad: float) -> None:
    values = draw(200_000, dtype, 0)
    values[0] = torch.finfo(dtype).max
    values[1] = torch.finfo(dtype).tiny
    assert all_finite(values)
    zeros = torch.zeros_like(values)
    for place in (0, 77_777, 199_999):
        values[place] = bad
        assert not all_finite(values)
        result = add_deltas(values, [difference(zeros, zeros)], [0.5], out=torch.empty_like(values))
        assert torch.equal(result[place].isnan(), torch.tensor(bad != bad))
        assert torch.equal(result[place].isinf(), torch.tensor(bad == bad))
        values[place] = 1.0


def test_sums_together_are_complete_at_the_end_and_not_later_than_an_error() -> None:
    n = 400_003
    t, a, b = (draw(n, torch.bfloat16, seed) for seed in range(3))
    expected = exact(t, [difference(a, b)], [0.5]).bfloat16()
    outs = [torch.empty_like(t) for _ in range(20)]
    with together():
        for out in outs:
            add_deltas(t, [difference(a, b)], [0.5], out=out)
    assert all(torch.equal(out, expected) for out in outs)
    with together():
        wide = add_deltas(t, [difference(a, b)], [0.5], out=torch.empty(2 * n, dtype=torch.bfloat16)[::2])
        assert torch.equal(wide, expected), "a copy of an unfinished sum"

    def fail() -> None:
        with together():
            for out in outs:
                add_deltas(t, [difference(a, b)], [0.5], out=out.zero_())
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    after = [out.clone() for out in outs]
    time.sleep(0.05)
    assert all(torch.equal(out, kept) for out, kept in zip(outs, after, strict=True))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_nans_of_every_kind_stay(source: torch.dtype, out: torch.dtype) -> None:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source.itemsize]
    largest = torch.iinfo(width).max  # all ones but the sign
    bits = torch.tensor([-1, largest, largest - 1], dtype=width)
    nans = bits.view(source)
    assert bool(nans.isnan().all())
    ones = torch.ones(3, dtype=source)
    for a, b in ((nans, ones), (ones, nans)):
        result = add_deltas(ones, [difference(a, b)], [0.5], out=torch.empty(3, dtype=out))
        assert bool(result.isnan().all())
    assert bool(add_deltas(nans, [difference(ones, ones)], [0.5], out=torch.empty(3, dtype=out)).isnan().all())
    assert not all_finite(nans)


@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_compiled_loops_that_were_kept_badly_are_compiled_anew(tmp_path: Path, damage: str) -> None:
    code = (
        "import numpy as np; from tvmerge.delta import Delta, add_deltas; a = np.ones(9, np.float16); "
        "print(add_deltas(a, [Delta(a, a * 3)], [0.5], out=a.copy()).tolist())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str([0.0] * 9)
        kept = list(tmp_path.rglob("*.nb*"))
        assert kept
        for path in kept:
            path.write_bytes(path.read_bytes()[:20] if damage == "cut" else b"")


def test_arrays_of_other_shapes_are_no_sum() -> None:
    a, b = np.ones(6, np.float32), np.ones(4, np.float32)
    for target, minuend in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="shapes differ"):
            module.add_deltas(target, [Delta(minuend)], [1.0], out=np.empty(6, np.float32))
    with pytest.raises(ValueError, match="shapes differ"):
        Delta(a, b)
