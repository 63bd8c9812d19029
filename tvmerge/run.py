"""The search command, assembled from the parts: check everything, then search, prove and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from tvmerge.checkpoint import Checkpoint, ModelId, check_mergeable, check_same_vocabulary, model_files, resolve
from tvmerge.config import JglueConfig
from tvmerge.errors import CheckpointError, ConfigError, RecipeError
from tvmerge.evaluators import Evaluator, QuestionScore, mean_score, task_scores
from tvmerge.evaluators.lm_eval import HarnessModel, LmEvalEvaluator, load_tasks, split_questions
from tvmerge.files import check_writable, local_path, remove_staged, staged_directory, write_text
from tvmerge.merge import Merge
from tvmerge.models.transformers import TransformersModel, load_tokenizer, unread_tensors
from tvmerge.progress import RunProgress
from tvmerge.recipe import RECIPE_FILE, Recipe, Sources, library_versions, source_entry, write_model
from tvmerge.report import Candidate, model_card, score_table, verdict
from tvmerge.search import uniform_weights
from tvmerge.state_dict import StateDict, Without
from tvmerge.study import MergeStudy, TrialResult

__all__ = ["jglue"]

METHOD = "task_arithmetic"


def jglue(config: JglueConfig) -> None:
    """Search, prove and save a merge that scores best on JGLUE-style tasks.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: a baseline failed, or three trials in a row.
    """
    output = local_path(config.output_dir, flag="--output_dir")
    check_output(output)
    device = choose_device(config.device)
    questions = ask_tasks(config)
    sources = open_models(config)
    models = (sources.target, sources.base, sources.tuned)
    omit = sorted({name for model in models for name in unread_tensors(model)})
    merge = sources.merge(granularity=config.optimize_mode, method=METHOD, omit=omit)
    load_tokenizer(sources.target.model.path)
    output.mkdir(parents=True, exist_ok=True)
    study = open_study(config, output, sources=sources, merge=merge, questions=questions, device=device)
    try:
        remove_staged(output, "best")
        settings = {**asdict(config), "n_trials": max(config.n_trials, study.n_finished)}
        write_text(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        folder = sources.target.model.path
        model = TransformersModel.from_folder(folder, checkpoint=merge.target, device=device)
        JglueRun(config, output, sources, merge, omit, study, model, questions).run()
    finally:
        study.close()


def check_output(output: Path) -> None:
    """Refuse an output folder that cannot be written, or whose `best` is not ours to replace."""
    check_writable(output)
    if (output / "best").exists() and not (output / "study.db").exists():
        raise ConfigError(f"--output_dir {output}: holds a 'best' that no study made, name another folder")


def open_models(config: JglueConfig) -> Sources:
    """Open the three models and check what does not depend on how they are merged."""
    names = {"target": config.target_model, "base": config.base_model, "tuned": config.tuned_model}
    models = {role: Checkpoint(resolve(name, cache_dir=config.cache_dir)) for role, name in names.items()}
    for role, model in models.items():
        check_mergeable(model, name=f"the {role} model {model.model.name}")
    for role in ("base", "tuned"):
        check_same_vocabulary(
            models["target"],
            models[role],
            reference_name=f"the target model {names['target']}",
            other_name=f"the {role} model {names[role]}",
        )
    return Sources(**models)


def choose_device(name: str) -> str:
    """The device that `auto` means here, or the one that was named.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ConfigError(f"--device {name}: cannot be used here: {reason}") from error
    return name


@dataclass(frozen=True)
class Questions:
    """The questions of a run, ready to be asked."""

    search: LmEvalEvaluator
    heldout: LmEvalEvaluator | None  # None: none is held out
    notes: Sequence[str]  # what the user should know of them


def ask_tasks(config: JglueConfig) -> Questions:
    """Load the tasks, choose their questions and build all requests, which no model is needed for."""
    task_dir = None if config.task_dir is None else local_path(config.task_dir, flag="--task_dir")
    # Tasks hold their requests, so each split has tasks of its own.
    tasks = [load_tasks(config.tasks, task_dir=task_dir) for _ in ("search", "heldout")]
    splits, notes = {}, []
    for name, task in tasks[0].items():
        n_questions, limit = len(task.eval_docs), config.limits[name]
        splits[name] = split_questions(
            name=name, n_questions=n_questions, holdout=config.holdout, limit=limit, seed=config.question_seed
        )
        n_search = len(splits[name].search)
        if limit is not None and limit > n_search:
            notes.append(f"task {name}: the limit of {limit} is more than the {n_search} questions left to search on")
    searched = {name: split.search for name, split in splits.items()}
    heldout = {name: split.heldout for name, split in splits.items()}
    return Questions(
        search=LmEvalEvaluator(tasks=tasks[0], questions=searched, seed=config.question_seed),
        heldout=LmEvalEvaluator(tasks=tasks[1], questions=heldout, seed=config.question_seed)
        if config.holdout
        else None,
        notes=notes,
    )


def open_study(
    config: JglueConfig, output: Path, *, sources: Sources, merge: Merge, questions: Questions, device: str
) -> MergeStudy:
    """Create or resume the study of a configuration, known by what it asks of which weights, not by their paths."""
    asked = [evaluator.fingerprint for evaluator in (questions.search, questions.heldout) if evaluator is not None]
    identity = {
        **config.identity(),
        **{f"{role}_model": f"weights {getattr(sources, role).fingerprint}" for role in ("target", "base", "tuned")},
        "questions": asked,
        "device": device.partition(":")[0],
    }
    return MergeStudy(
        output_dir=output,
        identity=identity,
        weight_names=merge.weight_names,
        weight_range=(config.weight_min, config.weight_max),
        sampler=config.optuna_sampler,
        seed=config.optuna_seed,
        uniform=uniform_weights(weight_min=config.weight_min, weight_max=config.weight_max),
    )


