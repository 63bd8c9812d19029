"""The search commands, assembled from the parts: check everything, then search, prove and save."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial

from tvmerge.config import JglueConfig, MtBenchConfig, SearchConfig
from tvmerge.errors import ConfigError, RunError, StudyError
from tvmerge.evaluators import score_range
from tvmerge.files import check_output, local_path, remove_staged, write_text
from tvmerge.loggers import MEMORY, Loggers, check_loggers, open_loggers
from tvmerge.models.device import choose_device
from tvmerge.progress import RunProgress
from tvmerge.proof import PARETO_FOLDER, Proof
from tvmerge.rebuild import ROUTER_FILE
from tvmerge.report.page import REPORT_FILE, write_report
from tvmerge.results import Results, trial_rows
from tvmerge.samplers import Recommendation
from tvmerge.score_log import unpacked
from tvmerge.scoring import Ask, Scorer, open_questions, open_space, study_plan
from tvmerge.storage import STORAGE_ERRORS, STUDY_FILE, STUDY_NAME, deletion_is_said, has_study, reason_of, shown_url
from tvmerge.study import MergeStudy
from tvmerge.trial_queue import StudyPlan

__all__ = ["jglue", "mt_bench"]

#: Bytes of weights whose reading takes so long that it is said.
LONG_TO_READ = 4_000_000_000
#: What a run writes into its folder, a study aside.
OF_A_RUN = ("best", PARETO_FOLDER, "config.yaml", "scores.jsonl", REPORT_FILE, "*.png", MEMORY, ROUTER_FILE)
#: Least seconds between two reports of a run that goes on, and how many times longer than one they are apart.
REPORT_SECONDS, REPORT_SHARE = 60.0, 20.0


def jglue(config: JglueConfig) -> None:
    """Search, prove and save a merge that scores best on JGLUE-style tasks.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: a baseline failed, or three trials in a row.
    """
    _run(config)


def mt_bench(config: MtBenchConfig) -> None:
    """Search, prove and save a merge whose answers a judge likes best.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: a baseline failed, or three trials in a row, or the judge cannot be asked any more.
    """
    _run(config)


def _run(config: SearchConfig) -> None:
    output = local_path(config.output_dir, flag="--output_dir")
    check_output(output)
    check_loggers(config.logger_names)
    device = choose_device(config.device)
    with open_questions(config, output, device=device) as ask:
        _search(config, output, device, ask)


def _search(config: SearchConfig, output: Path, device: str, ask: Ask) -> None:
    space = open_space(config, output)
    questions = ask(space.tokenizer())
    is_there = has_study(config.storage, output, _study_name(config, output))
    if not is_there:
        nbytes = sum(model.spec(name).nbytes for model in space.sources.models() for name in model.names)
        if nbytes > LONG_TO_READ:
            print(f"looking for NaN and infinity in {nbytes / 1e9:.0f} GB of weights", file=sys.stderr)
        space.check_finite()

    def study_of() -> MergeStudy:
        return _open_study(config, output, study_plan(config, space=space, questions=questions, device=device))

    # A study that is there may refuse, which is said before a model is loaded. One that is not is made last.
    study = study_of() if is_there else None
    try:
        if study is not None:
            _check_owner(study, output, config)
        # What a study without a finished trial recalls may be made anew.
        recall = study.recall if study is not None and study.n_finished else _nothing
        model = space.open_model(device=device, recall=recall)
        # Found once: another batch size would give other rounding errors.
        tokens = None if study is None else study.recall("batch_tokens")
        asked = questions.open_model(model, tokens=tokens)
        study = study or study_of()
        if not study.n_finished:
            space.remember(study.remember)
        _write_down(config, output, study)
        loggers = open_loggers(config.logger_names, settings=_shown(config), folder=output)
        try:
            with deletion_is_said(_study_name(config, output)):
                SearchRun(output, Scorer(config, space, study, model, asked, questions), loggers).run()
        finally:
            loggers.close()
    except STORAGE_ERRORS as error:
        where = output / STUDY_FILE if config.storage is None else shown_url(config.storage)
        raise RunError(f"{where}: cannot be written ({reason_of(error)}): the same command goes on") from error
    finally:
        if study is not None:
            study.close()


def _open_study(config: SearchConfig, output: Path, plan: StudyPlan) -> MergeStudy:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output}: {error.strerror}, name another folder") from error
    return MergeStudy(
        output_dir=output,
        plan=plan,
        storage=config.storage,
        name=_study_name(config, output),
        heartbeat=config.heartbeat,
        trial_timeout=config.trial_timeout,
    )


def _check_owner(study: MergeStudy, output: Path, config: SearchConfig) -> None:
    """Refuse a study in a database that another search works on: both would take up the same trials."""
    known = (study.recall("run") or {}).get("output", str(output.resolve()))
    if config.storage is not None and known != str(output.resolve()):
        raise StudyError(
            f"study {_study_name(config, output)} belongs to the search of --output_dir {known}: name that folder, or "
            "another --study_name; tvmerge worker joins it"
        )


def _nothing(key: str) -> None:
    """What a new study recalls."""


def _study_name(config: SearchConfig, output: Path) -> str:
    return STUDY_NAME if config.storage is None else config.study_name or output.resolve().name


def _write_down(config: SearchConfig, output: Path, study: MergeStudy) -> None:
    """Write the configuration, for the user and for workers, and remove what a kill left."""
    remove_staged(output, *OF_A_RUN)
    remove_staged(output / "best", "*")
    resolved = {**_shown(config), "n_trials": max(config.n_trials, study.n_finished)}
    write_text(output / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    command = "jglue" if isinstance(config, JglueConfig) else "mt_bench"
    folder = str(Path.cwd())
    study.remember("run", {"command": command, "config": resolved, "folder": folder, "output": str(output.resolve())})
    study.remember("n_trials", resolved["n_trials"])


def _shown(config: SearchConfig) -> dict[str, Any]:
    """All settings, without a password."""
    return {**asdict(config), "storage": None if config.storage is None else shown_url(config.storage)}


class Reporter:
    """Writes the report, also while the run goes on, but takes a small share of its time.

    Args:
        folder: of the run.
        progress: where it is said what is wrong with it.
    """

    def __init__(self, folder: Path, progress: RunProgress) -> None:
        self._folder = folder
        self._progress = progress
        self._said: set[str] = set()
        self._next = time.monotonic() + REPORT_SECONDS

    def write_now_and_then(self, results: Callable[[], Results]) -> None:
        """Write it if it is time."""
        if time.monotonic() >= self._next:
            begun = time.monotonic()
            self.write(results())
            ended = time.monotonic()
            self._next = ended + max(REPORT_SECONDS, REPORT_SHARE * (ended - begun))

    def write(self, results: Results) -> None:
        """Write it; a picture that cannot be drawn ends no run."""
        try:
            notes = write_report(results, self._folder)
        except Exception as error:  # noqa: BLE001  # what was scored and saved is worth more than its picture
            notes = [" ".join(f"{self._folder}: the report was not written: {type(error).__name__}: {error}".split())]
        for note in notes:
            if note not in self._said:
                self._progress.note(note)
                self._said.add(note)


@dataclass(frozen=True)
class SearchRun:
    """A run whose every part is checked and open."""

    output: Path
    scorer: Scorer
    loggers: Loggers

    def run(self) -> None:
        """Run the trials that are not done yet, then prove and save the best."""
        scorer, study = self.scorer, self.scorer.study
        questions, n_trials = scorer.questions, scorer.config.n_trials
        progress = RunProgress(n_trials=n_trials, n_finished=study.n_finished)
        for note in questions.notes:
            progress.note(note)
        scorer.note(progress)
        questions.resume([result.number for result in study.results()])
        heldout = questions.heldout.n_questions if questions.heldout else 0
        progress.note(
            f"{len(scorer.space.ranges)} weights, {questions.search.n_questions} questions per trial, "
            f"{heldout} held out; {study.n_finished} of {max(n_trials, study.n_finished)} trials done"
        )
        reporter = Reporter(self.output, progress)
        self.loggers.log(trial_rows(study.trials()))
        # Nothing that was made so far can be collected, and to look through it all takes as long as a small trial.
        gc.freeze()
        try:
            scorer.run_trials(progress, n_trials=lambda: n_trials, after=lambda: self._after_trial(progress, reporter))
            proof = Proof(scorer, self.output, progress)
            candidates = proof.prove()
        finally:
            gc.unfreeze()
            progress.close()
        results = proof.save(candidates, self.results())
        reporter.write(results)
        self.loggers.log(results.trials)
        self.loggers.finish(results, self.output)

    def _after_trial(self, progress: RunProgress, reporter: Reporter) -> None:
        study, tokens = self.scorer.study, self.scorer.asked.budget.tokens
        # That of this process: a worker's device may bear more, or less.
        if self.scorer.config.batch_size == "auto" and study.recall("batch_tokens") != tokens:
            study.remember("batch_tokens", tokens)
        if self.scorer.config.logger_names:  # rows of a thousand trials take as long as all else after a trial
            self.loggers.log(trial_rows(study.trials()))
        reporter.write_now_and_then(self.results)
        if study.n_finished == min(study.n_first, self.scorer.config.n_trials):
            self._warn_of_idle_tasks(progress)

    def results(self) -> Results:
        """What is known so far."""
        scorer = self.scorer
        trials = scorer.study.trials()
        return Results(
            name=self.output.resolve().name,
            settings=_shown(scorer.config),
            n_trials=scorer.config.n_trials,
            trials=trial_rows(trials),
            goals=scorer.questions.goals,
            categories=scorer.questions.categories,
            recommendation=self._recommendation(trials),
            heldout=scorer.questions.heldout is not None,
        )

    def _recommendation(self, trials: Sequence[FrozenTrial]) -> Recommendation | None:
        """What is recommended, predicted to score no more than if each question got the most that any got so far."""
        recommendation = self.scorer.study.recommended()
        seen = (score for trial in trials for score in unpacked(trial.user_attrs.get("scores", [])))
        ends = score_range(seen, self.scorer.questions.goals)
        return recommendation if recommendation is None or ends is None else recommendation.within(*ends)

    def _warn_of_idle_tasks(self, progress: RunProgress) -> None:
        """Say which tasks gave every model so far the same scores: they cannot guide the search."""
        seen: dict[str, dict[int, list[tuple[Any, ...]]]] = {}
        for result in self.scorer.study.results():
            for each in self.scorer.study.search_scores(result.number):
                of_task = seen.setdefault(each.task, {})
                of_task.setdefault(result.number, []).append((each.question, each.turn, each.choice, each.score))
        for task, by_trial in seen.items():
            scores = list(by_trial.values())
            if len(scores) > 1 and all(other == scores[0] for other in scores):
                progress.note(
                    f"task {task}: all {len(scores)} models so far got the same score on each of its questions: it "
                    "cannot guide the search"
                )
