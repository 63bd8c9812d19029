"""Early stopping: what is decided, by hand-made scores; and that stages change no score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, TASKS, Trio
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon
from test_harness import live
from test_mt_bench import CATEGORIES, Listening, bench, chat

from tvmerge.checkpoint import Checkpoint
from tvmerge.evaluators import Goals, QuestionScore, Scored, TaskGoal, mean_score
from tvmerge.evaluators.fastchat import FastChatFiles
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.mt_bench import MtBenchEvaluator
from tvmerge.evaluators.split import STAGES, Split, split_questions
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.judges.rouge_l import RougeL
from tvmerge.models.transformers import TransformersModel
from tvmerge.pruning import PRUNERS, Halving, Other, TrialStopped, Wilcoxon, stopper

HALVING, WILCOXON = Halving(), Wilcoxon()


def scores(values: Sequence[float | None], task: str = "t") -> list[QuestionScore]:
    return [QuestionScore(task, index, value) for index, value in enumerate(values)]


def right(n_right: int, of: int = 40) -> list[QuestionScore]:
    """The first ones right, the others wrong."""
    return scores([1.0] * n_right + [0.0] * (of - n_right))


def whole(*those: Sequence[QuestionScore]) -> list[Other]:
    return [Other(each, is_complete=True) for each in those]


def stops(pruner: Halving | Wilcoxon, own: Sequence[QuestionScore], others: Sequence[Other], **goals: TaskGoal) -> bool:
    return pruner.should_stop(stage=0, scores=own, others=others, goals=goals) is not None


@given(shares=st.lists(st.integers(0, 40), max_size=12), own=st.integers(0, 40))
def test_halving_goes_on_with_the_better_half_of_those_that_came_as_far(shares: list[int], own: int) -> None:
    rung = sorted([own, *shares], reverse=True)
    expected = own < rung[max(1, len(rung) // 2) - 1]
    others = whole(*map(right, shares))
    # Of questions that nobody was asked yet, what others got is of no account; who did not come as far is not there.
    others += [Other(scores([1.0] * 10), is_complete=False)]
    longer = [Other([*other.scores, *scores([1.0] * 50, "u")], is_complete=True) for other in others[:-1]]
    assert stops(HALVING, right(own), others) is stops(HALVING, right(own), [*longer, others[-1]]) is expected
    assert stops(HALVING, right(own), others[::-1]) is expected


def test_a_trial_that_was_stopped_counts_where_it_was() -> None:
    stopped = [Other(right(n), is_complete=False) for n in (30, 31, 32)]
    assert stops(HALVING, right(20), stopped)
    assert not stops(HALVING, right(31), stopped)
    assert not stops(WILCOXON, right(0), stopped), "the best one is a complete one"


def test_the_reason_says_what_was_compared() -> None:
    reason = HALVING.should_stop(stage=0, scores=right(10), others=whole(right(20), right(30)), goals={})
    assert reason == "scores 0.250 on its first 40 questions, and the best 1 of 3 trials 0.750 or more"
    reason = WILCOXON.should_stop(stage=0, scores=right(10), others=whole(right(20), right(30)), goals={})
    assert reason is not None
    assert reason.startswith("is worse than the best trial on its first 40 questions (p = ")


def test_a_metric_that_is_minimised_and_tasks_of_other_weights() -> None:
    down = TaskGoal(higher_is_better=False)
    for pruner in (HALVING, WILCOXON):
        assert stops(pruner, right(30), whole(right(10)), t=down)
        assert not stops(pruner, right(10), whole(right(30)), t=down)
        none, much = TaskGoal(weight=0), TaskGoal(weight=3)
        ours = [*right(10), *scores([1.0] * 40, "u")]
        theirs = [*right(30), *scores([0.0] * 40, "u")]
        assert stops(pruner, ours, whole(theirs), u=none)
        assert not stops(pruner, ours, whole(theirs), t=none)
        assert not stops(pruner, ours, whole(theirs), u=much)


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=20, max_size=60))
def test_wilcoxon_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = scores([float(a) for a, _ in pairs]), scores([float(b) for _, b in pairs])
    differences = [a - b for a, b in pairs]
    worse = sum(differences) < 0
    p = wilcoxon(differences, zero_method="zsplit", alternative="less", method="asymptotic").pvalue if worse else 1.0
    if not math.isclose(p, 0.1, rel_tol=1e-6):
        assert stops(WILCOXON, ours, whole(theirs)) is bool(p < 0.1)


def test_wilcoxon_by_hand() -> None:
    # 40 differences, 28 of them 0 (ranks 1 to 28, split), 12 times -1 (ranks 29 to 40): the sum of the positive ranks
    # is 203, its mean 410, its variance 40·41·81/24 less (t³ - t)/48 for each t that are tied; z is -2.9.
    ties = (28**3 - 28 + 12**3 - 12) / 48
    z = (203 - 410) / math.sqrt(40 * 41 * 81 / 24 - ties)
    p = 0.5 * math.erfc(-z / math.sqrt(2))
    found = WILCOXON.should_stop(stage=0, scores=right(8), others=whole(right(20)), goals={})
    assert found == f"is worse than the best trial on its first 40 questions (p = {p:.2g})"


def test_few_questions_or_none_with_a_score_decide_nothing() -> None:
    assert stops(WILCOXON, right(0, of=20), whole(right(20, of=20)))
    assert not stops(WILCOXON, right(0, of=19), whole(right(19, of=19)))
    unscored = scores([None] * 21 + [0.0] * 19)
    assert not stops(WILCOXON, unscored, whole(right(40)))
    nothing = scores([None] * 40)
    for pruner in PRUNERS.values():
        assert pruner.should_stop(stage=0, scores=nothing, others=whole(right(40)), goals={}) is None
        assert pruner.should_stop(stage=0, scores=right(0), others=[], goals={}) is None
        assert pruner.should_stop(stage=0, scores=right(0), others=whole(nothing), goals={}) is None


def test_turns_of_a_question_are_one_piece_of_evidence() -> None:
    def talk(rating: float) -> list[QuestionScore]:
        return [QuestionScore("t", n, rating, turn=turn) for n in range(10) for turn in (1, 2)]

    assert not stops(WILCOXON, talk(1.0), whole(talk(9.0))), "20 ratings are of 10 questions"


@pytest.mark.parametrize("name", PRUNERS)
def test_a_given_trial_is_never_stopped(name: str) -> None:
    asked: list[int] = []

    def others() -> list[Other]:
        asked.append(1)
        return whole(*[right(40)] * 4)

    bad = Scored(right(0), {"generated_tokens": 7})
    stopper(PRUNERS[name], is_given=True, others=others, goals={})(0, bad)
    assert not asked
    with pytest.raises(TrialStopped) as caught:
        stopper(PRUNERS[name], is_given=False, others=others, goals={})(0, bad)
    assert caught.value.scored is bad
    stopper(PRUNERS[name], is_given=False, others=others, goals={})(0, Scored(right(40)))


@given(n=st.integers(1, 400), limit=st.one_of(st.none(), st.integers(1, 300)), labels=st.booleans())
def test_stages_divide_the_questions_and_keep_the_shares(n: int, limit: int | None, labels: bool) -> None:
    named = ["ab"[index % 3 == 0] for index in range(n)] if labels else None
    split = split_questions(name="t", n_questions=n, holdout=0, limit=limit, seed=3, labels=named)
    assert sorted(index for stage in split.stages for index in stage) == split.search
    seen: list[int] = []
    for stage, share in zip(split.stages, STAGES, strict=True):
        seen += stage
        assert len(seen) == round(share * len(split.search))
        if named is not None:
            n_rare = sum(named[index] == "b" for index in seen)
            assert abs(n_rare - named.count("b") / n * len(seen)) <= 1 + 1e-9


def divided(names: Sequence[str], n: int) -> tuple[dict[str, Sequence[int]], list[dict[str, Sequence[int]]]]:
    splits: dict[str, Split] = {
        name: split_questions(name=name, n_questions=n, holdout=0.3, limit=30, seed=0) for name in names
    }
    stages = [{name: split.stages[stage] for name, split in splits.items()} for stage in range(len(STAGES))]
    return {name: split.search for name, split in splits.items()}, stages


TOYS = ("toy_jcommonsenseqa", "toy_jnli", "toy_jsquad", "toy_marc_ja")


@pytest.mark.parametrize(
    ("names", "tasks"), [(TOYS, ROOT / "demo" / "tasks"), (("tiny_extract", "tiny_perplexity"), TASKS)]
)
def test_stages_change_no_score(names: tuple[str, ...], tasks: Path, trio: Trio) -> None:
    folder = ROOT / "demo" / "models" / "tuned" if tasks != TASKS else trio.tuned
    model = TransformersModel.from_folder(
        folder, checkpoint=Checkpoint(resolve(str(folder))), device="cpu", dtype="float32"
    )
    harness = HarnessModel(model, batch_size=16)
    loaded = load_tasks(list(names), task_dir=tasks)
    questions, stages = divided(names, 40)
    plain = LmEvalEvaluator(tasks=loaded, questions=questions)
    staged = LmEvalEvaluator(tasks=loaded, questions=questions, stages=stages)
    assert staged.fingerprint == plain.fingerprint
    expected = plain.score(harness, lambda n: None)
    seen: list[Scored] = []
    progress: list[int] = []
    for after_stage in (None, lambda stage, scored: seen.append(scored)):
        progress.clear()
        found = staged.score(harness, progress.append, after_stage=after_stage)
        assert [each.score for each in found.scores] == pytest.approx(
            [each.score for each in expected.scores], rel=1e-5
        )
        assert [(s.task, s.question) for s in found.scores] == [(s.task, s.question) for s in expected.scores]
        assert sum(progress) == staged.n_questions
    assert [len(each.scores) for each in seen] == [len(names) * n for n in (7, 14)]
    by_question = {(each.task, each.question): each.score for each in found.scores}
    for each in seen:
        assert [by_question[s.task, s.question] for s in each.scores] == [s.score for s in each.scores]
        places = [(list(names).index(s.task), s.question) for s in each.scores]
        assert places == sorted(places)
    plain.score(harness, lambda n: None, after_stage=lambda stage, scored: pytest.fail("there is no stage"))


def test_a_perplexity_of_long_texts_is_the_same_after_each_stage(trio: Trio, tmp_path: Path) -> None:
    # A question's number is over the mean length of all questions, also of those that are not asked yet.
    for path in TASKS.glob("tiny_*.*"):
        text = path.read_text().replace("metric: perplexity", "metric: byte_perplexity")
        text = text.replace('"answer": question[0]', '"answer": question[: 1 + _i % 5]')
        text = text.replace("output_type: loglikelihood\n", "output_type: loglikelihood_rolling\n")
        (tmp_path / path.name).write_text(text.replace("aggregation: perplexity", "aggregation: weighted_perplexity"))
    name = "tiny_perplexity"
    loaded = load_tasks([name], task_dir=tmp_path)
    questions, stages = divided([name], 40)
    harness = HarnessModel(live(trio.target), batch_size=1)
    staged = LmEvalEvaluator(tasks=loaded, questions=questions, stages=stages)
    seen: list[Scored] = []
    found = staged.score(harness, lambda n: None, after_stage=lambda stage, scored: seen.append(scored))
    plain = LmEvalEvaluator(tasks=loaded, questions=questions).score(harness, lambda n: None)
    assert found == plain
    by_question = {each.question: each.score for each in found.scores}
    for each in seen:
        assert [by_question[s.question] for s in each.scores] == pytest.approx(
            [s.score for s in each.scores], rel=1e-12
        )


def test_what_is_stopped_is_not_asked_further(trio: Trio) -> None:
    loaded = load_tasks(["tiny_choice"], task_dir=TASKS)
    questions, stages = divided(["tiny_choice"], 40)
    staged = LmEvalEvaluator(tasks=loaded, questions=questions, stages=stages)
    harness, progress = HarnessModel(live(trio.target), batch_size=8), list[int]()

    def stop(stage: int, scored: Scored) -> None:
        raise TrialStopped("it is bad", scored)

    with pytest.raises(TrialStopped, match="it is bad") as caught:
        staged.score(harness, progress.append, after_stage=stop)
    assert len(caught.value.scored.scores) == sum(progress) == len(stages[0]["tiny_choice"])
    # The next trial is none the worse for it.
    plain = LmEvalEvaluator(tasks=loaded, questions=questions).score(harness, lambda n: None)
    assert staged.score(harness, lambda n: None).scores == plain.scores


def test_talks_in_stages(trio: Trio, tmp_path: Path) -> None:
    model = chat(
        TransformersModel.from_folder(
            trio.target, checkpoint=Checkpoint(resolve(str(trio.target))), device="cpu", dtype="float32"
        )
    )
    labels = [CATEGORIES[number % 4] for number in range(16)]
    split = split_questions(name="mine", n_questions=16, holdout=0, limit=None, seed=0, labels=labels)

    def evaluator(folder: Path, judge: RougeL | Listening, stages: Sequence[Sequence[int]] = ()) -> MtBenchEvaluator:
        files = FastChatFiles(folder, judge="m")
        return MtBenchEvaluator(bench=bench(), questions=split.search, judge=judge, files=files, stages=stages)

    def kept(folder: Path) -> list[list[str]]:
        files = sorted(path for path in folder.rglob("*.jsonl"))
        return [[line.split('"tstamp"')[0] for line in path.read_text().splitlines()] for path in files]

    plain = evaluator(tmp_path / "plain", RougeL()).score(model, lambda n: None, name="x")
    seen: list[Scored] = []
    progress: list[int] = []
    staged = evaluator(tmp_path / "staged", RougeL(), split.stages)
    found = staged.score(model, progress.append, name="x", after_stage=lambda stage, scored: seen.append(scored))
    assert found == plain
    assert sum(progress) == staged.n_scores
    assert kept(tmp_path / "staged") == kept(tmp_path / "plain")
    assert [len({score.question for score in each.scores}) for each in seen] == [4, 8]
    assert all([score for score in plain.scores if score in each.scores] == each.scores for each in seen)

    def stop(stage: int, scored: Scored) -> None:
        raise TrialStopped("it is bad", scored)

    judge = Listening()
    with pytest.raises(TrialStopped):
        evaluator(tmp_path / "stopped", judge, split.stages).score(model, lambda n: None, name="x", after_stage=stop)
    assert len(judge.cases) == len(seen[0].scores), "what is not asked is not judged"
    assert not (tmp_path / "stopped").exists(), "files have whole trials only"


def test_decisions_are_the_same_again() -> None:
    goals: Goals = {}
    others = [*whole(right(10), right(25)), Other(right(12), is_complete=False)]
    for pruner in PRUNERS.values():
        found = {pruner.should_stop(stage=0, scores=right(9), others=o, goals=goals) for o in (others, others[::-1])}
        assert len(found) == 1
    assert mean_score(right(9)) == 9 / 40
