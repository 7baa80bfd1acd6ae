"""What all pictures share: how lines are told apart, in grey print too, and how a picture becomes a file's content."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"Okabe and Ito's, which people who see few colours tell apart, the darkest first."
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Style(NamedTuple):
    """Of one of several lines: colour, dash and marker are each enough to know it by."""

    color: str
    linestyle: Any
    marker: str


def style(number: int) -> Style:
    """Of the ``number``-th thing in a picture; beyond eight, dashes meet other colours."""
    turn = number // len(COLOURS)
    return Style(
        COLOURS[number % len(COLOURS)], DASHES[(number + turn) % len(DASHES)], MARKERS[(number + turn) % len(MARKERS)]
    )


def panels(
    rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.4, **options: Any
) -> tuple[Figure, Any]:
    """A figure without a screen, and its axes [rows, columns]; sizes in inches a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The content of the picture's file."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    return picture.getvalue()


__all__ = ["COLOURS", "DASHES", "MARKERS", "Style", "panels", "png", "style"]
