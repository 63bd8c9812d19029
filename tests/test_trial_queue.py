"""Workers of one study as threads of one process: who takes a trial, who ends it, and who is taken for dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from tvmerge.evaluators import QuestionScore
from tvmerge.heartbeat import MAX_REPEATS, SLOWEST, Heartbeat, hand_back
from tvmerge.storage import file_url, open_storage
from tvmerge.trial_queue import MAIN, Claim, StudyPlan, TrialQueue

NAMES = ("layers.0", "layers.1")
BEAT = 0.05


class Worker:
    """One of several, with connections of its own."""

    def __init__(self, folder: Path, name: str, *, beat: float | None = None, first: Sequence[float] = ()) -> None:
        self.storage: RDBStorage = open_storage(file_url(folder / "study.db"))
        study = optuna.create_study(study_name="s", storage=self.storage, direction="maximize", load_if_exists=True)
        plan = StudyPlan(
            identity={},
            ranges=dict.fromkeys(NAMES, FloatDistribution(0.0, 2.0)),
            sampler="random",
            seed=1,
            first=[dict.fromkeys(NAMES, weight) for weight in first],
            guided=False,
        )
        self.queue = TrialQueue(study, self.storage, plan, worker=name)
        self.heartbeat: Heartbeat | None = None
        if beat is not None:
            study_id = self.storage.get_study_id_from_name("s")
            self.heartbeat = Heartbeat(self.storage, study_id, worker=name, interval=beat)

    def claim(self, n_trials: int = 100) -> Claim:
        claim = self.queue.claim(n_trials)
        assert claim is not None
        if self.heartbeat is not None:
            self.heartbeat.begin(claim.id)
        return claim

    def end(self, claim: Claim, value: float = 0.5) -> bool:
        scores = [QuestionScore("a", 0, value)]
        return self.queue.end(claim, TrialState.COMPLETE, scores=scores, facts={}, seconds=1.0, score=value)

    def trial(self, number: int) -> FrozenTrial:
        return self.queue.trials()[number]

    def close(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.storage.remove_session()
        self.storage.engine.dispose()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(name: str, *, beat: float | None = None, first: Sequence[float] = ()) -> Worker:
        made.append(Worker(tmp_path, name, beat=beat, first=first))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_for(what: Callable[[], object]) -> None:
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < 60, "it never came"
        time.sleep(0.02)


@contextmanager
def frozen(heartbeat: Heartbeat | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process whose threads all stand still."""
    with monkeypatch.context() as patched:
        patched.setattr(heartbeat, "_beat", lambda: None)
        patched.setattr(heartbeat, "_look", lambda: None)
        yield


