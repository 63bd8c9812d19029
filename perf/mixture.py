"""What a trial of a mixture of experts costs before it is scored: its merges into the one live model, in place.

    python perf/mixture.py                # two experts of 252 M parameters each
    python perf/mixture.py --rounds 21

Models are those of perf/merge.py; the second expert's target is a copy of the first's files, so that both are read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from merge import medians, processor, row
from models import MEDIUM, Shape, make_models, opened
from transformers import AutoModelForCausalLM

from tvmerge.checkpoint import Checkpoint
from tvmerge.gates import mixture_folder
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.merge import Merge
from tvmerge.mixture import MixtureMerge, MixtureSettings
from tvmerge.models.transformers import TransformersModel
from tvmerge.moe import LAYOUTS
from tvmerge.moe_config import DenseModel, moe_config
from tvmerge.router import drawn_gates
from tvmerge.state_dict import StateDict, TensorSpec, WithTensors
from tvmerge.task_vector import Difference, KeptTaskVector
from tvmerge.writer import write_weights

__all__ = ["construction", "mixture_of", "time_trial"]


def mixture_of(folder: Path, *, keep: bool, base: str = "first") -> MixtureMerge:
    """Two experts, a weight per layer and expert."""
    models = opened(folder)
    vector = Difference(tuned=models["tuned"], base=models["base"])
    vectors = {"tuned": KeptTaskVector(vector) if keep else vector}
    targets = [models["target"], Checkpoint(resolve(str(folder / "second")))]
    merges = [Merge(target=target, task_vectors=vectors, grouping=Grouping("layer")) for target in targets]
    config = models["target"].config
    router = drawn_gates("random", (config["num_hidden_layers"], 2, config["hidden_size"]), seed=0)
    settings = MixtureSettings(base=base)
    return MixtureMerge(merges=merges, layout=LAYOUTS["mistral"], router=router, settings=settings)


def points(mixture: MixtureMerge, *, only: str = "") -> Iterator[StateDict]:
    """Mixtures at other weights each time, or with others for the names that hold `only`."""
    for n in itertools.count():
        names = enumerate(mixture.weight_names)
        yield mixture.at({name: 0.3 + 0.001 * (i + n * (only in name)) for i, name in names})


def moved_elements(mixture: MixtureMerge) -> int:
    """How many elements of the live model a trial rewrites."""
    return sum(merge.spec(name).size for merge, names in mixture.parts() for name in names)


def time_trial(folder: Path, *, rounds: int) -> dict[str, float]:
    """Milliseconds from weights to live model."""
    if not (folder / "second").exists():
        shutil.copytree(folder / "target", folder / "second")
    dense = DenseModel("target", opened(folder)["target"].config)
    kept, mapped = (mixture_of(folder, keep=keep) for keep in (True, False))
    average = mixture_of(folder, keep=True, base="average")
    n = moved_elements(kept)
    a, b, c = (torch.full((n,), value, dtype=torch.bfloat16) for value in (1.0, 2.0, 0.0))
    config = moe_config([dense, dense])
    with mixture_folder(folder / "target", config, united=None) as files:
        live = TransformersModel.from_config(files, state_dict=next(points(kept)), device="cpu")
    of_kept, of_mapped, of_average = (points(mixture) for mixture in (kept, mapped, average))
    out = folder / "written"

    def write_and_load() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "config.json").write_text(json.dumps(config))
        write_weights(next(of_kept), out)
        AutoModelForCausalLM.from_pretrained(out, dtype="auto")

    times = medians(
        {
            "limit: one torch.add of three arrays of what is rewritten": lambda: torch.add(a, b, alpha=0.37, out=c),
            "mixture, --delta_storage memory": lambda: live.load(next(of_kept)),
            "mixture, --delta_storage mmap": lambda: live.load(next(of_mapped)),
            "mixture, memory, --moe_base average": lambda: live.load(next(of_average)),
            "written to a folder and loaded again": write_and_load,
        },
        rounds=rounds,
    )
    of_one = points(kept, only="expert2/layers.1")
    live.load(next(of_one))
    one = "mixture, memory, one layer of one expert moved"
    return times | medians({one: lambda: live.load(next(of_one))}, rounds=rounds)


class Shapes(WithTensors):
    """A model of which only names and shapes are looked at."""

    def __init__(self, shape: Shape) -> None:
        self._shapes = shape.tensors()
        self.names = sorted(self._shapes)

    def spec(self, name: str) -> TensorSpec:
        """All float32."""
        return TensorSpec(self._shapes[name], np.dtype(np.float32))

    def array(self, name: str, *, out: object = None) -> object:
        """Nobody reads it."""
        raise AssertionError(name)

    def version(self, name: str) -> object:
        """It does not change."""
        return name


def construction(*, layers: int = 32, n_experts: int = 8, rounds: int = 9) -> Mapping[str, float]:
    """Milliseconds of what a trial does before the first byte: a mixture as large as Mixtral at other weights."""
    shapes = Shapes(Shape(hidden=512, inner=512, layers=layers, vocabulary=64))
    vectors = {"tuned": Difference(tuned=shapes, base=shapes)}  # type: ignore[arg-type]
    merges = [
        Merge(target=shapes, task_vectors=vectors, grouping=Grouping("layer"))  # type: ignore[arg-type]
        for _ in range(n_experts)
    ]
    router = drawn_gates("random", (layers, n_experts, 512), seed=0)
    mixture = MixtureMerge(merges=merges, layout=LAYOUTS["mistral"], router=router, settings=MixtureSettings())
    of_mixture = points(mixture)
    versions: dict[str, object] = {}

    def look() -> None:
        state_dict = next(of_mixture)
        versions.update({name: state_dict.version(name) for name in state_dict.names})

    return medians({f"{n_experts} experts of {layers} layers, put together and compared": look}, rounds=rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, MEDIUM)
        times = time_trial(folder, rounds=options.rounds)
        rewritten = 2 * moved_elements(mixture_of(folder, keep=False))
        limit = next(iter(times.values()))
        print(f"{rewritten / 1e6:.0f} MB are rewritten in a trial that moves all weights\n")
        row("weights to live mixture, medians", "ms", "of the limit")
        row("---", "---:", "---:")
        for what, ms in times.items():
            row(what, f"{ms:.1f}", f"{ms / limit:.2f}")
    print()
    for what, ms in construction(rounds=options.rounds).items():
        print(f"{what}: {ms:.1f} ms, beside reading and writing")


if __name__ == "__main__":
    main()
