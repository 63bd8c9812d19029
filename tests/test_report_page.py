"""report.html and its PNGs: whole, asking no network, of the same bytes, and showing any names as text."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib import font_manager
from report_results import TASKS, make_results, pareto_results, weight_names

from tvmerge.report import style
from tvmerge.report.notes import RunNotes
from tvmerge.report.page import markdown, report_page, write_report
from tvmerge.report.pictures import PICTURES, draw_pictures
from tvmerge.report.style import COLOURS, drawing, japanese_font
from tvmerge.report.tables import score_table
from tvmerge.results import Candidate, Results, TrialRow

VOID = {"meta", "br", "img", "link", "input"}
LAYERS = weight_names("layer", layers=8)
#: Names that somebody could give to a task, a model or a folder.
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "$\\frac{1}{$ & &amp; --> ]]>",
    "a|b\n\n- c\x00\x1b[31m\ud800",
    "</svg></main><style>*{display:none}</style>",
    "url(#x) #1c2430 font: 9px x",
)
JAPANESE = ("自然言語推論（JNLI）", "機械読解", "ロールプレイ")


class Page(HTMLParser):
    """What a browser would make of it: tags that are closed, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(results: Results) -> str:
    return report_page(results, draw_pictures(results))


def check(text: str) -> Page:
    """It is well formed, refers to itself only, and runs nothing."""
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in {"script", "img", "iframe", "object", "link", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert "//" not in value or (tag == "image" and value.startswith("data:image/png;base64,"))
            for place in [
                *re.findall(r"url\(([^)]*)\)", value),
                *([value] if name == "href" and tag != "image" else []),
            ]:
                assert place.startswith("#")
                assert place[1:] in ids, place
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"<image[^>]*>|<text.*?</text>", "", svg, flags=re.DOTALL))
        assert set(re.findall(r"var\(--([a-z]+)\)", svg)) <= {*COLOURS, "font"}
    return page


