"""What the reference measures on every day and today does not have: a finding that needs no test.

Here belongs what is told by series that are missing; those that have a value today are
:mod:`ml.drift.findings`.
"""

from __future__ import annotations

import numpy as np

from ml.drift.answers import Finding
from ml.drift.findings import strongest_first
from ml.drift.grid import Floats, Grid
from ml.drift.questions import COMPLETENESS, MEASURED_ON_SOME, NAMES, SHOP_MIX, Limits
from ml.drift.sentences import in_words


def offers_of_groups(grid: Grid) -> dict[str, Floats]:
    """Offers of each group that were looked at on each day, by whichever share or mean is of most of them."""
    most: dict[str, Floats] = {}
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)
    for place, (question, _, group, _, kind) in enumerate(grid.keys):
        # Missing values and shops are counted over all offers, not over those that are looked at.
        if kind != "count" and question not in (COMPLETENESS, SHOP_MIX):
            most[group] = np.maximum(most.get(group, 0.0), offers[place])
    return most


def vanished_series(question: str, grid: Grid, of_group: dict[str, Floats], limits: Limits) -> list[Finding]:
    """What the reference measures on every day, and today on none of enough offers; no test is needed.

    Of a question that has no series at all today it was not asked: the day is not over, or there is no model.
    """
    known = np.isfinite(grid.value)
    if question in MEASURED_ON_SOME or not known[:, -1].any():
        return []
    usually = (known & (grid.offers >= limits.least_segment_offers))[:, : grid.references].all(axis=1)
    findings = {}
    for row in np.flatnonzero(usually & ~known[:, -1] & ~grid.of_kind("count")):
        _, measure, group, _, _ = grid.keys[row]
        offers = of_group.get(group)
        if offers is None or offers[-1] < limits.least_offers or (measure, group) in findings:
            continue
        of_all = max(float(of_day[-1]) for of_day in of_group.values())
        shares = grid.offers[row, : grid.references] / np.maximum(offers[: grid.references], 1.0)
        usual, low, high = (float(bound(np.minimum(shares, 1.0))) for bound in (np.median, np.min, np.max))
        effect = usual * float(offers[-1]) / of_all
        _, least, most = in_words("", "share", 0.0, low, high)
        name = ", ".join(part for part in (NAMES.get(measure, measure), group) if part)
        findings[measure, group] = Finding(
            question=question,
            measure=f"offers with {measure}",
            group=group,
            segment="can be measured",
            level="ERROR" if effect >= limits.vanished_for_error else "WARN",
            value=0.0,
            usual=usual,
            usual_low=low,
            usual_high=high,
            effect=-effect,
            p_value=0.0,
            days=1,
            sentence=f"{name}: cannot be measured any more on any of {offers[-1]:,.0f} offers, usually on "
            f"{least if least == most else f'{least}–{most}'} % of them",
        )
    return sorted(findings.values(), key=strongest_first)
