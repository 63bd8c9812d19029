"""What a merge costs: time, memory and disk, each beside its limit or a peer's, taken in the same run.

    python perf/merge.py                          # times and memory of a model of 252 M parameters
    python perf/merge.py --mergekit PATH          # and mergekit-yaml on the same merge, from an environment of its own
    python perf/merge.py --large                  # and a model of 3 B parameters, written with 2 GB of memory

Models are random, of Mistral's shape, in bfloat16. A tuned model is its base plus noise of 2% of its spread, unless
said otherwise: about one difference in a hundred has more digits than bfloat16, and is listed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import yaml
from models import LARGE, MEDIUM, ROLES, Shape, Weights, make_models, merge_of, mergekit_config, opened, recipe

from tvmerge.checkpoint import Checkpoint
from tvmerge.hub import resolve


def medians(
    work: Mapping[str, Callable[[], object]], *, rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Milliseconds of each, taken in turns, after one round that is not counted; `before` is not counted either."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for counted in [False] + [True] * rounds:
        for name, do in work.items():
            before()
            started = time.perf_counter()
            do()
            if counted:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def time_apply(folder: Path, *, rounds: int) -> dict[str, float]:
    """Weights to live model."""
    from tvmerge.models.transformers import TransformersModel

    models = opened(folder)
    live = TransformersModel.from_folder(folder / "target", checkpoint=models["target"], device="cpu")
    n = sum(models["target"].spec(name).size for name in models["target"].names)
    a, b, c = (torch.full((n,), value, dtype=torch.bfloat16) for value in (1.0, 2.0, 0.0))
    kept, mapped = (Weights(merge_of(folder, keep=keep)) for keep in (True, False))
    deltas = {name: models["tuned"].read(name) - models["base"].read(name) for name in models["target"].names}
    state = {name: models["target"].read(name) for name in models["target"].names}

    def script() -> None:
        live.model.load_state_dict(state)
        with torch.no_grad():
            for name, value in live.model.state_dict().items():
                value.copy_(value + 0.37 * deltas[name])
        live.forget()

    work = {
        "limit: one torch.add of three arrays of the model's size": lambda: torch.add(a, b, alpha=0.37, out=c),
        "apply, --delta_storage memory": lambda: live.load(kept()),
        "apply, --delta_storage mmap": lambda: live.load(mapped()),
        "load_state_dict, then v + w * delta in bfloat16": script,
    }
    times = medians(work, rounds=rounds)
    live.load(kept())
    one = medians({"": lambda: live.load(kept(only="layers.1"))}, rounds=rounds)[""]
    times["apply, --delta_storage memory, one layer of four moved"] = one
    return times


def run(command: list[str]) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def copy_bytes(folder: Path, out: Path) -> None:
    """The limit of writing: read the sources once, write and flush as many bytes as the result has."""
    block = bytearray(1 << 23)
    for role in ROLES:
        for path in sorted((folder / role).glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
    left = sum(path.stat().st_size for path in (folder / "target").glob("*.safetensors"))
    with out.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(memoryview(block)[: min(left, len(block))])
        os.fsync(file.fileno())
    out.unlink()


def compare(folder: Path, written: Path) -> str:
    """How many elements of a merged model are not those of float64, rounded to bfloat16."""
    merged, models = Checkpoint(resolve(str(written))), opened(folder)
    merge = merge_of(folder, keep=False)
    weights = {name: float(np.float32(w)) for name, w in yaml.safe_load(recipe(folder).read_text())["weights"].items()}
    different, furthest = 0, 0.0
    for name, ((_, weight),) in merge.weights_of.items():
        t, b, u = (models[role].array(name).astype(np.float64) for role in ROLES)
        exact = t + weights[weight] * (u - b)
        ours = merged.array(name)
        different += int((ours != exact.astype(ours.dtype)).sum())
        _, exponent = np.frexp(exact)
        last_place = np.ldexp(1.0, exponent - 8)  # bfloat16 has eight digits
        furthest = max(furthest, float((np.abs(ours.astype(np.float64) - exact) / last_place).max()))
    total = sum(models["target"].spec(name).size for name in merge.weights_of)
    return f"{different / total:.4%} of its elements are not float64's rounded, the furthest is {furthest:.2g} ulp off"


def time_write(folder: Path, shape: Shape, *, rounds: int, mergekit: Path | None) -> dict[str, float]:
    """Recipe to saved checkpoint."""
    ours, theirs = recipe(folder), mergekit_config(folder, shape)
    outs = (folder / f"out{n}" for n in itertools.count())

    def whole(command: list[str]) -> Callable[[], object]:
        def work() -> None:
            run([*command, str(next(outs))])

        return work

    work: dict[str, Callable[[], object]] = {
        "limit: read the sources, write and flush the result": lambda: copy_bytes(folder, folder / "copy"),
        "python -c 'import torch'": lambda: run([sys.executable, "-c", "import torch"]),
        "tvmerge apply, whole process": whole([sys.executable, "-m", "tvmerge", "apply", str(ours), "--output_dir"]),
    }
    if mergekit:
        work["mergekit-yaml, whole process"] = whole([str(mergekit), str(theirs)])

    def tidy() -> None:
        for done in sorted(folder.glob("out*"), key=lambda path: int(path.name[3:]))[:-2]:
            shutil.rmtree(done)
        os.sync()
        time.sleep(1)  # until the disk has really forgotten them

    times = medians(work, rounds=rounds, before=tidy)
    written = sorted(folder.glob("out*"), key=lambda path: int(path.name[3:]))
    for who, model in zip(("tvmerge", "mergekit") if mergekit else ("tvmerge",), written[-2:], strict=False):
        print(f"{who}: {compare(folder, model)}")
    print()
    return times


@contextmanager
def anonymous() -> Iterator[list[int]]:
    """Watch this process's anonymous memory: the list's only element is its growth at the highest, in bytes."""

    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise SystemExit("/proc/self/status has no RssAnon: this needs Linux")

    before, peak, stop = now(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], now() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[0] = max(peak[0], now() - before)


def measure_memory(what: str, folder: Path) -> int:
    """Growth of anonymous memory while something is done, in this process."""
    from tvmerge.models.transformers import TransformersModel

    if what == "write":
        from tvmerge.rebuild import apply_recipe

        with anonymous() as peak:
            apply_recipe(folder / "recipe.yaml", output=folder / "memory-out")
        shutil.rmtree(folder / "memory-out")
        return peak[0]
    target = opened(folder)["target"]
    live = TransformersModel.from_folder(folder / "target", checkpoint=target, device="cpu")
    live.load(target)  # so that every page of the live model is there before we look
    weights = Weights(merge_of(folder, keep=what == "memory"))
    with anonymous() as peak:
        for _ in range(3):
            live.load(weights())
    return peak[0]


def in_new_process(what: str, folder: Path) -> int:
    """`measure_memory` where nothing was allocated before."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", what, "--folder", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def write_large(folder: Path) -> tuple[float, float, int, int]:
    """Write a model of 3 B parameters under a hard limit of 2 GB of private writable memory.

    Returns:
        Seconds, seconds of the limit, the memory limit in bytes, the size of the result in bytes.
    """
    make_models(folder, LARGE)
    path, limit = recipe(folder), 2_000_000_000
    copying = time.perf_counter()
    copy_bytes(folder, folder / "copy")
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tvmerge", "apply", str(path), "--output_dir", str(folder / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    size = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    return time.perf_counter() - started, started - copying, limit, size


