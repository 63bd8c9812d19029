"""Whole runs by every way to search: what is recommended, what is saved, and several objectives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import Trio
from optuna.samplers import RandomSampler
from test_run import flags, trials

from tvmerge.cli import main
from tvmerge.evaluators import QuestionScore
from tvmerge.proof import choose
from tvmerge.report.tables import score_table, verdict
from tvmerge.results import Candidate
from tvmerge.samplers import Recommendation
from tvmerge.study import MergeStudy


class Centre(RandomSampler):
    """A sampler of somebody's own."""

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {name: 0.5 * (each.low + each.high) for name, each in search_space.items()}

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))


def candidate(label: str, right: int, *, n: int = 100, merged: bool = True) -> Candidate:
    scores = [QuestionScore("a", i, float(i < right)) for i in range(n)]
    return Candidate(label, scores, weights={"w": 1.0} if merged else None)


def test_the_recommended_model_is_saved_unless_another_merge_is_clearly_better() -> None:
    table = [candidate("target", 40), candidate("tuned", 99, merged=False), candidate("uniform", 60)]
    assert choose([*table, candidate("recommended", 62)], {}) == (3, "")
    assert choose([*table, candidate("recommended", 59)], {}) == (3, "")
    chosen, reason = choose([*table, candidate("recommended", 45)], {})
    assert chosen == 2
    assert "clearly worse than uniform" in reason


def test_what_is_recommended_is_scored_on_the_held_out_questions_and_saved(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--n_trials", "15")) == 0
    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if line.startswith("| task"))
    recipe = yaml.safe_load((output / "best" / "recipe.yaml").read_text())
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    of_recommended = [line for line in lines if line["model"] == "recommended"]
    assert head.split("|")[-2].strip() == "recommended"
    splits = [line["split"] for line in of_recommended]
    assert (splits.count("heldout"), splits.count("search")) == (30, 18)
    assert "The saved merge is recommended, of 15 trials" in printed
    assert recipe["score"]["trial"] is None
    assert recipe["weights"] not in [weights for _, weights, _, _ in trials(output)]
    before = (output / "scores.jsonl").read_bytes()
    assert main(flags(trio, output, "--n_trials", "15")) == 0
    assert (output / "scores.jsonl").read_bytes() == before
    # Another recommendation is another model: nothing that was scored of the first one counts for it.
    marked = [{**line, "score": 9.0} if line["model"] == "recommended" else line for line in lines]
    (output / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marked))
    assert main(flags(trio, output, "--n_trials", "25")) == 0
    again = yaml.safe_load((output / "best" / "recipe.yaml").read_text())
    assert again["weights"] != recipe["weights"]
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert 9.0 not in [line["score"] for line in lines]


