"""What a search finds on the demo's models, by sampler and number of trials: real merges, scored on real questions.

    python perf/search_embedded.py                                          # a minute
    python perf/search_embedded.py --samplers RSM TPE --seeds 5 --trials 15 30 100 --granularity layer all

A search sees questions of its own, drawn anew for each seed from the generator of the demo's tasks; the truth is the
score on others of the same generator, the same ones for all. The models have read some of both: it makes no new words.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import numpy.typing as npt
import optuna
import torch
from merge import processor, row
from search import SEARCHES, Found, mean_and_error, search

from tvmerge.evaluators import mean_score
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import LoadedTask, load_tasks
from tvmerge.granularity import Grouping
from tvmerge.models.transformers import TransformersModel
from tvmerge.sources import MergeSettings, open_sources

__all__ = ["Asked", "Embedded", "Models", "draw_tasks"]

Floats = npt.NDArray[np.float64]
DEMO = Path(__file__).resolve().parent.parent / "demo"
#: Steps between the uniform weights whose best one is known to no search.
COARSE, FINE = 0.1, 0.05


def draw_tasks(folder: Path, *, seed: int, n_questions: int) -> dict[str, LoadedTask]:
    """The demo's tasks with other questions.

    Args:
        folder: where they are written.
        seed: of the questions.
        n_questions: of each task.
    """
    sys.path.insert(0, str(DEMO))
    try:
        import world
    finally:
        sys.path.remove(str(DEMO))
    shutil.copytree(DEMO / "tasks", folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    (folder / "data").mkdir()
    for task in world.DRAW:
        rng = random.Random(f"{seed}/{task}")
        records = world.draw_questions(rng, task, n_questions)
        rng.shuffle(records)  # the last ones drawn are of the labels that were rarer
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / "data" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return load_tasks(list(world.DRAW), task_dir=folder)


@dataclass(frozen=True)
class Asked:
    """The questions of all searches: of each task first those of the truth, then those of one seed after another."""

    tasks: Mapping[str, LoadedTask]
    n_true: int  # of each task
    n_search: int

    def truth(self) -> LmEvalEvaluator:
        """What is known to no search."""
        return self._evaluator(0, self.n_true)

    def search(self, seed: int) -> LmEvalEvaluator:
        """What one search sees."""
        start = self.n_true + seed * self.n_search
        return self._evaluator(start, start + self.n_search)

    def _evaluator(self, start: int, stop: int) -> LmEvalEvaluator:
        return LmEvalEvaluator(tasks=self.tasks, questions=dict.fromkeys(self.tasks, range(start, stop)))


class Models:
    """The merges of the demo's models in one live model, and their true scores.

    Args:
        asked: questions.
        granularity: a key of GRANULARITIES.
    """

    def __init__(self, asked: Asked, *, granularity: str) -> None:
        target, base, tuned = (str(DEMO / "models" / role) for role in ("target", "base", "tuned"))
        sources = open_sources(target=target, tuned=[tuned], base=base, vocabulary="same", cache_dir=None)
        self._merge = sources.merge(MergeSettings(grouping=Grouping(granularity=granularity)), keep=True)
        self._model = TransformersModel.from_folder(Path(target), checkpoint=sources.target, device="cpu")
        self._harness = HarnessModel(self._model, batch_size=64)
        self._truth, self._known = asked.truth(), dict[tuple[float, ...], float]()
        self.names = list(self._merge.weight_names)

    def score(self, w: Floats, evaluator: LmEvalEvaluator) -> float:
        """Of the merge with weights `(d,)`: the mean over tasks."""
        self._model.load(self._merge.at(dict(zip(self.names, w.tolist(), strict=True))))
        score = mean_score(evaluator.score(self._harness, lambda _: None).scores)
        assert score is not None, "every question has a score"
        return score

    def truth(self, w: Floats) -> float:
        """On the questions of no search."""
        key = tuple(w.tolist())
        if key not in self._known:
            self._known[key] = self.score(w, self._truth)
        return self._known[key]

    @functools.cached_property
    def best_uniform(self) -> float:
        """The true score of the best uniform weight, chosen by it."""
        coarse = np.arange(0, 2 + COARSE / 2, COARSE)
        best = max(coarse, key=self._uniform)
        return max(self._uniform(weight) for weight in (best - FINE, best, best + FINE))

    def _uniform(self, weight: float) -> float:
        return self.truth(np.full(len(self.names), weight))


class Embedded:
    """What one search sees.

    Args:
        models: shared by all searches.
        questions: of this one.
    """

    def __init__(self, models: Models, questions: LmEvalEvaluator) -> None:
        self.names: Sequence[str] = models.names
        self._models, self._questions = models, questions

    def trial(self, w: Floats) -> float:
        """The score of one trial."""
        return self._models.score(w, self._questions)

    def truth(self, w: Floats) -> float:
        """The score on the questions of no search."""
        return self._models.truth(w)

    def best_uniform(self) -> float:
        """The true score of the truly best uniform weight."""
        return self._models.best_uniform


def print_found(name: str, found: Sequence[Sequence[Found]], *, marks: Sequence[int]) -> None:
    """The lines of a sampler: for each mark what was found with each seed."""
    ways = {"recommended": [[each.recommended for each in runs] for runs in found]}
    if not name.startswith("plain"):  # those recommend their best trial
        ways["best trial"] = [[each.observed for each in runs] for runs in found]
    for way, at_marks in ways.items():
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in map(mean_and_error, at_marks)]
        cells += ["-"] * (len(marks) - len(cells))
        claims = f"{np.mean([each.claimed for each in found[-1]]):.3f}" if way == "best trial" or len(ways) == 1 else ""
        row(f"{name}, {way}", *cells, claims)
    sys.stdout.flush()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--granularity", nargs="+", default=["layer"])
    parser.add_argument("--samplers", nargs="+", choices=SEARCHES, default=["RSM", "plain CMA-ES"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, nargs="+", default=[15, 30])
    parser.add_argument("--n_questions", type=int, default=75, help="of each of the four tasks, in a trial")
    parser.add_argument("--n_true", type=int, default=500, help="of each task, in the true score")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)  # two threads that wait for each other are slower than one on a busy machine
    marks = sorted(set(options.trials))
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"optuna {optuna.__version__}, {options.seeds} seeds, {4 * options.n_questions} questions a trial")
    with tempfile.TemporaryDirectory() as folder:
        n_questions = options.n_true + options.seeds * options.n_questions
        tasks = draw_tasks(Path(folder) / "tasks", seed=20, n_questions=n_questions)
        asked = Asked(tasks, options.n_true, options.n_questions)
        for granularity in options.granularity:
            started, models = time.monotonic(), Models(asked, granularity=granularity)
            print(
                f"\n{granularity}, {len(models.names)} weights: the best uniform one scores {models.best_uniform:.3f}\n"
            )
            row("true score", *(f"{mark} trials" for mark in marks), "best trial claims")
            row("---", *("---:" for _ in marks), "---:")
            for name in options.samplers:
                runs = [
                    search(Embedded(models, asked.search(seed)), SEARCHES[name], seed=seed, marks=marks)
                    for seed in range(options.seeds)
                ]
                print_found(name, list(zip(*runs, strict=True)), marks=marks)
            print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
