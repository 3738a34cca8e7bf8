"""Bad days of the reference: an outage that it holds is not to make the next one usual.

Here belongs what is done to the reference before anything is learned from it.
"""

from __future__ import annotations

from datetime import date

import msgspec
import numpy as np

from ml.drift.expected import weekdays_are_known
from ml.drift.grid import Floats, Grid
from ml.drift.questions import Limits
from ml.drift.scales import restored, stabilised


def without_bad_days(grid: Grid, supposed: Floats, limits: Limits) -> Grid:
    """The series, with bad days of the reference drawn in to the edge of what the other days are.

    A day is bad for a series if it is far from the median of all days and from that of the others of its
    weekday. What happens on many days, or again and again, is no accident but how the series is: a shop that
    sends now and then. Before the weekdays are known a week-end looks like an outage; nothing is drawn in.
    """
    reference = grid.days[: grid.references]
    if not weekdays_are_known(reference) or not len(grid):
        return grid
    stable = stabilised(grid, grid.value, supposed)[:, : grid.references]
    # A share of no offers has no place on the scale.
    stable[~np.isfinite(stable) | ~np.isfinite(grid.in_reference)] = np.nan
    rows = np.flatnonzero(np.isfinite(stable).any(axis=1))
    stable = stable[rows]
    centre = np.nanmedian(stable, axis=1, keepdims=True)
    scale = np.maximum(1.4826 * np.nanmedian(np.abs(stable - centre), axis=1, keepdims=True), 1.0)
    bad = np.abs(stable - centre) > limits.bad_day_deviations * scale
    weekday = np.array([date.fromisoformat(day).weekday() for day in reference])
    for column in np.flatnonzero(bad.any(axis=0)):
        others = np.flatnonzero((weekday == weekday[column]) & (np.arange(len(weekday)) != column))
        known = bad[:, column] & np.isfinite(stable[:, others]).any(axis=1)
        of_weekday = np.nanmedian(stable[known][:, others], axis=1)
        far = np.abs(stable[known, column] - of_weekday) > limits.bad_day_deviations * scale[known, 0]
        bad[known, column] = far
    times = bad[:, 0] + (bad[:, 1:] & ~bad[:, :-1]).sum(axis=1)
    days = np.isfinite(stable).sum(axis=1)
    bad[(times > limits.bad_times) | (bad.sum(axis=1) > limits.bad_days_share * days)] = False
    edge = limits.bad_day_edge * scale
    drawn_in = np.full((len(rows), len(grid.days)), np.nan)
    drawn_in[:, : grid.references] = np.clip(stable, centre - edge, centre + edge)
    edged = restored(grid.at(rows), drawn_in, supposed[rows])[:, : grid.references]
    value = grid.value.copy()
    value[rows, : grid.references] = np.where(bad, edged, value[rows, : grid.references])
    return msgspec.structs.replace(grid, value=value)
