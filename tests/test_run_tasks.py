"""Whole runs over other tasks than plain accuracies: groups, perplexities, custom code, tasks that say nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TASKS, Trio, last_target, save_mistral, saved_lines
from jglue_rows import write_all

from tvmerge.cli import main
from tvmerge.evaluators import QuestionScore, TaskGoal, mean_score, task_scores
from tvmerge.evaluators.tasks import load_tasks

#: Scores a saved model again, in a process of its own.
AGAIN = """
import json, sys
from pathlib import Path
from tvmerge.checkpoint import Checkpoint
from tvmerge.config import JglueConfig
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel, load_tokenizer
from tvmerge.questions import ask_questions, open_tasks
import yaml

output = Path(sys.argv[1])
config = JglueConfig(**yaml.safe_load((output / "config.yaml").read_text()))
folder = output / "best"
questions = ask_questions(config, open_tasks(config), load_tokenizer(folder))
live = TransformersModel.from_folder(folder, checkpoint=Checkpoint(resolve(str(folder))), device="cpu")
harness = HarnessModel(live, batch_size=config.batch_size)
scores = questions.search.score(harness, lambda n: None).scores
print(json.dumps([[s.task, s.question, s.score] for s in scores]))
"""


def flags(trio: Trio, output: Path, *more: str, tasks: str = "tiny_choice,tiny_extract") -> list[str]:
    command = [
        *("jglue", *trio.flags(), "--jglue_tasks", tasks, "--task_dir", str(TASKS)),
        *("--jglue_limit", "10", "--n_trials", "4", "--output_dir", str(output), *more),
    ]
    return last_target(command)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


def best(output: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((output / "best" / "recipe.yaml").read_text())
    return recipe["score"]  # type: ignore[no-any-return]


def custom_task(folder: Path, **changes: object) -> Path:
    """A copy of the test's task folder with one more task."""
    for path in TASKS.iterdir():
        if path.is_file():
            (folder / path.name).write_text(path.read_text())
    base = yaml.load((TASKS / "tiny_extract.yaml").read_text().replace("!function ", ""), Loader=yaml.SafeLoader)
    text = yaml.safe_dump({**base, "task": "mine", **changes})
    for key in ("custom_dataset", "process_results"):
        text = text.replace(f"{key}: ", f"{key}: !function ")
    (folder / "mine.yaml").write_text(text)
    return folder


def test_a_perplexity_is_minimised_and_shown_as_lm_eval_shows_it(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(trio, tmp_path, tasks="tiny_perplexity")) == 0
    captured = capsys.readouterr()
    assert "task tiny_perplexity: perplexity,none is minimised" in captured.err
    assert "| tiny_perplexity (perplexity, lower is better) |" in captured.out
    assert "| **score**" in captured.out
    goals = {"tiny_perplexity": TaskGoal("perplexity,none", higher_is_better=False, logarithmic=True)}
    by_trial: dict[int, list[QuestionScore]] = {}
    for line in lines(tmp_path):
        if line["split"] == "search":
            score = QuestionScore(line["task"], line["question"], line["score"])
            by_trial.setdefault(line["trial"], []).append(score)
    scores = {trial: mean_score(found, goals) for trial, found in by_trial.items()}
    saved = [QuestionScore(line["task"], line["question"], line["score"]) for line in saved_lines(tmp_path)]
    assert best(tmp_path)["search"] == mean_score(saved, goals)
    assert all(score is not None and score < 0 for score in scores.values())
    (shown,) = best(tmp_path)["heldout_tasks"].values()
    assert shown > 1, "the perplexity itself, not its logarithm"


def test_weights_and_directions_change_the_winner(trio: Trio, tmp_path: Path) -> None:
    found = []
    for i, weights in enumerate((["tiny_choice=1", "tiny_extract=0"], ["tiny_choice=-1", "tiny_extract=0"])):
        output = tmp_path / str(i)
        assert main(flags(trio, output, "--task_weight", *weights)) == 0
        scores = [QuestionScore(line["task"], line["question"], line["score"]) for line in saved_lines(output)]
        found.append((best(output)["search"], task_scores(scores)["tiny_choice"]))
    (most, up), (least, down) = found
    assert most == up
    assert down is not None
    assert least == -down
    assert up is not None
    assert down <= up


