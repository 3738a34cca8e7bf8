"""What pictures of one width have in common; PNG bytes, without matplotlib's global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#334155"
_GRID = "#e2e8f0"
_INCHES_WIDE = 7.0
_DOTS_PER_INCH = 130


def figure_of(height: float) -> Figure:
    """An empty figure, ``height`` in inches; threads may draw at once."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_INCHES_WIDE, height), dpi=_DOTS_PER_INCH, layout="constrained")


def tidy(axes: Axes) -> None:
    """Thin lines behind the data, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=7)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)


def png(figure: Figure) -> bytes:
    """The same figures give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    # else it would hold matplotlib's version
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()
