"""What a trial costs beside its model: choosing its weights, and writing it down, after a thousand of them.

`python perf/study.py` measures sqlite, and PostgreSQL too with `--storage postgresql+psycopg://user@host/database`, of
which it deletes what it made. Limits: 50 ms a trial at 35 weights, 300 at 291 and 1,164.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sqlalchemy import insert

from tvmerge.evaluators import QuestionScore, Scored, mean_score
from tvmerge.score_log import packed
from tvmerge.storage import file_url, open_storage
from tvmerge.study import MergeStudy
from tvmerge.trial_queue import MAX_PARAMETERS, StudyPlan
from tvmerge.trial_table import create_trial

N_QUESTIONS = 300
NAME = "perf-study"


def plan_of(n_weights: int, sampler: str) -> StudyPlan:
    """A study of so many layers."""
    names = [f"layers.{n}" for n in range(n_weights)]
    return StudyPlan(
        identity={"n_weights": n_weights},
        ranges=dict.fromkeys(names, FloatDistribution(0.0, 2.0)),
        sampler=sampler,
        seed=0,
        first=[dict.fromkeys(names, weight) for weight in (0.0, 1.0, 0.5)],
    )


def scores_of(weights: Mapping[str, float], generator: random.Random) -> list[QuestionScore]:
    """Of a made-up model, which is best where all weights are 0.7."""
    chance = 0.7 - 0.3 * statistics.fmean((weight - 0.7) ** 2 for weight in weights.values())
    return [QuestionScore("task", n, float(generator.random() < chance)) for n in range(N_QUESTIONS)]


def fill(url: str, plan: StudyPlan, n_trials: int) -> None:
    """Write down finished trials of random weights, as quickly as the storage takes them."""
    generator = random.Random(1)
    storage = open_storage(url)
    study_id = storage.get_study_id_from_name(NAME)
    first = len(storage.get_all_trials(study_id, deepcopy=False))
    for number in range(first, n_trials):
        weights = {name: generator.uniform(0.3, 1.1) for name in plan.ranges}
        scores = scores_of(weights, generator)
        score = mean_score(scores) or 0.0
        facts = {"task_scores": {"task": score}, "scores": packed(scores), "score": score, "seconds": 1.0}
        few = len(weights) <= MAX_PARAMETERS
        create_trial(
            storage,
            study_id,
            number=number,
            state=TrialState.RUNNING,
            parameters={name: (weights[name], r) for name, r in plan.ranges.items()} if few else {},
            attributes={"weights": weights, "worker": "main", "beat": "main:1", **facts},
        )
    finish(storage, study_id)
    storage.remove_session()
    storage.engine.dispose()


def finish(storage: optuna.storages.RDBStorage, study_id: int) -> None:
    """End all trials that run, in one go."""
    from optuna.storages._rdb.models import TrialModel, TrialValueModel
    from sqlalchemy import update
    from sqlalchemy.orm import Session

    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    rows = [
        {"trial_id": t._trial_id, "objective": 0, "value": t.user_attrs["score"], "value_type": "FINITE"}
        for t in running
    ]
    with Session(storage.engine) as session, session.begin():
        session.execute(update(TrialModel).where(TrialModel.state == "RUNNING").values(state="COMPLETE"))
        if rows:
            session.execute(insert(TrialValueModel), rows)


def measure(n_weights: int, *, n_trials: int, rounds: int, sampler: str, url: str | None = None) -> dict[str, float]:
    """Milliseconds, median over rounds: of a trial without and with the choice of its weights, and of opening."""
    plan, generator = plan_of(n_weights, sampler), random.Random(2)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        address = url or file_url(output / "study.db")
        first = MergeStudy(output_dir=output, plan=plan, storage=address, name=NAME)
        try:
            for _ in range(len(plan.first)):
                first.run_trial(lambda weights, _: Scored(scores_of(weights, generator)))
            first.close()
            fill(address, plan, n_trials)
            MergeStudy(output_dir=output, plan=plan, storage=address, name=NAME).close()  # scores.jsonl is made good
            begun = time.perf_counter()
            study = MergeStudy(output_dir=output, plan=plan, storage=address, name=NAME)
            found = {"open": 1e3 * (time.perf_counter() - begun)}
            found |= _trials(study, rounds, generator)
            begun = time.perf_counter()
            study.recommended()
            found["recommend"] = 1e3 * (time.perf_counter() - begun)
            study.close()
        finally:
            storage = open_storage(address)
            optuna.delete_study(study_name=NAME, storage=storage)
            storage.remove_session()
            storage.engine.dispose()
    return found


def _trials(study: MergeStudy, rounds: int, generator: random.Random) -> dict[str, float]:
    point, drawn, whole = study._queue._sampler.point, [], []

    def timed(*args: object, **kwargs: object) -> dict[str, float]:
        begun = time.perf_counter()
        weights = point(*args, **kwargs)  # type: ignore[arg-type]
        drawn.append(time.perf_counter() - begun)
        return weights

    study._queue._sampler.point = timed  # type: ignore[method-assign]
    for _ in range(1 + rounds):  # the first warms up
        made: list[float] = []

        def evaluate(weights: Mapping[str, float], number: int, made: list[float] = made) -> Scored:
            begun = time.perf_counter()
            scored = Scored(scores_of(weights, generator))
            made.append(time.perf_counter() - begun)
            return scored

        begun = time.perf_counter()
        study.run_trial(evaluate)
        whole.append(time.perf_counter() - begun - made[0])
    trials = [1e3 * seconds for seconds in whole[1:]]
    draws = [1e3 * seconds for seconds in drawn[1:]]
    storage = [trial - draw for trial, draw in zip(trials, draws, strict=True)]
    return {
        "storage": statistics.median(storage),
        "weights": statistics.median(draws),
        "trial": statistics.median(trials),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, nargs="+", default=[35, 291, 1164])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sampler", default="RSM")
    parser.add_argument("--storage")
    chosen = parser.parse_args()
    after = f"ms, median of {chosen.rounds}, after {chosen.trials} trials"
    print(f"| {after} | storage | weights | trial | open | recommend |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, url in (("sqlite", None), *([("database", chosen.storage)] if chosen.storage else [])):
        for n in chosen.weights:
            found = measure(n, n_trials=chosen.trials, rounds=chosen.rounds, sampler=chosen.sampler, url=url)
            cells = " | ".join(f"{found[key]:.0f}" for key in ("storage", "weights", "trial", "open", "recommend"))
            print(f"| {kind}, {n} weights | {cells} |", flush=True)


if __name__ == "__main__":
    main()
