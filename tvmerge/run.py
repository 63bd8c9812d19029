"""The search command, assembled from the parts: check everything, then search, prove and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from tvmerge.checkpoint import Checkpoint, check_mergeable, check_same_vocabulary, resolve
from tvmerge.config import JglueConfig
from tvmerge.errors import ConfigError, RecipeError
from tvmerge.evaluators import Evaluator, QuestionScore, mean_score, task_scores
from tvmerge.evaluators.lm_eval import HarnessModel, LmEvalEvaluator, Split, load_tasks, split_questions
from tvmerge.files import check_writable, staged_directory, write_text
from tvmerge.merge import Merge
from tvmerge.models.transformers import TransformersModel, unread_tensors
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
        RunError: three trials in a row failed.
    """
    output = Path(config.output_dir)
    check_output(output)
    sources = open_models(config)
    omit = unread_tensors(sources.target.model.path, sources.target.names)
    merge = sources.merge(granularity=config.optimize_mode, method=METHOD, omit=omit)
    device = choose_device(config.device)
    splits = split_tasks(config)
    output.mkdir(parents=True, exist_ok=True)
    study = open_study(config, sources, merge)
    try:
        write_text(output / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        model = TransformersModel.from_folder(
            sources.target.model.path, checkpoint_names=merge.target.names, device=device
        )
        JglueRun(config=config, sources=sources, merge=merge, omit=omit, study=study, model=model, splits=splits).run()
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
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used here: {reason}") from error
    return name


def split_tasks(config: JglueConfig) -> dict[str, Split]:
    """Load the tasks once to check them and to choose their questions."""
    task_dir = None if config.task_dir is None else Path(config.task_dir)
    splits = {}
    for name, task in load_tasks(config.tasks, task_dir=task_dir).items():
        limit = config.limits[name]
        n_questions = len(task.eval_docs)
        split = split_questions(
            name=name, n_questions=n_questions, holdout=config.holdout, limit=limit, seed=config.question_seed
        )
        if limit is not None and limit > len(split.search):
            print(f"task {name}: --jglue_limit {limit} is more than the {len(split.search)} questions it can search on")
        splits[name] = split
    return splits


def open_study(config: JglueConfig, sources: Sources, merge: Merge) -> MergeStudy:
    """Create or resume the study of a configuration."""
    revisions = {f"{role}_revision": getattr(sources, role).model.revision for role in ("target", "base", "tuned")}
    return MergeStudy(
        output_dir=Path(config.output_dir),
        identity={**config.identity(), **revisions},
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
    sources: Sources
    merge: Merge
    omit: Sequence[str]
    study: MergeStudy
    model: TransformersModel
    splits: Mapping[str, Split]

    def run(self) -> None:
        """Run the trials that are not done yet, then prove and save the best."""
        harness = HarnessModel(self.model, batch_size=self.config.batch_size)
        progress = RunProgress(n_trials=self.config.n_trials, n_finished=self.study.n_finished)
        per_trial, held_out = (sum(len(getattr(s, k)) for s in self.splits.values()) for k in ("search", "heldout"))
        progress.note(
            f"{len(self.merge.weight_names)} weights, {per_trial} questions per trial, {held_out} held out; "
            f"{self.study.n_finished} of {self.config.n_trials} trials done"
        )
        try:
            if self.study.n_finished < self.config.n_trials:
                self._search(self._evaluator(harness, "search"), progress)
            candidates = self._prove(harness, progress)
        finally:
            progress.close()
        self._save(candidates)

    def _evaluator(self, harness: HarnessModel, split: str) -> LmEvalEvaluator:
        # Tasks hold their requests, so each split has tasks of its own.
        task_dir = None if self.config.task_dir is None else Path(self.config.task_dir)
        return LmEvalEvaluator(
            tasks=load_tasks(self.config.tasks, task_dir=task_dir),
            questions={name: getattr(questions, split) for name, questions in self.splits.items()},
            model=harness,
            seed=self.config.question_seed,
        )

    def _score(
        self, state_dict: StateDict, evaluator: Evaluator, progress: RunProgress, what: str
    ) -> Sequence[QuestionScore]:
        advance, close = progress.count_questions(evaluator.n_questions, what)
        try:
            self.model.load(state_dict)
            return evaluator.score(advance)
        finally:
            close()

    def _search(self, evaluator: Evaluator, progress: RunProgress) -> None:
        def evaluate(weights: Mapping[str, float]) -> Sequence[QuestionScore]:
            return self._score(self.merge.at(weights), evaluator, progress, "questions")

        while self.study.n_finished < self.config.n_trials:
            result = self.study.run_trial(evaluate)
            best = self.study.best() if self.study.results() else None
            progress.finish_trial(
                score=None if result is None else result.score,
                best=None if best is None else (best.score, best.number),
            )
            if result is None:
                progress.note(f"  {self.study.last_failure()}")

    def _prove(self, harness: HarnessModel, progress: RunProgress) -> list[Candidate]:
        """Score target, tuned, uniform and best on the held-out questions; what was scored before is not again."""
        split = "heldout" if self.config.holdout > 0 else "search"
        evaluator: LmEvalEvaluator | None = None
        candidates = []
        for label, trial in self._columns():
            model = "tuned" if trial is None else "merge"
            number = None if trial is None else trial.number
            scores = self.study.scores.find(model=model, trial=number, split=split)
            if len(scores) != sum(len(getattr(questions, split)) for questions in self.splits.values()):
                evaluator = evaluator or self._evaluator(harness, split)
                state_dict = Without(self.sources.tuned, self.omit) if trial is None else self.merge.at(trial.weights)
                measured = self._score(state_dict, evaluator, progress, f"{split} {label}")
                self.study.scores.replace(measured, model=model, trial=number, split=split)
                scores = list(measured)
            candidates.append(Candidate(label=label, scores=scores))
        return candidates

    def _columns(self) -> list[tuple[str, TrialResult | None]]:
        """Column head → the trial it shows, None for the tuned model."""
        results = {result.number: result for result in self.study.results()}
        uniform = [results[n] for n in range(self.study.n_uniform) if n in results]
        columns: list[tuple[str, TrialResult | None]] = []
        if 0 in results:
            columns.append(("target", results[0]))
        columns.append(("tuned", None))
        if 1 in results:
            columns.append(("uniform 1", results[1]))
        if uniform:
            best_uniform = max(uniform, key=lambda result: (result.score, -result.number))
            weight = next(iter(best_uniform.weights.values()))
            columns.append((f"best uniform ({weight:g})", best_uniform))
        columns.append(("best", self.study.best()))
        return columns

    def _save(self, candidates: Sequence[Candidate]) -> None:
        best = self.study.best()
        table = score_table(candidates)
        words = verdict(candidates[-1], candidates[:-1], heldout=self.config.holdout > 0)
        if best.number == 0:
            nothing = "Nothing that was tried scored higher than the target: the best merge is the target itself."
            words = f"{nothing}\n\n{words}"
        recipe = self._recipe(best, candidates[-1].scores)
        output = Path(self.config.output_dir) / "best"
        if not _is_written(recipe, output):
            with staged_directory(output) as staging:
                write_model(recipe, self.sources, staging)
                card = model_card(recipe, table=table, verdict_text=words, weights=best.weights)
                write_text(staging / "README.md", card)
        print(f"\n{table}\n\n{words}\n")
        print(f"The best merge is trial {best.number} of {self.study.n_finished}; it is saved in {output}")

    def _recipe(self, best: TrialResult, scores: Sequence[QuestionScore]) -> Recipe:
        split = "heldout" if self.config.holdout > 0 else "search"
        return Recipe(
            **{role: source_entry(getattr(self.sources, role).model) for role in ("target", "base", "tuned")},
            granularity=self.config.optimize_mode,
            method=METHOD,
            weights=dict(best.weights),
            omit=list(self.omit),
            score={
                "trial": best.number,
                "search": best.score,
                split: mean_score(scores),
                f"{split}_tasks": task_scores(scores),
            },
            versions=library_versions(),
        )


def _is_written(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder, which appears whole or not at all, holds the model of this recipe."""
    try:
        return Recipe.load(folder / RECIPE_FILE) == recipe
    except RecipeError:
        return False