def test_the_tasks_of_a_group_share_its_weight(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = custom_task(tmp_path)
    (folder / "both.yaml").write_text("group: both\ntask: [tiny_extract, mine]\n")
    output = tmp_path / "out"
    command = [*flags(trio, output, "--jglue_limit", "10,5", tasks="tiny_choice,both"), "--task_dir", str(folder)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| tiny_choice " in out
    assert "| tiny_extract (exact_match, weight 0.5) |" in out or "| tiny_extract (weight 0.5) |" in out
    scores = [line for line in lines(output) if line["trial"] == 0 and line["split"] == "search"]
    assert [sum(line["task"] == task for line in scores) for task in ("tiny_choice", "tiny_extract", "mine")] == [
        10,
        5,
        5,
    ]


def test_a_task_that_is_named_twice_is_refused(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = custom_task(tmp_path)
    (folder / "both.yaml").write_text("group: both\ntask: [tiny_extract, mine]\n")
    command = [*flags(trio, tmp_path / "out", tasks="mine,both"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "task mine: is named twice, by mine and by both" in capsys.readouterr().err


def test_a_task_of_its_own_code_is_scored_by_it(trio: Trio, tmp_path: Path) -> None:
    folder = custom_task(
        tmp_path,
        process_results="tiny_own.process_results",
        metric_list=[{"metric": "length", "aggregation": "mean", "higher_is_better": False}],
    )
    (folder / "tiny_own.py").write_text(
        "def process_results(doc, results):\n"
        "    assert 'seen' not in doc, 'the last trial wrote into the question'\n"
        "    doc['seen'] = True\n"
        "    return {'length': len(results[0])}\n"
    )
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 0
    assert best(tmp_path / "out")["search"] <= 0
    assert {line["score"] for line in lines(tmp_path / "out")} <= {0.0, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("return {'exact_match': 1 / (not results[0])}", 1, "ZeroDivisionError"),  # of no empty answer
        ("return {'exact_match': 1 / 0}", 2, "task mine, question 1: ZeroDivisionError"),
        ("return None", 2, "process_results must give a mapping"),
        ("return {'right': 1}", 2, "task mine: gives no exact_match for a question, only right"),
        ("return {'exact_match': 'yes'}", 2, "its metric exact_match is 'yes' for a question, which is no number"),
        ("raise SystemExit(0)", 2, "ended the run by sys.exit(0)"),
    ],
)
def test_code_that_fails_on_an_answer_says_where(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, status: int, message: str
) -> None:
    folder = custom_task(tmp_path, process_results="tiny_own.process_results")
    (folder / "tiny_own.py").write_text(f"def process_results(doc, results):\n    {code}\n")
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert "task mine" in line or "sys.exit" in line
    assert message in line
    assert (tmp_path / "out").exists() == (status == 1)


def test_a_study_whose_scores_are_all_unscored_names_the_task(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path, process_results="tiny_own.score")
    (folder / "tiny_own.py").write_text("def score(doc, results):\n    return {'exact_match': float('nan')}\n")
    command = [*flags(trio, tmp_path / "out", tasks="tiny_choice,mine"), "--task_dir", str(folder)]
    assert main(command) == 1
    assert "no question could be scored, of mine" in capsys.readouterr().err


def test_a_metric_over_all_questions_is_refused_and_nothing_is_recorded(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(
        tmp_path,
        process_results="tiny_own.process_results",
        metric_list=[{"metric": "best", "aggregation": "AGG", "higher_is_better": True}],
    )
    text = (folder / "mine.yaml").read_text().replace("AGG", "!function tiny_own.best")
    (folder / "mine.yaml").write_text(text)
    (folder / "tiny_own.py").write_text(
        "import itertools\ncount = itertools.count()\n"
        "def process_results(doc, results):\n    return {'best': float(next(count))}\n"
        "def best(items):\n    return max(items)\n"
    )
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "task mine: its metric best is computed over all questions at once" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.jsonl").read_text()


def test_a_task_that_tells_no_models_apart_is_said(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing that the models write ever equals this answer.
    folder = custom_task(tmp_path, doc_to_target="no such answer")
    command = flags(trio, tmp_path / "out", "--n_trials", "8", tasks="tiny_choice,mine")
    assert main([*command, "--task_dir", str(folder)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "cannot guide the search" in line]
    assert warning.startswith("task mine: all 7 models so far got the same score on each of its questions")


def test_prompts_are_put_as_chats(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    shutil.copytree(trio.target, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role[:1] }}{{ m.content }}{% endfor %}a"
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    chat = ["--target_model", str(target), "--apply_chat_template", "--system_instruction", "bad"]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + template
    found: list[list[float]] = []
    for more in ([], chat[:2], chat[:3], chat):
        output = tmp_path / str(len(found))
        assert main(flags(trio, output, *more, tasks="tiny_perplexity")) == 0
        found.append([line["score"] for line in lines(output)])
    assert found[0] == found[1]
    assert found[1] != found[2] != found[3]
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": refusing}))
    assert main(flags(trio, tmp_path / "refused", *chat, tasks="tiny_perplexity")) == 0
    assert "the chat template takes no system message: --system_instruction is left out" in capsys.readouterr().err
    assert [line["score"] for line in lines(tmp_path / "refused")] == found[2]
    assert main(flags(trio, output, *chat[:3], tasks="tiny_perplexity")) == 2
    assert "system_instruction was 'bad' and is None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"doc_to_target": "{{answer if question[0] != 'c' else no.such}}"}, "", "task mine: a question cannot be put"),
        ({"repeats": "a"}, "", "task mine: repeats must be a whole number of at least 1, got 'a'"),
        ({"generation_kwargs": {"until": [None], "max_gen_toks": 4}}, "", "until must be a text or a list of texts"),
        ({"generation_kwargs": {"until": ["x"], "max_gen_toks": 0}}, "", ": answers of 0 tokens are asked for"),
        (
            {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            "",
            "task mine: its answers cannot be scored: error: missing )",
        ),
        (
            {"num_fewshot": 60, "fewshot_split": "test"},
            "",
            "(60 examples are asked for, of 40)",
        ),
        (
            {"process_results": "tiny_own.score", "metric_list": [{"metric": "m", "aggregation": "mean"}]},
            "def score(doc, results):\n    return {'m': 1}\n",
            "task mine: does not say whether a higher m is better",
        ),
        (
            {"custom_dataset": "tiny_own.load"},
            "raise SystemError('no')\n",
            "task mine: cannot be loaded: SystemError: no",
        ),
    ],
)
def test_a_task_that_cannot_work_is_refused_in_one_line(
    trio: Trio,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: str,
    message: str,
) -> None:
    folder = custom_task(tmp_path, **changes)
    (folder / "tiny_own.py").write_text(code)
    assert main([*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("tvmerge jglue: error: ")
    assert message in line


def test_a_label_that_cannot_be_read_is_refused_in_one_line(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path)
    text = (folder / "tiny_choice.yaml").read_text()
    text = text.replace("doc_to_target: label", "doc_to_target: '{{label if label != 2 else no.such}}'")
    (folder / "tiny_choice.yaml").write_text(text)
    command = [*flags(trio, tmp_path / "out", tasks="tiny_choice"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "task tiny_choice, question 2: UndefinedError" in capsys.readouterr().err


def test_questions_without_a_right_choice_are_said(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path)
    text = (folder / "tiny_choice.yaml").read_text().replace("doc_to_target: label", "doc_to_target: '{{label + 1}}'")
    (folder / "tiny_choice.yaml").write_text(text)
    command = flags(trio, tmp_path / "out", "--jglue_limit", "42", tasks="tiny_choice")
    assert main([*command, "--task_dir", str(folder)]) == 0
    assert "task tiny_choice: 14 of its questions have no right choice" in capsys.readouterr().err


def test_files_and_groups_that_hold_no_task_are_said(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path)
    (folder / "none.yaml").write_text("group: none\ntask: []\n")
    command = [*flags(trio, tmp_path / "out", tasks="none"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "task none: is a group without a task" in capsys.readouterr().err
    for text, message in (
        ("- a\n", "is no task"),
        ("include: no.yaml\ntask: broken\n", "includes no.yaml, which is not"),
    ):
        (folder / "broken.yaml").write_text(text)
        assert main([*flags(trio, tmp_path / "out", tasks="broken"), "--task_dir", str(folder)]) == 2
        assert f"broken.yaml: {message}" in capsys.readouterr().err
    (folder / "broken.yaml").write_text("task: 5\n")
    assert main([*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]) == 2
    assert "a file in it names no task" in capsys.readouterr().err
    (folder / "broken.yaml").write_text("task: broken\n  metric: [\n")
    command = [*flags(trio, tmp_path / "out", tasks="broken"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "broken.yaml: cannot be read as YAML" in capsys.readouterr().err


def test_a_group_inside_of_a_group_has_its_own_weight(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path)
    (folder / "inner.yaml").write_text("group: inner\ntask: [tiny_extract, mine]\n")
    (folder / "outer.yaml").write_text("group: outer\ntask: [inner, tiny_choice]\n")
    command = flags(trio, tmp_path / "out", "--task_weight", "inner=6", "mine=9", tasks="outer")
    assert main([*command, "--task_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(f"({weight})" in out for weight in ("weight 0.333333", "weight 2", "weight 9"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mine.yaml", "higher_is_better: true", "higher_is_better: false"),
        ("tiny_own.py", "1.0", "100.0"),
    ],
)
def test_a_study_is_not_resumed_with_another_meaning_of_its_scores(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, old: str, new: str
) -> None:
    folder = custom_task(tmp_path, process_results="tiny_own.score")
    (folder / "tiny_own.py").write_text("def score(doc, results):\n    return {'exact_match': 1.0 * len(results[0])}\n")
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 0
    path = folder / name
    path.write_text(path.read_text().replace(old, new))
    capsys.readouterr()
    assert main([*command, "--n_trials", "6"]) == 2
    assert "scoring was {'mine': 'exact_match,none, higher is better" in capsys.readouterr().err


def test_an_empty_split_is_said(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = custom_task(tmp_path, custom_dataset="tiny_own.load")
    (folder / "tiny_own.py").write_text(
        "import datasets\n"
        "def load(**_):\n"
        "    return {'test': datasets.Dataset.from_dict({'question': [], 'answer': []})}\n"
    )
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 2
    assert "task mine: has no questions: its split is empty" in capsys.readouterr().err


def test_examples_are_counted_per_task_and_a_task_that_wants_none_gets_none(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path, num_fewshot=2, fewshot_split="test")
    tasks = load_tasks(["mine", "tiny_choice"], task_dir=folder, num_fewshot={"mine": 1, "tiny_choice": 4})
    assert [task.task.get_config("num_fewshot") for task in tasks.values()] == [1, 0]
    command = flags(trio, tmp_path / "out", "--num_fewshot", "1,4", tasks="mine,tiny_choice")
    assert main([*command, "--task_dir", str(folder)]) == 0
    assert "task tiny_choice: is asked with 0 examples, as it says itself, not 4" in capsys.readouterr().err


def test_a_limit_beyond_the_split_is_said_and_capped(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(trio, tmp_path, "--jglue_limit", "1000,5")) == 0
    assert "task tiny_choice: the limit of 1000 is more than the 42 questions left" in capsys.readouterr().err


def test_prompts_that_are_longer_than_the_model_takes_are_said(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path, doc_to_text="{{question * 21}}")
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 0
    assert "task mine: 22 requests are longer than the 128 tokens that the model takes" in capsys.readouterr().err


def test_an_answer_that_no_model_of_this_length_can_give_is_refused_and_can_be_mended(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = custom_task(tmp_path, generation_kwargs={"until": ["\n"], "max_gen_toks": 500})
    command = [*flags(trio, tmp_path / "out", tasks="mine"), "--task_dir", str(folder)]
    assert main(command) == 2
    message = "answers of 500 tokens are asked for, of a model that takes 128 in all"
    assert message in capsys.readouterr().err
    # The folder holds a study of which nothing was scored: it is in nobody's way.
    assert main(flags(trio, tmp_path / "out")) == 0
    assert len({line["trial"] for line in lines(tmp_path / "out")} - {None}) == 4


def test_the_names_of_older_scripts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_mistral(tmp_path / "base", seed=0, max_position_embeddings=2048)
    models = [
        save_mistral(tmp_path / str(seed), seed=seed, drift_from=base, max_position_embeddings=2048) for seed in (1, 2)
    ]
    data = write_all(tmp_path / "data", n_valid=8)
    names = "jcommonsenseqa-1.1-0.3,marc_ja-1.1-0.2,jnli-1.3-0.2,jsquad-1.1-0.2,mgsm_ja"
    command = [
        *("jglue", "--target_model", str(models[0]), "--base_model", str(base), "--tuned_model", str(models[1])),
        *("--jglue_tasks", names, "--jglue_data", str(data), "--num_fewshot", "2", "--jglue_limit", "3,3,3,3,1"),
        *("--task_metric", "jsquad-1.1-0.2=f1", "jnli-1.3-0.2=acc_norm", "--task_weight", "mgsm_ja=0.5"),
        *("--n_trials", "2", "--output_dir", str(tmp_path / "out")),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    for label in ("jsquad-1.1-0.2 (f1)", "jnli-1.3-0.2 (acc_norm)", "mgsm_ja (weight 0.5)", "**score**"):
        assert f"| {label} " in out
    asked = [line["task"] for line in lines(tmp_path / "out") if line["trial"] == 0 and line["split"] == "search"]
    assert [asked.count(name) for name in names.split(",")] == [3, 3, 3, 3, 1]


def test_a_broken_line_of_a_data_file_is_named(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_all(tmp_path / "data") / "jnli-v1.3" / "valid-v1.3.json"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows[:2], rows[2][:20] + "\n", *rows[3:]]))
    command = flags(trio, tmp_path / "out", "--jglue_data", str(tmp_path / "data"), tasks="jnli-1.3-0.2")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"task jnli-1.3-0.2: {path}, line 3: is not JSON" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_size", ["auto", "3"])
def test_the_saved_model_scores_the_same_in_another_process_to_the_last_digit(
    trio: Trio, tmp_path: Path, batch_size: str
) -> None:
    tasks = "tiny_choice,tiny_extract,tiny_perplexity"
    assert main(flags(trio, tmp_path, "--batch_size", batch_size, tasks=tasks)) == 0
    command = [sys.executable, "-c", AGAIN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [[line["task"], line["question"], line["score"]] for line in saved_lines(tmp_path)]
    assert json.loads(done.stdout) == expected