def processor() -> str:
    """What /proc/cpuinfo calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def report_apply(folder: Path, *, rounds: int) -> None:
    """Print the times of weights to live model."""
    times = time_apply(folder, rounds=rounds)
    (limit, limit_ms), *rest = times.items()
    script = times["load_state_dict, then v + w * delta in bfloat16"]
    row("weights to live model, medians", "ms", "of the limit", "script's time over it")
    row("---", "---:", "---:", "---:")
    row(limit, f"{limit_ms:.1f}", "1.00", f"{script / limit_ms:.1f}")
    for name, ms in rest:
        row(name, f"{ms:.1f}", f"{ms / limit_ms:.2f}", f"{script / ms:.1f}")


def report_write(folder: Path, *, rounds: int, mergekit: Path | None) -> None:
    """Print the times of recipe to saved checkpoint."""
    times = time_write(folder, MEDIUM, rounds=rounds, mergekit=mergekit)
    ours = times["tvmerge apply, whole process"]
    row("recipe to saved checkpoint, medians", "s", "over tvmerge apply")
    row("---", "---:", "---:")
    for name, ms in times.items():
        row(name, f"{ms / 1e3:.2f}", f"{ms / ours:.2f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml")
    parser.add_argument("--large", action="store_true", help="also write 3 B parameters; needs 25 GB of disk")
    parser.add_argument("--spread", type=float, default=0.02, help="noise of the tuned model, over the base's spread")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure_memory(options.measure, options.folder))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        versions = [f"{name} {version(name)}" for name in ("torch", "numpy", "numba", "transformers", "safetensors")]
        print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}\n")
        make_models(folder, MEDIUM, spread=options.spread)
        size = sum(opened(folder)["target"].spec(n).nbytes for n in MEDIUM.tensors())
        print(
            f"{size / 2e6:.0f} M parameters, {size / 1e6:.0f} MB, tuned = base + {options.spread:.1%} of its spread\n"
        )
        report_apply(folder, rounds=options.rounds)
        print()
        report_write(folder, rounds=max(options.rounds // 3, 3), mergekit=options.mergekit)
        print()
        row("anonymous memory, highest growth", "MB", "of the model")
        row("---", "---:", "---:")
        for what, text in (("memory", "apply, memory"), ("mmap", "apply, mmap"), ("write", "apply RECIPE")):
            grown = in_new_process(what, folder)
            row(text, f"{grown / 1e6:.0f}", f"{grown / size:.2f}")
        shutil.rmtree(folder)
        if options.large:
            seconds, copying, limit, written = write_large(folder / "large")
            under = f"under RLIMIT_DATA of {limit / 1e9:.0f} GB"
            print(
                f"\n{written / 2e9:.2f} B parameters written in {seconds:.0f} s {under}; the limit is {copying:.0f} s"
            )


if __name__ == "__main__":
    main()
