"""A change of the taxonomy as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml.taxonomy_change.change import Impact

_BARS = 25
_LONGEST_NAME = 60
_COLOURS = {
    "added": "#2e7d32",
    "removed": "#c62828",
    "split": "#ef6c00",
    "merged": "#1565c0",
    "replaced": "#6a1b9a",
    "moved": "#00838f",
    "renamed": "#757575",
}


def impact_plot(impacts: Sequence[Impact]) -> bytes:
    """PNG: the changed categories with most labelled and unlabelled offers, coloured by kind of change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    most = sorted(impacts, key=lambda i: (-(i.labelled + i.unlabelled), i.path))[:_BARS][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(most)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(most))
    colours = [_COLOURS[impact.change] for impact in most]
    axes.barh(places, [impact.labelled for impact in most], color=colours)
    axes.barh(
        places,
        [impact.unlabelled for impact in most],
        left=[impact.labelled for impact in most],
        color=colours,
        alpha=0.35,
    )
    axes.set_yticks(places, [_shortened(impact.path) for impact in most], fontsize=7)
    axes.set_xlabel("offers (full colour: labelled; pale: unlabelled)")
    axes.set_title(
        f"{len(impacts):,} changed categories" + (f", the {_BARS} largest" if len(impacts) > _BARS else "")
    )
    found = [change for change in _COLOURS if any(impact.change == change for impact in most)]
    axes.legend(handles=[Patch(color=_COLOURS[change], label=change) for change in found], fontsize=7)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _shortened(path: str) -> str:
    """The end of a path: the start is what most of them share."""
    return path if len(path) <= _LONGEST_NAME else "…" + path[-_LONGEST_NAME:]
