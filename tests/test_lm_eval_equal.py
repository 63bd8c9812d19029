"""Built-in tasks of lm-eval, on made-up rows: our numbers are those of lm-eval's own command line."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from conftest import save_mistral, save_tokenizer
from transformers import MistralForCausalLM

from tvmerge.checkpoint import Checkpoint
from tvmerge.evaluators import QuestionScore, task_scores
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.measure import choose_measure
from tvmerge.evaluators.prompts import ChatFormat
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel, load_tokenizer

BUILT_IN = Path(lm_eval.__file__).parent / "tasks"
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'_#$-\n"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
N = 12


def words(generator: random.Random, least: int, most: int) -> str:
    return " ".join(
        "".join(generator.choices("abcdefgh", k=generator.randint(1, 5))) for _ in range(generator.randint(least, most))
    )


def arc(g: random.Random) -> dict[str, Any]:
    choices = {"text": [words(g, 1, 3) for _ in range(4)], "label": list("ABCD")}
    return {"question": words(g, 4, 9) + "?", "choices": choices, "answerKey": g.choice("ABCD")}


def winogrande(g: random.Random) -> dict[str, Any]:
    sentence = f"{words(g, 2, 4)} _ {words(g, 2, 4)}"
    return {"sentence": sentence, "option1": words(g, 1, 1), "option2": words(g, 1, 2), "answer": g.choice("12")}


def gsm8k(g: random.Random) -> dict[str, Any]:
    return {"question": words(g, 4, 9) + "?", "answer": f"{words(g, 3, 5)}.\n#### {g.randint(0, 9)}"}


def lambada(g: random.Random) -> dict[str, Any]:
    return {"text": words(g, 6, 12)}


def wikitext(g: random.Random) -> dict[str, Any]:
    return {"page": words(g, 20, 160)}


def truthful(g: random.Random) -> dict[str, Any]:
    targets = {"choices": [words(g, 2, 5) for _ in range(4)], "labels": [1, 1, 0, 0]}
    return {"question": words(g, 3, 6) + "?", "mc1_targets": targets, "mc2_targets": targets}


def sciq(g: random.Random) -> dict[str, Any]:
    choices = {f"distractor{i}": words(g, 1, 2) for i in (1, 2, 3)}
    return {"support": words(g, 5, 9), "question": words(g, 3, 6), "correct_answer": words(g, 1, 2), **choices}


def toxigen(g: random.Random) -> dict[str, Any]:
    scores = {"toxicity_ai": g.choice([1.0, 4.0]), "toxicity_human": g.choice([1.0, 4.0])}
    return {"text": words(g, 4, 8), **scores}


#: Built-in task → its file, a made-up row, its examples in a prompt, and the metric that is compared.
TASKS: Mapping[str, tuple[str, Any, int, str]] = {
    "arc_easy": ("arc/arc_easy.yaml", arc, 2, "acc_norm"),
    "winogrande": ("winogrande/default.yaml", winogrande, 2, "acc"),
    "gsm8k": ("gsm8k/gsm8k.yaml", gsm8k, 2, "exact_match,flexible-extract"),
    "lambada_openai": ("lambada/lambada_openai.yaml", lambada, 0, "perplexity"),
    "wikitext": ("wikitext/wikitext.yaml", wikitext, 0, "word_perplexity"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", truthful, 0, "acc"),
    "toxigen": ("toxigen/toxigen.yaml", toxigen, 0, "acc"),
    "sciq": ("sciq/sciq.yaml", sciq, 1, "acc"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in tasks that read rows of ours."""
    root = tmp_path_factory.mktemp("built_in")
    for name, (path, row, shots, _) in TASKS.items():
        files = {}
        for split in ("train", "validation", "test"):
            generator = random.Random(f"{name}/{split}")
            files[split] = str(root / f"{name}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row(generator)) + "\n" for _ in range(N)))
        task = {
            "include": str(BUILT_IN / path),
            "task": f"ours_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "num_fewshot": shots,
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, where two ways to compute the same differ by nothing that matters."""
    root = save_mistral(
        tmp_path_factory.mktemp("model"), seed=3, vocab_size=len(CHARACTERS) + 3, max_position_embeddings=600
    )
    MistralForCausalLM.from_pretrained(root).float().save_pretrained(root)
    save_tokenizer(root, CHARACTERS)
    settings = json.loads((root / "tokenizer_config.json").read_text())
    (root / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return root


def command_line(model: Path, folder: Path, output: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's own command line gives for each question of each task."""
    command = [
        *(
            sys.executable,
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={model}",
            "--device",
            "cpu",
        ),
        *("--tasks", ",".join(f"ours_{name}" for name in TASKS), "--include_path", str(folder)),
        *("--batch_size", "8", "--output_path", str(output), "--log_samples", *more),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in TASKS:
        (path,) = output.rglob(f"samples_ours_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    return {**found, "results": [results]}


@pytest.fixture(scope="module")
def plain(model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return command_line(model, folder, tmp_path_factory.mktemp("plain"))


def our_scores(model: Path, folder: Path, chat: ChatFormat | None = None) -> dict[str, list[QuestionScore]]:
    live = TransformersModel.from_folder(model, checkpoint=Checkpoint(resolve(str(model))), device="cpu")
    tasks = load_tasks([f"ours_{name}" for name in TASKS], task_dir=folder)
    measures = {f"ours_{name}": choose_measure(name, tasks[f"ours_{name}"].task, TASKS[name][3]) for name in TASKS}
    # Half of the questions in two calls each: which others are asked must not change a question.
    found: dict[str, list[QuestionScore]] = {}
    halves = [range(0, N, 2), range(1, N, 2)] if chat is None else [range(N)]
    for half in halves:
        evaluator = LmEvalEvaluator(tasks=tasks, questions=dict.fromkeys(tasks, half), measures=measures, chat=chat)
        for score in evaluator.score(HarnessModel(live, batch_size=8), lambda _: None).scores:
            found.setdefault(score.task.removeprefix("ours_"), []).append(score)
    return {name: sorted(scores, key=lambda score: score.question) for name, scores in found.items()}


def their_value(name: str, sample: Mapping[str, Any]) -> float:
    item = sample[TASKS[name][3].partition(",")[0]]
    return -item[0] / item[1] if isinstance(item, list) else -item if name == "lambada_openai" else float(item)


def assert_equal(
    ours: Mapping[str, Sequence[QuestionScore]], theirs: Mapping[str, list[dict[str, Any]]], *, calls: int
) -> None:
    for name, scores in ours.items():
        chosen = TASKS[name][3].partition(",")[2]
        samples = sorted(
            (sample for sample in theirs[name] if not chosen or sample["filter"] == chosen),
            key=lambda sample: int(sample["doc_id"]),
        )
        expected = [their_value(name, sample) for sample in samples]
        known = [score.score for score in scores]
        assert len(known) == len(expected) == N
        if name == "wikitext":  # a question's value is its share of all words that were asked for in one call
            sizes = [sample["word_perplexity"][1] for sample in samples]
            unit = [sum(sizes[i::calls]) / (N // calls) for i in range(calls)]
            expected = [value * sizes[i] / unit[i % calls] for i, value in enumerate(expected)]
        assert known == pytest.approx(expected, rel=1e-4), name


def test_every_question_of_built_in_tasks_scores_as_on_lm_evals_command_line(
    model: Path, folder: Path, plain: dict[str, list[dict[str, Any]]]
) -> None:
    assert_equal(our_scores(model, folder), plain, calls=2)


def test_chats_are_put_as_on_lm_evals_command_line(
    model: Path, folder: Path, tmp_path: Path, plain: dict[str, list[dict[str, Any]]]
) -> None:
    theirs = command_line(model, folder, tmp_path, "--apply_chat_template", "--system_instruction", "be good")
    chat = ChatFormat(tokenizer=load_tokenizer(model), system_instruction="be good")
    assert_equal(our_scores(model, folder, chat), theirs, calls=1)
    assert theirs["arc_easy"][0]["arguments"] != plain["arc_easy"][0]["arguments"]


def test_the_mean_over_questions_is_the_metric_itself(
    model: Path, folder: Path, plain: dict[str, list[dict[str, Any]]]
) -> None:
    (results,) = plain["results"]
    live = TransformersModel.from_folder(model, checkpoint=Checkpoint(resolve(str(model))), device="cpu")
    tasks = load_tasks([f"ours_{name}" for name in TASKS], task_dir=folder)
    measures = {f"ours_{name}": choose_measure(name, tasks[f"ours_{name}"].task, TASKS[name][3]) for name in TASKS}
    evaluator = LmEvalEvaluator(tasks=tasks, questions=dict.fromkeys(tasks, range(N)), measures=measures)
    means = task_scores(evaluator.score(HarnessModel(live, batch_size=8), lambda _: None).scores)
    for name, mean in means.items():
        goal = measures[name].goal(weight=1)
        metric = results[name][goal.metric]
        assert mean is not None
        assert math.isclose(goal.shown(mean), metric, rel_tol=1e-4), name
