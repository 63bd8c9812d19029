"""Which questions and judge prompts a configuration names, and which of the questions are asked when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tvmerge.config import MtBenchConfig
from tvmerge.errors import TaskError
from tvmerge.evaluators.bench import Bench, load_bench
from tvmerge.evaluators.split import Split, split_questions
from tvmerge.files import local_path
from tvmerge.judges.local import LOCAL
from tvmerge.judges.prompts import MAX_TURNS, JudgePrompts, load_judge_prompts
from tvmerge.judges.providers import parse_judge
from tvmerge.judges.rouge_l import RougeL

__all__ = ["answerable", "find_bench", "find_prompts", "judge_name", "split_bench"]


def judge_name(config: MtBenchConfig) -> str:
    """What files call the judge: its model, without its provider.

    Raises:
        ConfigError: it names no model.
    """
    name = config.judge_model_name
    if name == RougeL.name:
        return name
    return name.removeprefix(LOCAL) if name.startswith(LOCAL) else parse_judge(name)[1]


def find_bench(config: MtBenchConfig) -> Bench:
    """Read the questions that a configuration names.

    Raises:
        TaskError: they are not there, or broken.
    """
    name = config.bench_name
    if config.bench_dir is not None:
        folder = local_path(config.bench_dir, flag="--bench_dir")
        if name is not None and (folder / name / "question.jsonl").is_file():
            folder /= name
        if not (folder / "question.jsonl").is_file():
            named = "" if name is None else f", nor is {folder / name / 'question.jsonl'}"
            raise TaskError(f"--bench_dir {folder}: question.jsonl is not there{named}")
        return load_bench(folder, name=name or folder.resolve().name, judge=judge_name(config))
    assert name is not None, "the configuration has one of the two"
    folders = list(dict.fromkeys(path.resolve() for path in (Path("benchmarks"), *_with_the_code("benchmarks"))))
    for folder in folders:
        if (folder / name / "question.jsonl").is_file():
            return load_bench(folder / name, name=name, judge=judge_name(config))
    known = sorted({path.parent.name for folder in folders for path in folder.glob("*/question.jsonl")})
    raise TaskError(
        f"--bench_name {name}: is not in {' or '.join(map(str, folders))}; there are {', '.join(known) or 'none'}; "
        "--bench_dir takes any folder"
    )


def find_prompts(config: MtBenchConfig, bench: Bench) -> tuple[JudgePrompts, str]:
    """Read the judge prompts that a configuration names, and say which they are.

    Raises:
        ConfigError: they are not there, or broken.
    """
    named = config.judge_file
    if named is None:
        japanese = [question for question in bench.questions if re.search("[ぁ-ヿ]", "".join(question.turns))]
        named = "ja" if 2 * len(japanese) > len(bench.questions) else "en"
    if named in ("en", "ja"):
        path = next(path for path in _with_the_code("judge_prompts") if path.is_dir()) / f"{named}.jsonl"
    else:
        path = local_path(named, flag="--judge_file")
    return load_judge_prompts(path), path.name


def _with_the_code(name: str) -> list[Path]:
    """Where a folder of ours is: beside the code in a clone, else in it."""
    package = Path(__file__).parent
    return [root / name for root in (package.parent, package)]


def answerable(bench: Bench, judge: str) -> list[int]:
    """The questions that a judge can rate the answers to."""
    if judge != RougeL.name:
        for question in bench.questions:
            if len(question.turns) > MAX_TURNS:
                raise TaskError(
                    f"bench {bench.name}, question {question.question_id!r}: has {len(question.turns)} turns, and "
                    f"judge prompts show {MAX_TURNS}"
                )
        return list(range(len(bench.questions)))
    return [index for index, question in enumerate(bench.questions) if question.references is not None]


def split_bench(config: MtBenchConfig, bench: Bench, *, judge: str) -> Split:
    """Which questions the search sees, and which are held out; the shares of categories are kept.

    Raises:
        TaskError: too few of them, or one that the judge cannot rate.
    """
    usable = answerable(bench, judge)
    if not usable:
        raise TaskError(
            f"bench {bench.name}: no question has a reference answer to each turn, which the judge {judge} compares "
            "with: add them, or name another --judge_model_name"
        )
    split = split_questions(
        name=bench.name,
        n_questions=len(usable),
        holdout=config.holdout,
        limit=config.most_questions,
        seed=config.question_seed,
        labels=[bench.questions[index].category for index in usable],
        heldout_limit=config.most_heldout,
    )

    def of_bench(indices: Sequence[int]) -> list[int]:
        return [usable[index] for index in indices]

    return Split(of_bench(split.search), of_bench(split.heldout), [of_bench(stage) for stage in split.stages])
