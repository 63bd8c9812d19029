"""Workers: processes that do trials of a study which another one has begun.

One process is one device. A parent without a model watches it and starts a new one when it dies, which goes on under
the same name.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage

from tvmerge.config import JglueConfig, MtBenchConfig, SearchConfig, WorkerConfig
from tvmerge.errors import RunError, StudyError
from tvmerge.files import local_path
from tvmerge.models.device import choose_device
from tvmerge.progress import RunProgress
from tvmerge.scoring import Scorer, open_questions, open_space, study_plan
from tvmerge.storage import (
    STORAGE_ERRORS,
    STUDY_FILE,
    absolute_url,
    deletion_is_said,
    file_url,
    only_study,
    open_storage,
    reason_of,
    shown_url,
)
from tvmerge.study import MergeStudy

__all__ = ["work"]

COMMANDS: Mapping[str, type[SearchConfig]] = {"jglue": JglueConfig, "mt_bench": MtBenchConfig}
#: Seconds that a worker waits for a search to begin.
PATIENCE = 60.0


@dataclass(frozen=True)
class Joined:
    """What a worker finds in a study."""

    url: str
    name: str
    of_run: SearchConfig  # by which the study is known
    config: SearchConfig  # the same with this worker's own device and size of batches
    output: Path  # folder for what is written here


def work(config: WorkerConfig) -> None:
    """Do trials until none is left.

    Raises:
        InputError: there is no such study, or the models here are others.
        RunError: a trial that must not be given up, or three in a row.
    """
    joined = _join(config)
    name = config.name
    assert name is not None, "the command line makes one"
    device = choose_device(joined.config.device)
    print(f"worker {name}: study {joined.name}, on {device}", file=sys.stderr)
    joined.output.mkdir(parents=True, exist_ok=True)
    own = joined.output / "workers" / name
    with open_questions(joined.config, own, device=device) as ask:
        space = open_space(joined.config, joined.output)
        questions = ask(space.tokenizer())
        study = MergeStudy(
            output_dir=None,
            plan=study_plan(joined.of_run, space=space, questions=questions, device=device),
            storage=joined.url,
            name=joined.name,
            worker=name,
            heartbeat=joined.config.heartbeat,
            trial_timeout=joined.config.trial_timeout,
        )
        try:
            model = space.open_model(device=device, recall=study.recall)
            asked = questions.open_model(model, tokens=study.recall("batch_tokens"))
            with deletion_is_said(joined.name):
                _do_trials(Scorer(joined.config, space, study, model, asked, questions))
        except STORAGE_ERRORS as error:
            raise RunError(f"study {joined.name}: cannot be written ({reason_of(error)})") from error
        finally:
            study.close()


def _do_trials(scorer: Scorer) -> None:
    study = scorer.study
    n_trials, n_finished = int(study.recall("n_trials")), study.n_finished
    progress = RunProgress(n_trials=n_trials, n_finished=n_finished)
    if n_finished >= n_trials:
        progress.note(f"all {n_finished} trials are done: there is nothing to do")
    try:
        scorer.run_trials(progress, n_trials=lambda: int(study.recall("n_trials")), after=lambda: None)
    finally:
        study.release()
        progress.close()


def _join(config: WorkerConfig) -> Joined:
    """Find the study, and what it is a study of.

    Raises:
        StudyError: it is not there, or not begun.
    """
    # Whole paths, as it works in another folder soon.
    folder = None if config.output_dir is None else local_path(config.output_dir, flag="--output_dir").absolute()
    if config.storage is None:
        assert folder is not None, "one of them is given"
        if not (folder / STUDY_FILE).exists():
            raise StudyError(f"{folder}: holds no study, start the search first, or name its database by --storage")
    url = absolute_url(config.storage) if config.storage else file_url(Path(str(folder)) / STUDY_FILE)
    cache = None if config.cache_dir is None else local_path(config.cache_dir, flag="--cache_dir").absolute()
    shown = str(folder) if config.storage is None else shown_url(url)
    storage = open_storage(url, make=False)
    try:
        name = config.study_name or only_study(storage, shown=shown)
        found = _wait_for(storage, name, shown)
    except STORAGE_ERRORS as error:
        raise StudyError(f"{shown}: {reason_of(error)}") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()
    if Path(found["folder"]).is_dir():
        os.chdir(found["folder"])  # where the names of its models mean what they meant
    settings = COMMANDS[found["command"]]
    known = {each.name for each in fields(settings)}
    of_run = settings(**{key: value for key, value in found["config"].items() if key in known})
    own: dict[str, Any] = {"device": config.device}
    own |= {} if config.batch_size is None else {"batch_size": config.batch_size}
    own |= {} if config.cache_dir is None else {"cache_dir": str(cache)}
    return Joined(url, name, of_run, replace(of_run, **own), folder or Path(found["output"]))


def _wait_for(storage: RDBStorage, name: str, shown: str) -> Mapping[str, Any]:
    """What the search has written of itself into the study."""
    names = sorted(each.study_name for each in storage.get_all_studies())
    if name not in names:
        raise StudyError(f"{shown}: holds no study {name!r}, it holds {', '.join(names) or 'none'}")
    study = optuna.load_study(study_name=name, storage=storage)
    begun = time.monotonic()
    while (found := study.user_attrs.get("run")) is None or study.user_attrs.get("n_trials") is None:
        if time.monotonic() - begun > PATIENCE:
            raise StudyError(f"{shown}: study {name} was not begun to the end: start its search again")
        time.sleep(0.5)
    return dict(found)
