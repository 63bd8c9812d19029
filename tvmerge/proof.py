"""What a search has found, proven on questions that it did not see: the table, the choice, the saved model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvmerge.errors import CheckpointError, RecipeError, RunError, TvmergeError
from tvmerge.evaluators import Evaluator, Goals, QuestionScore, TaskGoal, mean_score, task_scores
from tvmerge.files import staged_directory, write_bytes
from tvmerge.interrupt import check_interrupted
from tvmerge.judging import trial_name
from tvmerge.progress import RunProgress
from tvmerge.rebuild import ROUTER_FILE, library_versions
from tvmerge.recipe import Recipe
from tvmerge.report.card import model_card
from tvmerge.report.pictures import weights_picture
from tvmerge.report.sources import read_cards
from tvmerge.report.tables import score_table, verdict
from tvmerge.results import Candidate, Results
from tvmerge.scoring import Scorer, uniform_points
from tvmerge.search import paired_gain
from tvmerge.spaces import RECOMMENDED, Column, Proven, Space

__all__ = ["PARETO_FOLDER", "Proof", "choose"]

#: How the names begin of models in scores.jsonl that are of the recommended point.
OF_RECOMMENDED = (RECOMMENDED, "expert")
#: Beside the model: the weights that were found, and what they are worth.
WEIGHTS_PICTURE, CARD = "weights.png", "README.md"
#: Folder of the recipes of the trials than which none is better in all tasks.
PARETO_FOLDER = "pareto"


@dataclass(frozen=True)
class Proof:
    """The last part of a run.

    Args:
        scorer: whose trials are all done.
        output: folder of the run.
        progress: where it is shown.
    """

    scorer: Scorer
    output: Path
    progress: RunProgress
    known: dict[tuple[str, int | None, str], list[QuestionScore]] = field(default_factory=dict)  # what is in the log

    def prove(self) -> list[Candidate]:
        """Score all models of the table on the held-out questions; what was scored before is not again."""
        study = self.scorer.study
        found = study.recommended()
        point = study.best().weights if found is None else found.point
        # What was scored of another recommendation, or of an expert of it, says nothing of this one.
        if study.recall("recommended") != dict(point):
            study.scores.keep(lambda line: not line["model"].startswith(OF_RECOMMENDED))
            study.remember("recommended", dict(point))
        self.known.update(study.scores.by_model())
        return [self._candidate(column) for column in self._columns(point)]

    def _candidate(self, column: Column) -> Candidate:
        scores = self._scores(column, self._split)
        # What is recommended was predicted, and no trial: how good it is on what the search saw is not known yet.
        is_new = column.model == RECOMMENDED
        seen = self._scores(column, "search") if is_new else self.known.get((column.model, column.trial, "search"), [])
        return Candidate(
            column.label,
            scores,
            search=seen,
            weights=column.weights,
            trial=column.trial,
            is_target=column.is_target,
        )

    @property
    def _split(self) -> str:
        return "search" if self.scorer.questions.heldout is None else "heldout"

    def _scores(self, column: Column, split: str) -> list[QuestionScore]:
        """The scores of a model on a split of the questions, from the log if they are there."""
        questions, study = self.scorer.questions, self.scorer.study
        evaluator = questions.search if split == "search" else questions.heldout
        assert evaluator is not None, "nobody asks for what is not held out"
        scores = self.known.get((column.model, column.trial, split), [])
        if len(scores) == evaluator.n_scores:
            return scores
        measured = self._measured(column, evaluator, split)
        # To replace is to read and write all lines, of a thousand trials for seconds.
        write = study.scores.replace if scores else study.scores.append
        write(measured, model=column.model, trial=column.trial, split=split)
        self.known[column.model, column.trial, split] = measured
        return measured

    def _measured(self, column: Column, evaluator: Evaluator, split: str) -> list[QuestionScore]:
        check_interrupted()
        what = f"{split} {column.label}"
        name = _name(column) + ("" if self.scorer.questions.heldout is None or split == "search" else "-heldout")
        try:
            return list(self.scorer.score(column.state_dict, evaluator, self.progress, name=name, what=what).scores)
        except (TvmergeError, OSError):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"{what}: {reason}; the same command goes on") from error

    def _columns(self, point: Mapping[str, float]) -> list[Column]:
        """The models of the table, in order; `point` is recommended."""
        study, space = self.scorer.study, self.scorer.space
        results = {result.number: result for result in study.results()}
        uniform = [results[n] for n in range(study.n_first) if n in results]
        best_uniform = max(uniform, key=lambda result: (result.score, -result.number))
        proven = Proven(
            zero=results[0],
            one=results[1],
            best_uniform=best_uniform,
            uniform_weight=uniform_points(self.scorer.config)[best_uniform.number],
            best=study.best(),
            recommended=point,
            tried=next((result for result in study.results() if dict(result.weights) == dict(point)), None),
        )
        # The best part is chosen by what the search has seen, as the whole was.
        singles = space.singles(point)
        goals = self.scorer.questions.goals
        searched = [mean_score(self._scores(each, "search"), goals) for each in singles]
        known = [n for n, score in enumerate(searched) if score is not None]
        single = singles[max(known, key=lambda n: (searched[n], -n))] if known else None
        return space.columns(proven, single)

    def save(self, candidates: Sequence[Candidate], results: Results) -> Results:
        """Choose one of the models, write it down, and say how good it is.

        Args:
            candidates: of `prove`.
            results: of the run, as far as they are known.

        Returns:
            All of them.
        """
        space, questions = self.scorer.space, self.scorer.questions
        goals, heldout = questions.goals, questions.heldout is not None
        chosen, reason = choose(candidates, goals)
        best = candidates[chosen]
        assert best.weights is not None, "only a merge is chosen"
        table = score_table(candidates, goals, questions.categories)
        others = [each for each in candidates if each is not best]
        words = [
            questions.explanation,
            reason,
            verdict(best, others, heldout=heldout, goals=goals),
            space.explanation(),
        ]
        text = "\n\n".join(part for part in words if part)
        whole = replace(results, candidates=candidates, chosen=chosen, table=table, verdict=text)
        recipe = space.recipe(best.weights, score=self._score_entry(best), versions=library_versions())
        folder = self.output / "best"
        about = self._about(recipe, whole)
        if not _is_written(space, recipe, folder):
            with staged_directory(folder, replace=True) as staging:
                space.write(recipe, staging)
                for name, content in about.items():
                    write_bytes(staging / name, content)
        for name, content in about.items():  # of the same model, after more trials
            if not (folder / name).is_file() or not _says_the_same(folder / name, content, whole):
                write_bytes(folder / name, content)
        if self.scorer.study.plan.objectives:
            self._write_front()
        print(f"\n{table}\n\n{text}\n")
        n = self.scorer.study.n_finished
        print(f"The saved {space.noun} is {best.label}, of {n} trials; it is in {self.output / 'best'}")
        return whole

    def _about(self, recipe: Recipe, results: Results) -> dict[str, bytes]:
        """What lies beside the model and says what it is: file name → content."""
        chosen = results.candidates[results.chosen or 0]
        try:
            picture = weights_picture(results)
        except Exception as error:  # noqa: BLE001  # the model is worth more than its picture
            self.progress.note(" ".join(f"{WEIGHTS_PICTURE}: was not drawn: {type(error).__name__}: {error}".split()))
            picture = None
        card = model_card(
            recipe,
            table=results.table,
            verdict_text=results.verdict,
            weights=chosen.weights or {},
            best=chosen,
            goals=results.goals,
            heldout=results.heldout,
            cards=read_cards(self.scorer.space.sources.models()),
            pictures=[] if picture is None else [WEIGHTS_PICTURE],
        )
        return {**({} if picture is None else {WEIGHTS_PICTURE: picture}), CARD: card.encode()}

    def _write_front(self) -> None:
        """A recipe for each trial than which none is better in all tasks."""
        study, folder = self.scorer.study, self.output / PARETO_FOLDER
        results = {result.number: result for result in study.results()}
        front = study.pareto_front()
        with staged_directory(folder, replace=True) as staging:
            for number in front:
                searched = _metrics(study.search_scores(number), self.scorer.questions.goals)
                score = {"trial": number, "search": results[number].score, "search_tasks": searched}
                recipe = self.scorer.space.recipe(results[number].weights, score=score, versions=library_versions())
                recipe.save(staging / f"{trial_name(number)}.yaml")
            if (self.output / ROUTER_FILE).exists():
                shutil.copyfile(self.output / ROUTER_FILE, staging / ROUTER_FILE)
        print(
            f"\n{len(front)} trials are such that no other is better in all tasks. Their recipes are in {folder}; "
            "tvmerge apply writes the model of each"
        )

    def _score_entry(self, best: Candidate) -> dict[str, Any]:
        """What a recipe says of its score."""
        goals = self.scorer.questions.goals
        return {
            "trial": best.trial,
            "search": mean_score(best.search, goals),
            self._split: mean_score(best.scores, goals),
            f"{self._split}_tasks": _metrics(best.scores, goals),
        }


def choose(candidates: Sequence[Candidate], goals: Goals) -> tuple[int, str]:
    """Which model is saved: the last one, which is recommended, unless another merge is clearly better.

    Args:
        candidates: models of the table; those with weights can be chosen.
        goals: how scores make the score of a model.

    Returns:
        Its index, and a sentence if it is not the last.
    """
    last = len(candidates) - 1
    better = [
        n
        for n, rival in enumerate(candidates[:-1])
        if rival.weights is not None
        and (gain := paired_gain(candidates[last].scores, rival.scores, goals)) is not None
        and gain.is_clear
        and gain.mean < 0
    ]
    if not better:
        return last, ""
    best = max(better, key=lambda n: (mean_score(candidates[n].scores, goals) or 0.0, -n))
    return (
        best,
        f"The search recommends another merge, which is clearly worse than {candidates[best].label}: that is saved. "
        "It was chosen by the questions of the table, so that its gains are a little too good.",
    )


def _metrics(scores: Sequence[QuestionScore], goals: Goals) -> dict[str, float | None]:
    means = task_scores(scores)
    return {task: None if mean is None else goals.get(task, TaskGoal()).shown(mean) for task, mean in means.items()}


def _name(column: Column) -> str:
    """What a model's answers are called in FastChat's files."""
    name = column.model.replace("/", "-")
    if column.trial is None:
        return name
    return trial_name(column.trial) if column.model == "merge" else f"{name}-{trial_name(column.trial)}"


def _says_the_same(path: Path, content: bytes, results: Results) -> bool:
    """Whether a file is what it is to be; a card may have been edited, as long as it says how good the model is."""
    found = path.read_bytes()
    if path.name != CARD or found == content:
        return found == content
    return results.table.encode() in found and results.verdict.encode() in found


def _is_written(space: Space, recipe: Recipe, folder: Path) -> bool:
    """Whether a folder holds exactly this model, so that finishing twice writes once."""
    try:
        return space.is_whole(recipe, folder)
    except (CheckpointError, RecipeError):  # not there, damaged, or not finished
        return False