@dataclass(frozen=True)
class JglueRun:
    """A run whose every part is checked and open."""

    config: JglueConfig
    output: Path
    sources: Sources
    merge: Merge
    omit: Sequence[str]
    study: MergeStudy
    model: TransformersModel
    questions: Questions

    def run(self) -> None:
        """Run the trials that are not done yet, then prove and save the best."""
        harness = HarnessModel(self.model, batch_size=self.config.batch_size)
        progress = RunProgress(n_trials=self.config.n_trials, n_finished=self.study.n_finished)
        for note in self.questions.notes:
            progress.note(note)
        heldout = self.questions.heldout.n_questions if self.questions.heldout else 0
        progress.note(
            f"{len(self.merge.weight_names)} weights, {self.questions.search.n_questions} questions per trial, "
            f"{heldout} held out; {self.study.n_finished} of {self.config.n_trials} trials done"
        )
        try:
            self._search(harness, progress)
            candidates = self._prove(harness, progress)
        finally:
            progress.close()
        self._save(candidates)

    def _score(
        self, state_dict: StateDict, evaluator: Evaluator, harness: HarnessModel, progress: RunProgress, what: str
    ) -> Sequence[QuestionScore]:
        advance, close = progress.count_questions(evaluator.n_questions, what)
        try:
            self.model.load(state_dict)
            return evaluator.score(harness, advance)
        finally:
            close()

    def _search(self, harness: HarnessModel, progress: RunProgress) -> None:
        def evaluate(weights: Mapping[str, float]) -> Sequence[QuestionScore]:
            return self._score(self.merge.at(weights), self.questions.search, harness, progress, "questions")

        while self.study.n_finished < self.config.n_trials:
            result = self.study.run_trial(evaluate)
            best = self.study.best()
            progress.finish_trial(score=None if result is None else result.score, best=(best.score, best.number))
            if result is None:
                progress.note(f"  {self.study.last_failure()}")

    @property
    def _split(self) -> str:
        return "search" if self.questions.heldout is None else "heldout"

    def _prove(self, harness: HarnessModel, progress: RunProgress) -> list[Candidate]:
        """Score target, tuned, uniform and best on the held-out questions; what was scored before is not again."""
        evaluator = self.questions.heldout or self.questions.search
        candidates = []
        for label, trial in self._columns():
            model = "tuned" if trial is None else "merge"
            number = None if trial is None else trial.number
            scores = self.study.scores.find(model=model, trial=number, split=self._split)
            if len(scores) != evaluator.n_questions:
                state_dict = Without(self.sources.tuned, self.omit) if trial is None else self.merge.at(trial.weights)
                measured = self._score(state_dict, evaluator, harness, progress, f"{self._split} {label}")
                self.study.scores.replace(measured, model=model, trial=number, split=self._split)
                scores = list(measured)
            candidates.append(Candidate(label=label, scores=scores))
        return candidates

    def _columns(self) -> list[tuple[str, TrialResult | None]]:
        """Column head → the trial it shows, None for the tuned model."""
        results = {result.number: result for result in self.study.results()}
        uniform = [results[n] for n in range(self.study.n_uniform) if n in results]
        best_uniform = max(uniform, key=lambda result: (result.score, -result.number))
        weight = next(iter(best_uniform.weights.values()))
        return [
            ("target", results[0]),
            ("tuned", None),
            ("uniform 1", results[1]),
            (f"best uniform ({weight:g})", best_uniform),
            ("best", self.study.best()),
        ]

    def _save(self, candidates: Sequence[Candidate]) -> None:
        best = self.study.best()
        table = score_table(candidates)
        words = verdict(candidates[-1], candidates[:-1], heldout=self.questions.heldout is not None)
        if best.number == 0:
            nothing = "Nothing that was tried scored higher than the target: the best merge is the target itself."
            words = f"{nothing}\n\n{words}"
        recipe = self._recipe(best, candidates[-1].scores)
        output = self.output / "best"
        needed = ["README.md", *(path.name for path in model_files(self.sources.target.model.path))]
        if not _is_written(recipe, output, needed):
            with staged_directory(output, replace=True) as staging:
                write_model(recipe, self.sources, staging)
                card = model_card(recipe, table=table, verdict_text=words, weights=best.weights)
                write_text(staging / "README.md", card)
        print(f"\n{table}\n\n{words}\n")
        print(f"The best merge is trial {best.number} of {self.study.n_finished}; it is saved in {output}")

    def _recipe(self, best: TrialResult, scores: Sequence[QuestionScore]) -> Recipe:
        return Recipe(
            **{role: source_entry(getattr(self.sources, role)) for role in ("target", "base", "tuned")},
            granularity=self.config.optimize_mode,
            method=METHOD,
            weights=dict(best.weights),
            omit=list(self.omit),
            score={
                "trial": best.number,
                "search": best.score,
                self._split: mean_score(scores),
                f"{self._split}_tasks": task_scores(scores),
            },
            versions=library_versions(),
        )


def _is_written(recipe: Recipe, folder: Path, needed: Sequence[str]) -> bool:
    """Whether a folder, which appears whole or not at all, holds the model of this recipe."""
    try:
        Checkpoint(ModelId(name=str(folder), revision=None, path=folder))
        return Recipe.load(folder / RECIPE_FILE) == recipe and all((folder / name).is_file() for name in needed)
    except (CheckpointError, RecipeError):
        return False
