"""Shows what the demo claims, over several search seeds.

`python demo/verify.py --seeds 5 --sampler TPE` runs the search of run_jglue.sh once per seed, and scores what it found
on the held-out questions, beside the parents and every uniform weight from 0 to 2 in steps of 0.05. The best uniform
weight is chosen on the very questions it is scored on: the hardest opponent that there is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path

import yaml

from tvmerge.cli import main as tvmerge
from tvmerge.evaluators import QuestionScore, mean_score, task_scores
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.split import split_questions
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.models.transformers import TransformersModel
from tvmerge.search import paired_gain
from tvmerge.sources import MergeSettings, open_sources
from tvmerge.state_dict import StateDict

DEMO = Path(__file__).parent
TASKS = ["toy_jcommonsenseqa", "toy_jnli", "toy_marc_ja", "toy_jsquad"]
GRID = [round(0.05 * step, 2) for step in range(41)]


class HeldOut:
    """The live model and the questions that no search sees, split as the command line splits them.

    Args:
        models: folder of the three models.
        batch_size: of lm-eval.
    """

    def __init__(self, models: Path, *, batch_size: int) -> None:
        target, base, tuned = (str(models / role) for role in ("target", "base", "tuned"))
        self.sources = open_sources(target=target, tuned=[tuned], base=base, vocabulary="same", cache_dir=None)
        self.merge = self.sources.merge(MergeSettings(), keep=True)
        tasks = load_tasks(TASKS, task_dir=DEMO / "tasks")
        questions = {
            name: split_questions(
                name=name, n_questions=len(task.questions), holdout=0.3, limit=None, seed=0, labels=task.labels
            ).heldout
            for name, task in tasks.items()
        }
        self._model = TransformersModel.from_folder(models / "target", checkpoint=self.sources.target, device="cpu")
        self._harness = HarnessModel(self._model, batch_size=batch_size)
        self._evaluator = LmEvalEvaluator(tasks=tasks, questions=questions)

    def score(self, state_dict: StateDict) -> list[QuestionScore]:
        """Scores a model on the held-out questions."""
        self._model.load(state_dict)
        return list(self._evaluator.score(self._harness, lambda _: None).scores)

    def uniform(self, weight: float) -> list[QuestionScore]:
        """Scores the merge with one weight for all."""
        return self.score(self.merge.at(dict.fromkeys(self.merge.weight_names, weight)))


def search(models: Path, *, seed: int, sampler: str, n_trials: int, limit: int) -> dict[str, float]:
    """Runs the search of run_jglue.sh with another seed, and returns the weights it found."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = [item for role in ("target", "base", "tuned") for item in (f"--{role}_model", str(models / role))]
        flags += ["--jglue_tasks", ",".join(TASKS), "--task_dir", str(DEMO / "tasks"), "--jglue_limit", str(limit)]
        flags += ["--optuna_sampler", sampler, "--optuna_seed", str(seed), "--n_trials", str(n_trials)]
        flags += ["--batch_size", "64", "--output_dir", folder]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            status = tvmerge(["jglue", *flags])
        assert status == 0, "the search failed; run it by hand to see why"
        weights: dict[str, float] = yaml.safe_load((Path(folder) / "best" / "recipe.yaml").read_text())["weights"]
        return weights


def row(label: str, scores: list[QuestionScore], opponent: list[QuestionScore]) -> str:
    """A line of the table: each task, the mean, and the gain over the best uniform weight."""
    numbers = " | ".join(f"{score:.3f}" for score in task_scores(scores).values())
    gain = paired_gain(scores, opponent)
    shown = "" if gain is None or not gain.mean else f"{gain.mean:+.3f} ± {gain.standard_error:.3f}"
    return f"| {label} | {numbers} | {mean_score(scores):.3f} | {shown} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sampler", default="TPE")
    parser.add_argument("--n_trials", type=int, default=30)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--models", type=Path, default=DEMO / "models")
    options = parser.parse_args()
    heldout = HeldOut(options.models, batch_size=64)
    by_weight = {weight: heldout.uniform(weight) for weight in GRID}
    best_weight = max(GRID, key=lambda weight: mean_score(by_weight[weight]) or 0.0)
    opponent = by_weight[best_weight]
    print("| model | " + " | ".join(TASKS) + " | mean | over the best uniform |\n|---|" + "---:|" * (len(TASKS) + 2))
    print(row("target", by_weight[0.0], opponent))
    print(row("tuned", heldout.score(heldout.sources.tuned[0].tuned), opponent))
    print(row(f"best uniform ({best_weight:g})", opponent, opponent))
    for seed in range(options.seeds):
        weights = search(
            options.models, seed=seed, sampler=options.sampler, n_trials=options.n_trials, limit=options.limit
        )
        found = row(f"{options.sampler}, seed {seed}", heldout.score(heldout.merge.at(weights)), opponent)
        print(found, " ".join(f"{weight:.2f}" for weight in weights.values()), flush=True)


if __name__ == "__main__":
    main()
