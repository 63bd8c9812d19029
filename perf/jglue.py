"""What a trial over lm-eval's tasks costs beside the model's forward passes, and what these cost.

`python perf/jglue.py` prints two tables in Markdown. All times of a table are taken in turns within one run.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from optuna.distributions import FloatDistribution
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tvmerge.checkpoint import Checkpoint
from tvmerge.evaluators import Scored
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import LoadedTask, load_tasks
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel
from tvmerge.search import BASELINES
from tvmerge.sources import MergeSettings, open_sources
from tvmerge.study import MergeStudy
from tvmerge.trial_queue import StudyPlan

__all__ = ["ROUNDS", "Timer", "made_up_task", "overhead", "plain_passes", "sharing", "wide_model"]

DEMO = Path(__file__).parents[1] / "demo"
TOYS = ("toy_jcommonsenseqa", "toy_jnli", "toy_marc_ja", "toy_jsquad")
ROUNDS = 5
CHARACTERS = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん東京山川空海"


class Timer:
    """Seconds that a model spends in its forward passes.

    Args:
        model: is looked at for good.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.seconds = 0.0
        self._start = 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def of(self, work: Callable[[], object]) -> tuple[float, float]:
        """How long some work takes, and its forward passes."""
        self.seconds = 0.0
        return seconds(work), self.seconds


def live(folder: Path, dtype: str = "auto") -> TransformersModel:
    """A model folder as a live model."""
    checkpoint = Checkpoint(resolve(str(folder)))
    return TransformersModel.from_folder(folder, checkpoint=checkpoint, device="cpu", dtype=dtype)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def overhead(*, n_questions: int, rounds: int, batch_size: int = 256) -> dict[str, float]:
    """Seconds of the parts of a run on the embedded models: once per process, and in each trial.

    Args:
        n_questions: of each of the four toy tasks.
        rounds: trials; medians are returned.
        batch_size: of both.
    """
    found: dict[str, float] = {}
    start = time.perf_counter()
    tasks = load_tasks(TOYS, task_dir=DEMO / "tasks")
    found["load tasks"] = time.perf_counter() - start
    start = time.perf_counter()
    evaluator = LmEvalEvaluator(tasks=tasks, questions={name: range(n_questions) for name in tasks})
    found["build requests"] = time.perf_counter() - start
    target, base, tuned = (str(DEMO / "models" / role) for role in ("target", "base", "tuned"))
    sources = open_sources(target=target, tuned=[tuned], base=base, vocabulary="same", cache_dir=None)
    merge = sources.merge(MergeSettings(), keep=True)
    model = live(Path(target))
    start = time.perf_counter()
    harness = HarnessModel(model, batch_size=batch_size)
    found["try what the model can"] = time.perf_counter() - start
    found["tokenise and lay out"] = seconds(lambda: evaluator.prepare(harness))
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=str(DEMO / "tasks"), include_defaults=False)
    timer = Timer(model.model)
    scoring: list[float] = []

    def evaluate(weights: Mapping[str, float], number: int) -> Scored:
        model.load(merge.at(weights))
        start = time.perf_counter()
        scored = evaluator.score(harness, lambda _: None)
        scoring.append(time.perf_counter() - start)
        return scored

    ours, other = [], []
    with tempfile.TemporaryDirectory() as folder:
        study = MergeStudy(
            output_dir=Path(folder),
            plan=StudyPlan(
                identity={},
                ranges=dict.fromkeys(merge.weight_names, FloatDistribution(0.0, 2.0)),
                sampler="TPE",
                seed=0,
                first=[dict.fromkeys(merge.weight_names, weight) for weight in BASELINES],
            ),
        )
        gc.freeze()  # as a run does it
        for _ in range(2 + rounds):  # the first two warm up
            ours.append(timer.of(lambda: study.run_trial(evaluate)))
            other.append(timer.of(lambda: _simple_evaluate(theirs, manager, n_questions)))
        gc.unfreeze()
        study.close()
    trials, forwards = zip(*ours[2:], strict=True)
    rest = [(t, f, s) for t, f, s in zip(trials, forwards, scoring[2:], strict=True)]
    found["forward"], found["trial"] = statistics.median(forwards), statistics.median(trials)
    found["scoring"] = statistics.median(score - forward for _, forward, score in rest)
    found["study"] = statistics.median(trial - score for trial, _, score in rest)
    found["outside of scoring"] = statistics.median(1 - forward / score for _, forward, score in rest)
    found["outside of trial"] = statistics.median(1 - forward / trial for trial, forward, _ in rest)
    found["lm-eval"], found["lm-eval forward"] = (statistics.median(c) for c in zip(*other[2:], strict=True))
    return found


