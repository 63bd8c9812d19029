"""The Japanese tasks: their prompts, their examples, and a run through lm-eval itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from conftest import ROOT, save_mistral
from hypothesis import given
from hypothesis import strategies as st
from jglue_fewshot import StratifiedSampler
from jglue_rows import write_all
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

FOLDER = ROOT / "benchmarks" / "jglue"
REAL = ROOT.parent / "shared" / "data" / "jglue"
PROMPTS = (ROOT / "tests" / "jglue_prompts.txt").read_text(encoding="utf-8")
GOLDEN: dict[str, str] = dict(re.findall(r"^=== (\S+)\n(.*?)◀$", PROMPTS, re.DOTALL | re.MULTILINE))
#: A task without a style, and whose prompt it has.
STYLE_OF = {
    "jcommonsenseqa": "jcommonsenseqa-1.1-0.3",
    "jnli": "jnli-1.3-0.3",
    "jsquad": "jsquad-1.1-0.3",
    "marc_ja": "marc_ja-1.1-0.3",
    "mgsm_ja": "mgsm-1.0-0.3",
}
STYLES = {
    "jcommonsenseqa-1.1": ("0.1", "0.2", "0.2.1", "0.3", "0.4", "0.5", "0.6"),
    "jnli-1.3": ("0.2", "0.3", "0.4", "0.5", "0.6"),
    "jsquad-1.1": ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6"),
    "jsquad-1.2": ("0.2", "0.3", "0.4", "0.5", "0.6"),
    "marc_ja-1.1": ("0.2", "0.3", "0.4", "0.5", "0.6"),
    "mgsm-1.0": ("0.0", "0.3", "0.4", "0.5", "0.6"),
}
NAMES = sorted([*STYLE_OF, *(f"{task}-{style}" for task, styles in STYLES.items() for style in styles)])
SEPARATORS = {"0.4": "<NL>", "0.5": "\n", "0.6": " </s><s>[INST] "}

IN_A_NEW_PROCESS = """
import sys
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False, metadata={"jglue_data": sys.argv[2]})
for name in sys.argv[3:]:
    task = manager.load([name])["tasks"][name]
    task.set_fewshot_seed(0)
    task.build_all_requests()
    print([instance.args for instance in task.instances])
