"""The search commands, assembled from the parts: check everything, then search, prove and save."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from tvmerge.config import JglueConfig, MtBenchConfig, SearchConfig
from tvmerge.errors import CheckpointError, RecipeError, RunError, TvmergeError
from tvmerge.evaluators import (
    Evaluator,
    Questions,
    QuestionScore,
    Scored,
    ScoredModel,
    TaskGoal,
    mean_score,
    task_scores,
)
from tvmerge.files import check_output, local_path, remove_staged, staged_directory, write_text
from tvmerge.judging import open_judged, trial_name
from tvmerge.models.device import choose_device
from tvmerge.models.transformers import TransformersModel
from tvmerge.progress import RunProgress
from tvmerge.questions import ask_questions, open_tasks
from tvmerge.rebuild import ROUTER_FILE, library_versions
from tvmerge.recipe import Recipe
from tvmerge.report.card import model_card
from tvmerge.report.tables import score_table, verdict
from tvmerge.results import Candidate
from tvmerge.search import uniform_weights
from tvmerge.spaces import Column, Proven, Space
from tvmerge.spaces.dense import DenseSpace
from tvmerge.spaces.mixture import MixtureSpace
from tvmerge.state_dict import StateDict
from tvmerge.study import STORAGE_ERRORS, MergeStudy, TrialResult

__all__ = ["jglue", "mt_bench"]

#: Bytes of weights whose reading takes so long that it is said.
LONG_TO_READ = 4_000_000_000


def jglue(config: JglueConfig) -> None:
    """Search, prove and save a merge that scores best on JGLUE-style tasks.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: a baseline failed, or three trials in a row.
    """
    output = _checked_output(config)
    device = choose_device(config.device)
    tasks = open_tasks(config)
    _search(config, output, device, lambda tokenizer: ask_questions(config, tasks, tokenizer))


def mt_bench(config: MtBenchConfig) -> None:
    """Search, prove and save a merge whose answers a judge likes best.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: a baseline failed, or three trials in a row, or the judge cannot be asked any more.
    """
    output = _checked_output(config)
    device = choose_device(config.device)
    with open_judged(config, output, device=device) as bench:
        _search(config, output, device, bench.ask)


def _checked_output(config: SearchConfig) -> Path:
    output = local_path(config.output_dir, flag="--output_dir")
    check_output(output)
    return output


def _search(
    config: SearchConfig, output: Path, device: str, ask: Callable[[PreTrainedTokenizerBase], Questions]
) -> None:
    space = MixtureSpace(config, output) if config.is_mixture else DenseSpace(config)
    questions = ask(space.tokenizer())
    if not (output / "study.db").exists():
        nbytes = sum(model.spec(name).nbytes for model in space.sources.models() for name in model.names)
        if nbytes > LONG_TO_READ:
            print(f"looking for NaN and infinity in {nbytes / 1e9:.0f} GB of weights", file=sys.stderr)
        space.check_finite()

    def study_of() -> MergeStudy:
        output.mkdir(parents=True, exist_ok=True)
        return open_study(config, output, space=space, questions=questions, device=device)

    # A study that is there may refuse, which is said before a model is loaded. One that is not is made last.
    study = study_of() if (output / "study.db").exists() else None
    try:
        # What a study without a finished trial recalls may be made anew.
        recall = study.recall if study is not None and study.n_finished else _nothing
        model = space.open_model(device=device, recall=recall)
        # Found once: another batch size would give other rounding errors.
        tokens = None if study is None else study.recall("batch_tokens")
        asked = questions.open_model(model, tokens=tokens)
        study = study or study_of()
        if not study.n_finished:
            space.remember(study.remember)
        for name in ("best", "scores.jsonl", "config.yaml", ROUTER_FILE):
            remove_staged(output, name)
        resolved = {**asdict(config), "n_trials": max(config.n_trials, study.n_finished)}
        write_text(output / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        SearchRun(config, output, space, study, model, asked, questions).run()
    except STORAGE_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{output / 'study.db'}: cannot be written ({reason}): the same command goes on") from error
    finally:
        if study is not None:
            study.close()


def _nothing(key: str) -> None:
    """What a new study recalls."""


def open_study(config: SearchConfig, output: Path, *, space: Space, questions: Questions, device: str) -> MergeStudy:
    """Create or resume the study of a configuration, known by what it asks of which weights, not by their paths."""
    asked = [evaluator.fingerprint for evaluator in (questions.search, questions.heldout) if evaluator is not None]
    identity = {
        **config.identity(),
        **space.identity(),
        "questions": asked,
        "scoring": dict(questions.scoring),
        "device": device.partition(":")[0],
    }
    return MergeStudy(
        output_dir=output,
        identity=identity,
        ranges=space.ranges,
        sampler=config.optuna_sampler,
        seed=config.optuna_seed,
        first=[space.uniform(weight) for weight in _uniform_weights(config)],
        goals=questions.goals,
    )


def _uniform_weights(config: SearchConfig) -> list[float]:
    return uniform_weights(weight_min=config.weight_min, weight_max=config.weight_max)


@dataclass(frozen=True)
class SearchRun:
    """A run whose every part is checked and open."""

    config: SearchConfig
    output: Path
    space: Space
    study: MergeStudy
    model: TransformersModel
    asked: ScoredModel  # the model, as evaluators ask it
    questions: Questions

    def run(self) -> None:
        """Run the trials that are not done yet, then prove and save the best."""
        progress = RunProgress(n_trials=self.config.n_trials, n_finished=self.study.n_finished)
        for note in [*self.questions.notes, *self.asked.notes]:
            progress.note(note)
        self.questions.resume([result.number for result in self.study.results()])
        heldout = self.questions.heldout.n_questions if self.questions.heldout else 0
        progress.note(
            f"{len(self.space.ranges)} weights, {self.questions.search.n_questions} questions per trial, "
            f"{heldout} held out; {self.study.n_finished} of {self.config.n_trials} trials done"
        )
        # Nothing that was made so far can be collected, and to look through it all takes as long as a small trial.
        gc.freeze()
        try:
            self._search(progress)
            candidates = self._prove(progress)
        finally:
            gc.unfreeze()
            progress.close()
        self._save(candidates)

    def _score(
        self, state_dict: StateDict, evaluator: Evaluator, progress: RunProgress, *, name: str, what: str
    ) -> Scored:
        advance, close = progress.count_questions(evaluator.n_scores, what)
        try:
            self.space.sources.check_unchanged()
            self.model.load(state_dict)
            self.space.sources.check_unchanged()
            return evaluator.score(self.asked, advance, name=name)
        finally:
            close()

    def _search(self, progress: RunProgress) -> None:
        def evaluate(weights: Mapping[str, float], number: int) -> Scored:
            merged, name = self.space.at(weights), trial_name(number)
            scored = self._score(merged, self.questions.search, progress, name=name, what="questions")
            said.update(scored.facts)
            return scored

        said: dict[str, Any] = {}  # of the last trial
        while self.study.n_finished < self.config.n_trials:
            said.clear()
            result = self.study.run_trial(evaluate)
            if self.config.batch_size == "auto" and self.study.recall("batch_tokens") != self.asked.budget.tokens:
                self.study.remember("batch_tokens", self.asked.budget.tokens)
            best = self.study.best()
            score = None if result is None else result.score
            progress.finish_trial(
                score=score, best=(best.score, best.number), remarks=_remarks(said, self.questions.cost())
            )
            if result is None:
                progress.note(f"  {self.study.last_failure()}")
            if self.study.n_finished == min(self.study.n_first, self.config.n_trials):
                self._warn_of_idle_tasks(progress)

    def _warn_of_idle_tasks(self, progress: RunProgress) -> None:
        """Say which tasks gave every model so far the same scores: they cannot guide the search."""
        seen: dict[str, dict[int, list[tuple[Any, ...]]]] = {}
        for line in self.study.scores.lines():
            if line["split"] == "search" and line["model"] == "merge":
                of_task = seen.setdefault(line["task"], {})
                place = line["question"], line.get("turn"), line.get("choice")
                of_task.setdefault(line["trial"], []).append((*place, line["score"]))
        for task, by_trial in seen.items():
            scores = list(by_trial.values())
            if len(scores) > 1 and all(other == scores[0] for other in scores):
                progress.note(
                    f"task {task}: all {len(scores)} models so far got the same score on each of its questions: it "
                    "cannot guide the search"
                )

    @property
    def _split(self) -> str:
        return "search" if self.questions.heldout is None else "heldout"

    def _prove(self, progress: RunProgress) -> list[Candidate]:
        """Score all models of the table on the held-out questions; what was scored before is not again."""
        columns = self._columns(progress)
        return [Candidate(label=each.label, scores=self._scores(each, self._split, progress)) for each in columns]

    def _scores(self, column: Column, split: str, progress: RunProgress) -> list[QuestionScore]:
        """The scores of a model on a split of the questions, from the log if they are there."""
        evaluator = self.questions.search if split == "search" else self.questions.heldout
        assert evaluator is not None, "nobody asks for what is not held out"
        scores = self.study.scores.find(model=column.model, trial=column.trial, split=split)
        if len(scores) == evaluator.n_scores:
            return scores
        what = f"{split} {column.label}"
        name = _name(column) + ("" if self.questions.heldout is None or split == "search" else "-heldout")
        try:
            measured = self._score(column.state_dict, evaluator, progress, name=name, what=what).scores
        except (TvmergeError, OSError):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"{what}: {reason}; the same command goes on") from error
        self.study.scores.replace(measured, model=column.model, trial=column.trial, split=split)
        return list(measured)

    def _columns(self, progress: RunProgress) -> list[Column]:
        """The models of the table, in order."""
        results = {result.number: result for result in self.study.results()}
        uniform = [results[n] for n in range(self.study.n_first) if n in results]
        best_uniform = max(uniform, key=lambda result: (result.score, -result.number))
        best = self.study.best()
        # The best part is chosen by what the search has seen, as the best whole was.
        singles = self.space.singles(best)
        searched = [mean_score(self._scores(each, "search", progress), self.questions.goals) for each in singles]
        known = [n for n, score in enumerate(searched) if score is not None]
        single = singles[max(known, key=lambda n: (searched[n], -n))] if known else None
        weight = _uniform_weights(self.config)[best_uniform.number]
        return self.space.columns(Proven(results[0], results[1], best_uniform, weight, best), single)

    def _save(self, candidates: Sequence[Candidate]) -> None:
        best = self.study.best()
        goals = self.questions.goals
        table = score_table(candidates, goals, self.questions.categories)
        words = verdict(candidates[-1], candidates[:-1], heldout=self.questions.heldout is not None, goals=goals)
        if best.number == 0:
            words = f"{self.space.nothing_gained()}\n\n{words}"
        words = f"{self.questions.explanation}\n\n{words}\n\n{self.space.explanation()}".strip()
        recipe = self._recipe(best, candidates[-1].scores)
        output = self.output / "best"
        if not _is_written(self.space, recipe, output):
            with staged_directory(output, replace=True) as staging:
                self.space.write(recipe, staging)
                card = model_card(recipe, table=table, verdict_text=words, weights=best.weights)
                write_text(staging / "README.md", card)
        print(f"\n{table}\n\n{words}\n")
        noun = self.space.noun
        print(f"The best {noun} is trial {best.number} of {self.study.n_finished}; it is saved in {output}")

    def _metrics(self, scores: Sequence[QuestionScore]) -> dict[str, float | None]:
        goals = self.questions.goals
        means = task_scores(scores)
        return {task: None if mean is None else goals.get(task, TaskGoal()).shown(mean) for task, mean in means.items()}

    def _recipe(self, best: TrialResult, scores: Sequence[QuestionScore]) -> Recipe:
        return self.space.recipe(
            best,
            score={
                "trial": best.number,
                "search": best.score,
                self._split: mean_score(scores, self.questions.goals),
                f"{self._split}_tasks": self._metrics(scores),
            },
            versions=library_versions(),
        )


def _name(column: Column) -> str:
    """What a model's answers are called in FastChat's files."""
    name = column.model.replace("/", "-")
    if column.trial is None:
        return name
    return trial_name(column.trial) if column.model == "merge" else f"{name}-{trial_name(column.trial)}"


def _remarks(facts: Mapping[str, Any], cost: str) -> list[str]:
    """What a line on a trial says beside its score."""
    remarks = [cost] if cost else []
    remarks += [f"{facts['unscored']:.1%} unscored"] if facts.get("unscored") else []
    return remarks + ([f"repeats {facts['judge_spread']:.2f} apart"] if "judge_spread" in facts else [])


def _is_written(space: Space, recipe: Recipe, folder: Path) -> bool:
    """Whether a folder, which appears whole or not at all, holds the model of this recipe."""
    try:
        return space.is_whole(recipe, folder) and (folder / "README.md").is_file()
    except (CheckpointError, RecipeError):
        return False