@pytest.fixture
def no_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without any Japanese font: none of those that are looked for, and no package."""
    monkeypatch.setattr(style, "JAPANESE", ())
    monkeypatch.setitem(sys.modules, "matplotlib_fontja", None)
    japanese_font.cache_clear()
    yield
    japanese_font.cache_clear()


def test_report_of_a_finished_run_has_all_that_it_should(tmp_path: Path) -> None:
    results = make_results(LAYERS, n=30)
    assert write_report(results, tmp_path) == []
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    written = {path.name for path in tmp_path.iterdir()}
    expected = {"score_by_task", "score_by_trial", "weight_map", "weights_by_layer", "contributions"}
    expected |= {"search_and_heldout", "cost_by_trial"}
    assert written == {"report.html", *(f"{name}.png" for name in expected)}
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in expected)
    said = page.said()
    for line in (*results.verdict.replace("- ", "").split("\n"), "30 of 30 trials done, 2 pruned, 1 failed."):
        assert line in said
    assert all(PICTURES[name].title in said for name in expected)
    assert "RunError: no question could be scored" in said
    cells = [cell.strip(" *") for cell in results.table.replace("-", "").split("|")]
    assert all(cell in said for cell in cells if cell.strip(":\n"))
    described = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(described) == len(expected)
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in described)


def test_letters_of_pictures_are_letters_and_colours_are_the_pages(tmp_path: Path) -> None:
    text = page_of(make_results(LAYERS, n=12, tasks=JAPANESE))
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"font-family: (?!var)", svg)
    for name in (*JAPANESE, "embed_tokens", "best so far"):
        assert f">{name}</text>" in svg
    assert "DejaVu" not in text
    for which in (0, 1):
        assert all(f"--{name}: {pair[which]};" in text for name, pair in COLOURS.items())


@pytest.mark.parametrize("which", [0, 1])
def test_contrast_is_what_wcag_asks_for(which: int) -> None:
    """Level AA: 4.5 for text, 3 for graphics (WCAG 2.2, 1.4.3 and 1.4.11)."""

    def luminance(name: str) -> float:
        channels = [int(COLOURS[name][which][n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(text, ground) >= 4.5 for text in ("ink", "muted") for ground in ("paper", "stage"))
    assert all(contrast(name, "paper") >= 3 for name in ("best", "second", "trial", "other", "pruned", "failed"))
    assert len({pair[which] for pair in COLOURS.values()}) == len(COLOURS)


def test_same_results_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib, pathlib, matplotlib\n"
        "sys.path.insert(0, 'tests')\n"
        "from report_results import make_results, weight_names\n"
        "from tvmerge.report.page import write_report\n"
        "matplotlib.rcParams['font.size'] = float(sys.argv[2])\n"
        "seen = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != 'backend'}\n"
        "before = seen()\n"
        "write_report(make_results(weight_names('layer', layers=8), n=15), pathlib.Path(sys.argv[1]))\n"
        "assert seen() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'matplotlib_fontja' not in sys.modules"
    )
    digests = []
    for seed, size in (("1", "10"), ("2", "30")):
        folder = tmp_path / seed
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(folder), size], check=True, env=environment, cwd=ROOT)
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert digests[0] == digests[1]
    write_report(make_results(LAYERS, n=15), tmp_path / "1")
    again = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "1").iterdir()}
    assert again == digests[0], "and in one that has drawn others before"


def test_matplotlib_waits_for_the_first_picture() -> None:
    code = "import sys, tvmerge.report.page; assert not [name for name in sys.modules if name.startswith('matplotlib')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """As names of tasks, models, task vectors, workers, settings and the run, and in reasons of failures."""
    names = [f"{name}/{layer}" for name in HOSTILE for layer in weight_names("layer", layers=2)]
    results = make_results(names, n=14, tasks=HOSTILE, questions=9)
    odd = [replace(each, label=name) for each, name in zip(results.candidates, HOSTILE, strict=False)]
    failed = [
        TrialRow(14 + n, "failed", False, {}, failure=f"RunError: {name}", worker=name)
        for n, name in enumerate(HOSTILE)
    ]
    results = replace(results, name=HOSTILE[0], candidates=odd, trials=[*results.trials, *failed])
    said = "\n".join(f"{name} is better\n- {name}: **{name}** `{name}`" for name in HOSTILE)
    settings = {name: name for name in HOSTILE}
    results = replace(results, settings=settings, table=score_table(odd), verdict=said)
    assert write_report(results, tmp_path) == []
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = "".join("".join(page.text).split())
    for name in HOSTILE:
        # Wherever it stands, and not only once: whole, or shortened in a picture.
        assert text.count("".join(style.clean(name).split())) >= 5


def test_zero_trials() -> None:
    page = check(page_of(Results("new", {}, 100, [])))
    assert "0 of 100 trials done. The run is not finished" in page.said()
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    results = make_results(LAYERS, n=15, finished=False)
    weights = results.trials[0].weights
    more = [TrialRow(15, "running", False, weights, worker="host-1"), TrialRow(16, "waiting", False, {})]
    results = replace(results, n_trials=40, trials=[*results.trials, *more])
    assert write_report(results, tmp_path) == []
    said = check((tmp_path / "report.html").read_text(encoding="utf-8")).said()
    assert "15 of 40 trials done, 1 pruned, 1 running, 1 waiting. The run is not finished" in said
    assert "What each group contributes 7 trials of unequal weights cannot tell" in said
    assert not (tmp_path / "score_by_task.png").exists()


def test_all_trials_failed() -> None:
    trials = [TrialRow(n, "failed", False, {"uniform": 0.5}, failure="RunError: <no memory>") for n in range(3)]
    said = check(page_of(Results("bad", {}, 3, trials))).said()
    assert "3 of 3 trials done, 3 failed" in said
    assert "RunError: <no memory>" in said


def test_many_trials_of_many_weights_stay_small() -> None:
    names = weight_names("all", prefixes=[f"expert{n}/" for n in (1, 2, 3, 4)])
    assert len(names) == 1164
    text = page_of(make_results(names, n=1000))
    check(text)
    assert len(text.encode()) < 2_000_000


def test_several_objectives() -> None:
    assert PICTURES["pareto_front"].title in check(page_of(pareto_results())).said()


def test_password_of_a_storage_is_not_shown() -> None:
    address = "postgresql+psycopg://me:p4ss%40@db.example:5432/x"
    settings = {"storage": address, "base_url": ["https://key:@host/v1", "https://host/v1"], "none": None}
    text = page_of(Results("run", settings, 1, []))
    assert "p4ss" not in text
    assert "key:" not in text
    assert "postgresql+psycopg://***@db.example:5432/x" in text
    assert "https://***@host/v1, https://host/v1" in text


def test_markdown_is_what_tvmerge_writes() -> None:
    assert markdown("One `a<b` **c**.\n\nOn questions:\n- x\n- y") == (
        "<p>One <code>a&lt;b</code> <strong>c</strong>.</p>\n<p>On questions:</p>\n<ul><li>x</li><li>y</li></ul>"
    )
    table = markdown(score_table([Candidate("a|b", make_results(LAYERS, n=9).candidates[0].scores)]))
    assert all(f"<td>{task}</td>" in table for task in TASKS)
    assert Page(table).said().startswith("task questions")


def test_japanese_needs_a_font_in_pngs_and_says_so_once(no_font: None, tmp_path: Path) -> None:
    """Letters that no font has are a warning each, which here would be an error."""
    with drawing():
        assert japanese_font() is None
    notes = write_report(make_results(LAYERS, n=9, tasks=JAPANESE), tmp_path)
    assert len(notes) == 1
    assert "tvmerge[ja]" in notes[0]
    assert write_report(Results("new", {}, 9, []), tmp_path) == []


def test_the_font_of_the_extra_is_found_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "JAPANESE", ())
    japanese_font.cache_clear()
    try:
        name = japanese_font()
        assert name == "IPAexGothic"
        file = font_manager.findfont(name, fallback_to_default=False)
        assert font_manager.get_font(file).get_char_index(ord("読")) > 0
        assert "matplotlib_fontja" not in sys.modules
    finally:
        japanese_font.cache_clear()


def test_a_trial_that_was_stopped_has_its_reason() -> None:
    results = make_results(LAYERS)
    stopped = TrialRow(7, "pruned", False, results.trials[0].weights, facts={"stopped": "is worse <than> the best"})
    said = Page(page_of(replace(results, trials=[*results.trials[:7], stopped]))).said()
    assert "is worse <than> the best" in said
    assert "is worse <than> the best" in RunNotes(Path("nowhere")).of(stopped)
