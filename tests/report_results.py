"""Results of runs that were never made: of every granularity, of any state, with any names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.granularity import Grouping, group_tensors
from tvmerge.report.tables import score_table, verdict
from tvmerge.results import Candidate, Results, TrialRow
from tvmerge.samplers import Recommendation

KINDS = (
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
TASKS = ("jcommonsenseqa", "jnli", "jsquad")


def weight_names(granularity: str, *, layers: int = 32, prefixes: Sequence[str] = ("",)) -> list[str]:
    """Of a model of a usual architecture; 291 for `all`, 35 for `layer`."""
    tensors = [f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in KINDS]
    tensors += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    groups = group_tensors(tensors, Grouping(granularity))
    return [prefix + name for prefix in prefixes for name in dict.fromkeys(groups.values())]


def make_results(
    names: Sequence[str],
    *,
    n: int = 40,
    tasks: Sequence[str] = TASKS,
    finished: bool = True,
    seed: int = 0,
    questions: int = 60,
) -> Results:
    """A run over these weights: smooth weights, scores that have a peak, and some trials that have none."""
    generator = np.random.default_rng(seed)
    shape = 1 + 0.4 * np.sin(np.linspace(0, 3, len(names)))
    trials = [_trial(i, names, shape, tasks, generator) for i in range(n)]
    results = Results("a run", {"optuna_sampler": "RSM", "n_trials": n, "seed": 0}, n, trials, heldout=True)
    if not finished:
        return results
    scored = [trial for trial in trials if trial.score is not None]
    best = max(scored, key=lambda trial: trial.score or 0.0)
    point = dict(zip(names, shape.tolist(), strict=True))
    candidates = [
        _candidate("target", 0.55, tasks, questions, generator, trial=0, weights=dict.fromkeys(names, 0.0)),
        _candidate("tuned", 0.62, tasks, questions, generator),
        _candidate("uniform 1", 0.63, tasks, questions, generator, trial=1, weights=dict.fromkeys(names, 1.0)),
        _candidate("best observed", 0.70, tasks, questions, generator, trial=best.number, weights=best.weights),
        _candidate("recommended", 0.72, tasks, questions, generator, weights=point),
    ]
    candidates[0] = replace(candidates[0], is_target=True)
    return replace(
        results,
        recommendation=Recommendation(point, "surface", 0.71, (0.67, 0.75)),
        candidates=candidates,
        chosen=4,
        table=score_table(candidates),
        verdict=verdict(candidates[-1], candidates[:-1], heldout=True),
    )


def _trial(
    i: int, names: Sequence[str], shape: npt.NDArray[np.float64], tasks: Sequence[str], generator: np.random.Generator
) -> TrialRow:
    uniform = (0.0, 1.0, 0.5, 1.5, 0.75, 0.25, 1.25)
    wave = generator.normal() * np.cos(np.linspace(0, math.pi * (1 + i % 3), len(names)))
    x = (
        np.full(len(names), uniform[i])
        if i < len(uniform)
        else shape + 0.4 * wave + 0.1 * generator.normal(size=len(names))
    )
    weights = dict(zip(names, np.clip(x, 0, 2).tolist(), strict=True))
    if i and i % 17 == 0:
        return TrialRow(i, "failed", False, weights, seconds=31.0, failure="RunError: no question could be scored")
    if i and i % 13 == 0:
        return TrialRow(i, "pruned", False, weights, seconds=40.0)
    score = 0.72 - 0.12 * float(np.mean((x - shape) ** 2)) / 0.3 + 0.02 * float(generator.normal())
    by_task = {task: min(score + 0.1 * float(generator.normal()), 1.0) for task in tasks}
    seconds = 120 + 10 * float(generator.random())
    return TrialRow(i, "complete", i < len(uniform), weights, score, by_task, seconds=seconds, cost=0.02 + 0.001 * i)


def _candidate(
    label: str,
    share: float,
    tasks: Sequence[str],
    questions: int,
    generator: np.random.Generator,
    *,
    trial: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> Candidate:
    def scores(n: int, mean: float) -> list[QuestionScore]:
        return [QuestionScore(task, i, float(generator.random() < mean)) for task in tasks for i in range(n)]

    return Candidate(label, scores(questions, share), scores(2 * questions, share + 0.02), weights, trial)


def pareto_results() -> Results:
    """Of a run with several tasks as objectives, the second to be minimised."""
    results = make_results(weight_names("layer"), n=60)
    goals = {"jnli": TaskGoal("perplexity,none", higher_is_better=False, logarithmic=True)}
    return replace(results, settings={"optuna_sampler": "NSGA-II"}, goals=goals)
