"""What every lazy state dict must do. `check_state_dict` runs over all implementations in test_state_dict.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tvmerge.state_dict import StateDict, as_array


def check_state_dict(state_dict: StateDict) -> None:
    """Names are sorted, specs hold without reading, reading is repeatable and fills a given output."""
    names = list(state_dict.names)
    assert names
    assert names == sorted(set(names))
    for name in names:
        spec = state_dict.spec(name)
        array, tensor = state_dict.array(name), state_dict.read(name)
        assert (array.shape, array.dtype, array.nbytes) == (spec.shape, spec.dtype, spec.nbytes)
        assert (tuple(tensor.shape), str(tensor.dtype)) == (spec.shape, f"torch.{spec.dtype.name}")
        assert array.tobytes() == as_array(tensor).tobytes()
        room = np.empty(spec.shape, spec.dtype)
        assert state_dict.array(name, out=room) is room
        assert room.tobytes() == array.tobytes()
        assert torch.equal(state_dict.read(name), tensor)
        assert state_dict.version(name) == state_dict.version(name)
        hash(state_dict.version(name))
        out = torch.empty(spec.shape, dtype=tensor.dtype)
        assert state_dict.read(name, out=out) is out
        assert torch.equal(out, tensor)
        wide = torch.empty(spec.shape, dtype=torch.float64)
        assert torch.equal(state_dict.read(name, out=wide), tensor.double())
        kept = tensor.clone()
        out.add_(1)
        room[...] = 1
        assert torch.equal(state_dict.read(name), kept), "writing into an output changed the source"
    with pytest.raises(KeyError):
        state_dict.spec("no.such.tensor")
    with pytest.raises(KeyError):
        state_dict.read("no.such.tensor")