def _simple_evaluate(model: HFLM, manager: TaskManager, n_questions: int) -> object:
    with redirect_stderr(io.StringIO()):  # progress bars
        return lm_eval.simple_evaluate(
            model=model, tasks=list(TOYS), task_manager=manager, limit=n_questions, bootstrap_iters=0
        )


def made_up_task(folder: Path, *, n_questions: int, shots: int = 3, same: bool = False) -> Path:
    """A task of JCommonsenseQA's shape: five choices, examples, instructions; questions of random characters.

    Args:
        folder: for its files.
        n_questions: of the task; there are as many examples.
        shots: examples in a prompt.
        same: whether all questions have the same examples.
    """
    generator = random.Random(0)

    def word(least: int, most: int) -> str:
        return "".join(generator.choices(CHARACTERS, k=generator.randint(least, most)))

    for split in ("train", "validation"):
        rows = [
            {"question": word(12, 30), "choices": [word(2, 6) for _ in range(5)], "label": generator.randrange(5)}
            for _ in range(n_questions)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": f"made_up_{same}",
        "fewshot_config": {"sampler": "first_n" if same else "default"},
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "validation")}},
        "validation_split": "validation",
        "fewshot_split": "train",
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "description": "以下の質問に、選択肢の中から答えてください。\n\n",
        "doc_to_text": "質問:{{question}}\n選択肢:\n- {{choices|join('\n- ')}}\n答え:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"made_up_{same}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True))
    return folder


