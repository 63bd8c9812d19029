"""report.html: one file that opens anywhere and asks no network for anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tvmerge.files import write_bytes, write_text
from tvmerge.report.grid import scored_trials
from tvmerge.report.pictures import PICTURES, draw_pictures
from tvmerge.report.style import COLOURS, Drawn, clean, drawing, japanese_font, to_png, to_svg
from tvmerge.results import Results, TrialRow

__all__ = ["REPORT_FILE", "report_page", "write_report"]

REPORT_FILE = "report.html"
#: So many of the best trials are listed, so many failures, and so many tasks of each.
MAX_LISTED, MAX_FAILURES, MAX_TASKS = 50, 100, 8
#: What stands in for a password in an address.
_PASSWORD = re.compile(r"(?<=//)[^/@\s]*:[^/\s]*@")
_JAPANESE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, "Hiragino Sans", "Noto Sans CJK JP", "Noto Sans JP", sans-serif;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 var(--font); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, ul { margin: .6rem 0; } .status, figcaption, .note { color: var(--muted); } .note { font-size: .9rem; }
.verdict { border-left: 4px solid var(--best); background: var(--stage); padding: .4rem 1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child, .left { text-align: left; }
td.left { overflow-wrap: anywhere; min-width: 12rem; }
figure { margin: 0; } figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; }
figcaption { font-size: .875rem; max-width: 46rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
code { font-size: .9em; background: var(--stage); padding: 0 .2em; }
a { color: var(--best); }
@media print { details:not([open]) { display: none; } figure { break-inside: avoid; } }
"""


def write_report(results: Results, folder: Path) -> list[str]:
    """Write report.html and its pictures as PNGs, each of them whole or not at all.

    It may be written as often as there is something new; the same results give the same files.

    Args:
        results: of a run, which may still go on.
        folder: an existing one.

    Returns:
        What the user should be told once: that letters cannot be shown in PNGs, if so.
    """
    drawn = draw_pictures(results)
    for name, each in drawn.items():
        if each.figure is not None:
            write_bytes(folder / f"{name}.png", to_png(each.figure))
    write_text(folder / REPORT_FILE, report_page(results, drawn))
    return _unshown(results)


def _unshown(results: Results) -> list[str]:
    names = [*results.categories, *(name for each in results.categories.values() for name in each)]
    names += [each.label for each in results.candidates]
    names += [name for trial in results.trials[:1] for name in (*trial.tasks, *trial.weights)]
    with drawing():
        if japanese_font() is not None or not any(_JAPANESE.search(name) for name in names):
            return []
    return [
        "no font here has Japanese letters: the PNGs of the report show boxes for them, report.html shows them in the "
        "browser's font; pip install 'tvmerge[ja]' has one"
    ]


def report_page(results: Results, drawn: Mapping[str, Drawn]) -> str:
    """The page.

    Args:
        results: of a run.
        drawn: its pictures.
    """
    # A picture is drawn in the light colours of the page, and adapts by the same variables.
    style = _STYLE.replace("LIGHT", _variables(0)).replace("DARK", _variables(1))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    name = _text(results.name)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="status">{_text(_status(results))}</p>',
        f'<section class="verdict">{markdown(results.verdict)}</section>' if results.verdict.strip() else "",
        markdown(results.table),
        *(_picture(name, each) for name, each in drawn.items()),
        _trials(results),
        _settings(results.settings),
        '<p class="note">Made by tvmerge. Every score can be computed again from scores.jsonl.</p>',
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name} – tvmerge</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _variables(which: int) -> str:
    return " ".join(f"--{name}: {pair[which]};" for name, pair in COLOURS.items())


def _text(text: object) -> str:
    return escape(clean(str(text)))


def _status(results: Results) -> str:
    states = [trial.state for trial in results.trials]
    ended = sum(state in ("complete", "pruned", "failed") for state in states)
    said = [f"{ended} of {max(results.n_trials, ended)} trials done"]
    said += [
        f"{states.count(state)} {state}" for state in ("pruned", "failed", "running", "waiting") if state in states
    ]
    if results.candidates:
        return ", ".join(said) + "."
    return ", ".join(said) + ". The run is not finished: no model has been compared on the questions of the table yet."


