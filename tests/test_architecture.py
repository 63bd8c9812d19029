"""The house: imports point one way, and the picture of the rooms in CONTRIBUTING.md is the folder's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

#: The rooms, from the ones that know nothing to the ones that know all. A module imports from above itself only.
ROOMS = [
    "errors",
    "interrupt",
    "files",
    "state_dict",
    "kernels",
    "delta",
    "hub",
    "checkpoint",
    "granularity",
    "task_vector",
    "vocabulary",
    "union",
    "lora",
    "methods",
    "merge",
    "moe",
    "moe_config",
    "router",
    "sources",
    "mixture",
    "writer",
    "recipe",
    "rebuild",
    "export",
    "models",
    "gates",
    "judges",
    "evaluators",
    "samplers",
    "score_log",
    "search",
    "storage",
    "trial_table",
    "heartbeat",
    "trial_queue",
    "pruning",
    "study",
    "results",
    "report",
    "loggers",
    "progress",
    "config",
    "spaces",
    "benches",
    "judging",
    "plan",
    "assembly",
    "push",
    "dashboard",
    "questions",
    "scoring",
    "proof",
    "run",
    "worker",
    "supervisor",
    "cli",
]
SOURCES = sorted((ROOT / "tvmerge").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "tvmerge").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "tvmerge"):
            names += [f"tvmerge.{alias.name}" for alias in node.names if alias.name in ROOMS]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("tvmerge.")}
    return rooms


def test_every_module_has_its_room() -> None:
    assert {room_of(path) for path in SOURCES} == {*ROOMS, "__init__", "__main__"}


def test_every_folder_is_installed() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert listed is not None
    names = set(re.findall(r'"(tvmerge[\w.]*)"', listed[1]))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert folders == {name for name in names if not name.startswith(("tvmerge.benchmarks", "tvmerge.judge_prompts"))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in {"__init__", "__main__"}:
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert (node.end_lineno or 0) - body[0].lineno < 40, f"{node.name} is too long"


def test_evaluators_know_no_merge_and_methods_know_torch_only() -> None:
    for path in (ROOT / "tvmerge" / "evaluators").rglob("*.py"):
        assert not imported_rooms(path) & {"merge", "task_vector", "recipe", "granularity", "methods"}
    assert imported_rooms(ROOT / "tvmerge" / "methods.py") == {"delta", "state_dict"}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CONTRIBUTING.ja.md"])
def test_the_picture_shows_the_rooms(name: str) -> None:
    shown = re.findall(r"^  (\w+)(?:\.py|/)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert shown == ROOMS
