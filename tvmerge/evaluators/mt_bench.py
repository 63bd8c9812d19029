"""Conversations with the live model, rated by a judge, in the manner of MT-Bench."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from tvmerge.errors import RunError, StopError
from tvmerge.evaluators import MAX_UNSCORED, AfterStage, Progress, QuestionScore, Scored, unscored_questions
from tvmerge.evaluators.bench import Bench
from tvmerge.evaluators.fastchat import FastChatFiles, Rated, Talk
from tvmerge.judges import Judge, Judgment
from tvmerge.judges.meter import Meter
from tvmerge.models.chat import ChatAnswer, ChatModel, ChatRequest

__all__ = ["Asking", "MtBenchEvaluator"]

#: Category → temperature, as in FastChat; any other is written at 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Asking:
    """How questions are put."""

    num_choices: int = 1  # answers to each question
    temperature: float | None = None  # of all answers; None: by category
    system: str | None = None  # message of the system
    seed: int = 0  # of the draws of sampled answers


@dataclass
class _Talk:
    """A talk under way."""

    index: int
    choice: int
    answers: list[str] = field(default_factory=list)
    failure: str | None = None  # why there is no further answer


class MtBenchEvaluator:
    """Has conversations with a model and lets a judge rate each of its turns, while others are still being had.

    Args:
        bench: the questions.
        questions: indices of those that are asked, sorted, never empty.
        judge: rates answers.
        asking: how they are put.
        max_unscored: the greatest share of questions that lack a rating, of any turn, with which a model has a score.
        files: where answers and judgments are kept; None: nowhere.
        meter: of what the judge costs; None: nothing.
        stages: a division of the questions, which are then asked and judged one part after the other; none: all at
            once.
    """

    def __init__(
        self,
        *,
        bench: Bench,
        questions: Sequence[int],
        judge: Judge,
        asking: Asking | None = None,
        max_unscored: float = MAX_UNSCORED,
        files: FastChatFiles | None = None,
        meter: Meter | None = None,
        stages: Sequence[Sequence[int]] = (),
    ) -> None:
        self._bench = bench
        self._indices = list(questions)
        self._judge = judge
        self._asking = asking or Asking()
        self._max_unscored = max_unscored
        self._files = files
        self._meter = meter
        self._stages = [frozenset(stage) for stage in stages if stage] or [frozenset(self._indices)]

    @property
    def n_questions(self) -> int:
        """How many questions a model is asked."""
        return len(self._indices)

    @property
    def n_scores(self) -> int:
        """One for each turn of each choice."""
        return sum(len(self._bench.questions[i].turns) for i in self._indices) * self._asking.num_choices

    @property
    def fingerprint(self) -> str:
        """A digest of the questions, their references and how answers are drawn."""
        asking = self._asking
        digest = hashlib.sha256(json.dumps([asking.num_choices, asking.system, asking.seed]).encode())
        for index in self._indices:
            question = self._bench.questions[index]
            asked = [question.question_id, question.category, question.turns, question.references]
            digest.update(json.dumps([index, *asked, self._temperature(index)]).encode())
        return digest.hexdigest()[:16]

    def _temperature(self, index: int) -> float:
        question = self._bench.questions[index]
        if self._asking.temperature is not None:
            return self._asking.temperature
        if question.temperature is not None:
            return question.temperature
        return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)

    def score(
        self, model: ChatModel, progress: Progress, *, name: str, after_stage: AfterStage | None = None
    ) -> Scored:
        """Have all conversations, turn by turn, and wait for the ratings.

        Args:
            model: to talk with.
            progress: told how many turns are rated.
            name: of the model, in the files of answers and judgments, which have whole trials only.
            after_stage: told what is rated so far, if there are stages.

        Raises:
            RunError: too many questions lack a rating.
            StopError: the judge cannot be asked any more.
        """
        if self._meter is not None:
            self._meter.begin(name)
        talks = [_Talk(i, choice) for i in self._indices for choice in range(self._asking.num_choices)]
        waiting: dict[tuple[int, int, int], Future[Judgment]] = {}
        asked: frozenset[int] = frozenset()
        rated: Sequence[Rated] = ()
        tokens = 0
        for number, stage in enumerate(self._stages):
            if number and after_stage is not None:
                after_stage(number - 1, self._scored(name, rated, tokens))
            part = [talk for talk in talks if talk.index in stage]
            tokens += self._converse(part, model, progress, waiting)
            asked |= stage
            self._judge.finish()
            self._ask_again(talks, waiting, n_asked=len(asked))
            judgments = {key: _result(future) for key, future in waiting.items()}
            rated = self._rated([talk for talk in talks if talk.index in asked], judgments)
            self._check(rated)
        if self._files is not None:
            self._files.write(name, [each.talk for each in rated if each.turn == 1], rated)
        return self._scored(name, rated, tokens)

    def _scored(self, name: str, rated: Sequence[Rated], tokens: int) -> Scored:
        facts = self._facts(rated) | {"generated_tokens": tokens}
        if self._meter is not None:
            facts["judge_usage"] = asdict(self._meter.of(name))
        return Scored([self._score(each) for each in rated], facts)

    def _converse(
        self,
        talks: Sequence[_Talk],
        model: ChatModel,
        progress: Progress,
        waiting: dict[tuple[int, int, int], Future[Judgment]],
    ) -> int:
        """Have some conversations, and ask for the judgments.

        Args:
            talks: take up the answers.
            model: to talk with.
            progress: told how many turns are rated.
            waiting: takes up the judgments, by question, choice and turn.

        Returns:
            How many tokens were generated.
        """
        tokens = 0
        for turn in range(max(len(self._bench.questions[talk.index].turns) for talk in talks)):
            going = [t for t in talks if len(t.answers) == turn < len(self._bench.questions[t.index].turns)]

            def take(which: int, answer: ChatAnswer, going: Sequence[_Talk] = going) -> None:
                talk = going[which]
                if answer.text is None:
                    talk.failure = answer.reason
                    progress(len(self._bench.questions[talk.index].turns) - len(talk.answers))
                    return
                talk.answers.append(answer.text)
                future = self._judge.submit(self._bench.questions[talk.index].case(talk.answers))
                future.add_done_callback(lambda _: progress(1))
                waiting[talk.index, talk.choice, len(talk.answers)] = future
                if future.done():
                    _result(future)  # if the judge has gone, no further answer is worth its time

            answers = model.answer([self._request(talk) for talk in going], take)
            tokens += sum(answer.n_tokens for answer in answers)
        return tokens

    def _ask_again(
        self, talks: Sequence[_Talk], waiting: dict[tuple[int, int, int], Future[Judgment]], *, n_asked: int
    ) -> None:
        """Have lost judgments made once more, if they are too many: nothing was wrong with the answers.

        Raises:
            StopError: they are still too many.
        """
        for last in (False, True):
            lost = [key for key, future in waiting.items() if _result(future).is_lost]
            if len({index for index, _, _ in lost}) <= self._max_unscored * n_asked:
                return
            if last:
                reason = _result(waiting[lost[0]]).reason
                raise StopError(f"{len(lost)} of {self.n_scores} judgments failed, one with: {reason}; try again later")
            of = {(talk.index, talk.choice): talk for talk in talks}
            for index, choice, turn in lost:
                case = self._bench.questions[index].case(of[index, choice].answers[:turn])
                waiting[index, choice, turn] = self._judge.submit(case)
            self._judge.finish()

    def _request(self, talk: _Talk) -> ChatRequest:
        """The next turn of a talk."""
        question = self._bench.questions[talk.index]
        messages = [] if self._asking.system is None else [{"role": "system", "content": self._asking.system}]
        for number, answer in enumerate(talk.answers):
            messages.append({"role": "user", "content": question.turns[number]})
            messages.append({"role": "assistant", "content": answer})
        turn = len(talk.answers)
        messages.append({"role": "user", "content": question.turns[turn]})
        drawn = [self._asking.seed, question.question_id, turn, talk.choice]
        seed = int.from_bytes(hashlib.sha256(json.dumps(drawn).encode()).digest()[:8], "big")
        return ChatRequest(messages=messages, temperature=self._temperature(talk.index), seed=seed)

    def _rated(self, talks: Sequence[_Talk], judgments: Mapping[tuple[int, int, int], Judgment]) -> Sequence[Rated]:
        """Every turn of every talk; one without an answer is unscored, and never judged."""
        rated = []
        for had in talks:
            talk = Talk(had.index, self._bench.questions[had.index], had.choice, tuple(had.answers))
            nothing = Judgment(rating=None, reason=f"no answer: {had.failure}")
            for turn in range(1, len(talk.question.turns) + 1):
                rated.append(Rated(talk, turn, judgments.get((talk.index, talk.choice, turn), nothing)))
        return rated

    def _score(self, rated: Rated) -> QuestionScore:
        talk = rated.talk
        rating = rated.judgment.rating
        return QuestionScore(self._bench.name, talk.index, rating, turn=rated.turn, choice=talk.choice)

    def _facts(self, rated: Sequence[Rated]) -> dict[str, Any]:
        n, of = unscored_questions(map(self._score, rated))
        spreads = [each.judgment.spread for each in rated if len(each.judgment.ratings) > 1]
        facts: dict[str, Any] = {"unscored": n / of}
        facts |= {"unscored_reasons": dict(_reasons(rated).most_common(3))} if n else {}
        return facts | ({"judge_spread": sum(spreads) / len(spreads)} if spreads else {})

    def _check(self, rated: Sequence[Rated]) -> None:
        n, _ = unscored_questions(map(self._score, rated))
        if n > self._max_unscored * self.n_questions:
            raise RunError(
                f"{n} of {self.n_questions} questions lack a rating, more than --max_unscored {self._max_unscored:g} "
                f"allows; most often: {_reasons(rated).most_common(1)[0][0]}"
            )


def _reasons(rated: Sequence[Rated]) -> Counter[str | None]:
    """Why turns are unscored."""
    return Counter(each.judgment.reason for each in rated if each.judgment.rating is None)


def _result(future: Future[Judgment]) -> Judgment:
    """A judgment; what ends the run is no fault of the trial."""
    try:
        return future.result()
    except RunError as error:
        raise StopError(str(error)) from error
