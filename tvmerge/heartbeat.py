"""Signs of life: how workers of one study tell that another one has died, and take over its trial.

A worker leaves a sign with its trial every so often. One whose sign does not change over MISSES looks is taken for
dead, and its trial is to be run again. It is looks that are counted and not seconds, so that neither clocks that
differ nor the sleep of the one who looks can make a living worker dead. Nothing breaks if one that was only frozen
wakes up: a trial is a function of its weights, it ends once, and whoever comes late is told.

Optuna's own heartbeat is for `study.optimize`, and by the database's clock.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from tvmerge.search import BASELINES
from tvmerge.storage import STORAGE_ERRORS
from tvmerge.trial_table import change_trial

__all__ = ["MAX_REPEATS", "MISSES", "SLOWEST", "Heartbeat", "hand_back"]

#: Looks without a new sign after which a worker counts as dead, where all leave them equally often.
MISSES = 4
#: The attribute of a study that holds the longest interval of all of its workers.
SLOWEST = "heartbeat"
#: How often a trial is run again whose worker has died: one that kills every worker must not go around for ever.
MAX_REPEATS = 2
#: Seconds beyond the limit of a trial after which its process is ended, as it hangs where nothing can interrupt it. For
#: a limit that is less, as many as that.
HANGING = 30.0
#: Status of a process that ended itself; EX_TEMPFAIL of sysexits.h: what is run again may succeed.
HUNG_STATUS = 75


class Heartbeat:
    """A thread that leaves signs of life with one trial and looks for those of others.

    Args:
        storage: of the study.
        study_id: its number in there.
        worker: what this worker is called.
        interval: seconds between two signs.
    """

    def __init__(self, storage: RDBStorage, study_id: int, *, worker: str, interval: float) -> None:
        self._storage = storage
        self._study_id = study_id
        self._worker = worker
        self._interval = interval
        self._trial: int | None = None
        self._deadline: float | None = None
        self._hung: Callable[[], None] | None = None
        self._seen: dict[int, tuple[object, int]] = {}  # trial → its last sign, and looks since that changed
        self._n_signs = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def begin(self, trial_id: int, *, limit: float | None = None, hung: Callable[[], None] | None = None) -> None:
        """Leave signs with this trial from now on.

        Args:
            trial_id: its number in the storage.
            limit: seconds that it may take.
            hung: what is to be done before the process is ended if it takes much longer than that.
        """
        self._hung = hung
        self._deadline = None if limit is None else time.monotonic() + limit + min(limit, HANGING)
        self._trial = trial_id

    def end(self) -> None:
        """Leave no more signs."""
        self._trial = self._deadline = None

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._beat()
                self._look()
            except (*STORAGE_ERRORS, KeyError):  # the next time, perhaps: the run says what has gone
                pass
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_process()
        self._storage.remove_session()

    def _beat(self) -> None:
        trial = self._trial
        if trial is not None:
            self._n_signs += 1
            sign = {"beat": f"{self._worker}:{self._n_signs}"}
            change_trial(self._storage, trial, TrialState.RUNNING, having={"worker": self._worker}, attributes=sign)

    def _look(self) -> None:
        running = self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        others = [trial for trial in running if trial.user_attrs.get("worker") != self._worker]
        seen: dict[int, tuple[object, int]] = {}
        for trial in others:
            sign = trial.user_attrs.get("worker"), trial.user_attrs.get("beat")
            last, misses = self._seen.get(trial._trial_id, (None, 0))
            misses = misses + 1 if last == sign else 0
            if misses < MISSES * self._longest() / self._interval:
                seen[trial._trial_id] = sign, misses
                continue
            hand_back(self._storage, trial, reason=f"its worker {sign[0]} gave no sign of life")
        self._seen = seen

    def _longest(self) -> float:
        """Seconds between the signs of the worker that leaves the fewest."""
        slowest: float = self._storage.get_study_user_attrs(self._study_id).get(SLOWEST, 0.0)
        return max(slowest, self._interval)

    def _end_process(self) -> None:
        with suppress(*STORAGE_ERRORS):  # then the next process notices that it was not ended
            if self._hung is not None:
                self._hung()
        print("\nthe trial hangs where nothing can interrupt it: this process ends itself", file=sys.stderr, flush=True)
        os._exit(HUNG_STATUS)


def hand_back(storage: RDBStorage, trial: FrozenTrial, *, reason: str) -> bool:
    """Have a trial run again, or fail it if it was run again MAX_REPEATS times.

    A baseline never fails: no study can do without it.

    Args:
        storage: of the study.
        trial: that runs, as it was seen; one that has left another sign since then stays as it is.
        reason: why it will not end.

    Returns:
        Whether it will be run again.
    """
    repeats = int(trial.user_attrs.get("repeats", 0))
    seen = {key: trial.user_attrs.get(key) for key in ("worker", "beat")}
    is_baseline = trial.user_attrs.get("given") and trial.number < len(BASELINES)
    if repeats >= MAX_REPEATS and not is_baseline:
        failure = {"failure": f"it was begun {repeats + 1} times and never ended: {reason}"}
        change_trial(storage, trial._trial_id, TrialState.FAIL, having=seen, attributes=failure)
        return False
    again = {"repeats": repeats + 1}
    return change_trial(storage, trial._trial_id, TrialState.WAITING, having=seen, attributes=again)