def markdown(text: str) -> str:
    """The little Markdown that tvmerge writes itself, as HTML: paragraphs, lists, one table, code and bold."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line for line in block.split("\n") if line.strip()]
        if len(lines) > 1 and all(line.startswith("|") for line in lines):
            blocks.append(_markdown_table(lines))
            continue
        listed = [line[2:] for line in lines if line.startswith("- ")]
        plain = " ".join(line for line in lines if not line.startswith("- "))
        blocks += [f"<p>{_inline(plain)}</p>"] if plain else []
        blocks += [_elements("ul", "li", map(_inline, listed))] if listed else []
    return "\n".join(blocks)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _elements(outer: str, inner: str, items: Iterable[str]) -> str:
    return f"<{outer}>" + "".join(f"<{inner}>{item}</{inner}>" for item in items) + f"</{outer}>"


def _markdown_table(lines: Sequence[str]) -> str:
    rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return table([_inline(cell) for cell in rows[0]], [[_inline(cell) for cell in row] for row in rows[2:]])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already.

    Args:
        head: of the columns.
        rows: their cells.
        left: indices of the columns of text.
    """
    marks = ["" if n not in left else ' class="left"' for n in range(len(head))]
    heads = "".join(f'<th scope="col"{mark}>{cell}</th>' for cell, mark in zip(head, marks, strict=True))
    lines = ("".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=False)) for row in rows)
    body = _elements("tbody", "tr", lines)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>{body}</table></div>'


def _picture(name: str, drawn: Drawn) -> str:
    title, caption = PICTURES[name].title, _text(drawn.caption)
    heading = f'<h2 id="{name}">{_text(title)}</h2>'
    if drawn.figure is None:
        return f'{heading}\n<p class="note">{caption}</p>'
    svg = to_svg(drawn.figure, name=name, title=title, description=drawn.caption)
    return f'{heading}\n<figure><div class="scroll" tabindex="0">{svg}</div><figcaption>{caption}</figcaption></figure>'


def _trials(results: Results) -> str:
    if not results.trials:
        return ""
    scored = sorted(scored_trials(results), key=lambda trial: (-(trial.score or 0.0), trial.number))
    unscored = [trial for trial in results.trials if trial.failure is not None or trial.state in ("failed", "pruned")]
    tasks = list(dict.fromkeys(task for trial in scored for task in trial.tasks))[:MAX_TASKS]
    columns = [("seconds", "seconds"), ("cost", "cost"), ("worker", "worker")]
    known = [(head, key) for head, key in columns if any(getattr(trial, key) is not None for trial in scored)]
    head = ["trial", "score", *map(_text, tasks), *(head for head, _ in known), "weights"]
    rows = [
        [
            str(trial.number),
            _number(trial.score),
            *(_number(trial.tasks.get(task)) for task in tasks),
            *(_cell(getattr(trial, key)) for _, key in known),
            _weights(trial),
        ]
        for trial in scored[:MAX_LISTED]
    ]
    parts = []
    if rows:
        what = f"The best {len(rows)} of {len(scored)} trials" if len(rows) < len(scored) else "Trials, the best first"
        parts.append(f"<details><summary>{what}</summary>{table(head, rows, left=[len(head) - 1])}</details>")
    if unscored:
        reasons = [
            [str(t.number), t.state, _text(t.failure or t.facts.get("stopped", ""))] for t in unscored[-MAX_FAILURES:]
        ]
        what = f"Trials without a score ({len(unscored)})"
        listed = table(["trial", "state", "reason"], reasons, left=[1, 2])
        parts.append(f"<details open><summary>{what}</summary>{listed}</details>")
    return "\n".join(parts)


def _weights(trial: TrialRow) -> str:
    values = list(trial.weights.values())
    if not values:
        return ""
    given = ", given" if trial.is_given else ""
    if min(values) == max(values):
        return f"all {values[0]:.2f}{given}"
    return f"{min(values):.2f} to {max(values):.2f}, mean {sum(values) / len(values):.2f}{given}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else _text(value)


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = [[f"<code>{_text(key)}</code>", _text(_masked(value))] for key, value in settings.items()]
    return f"<details><summary>Settings</summary>{table(['setting', 'value'], rows, left=[1])}</details>"


def _masked(value: Any) -> str:
    """A setting as text, without the name and password that an address may hold."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_masked, value))
    return "" if value is None else _PASSWORD.sub("***@", str(value))
