"""The questions of a run that a judge rates: a bench, its judge, and which of its questions are asked."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvmerge.benches import answerable, find_bench, find_prompts, judge_name, split_bench
from tvmerge.config import MtBenchConfig
from tvmerge.errors import ConfigError
from tvmerge.evaluators import Goals, TaskGoal
from tvmerge.evaluators.bench import Bench
from tvmerge.evaluators.fastchat import FastChatFiles
from tvmerge.evaluators.mt_bench import Asking, MtBenchEvaluator
from tvmerge.evaluators.split import Split, n_heldout, why_so_few_heldout, why_so_many
from tvmerge.files import local_path
from tvmerge.judges import Client, Judge
from tvmerge.judges.cache import JudgmentCache
from tvmerge.judges.local import LOCAL, LocalClient
from tvmerge.judges.meter import LEDGER, Meter, Prices, known_prices
from tvmerge.judges.prompted import PromptedJudge
from tvmerge.judges.providers import PROVIDERS, make_client, parse_judge
from tvmerge.judges.rating import read_rating
from tvmerge.judges.remote import ClientSettings, RemoteClient
from tvmerge.judges.rouge_l import RougeL
from tvmerge.models.chat import ChatModel
from tvmerge.models.chat_template import ChatTemplate, open_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tvmerge.models.transformers import TransformersModel

__all__ = [
    "JudgedBench",
    "JudgedQuestions",
    "find_bench",
    "find_prompts",
    "open_judged",
    "trial_name",
]

#: How the answers of a trial are called in FastChat's files. Its show_result takes names of digits alone for numbers.
TRIAL_NAME = re.compile(r"trial-(\d+)(-heldout)?")


def trial_name(number: int) -> str:
    """What a trial's model is called in FastChat's files."""
    return f"trial-{number:04d}"


@dataclass(frozen=True)
class JudgedQuestions:
    """The questions of a bench, ready to be asked."""

    config: MtBenchConfig
    search: MtBenchEvaluator
    heldout: MtBenchEvaluator | None  # None: none is held out
    goals: Goals
    scoring: Mapping[str, str]  # the bench → what its scores mean
    notes: Sequence[str]  # what the user should know of them
    categories: Mapping[str, Sequence[str]]  # the bench → the category of each question
    template: ChatTemplate
    files: FastChatFiles
    meter: Meter | None  # None: asking is free
    client: Client | None  # that the judge asks
    explanation: str  # of what the scores are

    def open_model(self, model: TransformersModel, *, tokens: int | None) -> ChatModel:
        """Make a live model ready to talk."""
        if isinstance(self.client, LocalClient):
            self.client.attach(model)
        return ChatModel(
            model,
            template=self.template,
            max_new_tokens=self.config.max_new_token,
            batch_size="auto" if isinstance(self.config.batch_size, str) else self.config.batch_size,
            tokens=tokens,
            more_notes=lambda: self.client.notes if isinstance(self.client, LocalClient) else [],
        )

    def resume(self, finished: Collection[int]) -> None:
        """Drop what a kill left of the answers and judgments of other trials than these."""

        def is_finished(model: str) -> bool:
            trial = TRIAL_NAME.fullmatch(model)
            return trial is None or int(trial[1]) in finished

        self.files.keep(is_finished)

    def cost(self) -> str:
        """What the judge cost so far."""
        if self.meter is None:
            return ""
        usage = self.meter.total
        tokens = f"judge {(usage.tokens_in + usage.tokens_out) / 1000:.1f} k tokens"
        return tokens if usage.cost is None else f"{tokens}, ${usage.cost:.2f}"


@dataclass(frozen=True)
class OpenJudge:
    """A judge that can be asked."""

    judge: Judge
    explanation: str  # of what its ratings are
    client: Client | None = None  # that it asks
    meter: Meter | None = None  # of what that costs; None: nothing
    notes: Sequence[str] = ()  # what the user should know


@dataclass(frozen=True)
class JudgedBench:
    """A bench and its judge, which no model was needed for."""

    config: MtBenchConfig
    output: Path
    bench: Bench
    opened: OpenJudge

    def ask(self, tokenizer: PreTrainedTokenizerBase) -> JudgedQuestions:
        """Choose the questions, and how they are put.

        Args:
            tokenizer: of the target model, whose template makes chats.

        Raises:
            ConfigError: there is no such chat template.
            TaskError: too few questions.
        """
        config, bench = self.config, self.bench
        template = open_template(config.chat_template, tokenizer)
        files = FastChatFiles(self.output, judge=self.opened.judge.name)
        split = split_bench(config, bench, judge=self.opened.judge.name)

        def evaluator(questions: Sequence[int], stages: Sequence[Sequence[int]] = ()) -> MtBenchEvaluator:
            return MtBenchEvaluator(
                bench=bench,
                questions=questions,
                judge=self.opened.judge,
                asking=Asking(
                    num_choices=config.num_choices,
                    temperature=config.temperature,
                    system=config.system_instruction or None,
                    seed=config.question_seed,
                ),
                max_unscored=config.max_unscored,
                files=files,
                meter=self.opened.meter,
                stages=stages,
            )

        return JudgedQuestions(
            config=config,
            search=evaluator(split.search, split.stages if config.pruner != "none" else ()),
            heldout=evaluator(split.heldout) if config.holdout else None,
            goals={bench.name: TaskGoal(metric="rating")},
            scoring={bench.name: json.dumps([self.opened.judge.identity, template.digest], ensure_ascii=False)},
            notes=[*self._how_many(split), *self.opened.notes, *self._notes(template)],
            categories={bench.name: [question.category for question in bench.questions]},
            template=template,
            files=files,
            meter=self.opened.meter,
            client=self.opened.client,
            explanation=self.opened.explanation,
        )

    def _how_many(self, split: Split) -> list[str]:
        """How many questions are asked when, and why."""
        config, usable = self.config, answerable(self.bench, self.opened.judge.name)
        n_out = n_heldout(len(usable), config.holdout)
        n, left = len(split.search), len(usable) - n_out
        notes = []
        if config.question_limit is None:
            notes.append(why_so_many(n, left, flag="--question_limit"))
        elif isinstance(config.question_limit, int) and config.question_limit > n:
            notes.append(
                f"bench {self.bench.name}: the limit of {config.question_limit} is more than the {n} questions left to "
                "search on"
            )
        return notes + ([why_so_few_heldout(len(split.heldout), n_out)] if len(split.heldout) < n_out else [])

    def _notes(self, template: ChatTemplate) -> list[str]:
        config = self.config
        notes = list(self.bench.notes)
        if config.system_instruction and not template.takes_system:
            notes.append("the chat template takes no system message: --system_instruction is left out")
        unused = len(self.bench.questions) - len(answerable(self.bench, self.opened.judge.name))
        if unused:
            notes.append(f"bench {self.bench.name}: {unused} of its questions have no reference answer: not asked")
        return notes


@contextmanager
def open_judged(config: MtBenchConfig, output: Path, *, device: str) -> Iterator[JudgedBench]:
    """Read the questions and open the judge; a judge that cannot be asked is found here.

    Args:
        config: of the run.
        output: folder of the run.
        device: where a judge on this machine runs.

    Raises:
        ConfigError: the judge cannot be asked: a missing key, an unknown model, an address where nobody answers.
        TaskError: a bench that is not there or broken.
    """
    bench = find_bench(config)
    split_bench(config, bench, judge=judge_name(config))
    with open_judge(config, output, bench, device=device) as opened:
        yield JudgedBench(config, output, bench, opened)


@contextmanager
def open_judge(config: MtBenchConfig, output: Path, bench: Bench, *, device: str) -> Iterator[OpenJudge]:
    """Open the judge that a configuration names, see that it answers, and close it in the end.

    Raises:
        ConfigError: it cannot be asked.
    """
    name = config.judge_model_name
    if name == RougeL.name:
        yield OpenJudge(RougeL(), "Answers were compared with reference answers: 10 times ROUGE-L.")
        return
    if config.max_judge_cost is not None and prices_of(config) is None:
        raise ConfigError(
            f"--max_judge_cost {config.max_judge_cost:g}: the prices of {name} are not known, give --judge_price_in "
            "and --judge_price_out"
        )
    prompts, which = find_prompts(config, bench)
    client = _client(config, device)
    meter = Meter(path=output / LEDGER, judge=name, prices=prices_of(config), max_cost=config.max_judge_cost)
    is_local = isinstance(client, LocalClient)
    cache = JudgmentCache(_cache_file(config))
    judge = PromptedJudge(
        client=client,
        name=judge_name(config),
        identity={"prompts": prompts.digest},
        render=prompts.render,
        read_rating=read_rating,
        meter=meter,
        cache=cache,
        # A judge on this machine has no more hands than one, and no deadline.
        parallel=1 << 20 if is_local else config.parallel,
        deadline=math.inf if is_local else config.judge_deadline,
        repeats=config.judge_repeats,
    )
    try:
        if isinstance(client, RemoteClient):
            judge.check()
        explanation = f"Answers were rated from 1 to 10 by {judge.name}, asked with the prompts of {which}."
        notes = [f"judge prompts: {which}", *getattr(client, "notes", [])]
        yield OpenJudge(judge, explanation, client, meter, notes)
    finally:
        judge.close()
        cache.close()


def _client(config: MtBenchConfig, device: str) -> RemoteClient | LocalClient:
    name = config.judge_model_name
    if name.startswith(LOCAL):
        return LocalClient(
            name.removeprefix(LOCAL),
            cache_dir=config.cache_dir,
            device=device,
            max_tokens=config.judge_max_tokens,
            temperature=config.judge_temperature,
            batch_size=config.batch_size,
        )
    provider, model = parse_judge(name)
    return make_client(
        provider,
        ClientSettings(
            model=model,
            base_url=config.judge_base_url,
            timeout=config.judge_timeout,
            max_retries=config.judge_retries,
            max_tokens=config.judge_max_tokens,
            temperature=config.judge_temperature,
        ),
    )


def prices_of(config: MtBenchConfig) -> Prices | None:
    """What the judge's tokens cost: as the user says, or what is known of the model; None: unknown."""
    if config.judge_price_in is not None and config.judge_price_out is not None:
        return Prices(config.judge_price_in, config.judge_price_out)
    if config.judge_model_name.startswith(LOCAL):
        return None
    provider, model = parse_judge(config.judge_model_name)
    # A server of one's own has no list price, whatever the model's name.
    return known_prices(model) if PROVIDERS[provider].address(config.judge_base_url)[1] else None


def _cache_file(config: MtBenchConfig) -> Path:
    """Where judgments are kept, for all runs."""
    if config.cache_dir is not None:
        return local_path(config.cache_dir, flag="--cache_dir") / "tvmerge" / "judgments.db"
    home = os.environ.get("XDG_CACHE_HOME") or str(local_path("~/.cache", flag="--cache_dir"))
    return Path(home) / "tvmerge" / "judgments.db"