def wide_model(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> Path:
    """A random Llama with the toys' tokenizer, as a folder; its vocabulary is wider than the tokenizer's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    live(DEMO / "models" / "target").tokenizer.save_pretrained(folder)
    return folder


def sharing(
    model: TransformersModel, tasks: Mapping[str, LoadedTask], *, n_questions: int, rounds: int, batch_size: int = 16
) -> dict[str, float]:
    """Seconds of the log-likelihoods of a task, here and by lm-eval's own wrapper, and how often they disagree.

    Args:
        model: live.
        tasks: the task.
        n_questions: of the task.
        rounds: medians of so many are returned.
        batch_size: of both.
    """
    evaluator = LmEvalEvaluator(tasks=tasks, questions={name: range(n_questions) for name in tasks})
    harness = HarnessModel(model, batch_size=batch_size)
    evaluator.prepare(harness)
    requests = evaluator.requests("loglikelihood")
    theirs, alone = (
        HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=size) for size in (batch_size, 1)
    )
    answer = harness.prepare("loglikelihood", requests)
    pairs = [harness._encode_pair(*request.args) for request in requests]
    n_least = n_distinct([[*context, *continuation[:-1]] for context, continuation in pairs])
    times: dict[str, list[float]] = {"tvmerge": [], "lm-eval": [], "limit": []}
    for _ in range(rounds):
        times["tvmerge"].append(seconds(lambda: answer(lambda _: None)))
        times["lm-eval"].append(seconds(lambda: theirs.loglikelihood(requests, disable_tqdm=True)))
        times["limit"].append(seconds(lambda: plain_passes(model.model, n_least)))
    ours = answer(lambda _: None)
    other = theirs.loglikelihood(requests, disable_tqdm=True)
    single = alone.loglikelihood(requests, disable_tqdm=True)
    return {
        **{name: statistics.median(taken) for name, taken in times.items()},
        "furthest": max(abs(a[0] - b[0]) for a, b in zip(ours, other, strict=True)),
        "own furthest": max(abs(a[0] - b[0]) for a, b in zip(other, single, strict=True)),
        "differ": _differ(requests, ours, other),
        "own": _differ(requests, other, single),
    }


def n_distinct(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens there are if each beginning that sequences share is counted once."""
    n = 0
    last: list[int] = []
    for sequence in sorted(map(list, sequences)):
        shared = next((i for i, (a, b) in enumerate(zip(last, sequence, strict=False)) if a != b), None)
        n += len(sequence) - (min(len(last), len(sequence)) if shared is None else shared)
        last = sequence
    return n


def plain_passes(model: PreTrainedModel, n_tokens: int, *, length: int = 256, batch: int = 16) -> None:
    """Forward so many tokens without any padding, mask or head."""
    ids = torch.randint(100, (batch, length))
    with torch.no_grad():
        for _ in range(n_tokens // ids.numel()):
            model.get_decoder()(ids, use_cache=False)
        if rest := n_tokens % ids.numel() // length:
            model.get_decoder()(ids[:rest], use_cache=False)


def _differ(requests: Sequence[Any], ours: Sequence[Any], other: Sequence[Any]) -> int:
    """On how many questions two lists of log-likelihoods choose another answer."""
    chosen: list[dict[int, tuple[float, int]]] = [{}, {}]
    for request, *pair in zip(requests, ours, other, strict=True):
        for best, (likelihood, _) in zip(chosen, pair, strict=True):
            best[request.doc_id] = max(best.get(request.doc_id, (-1e9, 0)), (likelihood, -request.idx))
    return sum(chosen[0][key][1] != chosen[1][key][1] for key in chosen[0])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_questions", type=int, default=500, help="of each task")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    found = overhead(n_questions=options.n_questions, rounds=options.rounds)
    once = ["load tasks", "build requests", "try what the model can", "tokenise and lay out"]
    rows = [[name, f"{found[name]:.2f}"] for name in once]
    rows += [
        ["**once per process**", f"{sum(found[name] for name in once):.2f}"],
        ["forward passes", f"{found['forward']:.3f}"],
        [f"all else of scoring, {found['outside of scoring']:.1%} of it", f"{found['scoring']:.3f}"],
        ["drawing and merging weights, study, scores.jsonl", f"{found['study']:.3f}"],
        [f"**each trial**, {found['outside of trial']:.1%} outside of forward passes", f"{found['trial']:.3f}"],
        ["lm_eval.simple_evaluate: forward passes", f"{found['lm-eval forward']:.3f}"],
        ["lm_eval.simple_evaluate: all else", f"{found['lm-eval'] - found['lm-eval forward']:.3f}"],
        [f"**lm_eval.simple_evaluate**, {found['lm-eval'] / found['trial']:.1f} times", f"{found['lm-eval']:.3f}"],
    ]
    print(table([f"4 toy tasks of {options.n_questions} questions, medians", "s"], rows))
    rows = []
    for name in ("toy_jcommonsenseqa", "toy_jnli"):
        tasks = load_tasks([name], task_dir=DEMO / "tasks")
        result = sharing(live(DEMO / "models" / "tuned"), tasks, n_questions=options.n_questions, rounds=options.rounds)
        rows.append([f"none; {name}, tuned toy, bfloat16, {options.n_questions} questions", *_cells(result)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for hidden, layers, dtype, same in (
            (512, 8, "float32", False),
            (512, 8, "float32", True),
            (512, 8, "bfloat16", False),
            (128, 4, "float32", False),
        ):
            made_up_task(folder, n_questions=options.n_questions, same=same)
            tasks = load_tasks([f"made_up_{same}"], task_dir=folder)
            path = wide_model(folder / f"{hidden}", hidden=hidden, layers=layers, vocabulary=32000)
            n = options.n_questions // 20
            result = sharing(live(path, dtype), tasks, n_questions=n, rounds=max(1, options.rounds // 2))
            what = "the same" if same else "other ones for each question"
            rows.append([f"{what}; {hidden} x {layers} layers, {dtype}, {n} questions", *_cells(result)])
    heads = ["3 examples", "limit, s", "tvmerge, s", "of the limit", "lm-eval, s", "over tvmerge"]
    print(table([*heads, "furthest", "other answers"], rows))


def _cells(result: Mapping[str, float]) -> list[str]:
    return [
        f"{result['limit']:.2f}",
        f"{result['tvmerge']:.2f}",
        f"{result['tvmerge'] / result['limit']:.2f}",
        f"{result['lm-eval']:.2f}",
        f"{result['lm-eval'] / result['tvmerge']:.1f}",
        f"{result['furthest']:.1g} ({result['own furthest']:.1g})",
        f"{result['differ']} ({result['own']})",
    ]


if __name__ == "__main__":
    main()
