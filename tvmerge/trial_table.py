"""The rows of trials in a database, each change of which is one transaction.

Optuna's storage writes an attribute, a parameter and a state in transactions of their own, so that a kill may fall
between them, and does not look who else has changed a trial since it was read. Sqlite has no locks of single rows, and
there two of its workers may take the same trial. The tables are Optuna's, which checks their version when it opens
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import TrialState
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

__all__ = ["change_trial", "create_trial"]


def create_trial(
    storage: RDBStorage,
    study_id: int,
    *,
    number: int,
    state: TrialState,
    parameters: Mapping[str, tuple[float, BaseDistribution]],
    attributes: Mapping[str, Any],
) -> int | None:
    """Write down a trial, whole or not at all.

    Args:
        storage: that the study is in.
        study_id: its number in there.
        number: of the trial, which is how many there are before it.
        state: of the trial.
        parameters: name → value, and the range that it is of.
        attributes: plain JSON values that are kept with it.

    Returns:
        Its number in the storage; None if another worker was faster and there is a trial of this number.
    """
    with Session(storage.engine) as session, session.begin():
        # A write before anything is read: sqlite lets one process write at a time, others lock the row.
        session.execute(update(StudyModel).where(StudyModel.study_id == study_id).values(study_id=study_id))
        n_trials = session.execute(
            select(func.count()).select_from(TrialModel).where(TrialModel.study_id == study_id)
        ).scalar_one()
        if n_trials != number:
            return None
        trial = TrialModel(study_id=study_id, number=number, state=state)
        if state == TrialState.RUNNING:
            trial.datetime_start = datetime.now()
        session.add(trial)
        session.flush()
        trial_id = int(trial.trial_id)
        rows = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": distribution.to_internal_repr(value),
                "distribution_json": distribution_to_json(distribution),
            }
            for name, (value, distribution) in parameters.items()
        ]
        if rows:
            session.execute(insert(TrialParamModel), rows)
        _write_attributes(session, trial_id, attributes)
    return trial_id


def change_trial(
    storage: RDBStorage,
    trial_id: int,
    state: TrialState,
    *,
    was: TrialState = TrialState.RUNNING,
    having: Mapping[str, Any],
    attributes: Mapping[str, Any],
    values: Sequence[float] | None = None,
) -> bool:
    """Change a trial, if it still is what it is taken for.

    Args:
        storage: that it is in.
        trial_id: its number in there.
        state: that it is to have.
        was: the state that it must have now.
        having: attributes that it must have now; one that is None is missing.
        attributes: those to be written.
        values: of its objectives.

    Returns:
        Whether it was.
    """
    with _locked(storage, trial_id) as (session, trial):
        known = _attributes(session, trial_id, list(having))
        if trial is None or trial.state != was or any(known.get(key) != value for key, value in having.items()):
            return False
        if state != was:
            trial.state = state
            if state == TrialState.RUNNING:
                trial.datetime_start = datetime.now()
            if state.is_finished():
                trial.datetime_complete = datetime.now()
        for objective, value in enumerate(values or []):
            stored, kind = TrialValueModel.value_to_stored_repr(value)
            session.add(TrialValueModel(trial_id=trial_id, objective=objective, value=stored, value_type=kind))
        _write_attributes(session, trial_id, attributes)
    return True


@contextmanager
def _locked(storage: RDBStorage, trial_id: int) -> Iterator[tuple[Session, TrialModel | None]]:
    """A transaction that no other one on the same trial runs beside."""
    with Session(storage.engine) as session, session.begin():
        session.execute(update(TrialModel).where(TrialModel.trial_id == trial_id).values(trial_id=trial_id))
        yield session, session.get(TrialModel, trial_id)


def _attributes(session: Session, trial_id: int, keys: Sequence[str]) -> dict[str, Any]:
    of_trial = TrialUserAttributeModel.trial_id == trial_id
    wanted = select(TrialUserAttributeModel.key, TrialUserAttributeModel.value_json).where(
        of_trial, TrialUserAttributeModel.key.in_(keys)
    )
    return {key: json.loads(text) for key, text in session.execute(wanted)} if keys else {}


def _write_attributes(session: Session, trial_id: int, attributes: Mapping[str, Any]) -> None:
    if not attributes:
        return
    model = TrialUserAttributeModel
    session.execute(delete(model).where(model.trial_id == trial_id, model.key.in_(list(attributes))))
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    session.execute(insert(model), rows)
