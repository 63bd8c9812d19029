"""The settings of a search that is scored by a judge, and of its plan."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from tvmerge.config.search import N_QUESTIONS, SearchConfig
from tvmerge.errors import ConfigError

__all__ = ["MtBenchConfig", "PlanConfig"]

#: Numbers that may be 0 or more, and numbers that must be more than 0.
AT_LEAST_0 = ("judge_temperature", "judge_price_in", "judge_price_out", "temperature")
ABOVE_0 = ("judge_timeout", "judge_deadline", "max_judge_cost")


@dataclass(kw_only=True)
class MtBenchConfig(SearchConfig):
    """Search the weights of target + Σ w·(tuned − base) whose answers a judge likes best, and save the best model.

    Args:
        bench_name: folder of benchmarks/ with a question.jsonl in FastChat's format
        bench_dir: folder with a question.jsonl, or with folders that bench_name names
        question_limit: most questions that a trial sees, drawn by question_seed, the shares of categories kept; all
            for all; default is 300
        judge_model_name: rouge_l compares with reference answers; gpt-4o, openai:NAME, claude-..., anthropic:NAME ask a
            service; transformers:NAME asks a model of the Hub or a folder on this machine
        judge_file: judge prompts in FastChat's format, or ja or en for those that come with tvmerge; default is ja for
            questions in Japanese, else en
        judge_base_url: address of another service that speaks the same protocol, as http://127.0.0.1:8000/v1
        judge_repeats: how many times each answer is judged; the median counts
        judge_temperature: of the judge's own words
        judge_max_tokens: most tokens that the judge writes on one answer
        judge_timeout: seconds until a request is given up and tried again
        judge_retries: how often it is tried again
        judge_deadline: seconds for one judgment, all its tries counted in
        judge_price_in: US dollars for a million tokens that the judge reads; default is what is known of the model
        judge_price_out: US dollars for a million tokens that it writes
        max_judge_cost: US dollars that this output_dir may cost in all; the run stops before, and goes on when raised
        max_unscored: a trial with a greater share of questions that lack a rating, of any turn, fails
        parallel: requests to the judge at a time
        max_new_token: most tokens of an answer
        num_choices: answers to each question, all of them judged
        temperature: of all answers; default is FastChat's for the category of each question
        chat_template: none puts the questions as they are; a .jinja file; a name of FastChat, as llama-2; default is
            the template of the target's tokenizer
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = SearchConfig.NOT_IDENTITY | {
        *("bench_dir", "bench_name", "judge_file", "judge_base_url", "judge_timeout", "judge_retries"),
        *("judge_deadline", "judge_price_in", "judge_price_out", "max_judge_cost", "max_unscored", "parallel"),
        # What they are is in the judge's own identity, a model's weights rather than its folder.
        *("judge_model_name", "judge_temperature", "judge_max_tokens", "judge_repeats"),
    }

    bench_name: str | None = None
    bench_dir: str | None = None
    question_limit: int | str | None = None
    judge_model_name: str = "rouge_l"
    judge_file: str | None = None
    judge_base_url: str | None = None
    judge_repeats: int = 1
    judge_temperature: float = 0.0
    judge_max_tokens: int = 2048
    judge_timeout: float = 120.0
    judge_retries: int = 5
    judge_deadline: float = 600.0
    judge_price_in: float | None = None
    judge_price_out: float | None = None
    max_judge_cost: float | None = None
    max_unscored: float = 0.1
    parallel: int = 8
    max_new_token: int = 512
    num_choices: int = 1
    temperature: float | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self.check_search()
        self.check_bench()

    def check_bench(self) -> None:
        """Check every setting of questions, answers and judge.

        Raises:
            ConfigError: the first value that cannot work.
        """
        if self.bench_name is None and self.bench_dir is None:
            raise ConfigError("--bench_name is missing: name a folder of benchmarks/, or give any with --bench_dir")
        name = self.bench_name
        if name is not None and (re.fullmatch(r"[\w][\w.\- ]{,99}", name) is None or name != name.strip()):
            raise ConfigError(f"--bench_name {name!r}: must be the name of a folder, give its path as --bench_dir")
        if not self.judge_model_name.strip():
            raise ConfigError("--judge_model_name is empty, name a judge")
        if re.fullmatch("rouge[-_ ]?l", self.judge_model_name.strip(), flags=re.IGNORECASE):
            self.judge_model_name = "rouge_l"
        for name in ("judge_repeats", "judge_max_tokens", "parallel", "max_new_token", "num_choices"):
            self.check_whole(name, least=1)
        self.check_whole("judge_retries", least=0)
        if self.question_limit is not None:
            self.check_limit("question_limit")
        for name in (*AT_LEAST_0, *ABOVE_0):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf and (value > 0 or name in AT_LEAST_0)):
                least = "at least 0" if name in AT_LEAST_0 else "more than 0"
                raise ConfigError(f"--{name} must be {least} and finite, got {value}")
        if (self.judge_price_in is None) != (self.judge_price_out is None):
            raise ConfigError("--judge_price_in and --judge_price_out belong together: give both or none")
        if not 0 <= self.max_unscored < 1:
            raise ConfigError(f"--max_unscored must be a share from 0 to less than 1, got {self.max_unscored}")

    @property
    def most_questions(self) -> int | None:
        """Most questions that a trial sees; None for all."""
        if self.question_limit is None:
            return N_QUESTIONS
        return self.question_limit if isinstance(self.question_limit, int) else None

    def identity(self) -> dict[str, Any]:
        """Every setting that a score depends on, in one spelling."""
        # What is asked is known by the questions: a study without a limit goes on if it had no more than these.
        known = {"question_limit": None} if isinstance(self.question_limit, str) else {}
        return {**super().identity(), **known}


@dataclass(kw_only=True)
class PlanConfig(MtBenchConfig):
    """Say what a merge would need, whether it can work, and what its judge would cost, before anything is paid for.

    Weights are neither downloaded nor read, no judge is asked. Takes the settings of mt_bench; without bench_name and
    bench_dir it is about the merge alone.
    """

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self.check_search()
        if self.bench_name is not None or self.bench_dir is not None:
            self.check_bench()