print("tvmerge" in sys.modules)
"""


def manager(data: Path) -> TaskManager:
    # What else --model_args and --metadata hand over must not matter.
    metadata = {"jglue_data": str(data), "pretrained": "a/b", "max_length": 1}
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)


def load(name: str, data: Path) -> ConfigurableTask:
    task = manager(data).load([name])["tasks"][name]
    task.set_fewshot_seed(0)
    return task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("jglue"))


def test_the_names_are_these_and_no_base_file_is_a_task(data: Path) -> None:
    assert sorted(manager(data).all_tasks) == NAMES
    assert sorted([*GOLDEN, *STYLE_OF]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_prompts(name: str, tmp_path: Path) -> None:
    task = load(name, write_all(tmp_path, n_valid=1, n_train=1))
    if task.config.fewshot_config.samples:
        task.sampler.replace_df([{"question": "例題？", "answer": "例の答えは2です。"}])
    assert task.fewshot_context(task.eval_docs[0], 1) == GOLDEN[STYLE_OF.get(name, name)]
    assert task.config.num_fewshot == 3
    version = STYLE_OF.get(name, name).split("-")[1]
    assert str(task.VERSION) == version
    assert next(entry["metric"] for entry in task.config.metric_list) == ("exact_match" if "jsquad" in name else "acc")


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_prompt_is_description_examples_and_question_and_generation_ends_before_the_next(
    name: str, data: Path
) -> None:
    task = load(name, data)
    doc = task.eval_docs[0]
    question, separator = task.doc_to_text(doc), SEPARATORS.get(name.split("-")[2], "\n\n")
    prompt = task.fewshot_context(doc, 3)
    shown = prompt.removeprefix(task.config.description).removesuffix(question)
    assert task.config.description + shown + question == prompt
    assert shown.endswith(separator)
    assert task.fewshot_context(doc, 0) == task.config.description + question
    if task.OUTPUT_TYPE == "generate_until":
        until = task.config.generation_kwargs["until"]
        assert any(stop in separator for stop in until)
        target = task.doc_to_target(task.sampler.sample(1)[0])
        assert not any(stop in target for stop in until), "an answer like the examples would be cut off"


@pytest.mark.parametrize(("name", "labels"), [("jnli", 3), ("marc_ja", 2)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 6])
def test_examples_are_as_many_of_each_label_as_can_be(name: str, labels: int, n: int, data: Path) -> None:
    task = load(name, data)
    orders = set()
    for _ in range(40):
        drawn = [doc["label"] for doc in task.sampler.sample(n)]
        counts = [drawn.count(label) for label in range(labels)]
        assert len(drawn) == n
        assert max(counts) - min(counts) <= 1
        orders.add(tuple(drawn))
    assert n == 0 or len(orders) > 1, "always the same order of labels"


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=30), n=st.integers(0, 30), seed=st.integers(0, 9))
def test_sampler_draws_without_repeats_from_what_there_is(labels: list[int], n: int, seed: int) -> None:
    docs = [{"number": i, "label": label} for i, label in enumerate(labels)]
    sampler = StratifiedSampler(docs).set_rnd(seed)
    if n > len(docs):
        with pytest.raises(ValueError, match=f"{n} few-shot examples are wanted of {len(docs)}"):
            sampler.sample(n)
        return
    drawn = sampler.sample(n)
    assert len({doc["number"] for doc in drawn}) == n
    counts, sizes = Counter(doc["label"] for doc in drawn), Counter(labels)
    full = max(counts.values(), default=0)
    assert all(counts[label] in (sizes[label], full, full - 1) for label in sizes)
    assert drawn == StratifiedSampler(docs).set_rnd(seed).sample(n)


def test_sampler_leaves_the_question_out_and_draws_from_new_rows() -> None:
    docs = [{"number": i, "label": i % 2} for i in range(4)]
    sampler = StratifiedSampler(docs).set_rnd(0)
    for _ in range(10):
        assert docs[1] not in sampler.sample(3, eval_doc=docs[1])
    assert sampler.sample(1, df=[{"number": 9, "label": 7}]) == [{"number": 9, "label": 7}]


def test_prompts_are_the_same_in_every_process_and_need_nothing_of_tvmerge(data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(FOLDER), str(data), *STYLE_OF],
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    here = []
    for name in STYLE_OF:
        task = load(name, data)
        task.build_all_requests()
        here.append(str([instance.args for instance in task.instances]))
    assert done.stdout.splitlines() == [*here, "False"]


class Oracle(LM):  # type: ignore[misc]  # lm_eval ships no types
    """Knows every answer, or that of another question."""

    def __init__(self, *, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-1.0 if (i.idx == i.doc["label"]) == self.knows else -9.0, False) for i in requests]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._answer(i.doc) if self.knows else "わかりません" for i in requests]

    @staticmethod
    def _answer(doc: dict[str, Any]) -> str:
        # The last gold answer: the first is what examples show.
        return doc["answers"]["text"][-1] if "answers" in doc else f"合わせて{doc['answer']}個です。"

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def evaluate(model: LM, names: Sequence[str], data: Path, **settings: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager(data), bootstrap_iters=0, **settings
    )
    assert results is not None
    return dict(results)


def metrics(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name} {metric.removesuffix(',none')}": value
        for name, row in results["results"].items()
        for metric, value in row.items()
        if metric in ("acc,none", "exact_match,none", "f1,none")
    }


@pytest.mark.filterwarnings("ignore")
def test_who_knows_the_answers_has_1_and_who_does_not_has_0(data: Path) -> None:
    names = [*STYLE_OF, "jcommonsenseqa-1.1-0.2", "marc_ja-1.1-0.2"]  # these two have answers of their own
    for knows in (True, False):
        scores = metrics(evaluate(Oracle(knows=knows), names, data))
        assert scores == {f"{name} acc": float(knows) for name in names if name != "jsquad"} | {
            "jsquad exact_match": float(knows),
            "jsquad f1": float(knows),
        }


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_scored_by_lm_eval_itself_and_the_results_can_be_written(data: Path, tmp_path: Path) -> None:
    folder = save_mistral(tmp_path / "model", seed=0, max_position_embeddings=1024)
    names = ["jcommonsenseqa-1.1-0.2", "jnli-1.3-0.6", "marc_ja-1.1-0.4", "jsquad-1.2-0.2", "mgsm-1.0-0.0"]
    model = HFLM(pretrained=str(folder), batch_size=2, device="cpu")
    results = evaluate(model, names, data, limit=2, log_samples=True)
    assert all(0 <= value <= 1 for value in metrics(results).values())
    assert {name: len(results["samples"][name]) for name in names} == dict.fromkeys(names, 2)
    # <s> in the prompt is the only one.
    prompt = results["samples"]["jnli-1.3-0.6"][0]["arguments"][0][0]
    assert model.tok_encode(prompt).count(model.tokenizer.bos_token_id) == prompt.count("<s>")
    written = json.loads(json.dumps(results, default=handle_non_serializable, ensure_ascii=False))
    assert "StratifiedSampler" in written["configs"]["jnli-1.3-0.6"]["fewshot_config"]["sampler"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not beside this repository")
@pytest.mark.parametrize(("name", "n"), [("jcommonsenseqa", 1119), ("jnli", 2434), ("jsquad", 4442), ("mgsm_ja", 250)])
def test_real_gold_answers_are_right(name: str, n: int) -> None:
    task = load(name, REAL)
    docs = list(task.eval_docs)
    assert len(docs) == n
    assert len(task.sampler.sample(3)) == 3
    for doc in docs:
        if name == "jsquad":
            for gold in doc["answers"]["text"]:
                assert task.process_results(doc, [gold]) == {"exact_match": 1.0, "f1": 1.0}
        elif name == "mgsm_ja":
            assert task.process_results(doc, [f"16-3=13なので、答えは{doc['answer']}です。"]) == {"acc": 1.0}
        else:
            right = [(float(i == doc["label"]), False) for i in range(len(task.doc_to_choice(doc)))]
            assert task.process_results(doc, right) == {"acc": 1.0, "acc_norm": 1.0}


@pytest.mark.full
def test_the_tasks_are_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("tvmerge/") for name in archive.namelist()}
    ours = {str(path.relative_to(ROOT)) for path in FOLDER.iterdir() if path.is_file()}
    assert ours <= packed