def test_of_many_that_claim_at_once_each_gets_its_own(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    main = worker(MAIN, first=(0.0, 1.0, 0.5))
    main.queue.begin()
    workers = [main, *(worker(f"w{n}", first=(0.0, 1.0, 0.5)) for n in range(5))]
    got: list[list[Claim]] = [[] for _ in workers]
    barrier = threading.Barrier(len(workers))

    def work(n: int) -> None:
        barrier.wait()
        while (claim := workers[n].queue.claim(30)) is not None:
            got[n].append(claim)
            assert workers[n].end(claim)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claims = [claim for claims in got for claim in claims]
    assert sorted(claim.number for claim in claims) == list(range(30)), "each once, and no more than there are to be"
    assert len({tuple(claim.weights.values()) for claim in claims}) == 30
    found = main.queue.trials()
    assert [t.number for t in found] == list(range(30))
    assert {t.state for t in found} == {TrialState.COMPLETE}
    for claim in claims:
        assert found[claim.number].user_attrs["weights"] == claim.weights


def test_one_that_was_frozen_finds_its_trial_taken_and_its_result_is_discarded(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, other = worker("a", beat=BEAT), worker("b", beat=BEAT)
    claim = sleeper.claim()
    with frozen(sleeper.heartbeat, monkeypatch):
        wait_for(lambda: other.trial(0).state == TrialState.WAITING)
        taken = other.claim()
        assert taken == claim
    assert not sleeper.end(claim, 0.1)
    assert other.trial(0).state == TrialState.RUNNING
    assert other.end(taken, 0.9)
    assert not sleeper.end(claim, 0.1)
    assert other.trial(0).value == 0.9
    assert other.trial(0).user_attrs["scores"] == [["a", [[0, 0.9]]]]


def test_a_watcher_that_slept_takes_nobody_for_dead(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    living, watcher = worker("a", beat=BEAT), worker("b", beat=BEAT)
    claim = living.claim()
    wait_for(lambda: "beat" in watcher.trial(0).user_attrs)
    with frozen(watcher.heartbeat, monkeypatch):
        before = watcher.trial(0).user_attrs["beat"]
        wait_for(lambda: watcher.trial(0).user_attrs["beat"] != before)
        time.sleep(20 * BEAT)
    last = watcher.trial(0).user_attrs["beat"]
    wait_for(lambda: watcher.trial(0).user_attrs["beat"] != last)
    assert "repeats" not in watcher.trial(0).user_attrs
    assert living.end(claim)


def test_a_worker_that_leaves_few_signs_is_not_dead(worker: Callable[..., Worker]) -> None:
    slow, hasty = worker("a", beat=20 * BEAT), worker("b", beat=BEAT)
    slow.storage.set_study_user_attr(slow.storage.get_study_id_from_name("s"), SLOWEST, 20 * BEAT)
    claim = slow.claim()
    time.sleep(30 * BEAT)
    assert "repeats" not in hasty.trial(0).user_attrs
    assert slow.heartbeat is not None
    slow.heartbeat.stop()
    wait_for(lambda: hasty.trial(0).user_attrs.get("repeats") == 1)
    assert not slow.end(claim)


def test_a_hand_back_that_comes_late_takes_a_trial_from_nobody(worker: Callable[..., Worker]) -> None:
    dead, first, second, late = (worker(name) for name in "abcd")
    dead.claim()
    seen = dead.trial(0)
    assert hand_back(first.storage, seen, reason="gone")
    claim = first.claim()
    assert claim.number == 0
    assert not hand_back(second.storage, seen, reason="gone"), "it is another worker's by now"
    assert late.trial(0).user_attrs["repeats"] == 1
    assert first.end(claim)
    assert not hand_back(late.storage, seen, reason="gone")
    assert late.trial(0).state == TrialState.COMPLETE


def test_a_trial_that_kills_every_worker_fails_in_the_end(worker: Callable[..., Worker]) -> None:
    for n in range(MAX_REPEATS + 1):
        victim = worker(f"w{n}")
        assert victim.claim().number == 0
        again = hand_back(victim.storage, victim.trial(0), reason=f"its worker w{n} gave no sign of life")
        assert again == (n < MAX_REPEATS)
    survivor = worker("last")
    failed = survivor.trial(0)
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["failure"] == "it was begun 3 times and never ended: its worker w2 gave no sign of life"
    assert survivor.claim().number == 1


def test_a_worker_that_starts_again_gives_its_trial_back_and_the_search_goes_on_with_its_own(
    worker: Callable[..., Worker],
) -> None:
    main, other = worker(MAIN), worker("w")
    mine, theirs = main.claim(), other.claim()
    assert worker(MAIN).claim() == mine
    assert "repeats" not in main.trial(mine.number).user_attrs
    assert worker("w").claim() == theirs
    assert main.trial(theirs.number).user_attrs["repeats"] == 1


def test_a_trial_that_is_released_waits_for_another_worker(worker: Callable[..., Worker]) -> None:
    one, other = worker("a"), worker("b")
    claim = one.claim()
    one.queue.release()
    assert one.trial(0).state == TrialState.WAITING
    assert other.claim() == claim
    one.queue.release()
    assert one.trial(0).state == TrialState.RUNNING, "it is another worker's"


def test_a_baseline_is_begun_again_whatever_killed_its_workers(worker: Callable[..., Worker]) -> None:
    # No table can be made without it, so that a study in which it has failed is lost.
    worker(MAIN, first=[0.0]).queue.begin()
    for n in range(MAX_REPEATS + 2):
        victim = worker(f"w{n}", first=[0.0])
        assert victim.claim().number == 0
        assert hand_back(victim.storage, victim.trial(0), reason=f"w{n} has died")
    assert victim.trial(0).state == TrialState.WAITING
