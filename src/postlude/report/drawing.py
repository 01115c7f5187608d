"""What every drawing has in common: its fonts and colours, and how it becomes an element of a page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["FONT_SIZE", "INK", "drawing_settings", "svg"]

INK = "#1b1b1b"
FONT_SIZE = 12.5


@contextmanager
def drawing_settings() -> Iterator[None]:
    """Fonts and colours of every drawing, for as long as one is made."""
    with matplotlib.rc_context(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib; its letters are wide, so a page's own font fits
            "font.size": FONT_SIZE,
            "svg.fonttype": "none",
            "svg.hashsalt": "postlude",
            "text.parse_math": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        yield


def svg(figure: Figure, identifier: str, alt: str) -> str:
    """The drawing as an element of an HTML page: no declarations, ids of its own, a text for screen readers."""
    # As savefig(transparent=True), which draws everything once more to place it.
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    body = buffer.getvalue()
    inner = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r'\bid="', f'id="{identifier}-', inner)
    inner = inner.replace("url(#", f"url(#{identifier}-").replace(
        'href="#', f'href="#{identifier}-'
    )
    width, height = (round(side * 72) for side in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(alt)}">'
        f"{inner.strip()}</svg>"
    )
