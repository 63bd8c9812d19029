"""How pictures look: colours, fonts, and a figure as SVG for light and dark pages or as PNG.

Only matplotlib's objects are used, never pyplot, and its settings are put back: a program that draws with it sees
nothing of this one. It is imported when the first picture is drawn.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "Drawn",
    "clean",
    "drawing",
    "heading",
    "intervals",
    "japanese_font",
    "new_figure",
    "shorten",
    "to_png",
    "to_svg",
]

#: Name → colour on a light page and on a dark one. A picture is drawn in the light ones, which are all different, and
#: in an SVG each becomes a CSS variable.
COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1c2430", "#e6eaf0"),
    "muted": ("#5b6675", "#a3adbb"),
    "grid": ("#dde2e8", "#343c48"),
    "faint": ("#c2cbd6", "#465160"),
    "paper": ("#fefefe", "#151a21"),
    "best": ("#1565b0", "#74b6ff"),
    "band": ("#cfe1f3", "#21405f"),
    "stage": ("#eef1f5", "#1f2630"),
    "second": ("#b8500f", "#ffa366"),
    "other": ("#8a94a3", "#8791a0"),
    "trial": ("#7592b0", "#6f8cab"),
    "pruned": ("#7a4fa3", "#c8a8f2"),
    "failed": ("#b3261e", "#ff8f85"),
}
INK, MUTED, GRID, PAPER = (COLOURS[name][0] for name in ("ink", "muted", "grid", "paper"))
#: Inches and dots per inch. An SVG is as wide as the page, which makes its letters half as large again.
WIDTH, PNG_DPI, IMAGE_DPI = 8.0, 150, 200

#: Fonts of systems that have Japanese ones, and the one of the package matplotlib-fontja.
JAPANESE = (
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "IPAPGothic",
    "TakaoPGothic",
    "TakaoGothic",
    "VL PGothic",
    "Hiragino Sans",
    "Hiragino Kaku Gothic Pro",
    "Yu Gothic",
    "Meiryo",
    "MS Gothic",
)


@dataclass(frozen=True)
class Drawn:
    """A picture, and what it says for those who do not see it."""

    figure: Figure | None  # None: there is too little to draw, as the caption says
    caption: str


@functools.cache
def japanese_font() -> str | None:
    """The name of a font with Japanese letters that matplotlib can draw with; None: none is here.

    The package matplotlib-fontja is not imported, as that changes the settings of the whole process.
    """
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    found = next((name for name in JAPANESE if name in here), None)
    package = importlib.util.find_spec("matplotlib_fontja") if found is None else None
    if package is None or package.origin is None:
        return found
    file = Path(package.origin).parent / "fonts" / "ipaexg.ttf"
    if not file.is_file():
        return None
    font_manager.fontManager.addfont(file)
    return font_manager.FontProperties(fname=file).get_name()


#: Of matplotlib, beside its own defaults.
_SETTINGS: Mapping[str, Any] = {
    "font.size": 8.0,
    "text.parse_math": False,  # a task may be called $x$
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # letters stay letters, in the browser's fonts
    "svg.hashsalt": "tvmerge",
    "xtick.color": MUTED,
    "xtick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelsize": 7.5,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings while pictures are made and written; nobody's own settings change them."""
    import matplotlib

    fonts = ["DejaVu Sans", *([name] if (name := japanese_font()) else [])]
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for name, value in (("font.family", fonts), *_SETTINGS.items()):
            matplotlib.rcParams[name] = value  # type: ignore[index]
        # Said once by whoever writes the report, and not for every letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heading(axes: Axes, text: str) -> None:
    """The title of one of several parts of a figure."""
    axes.set_title(text, color=INK, fontweight="bold")


def intervals(
    axes: Axes,
    at: Sequence[float],
    middle: Sequence[float],
    ends: Sequence[tuple[float, float]],
    colours: Sequence[str],
) -> None:
    """Dots with lines from end to end, which lie: rows at heights, the first on top."""
    low, high = zip(*ends, strict=True) if ends else ((), ())
    axes.hlines(list(at), list(low), list(high), colors=list(colours), linewidth=1.3)
    axes.scatter(list(middle), list(at), s=16, color=list(colours), linewidths=0, zorder=3)


@contextmanager
def _at(figure: Figure, dpi: int) -> Iterator[None]:
    """A figure at a resolution. It is laid out when it is drawn first, and stays so."""
    before = figure.dpi
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.set_layout_engine("none")
        figure.dpi = before


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG for a light page; the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with drawing(), _at(figure, PNG_DPI):
        canvas: Any = FigureCanvasAgg(figure)  # which is not typed; savefig would draw everything twice
        canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, *, name: str, title: str, description: str) -> str:
    """A figure as an SVG element, to be put in a page that has the CSS variables of COLOURS and `--font`.

    Args:
        figure: drawn in the light colours.
        name: goes before its ids, which have to be unique in a page.
        title: what it is called.
        description: what it says, for those who do not see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    with drawing(), _at(figure, IMAGE_DPI):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # What is about the file is not about the picture, and a style of its own would be one of the whole page.
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([\d. ]+)"', head)
    assert box is not None, "matplotlib writes a box"
    # Letters of a file can be no tags: matplotlib escapes < in them, so that a tag is its own.
    body = re.sub(r"<[^!?][^>]*>", lambda tag: _own_tag(tag[0], name), body)
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(clean(title))}</title>'
        f'<desc id="{name}-description">{escape(clean(description))}</desc>{body}'
    )


_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_COLOUR = re.compile("|".join(_VARIABLES))


def _own_tag(tag: str, name: str) -> str:
    """A tag of matplotlib's, with unique ids, and with the page's colours and font."""
    tag = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', tag)
    tag = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', tag)
    tag = tag.replace("xlink:href=", "href=").replace("url(#", f"url(#{name}-")
    if tag.startswith("<image"):
        return tag
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)  # which it then has from the page
    tag = re.sub(r"(font: (?:[\w-]+ )*[\d.]+px)[^;\"]*", r"\1 var(--font)", tag)
    return _COLOUR.sub(lambda colour: _VARIABLES[colour[0]], tag)


def clean(text: str) -> str:
    """Text without what no page and no picture can show: control characters and halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shorten(text: str, width: int = 28) -> str:
    """A label of at most so many columns of a terminal, its middle left out if it is longer."""
    text = clean(text)
    if sum(map(_columns, text)) <= width:
        return text
    head, tail = "", ""
    for letter in text:
        if sum(map(_columns, head)) + _columns(letter) > width // 2:
            break
        head += letter
    for letter in reversed(text):
        if sum(map(_columns, tail)) + _columns(letter) > width - width // 2 - 1:
            break
        tail = letter + tail
    return f"{head}…{tail}"


def _columns(letter: str) -> int:
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