def test_a_trial_that_is_recommended_is_saved_and_not_the_best_observed_one(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recommended(study: MergeStudy) -> Recommendation:
        """As happens if the surface's top is the best uniform weight, while a lucky trial scored higher."""
        other = next(result for result in study.results() if result.number not in (0, 1, study.best().number))
        return Recommendation(other.weights, "surface", 1.25, (0.125, 2.0))

    monkeypatch.setattr(MergeStudy, "recommended", recommended)
    output = tmp_path / "out"
    assert main(flags(trio, output, "--n_trials", "5")) == 0
    # Of one of the two tasks no model got a question right: half of them all are the most that any can be seen to get.
    assert "predicted to score 0.500, 95% interval 0.125 to 0.500" in (output / "report.html").read_text()
    recipe = yaml.safe_load((output / "best" / "recipe.yaml").read_text())
    printed = re.search(r"The saved merge is recommended \(trial (\d)\), of 5 trials", capsys.readouterr().out)
    assert printed is not None
    assert recipe["score"]["trial"] == int(printed[1])
    assert recipe["weights"] == trials(output)[int(printed[1])][1]
    # The same model, compared with others than before, as after more trials: its card tells of these.
    card = output / "best" / "README.md"
    told = card.read_text()
    weights = (output / "best" / "model.safetensors").stat().st_ino
    card.write_text(told.replace("| task", "| once") + "\nmine\n")
    assert main(flags(trio, output, "--n_trials", "5")) == 0
    assert card.read_text() == told
    assert (output / "best" / "model.safetensors").stat().st_ino == weights
    card.write_text(told + "\nmine\n")
    assert main(flags(trio, output, "--n_trials", "5")) == 0
    assert card.read_text() == told + "\nmine\n"


def test_a_picture_that_cannot_be_drawn_keeps_no_model_from_being_saved(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(results: object) -> None:
        raise ValueError("no\nfont")

    monkeypatch.setattr("tvmerge.proof.weights_picture", fail)
    output = tmp_path / "out"
    assert main(flags(trio, output, "--n_trials", "2")) == 0
    assert "weights.png: was not drawn: ValueError: no font" in capsys.readouterr().err
    assert "weights.png" not in (output / "best" / "README.md").read_text()


@pytest.mark.parametrize("sampler", ["sep-CMA-ES", "GA", "QMC", "random", "GP", "test_run_search:Centre"])
def test_every_sampler_runs_by_its_name(trio: Trio, tmp_path: Path, sampler: str) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--optuna_sampler", sampler, "--n_trials", "10")) == 0
    assert len(trials(output)) == 10


def test_a_flat_search_tries_no_uniform_grid(trio: Trio, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--search", "flat", "--optuna_sampler", "TPE", "--n_trials", "6")) == 0
    weights = [list(weights.values()) for _, weights, _, _ in trials(output)]
    assert [len(set(each)) for each in weights[:2]] == [1, 1]
    assert all(len(set(each)) > 1 for each in weights[2:])


def test_an_unknown_sampler_is_refused_in_a_line(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(trio, tmp_path / "out", "--optuna_sampler", "cma")) == 2
    error = capsys.readouterr().err
    assert "--optuna_sampler cma is unknown: choose TPE, CMA-ES, RSM" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_tasks_as_objectives_leave_a_front_whose_models_can_be_written(trio: Trio, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--optuna_sampler", "NSGA-II", "--n_trials", "12")) == 0
    study = optuna.load_study(study_name="tvmerge", storage=f"sqlite:///{output / 'study.db'}")
    assert len(study.directions) == 2
    assert [trial.values for trial in study.trials] == [
        list(t.user_attrs["task_scores"].values()) for t in study.trials
    ]
    front = sorted((output / "pareto").iterdir())
    assert {path.name for path in front} == {f"trial-{trial.number:04d}.yaml" for trial in study.best_trials}
    assert main(["apply", str(front[-1]), "--output_dir", str(tmp_path / "written")]) == 0
    assert (tmp_path / "written" / "model.safetensors").is_file()
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]


def test_a_library_that_cannot_draw_keeps_no_model_from_being_saved(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(flags(trio, output, "--n_trials", "3")) == 0
    assert {"README.md", "model.safetensors", "recipe.yaml"} <= {path.name for path in (output / "best").iterdir()}
    assert "weights.png: was not drawn: ModuleNotFoundError" in capsys.readouterr().err


def test_with_one_task_there_is_one_objective(trio: Trio, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = flags(trio, output, "--optuna_sampler", "NSGA-II", "--n_trials", "9", "--jglue_limit", "12")
    command[command.index("tiny_choice,tiny_extract")] = "tiny_choice"
    assert main(command) == 0
    assert not (output / "pareto").exists()


def test_a_database_study_belongs_to_one_search(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--storage", f"sqlite:///{tmp_path / 'all.db'}", "--study_name", "ours", "--n_trials", "4"]
    assert main(flags(trio, tmp_path / "one", *shared)) == 0
    assert main(flags(trio, tmp_path / "one", *shared)) == 0
    capsys.readouterr()
    assert main(flags(trio, tmp_path / "two", *shared)) == 2
    error = capsys.readouterr().err
    assert "study ours belongs to the search of --output_dir" in error
    assert error.count("\n") == 1


def test_every_figure_that_is_printed_follows_from_the_log_of_scores(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--n_trials", "9")) == 0
    printed = capsys.readouterr().out
    of_model: dict[tuple[str, int | None], list[QuestionScore]] = {}
    for text in (output / "scores.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["split"] == "heldout":
            score = QuestionScore(line["task"], line["question"], line["score"])
            of_model.setdefault((line["model"], line["trial"]), []).append(score)
    head = next(line for line in printed.splitlines() if line.startswith("| task"))
    labels = [cell.strip() for cell in head.split("|")[3:-1]]
    uniform = [0.0, 1.0, 0.5, 1.5, 0.75, 0.25, 1.25]
    candidates = []
    for label in labels:
        number = re.search(r"\((?:trial )?([\d.]+)\)", label)
        key: tuple[str, int | None] = (label, None)
        if label in ("target", "uniform 1"):
            key = "merge", labels.index(label) and 1
        elif number is not None:
            key = "merge", uniform.index(float(number[1])) if "uniform" in label else int(number[1])
        candidates.append(Candidate(label, of_model[key], is_target=label == "target"))
    assert score_table(candidates) in printed
    assert verdict(candidates[-1], candidates[:-1], heldout=True) in printed
