"""What stopping trials early gains on the synthetic landscapes of perf/search.py, at equal numbers of questions.

    python perf/pruning.py
    python perf/pruning.py --landscapes A C --samplers RSM CMA-ES --seeds 8 --trials 30 100

A budget is that of so many whole trials. A pruner that stops some has more of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import optuna
from merge import row
from optuna.distributions import FloatDistribution
from search import LANDSCAPES, SEARCHES, Landscape, mean_and_error, weight_names

from tvmerge.evaluators import QuestionScore
from tvmerge.evaluators.split import STAGES
from tvmerge.pruning import PRUNERS, Other
from tvmerge.samplers import SeededSampler, recommend
from tvmerge.search import uniform_weights

__all__ = ["Pruned", "search_pruned"]


@dataclass(frozen=True)
class Pruned:
    """After a budget of questions."""

    recommended: float  # true score
    n_trials: int
    n_stopped: int
    share: float  # of the questions of these trials that were asked


def _scores(answers: Sequence[bool], n: int) -> list[QuestionScore]:
    return [QuestionScore("t", index, float(answer)) for index, answer in enumerate(answers[:n])]


def search_pruned(landscape: Landscape, *, sampler: str, pruner: str, seed: int, marks: Sequence[int]) -> list[Pruned]:
    """Run a study until the questions of the last of `marks` whole trials are asked; what is found at each of them."""
    ranges: Mapping[str, FloatDistribution] = dict.fromkeys(weight_names(landscape.shape), FloatDistribution(0.0, 2.0))
    first = [dict.fromkeys(ranges, weight) for weight in uniform_weights(weight_min=0.0, weight_max=2.0)]
    study = optuna.create_study(
        direction="maximize", sampler=SeededSampler(name=sampler, seed=seed, search_space=ranges, first=first)
    )
    n_questions, others, asked, found = landscape.shape.questions, list[Other](), 0, list[Pruned]()
    while len(found) < len(marks):
        trial = study.ask()
        answers = landscape.answers(np.array([trial.suggest_float(name, r.low, r.high) for name, r in ranges.items()]))
        n, reason = n_questions, None
        for stage, share in enumerate(STAGES[:-1]):
            n = round(share * n_questions)
            if pruner == "none" or trial.number < len(first):
                break
            scores = _scores(answers.tolist(), n)
            reason = PRUNERS[pruner].should_stop(stage=stage, scores=scores, others=others, goals={})
            if reason is not None:
                break
        n = n_questions if reason is None else n
        asked += n
        others.append(Other(_scores(answers.tolist(), n), is_complete=reason is None))
        if reason is None:
            study.tell(trial, float(answers.mean()))
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        if asked >= marks[len(found)] * n_questions:
            best = recommend(study.get_trials(deepcopy=False), ranges, n_first=len(first))
            assert best is not None, "given trials are never stopped"
            truth = landscape.truth(np.array(list(best.point.values())))
            n_stopped = sum(not other.is_complete for other in others)
            found.append(Pruned(truth, len(others), n_stopped, asked / n_questions / len(others)))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscapes", nargs="+", choices=LANDSCAPES, default=["A"])
    parser.add_argument(
        "--samplers", nargs="+", choices=[name for name in SEARCHES if "plain" not in name], default=["RSM"]
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, nargs="+", default=[15, 30])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    marks = sorted(set(options.trials))
    row("true score at equal questions", *(f"{mark} whole trials" for mark in marks), "trials", "stopped", "asked")
    row("---", *("---:" for _ in marks), "---:", "---:", "---:")
    for name in options.landscapes:
        for sampler in options.samplers:
            for pruner in ("none", *PRUNERS):
                runs = [
                    search_pruned(
                        Landscape(LANDSCAPES[name], seed=seed), sampler=sampler, pruner=pruner, seed=seed, marks=marks
                    )
                    for seed in range(options.seeds)
                ]
                cells = [mean_and_error([run[n].recommended for run in runs]) for n in range(len(marks))]
                last = [run[-1] for run in runs]
                row(
                    f"{name}, {sampler}, {pruner}",
                    *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells),
                    f"{np.mean([each.n_trials for each in last]):.0f}",
                    f"{np.mean([each.n_stopped for each in last]):.0f}",
                    f"{np.mean([each.share for each in last]):.0%}",
                )


if __name__ == "__main__":
    main()
