"""The demo feed's corrections: what people decide about its offers some days after they were delivered.

Of each day a few hundred offers are looked at, most of them soon, some only after days. A file holds the
decisions of one day, so those that are still to come lie in no file yet. Deterministic, as the feed is.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ml.demo.catalog import categories
from ml.demo.feed import DemoFeed, days_in, feed_in, has_drifted, in_one_step
from ml.demo.random import Draws

CORRECTIONS_FOLDER = "corrections"
"""Beside the days: a file per day on which something was decided."""

OFFERS_LOOKED_AT = 300
"""Of one day's offers."""
MOST_LOOKED_AT = 0.25
"""Share of a small day's offers that is not exceeded."""
LONGEST_DELAY_DAYS = 6
DECIDED_PER_DAY = 0.4
"""Share of the open decisions that fall on each day: delays are geometric."""
HUMAN_ERRORS = 0.03
CHANGES_OF_MIND = 0.02
BAD_ROWS = 0.015

_HEADER = ("offer_id", "category_id", "decided_at")
_SECONDS_OF_A_DAY = 24 * 3600

Decision = tuple[str, str, str]
"""Values of one row of the feed."""


def write_missing_corrections(folder: Path) -> list[Path]:
    """Write the decisions of each day of the feed in ``folder`` that has none yet; returns the new files."""
    days = days_in(folder)
    missing = [day for day in days if not _file(folder, day).exists()]
    if not missing:
        return []
    feed = feed_in(folder)
    # Asked for again for each of the days on which something is decided about it.
    decisions = lru_cache(LONGEST_DELAY_DAYS + 1)(
        lambda day: decisions_about(feed, day, drifted=has_drifted(folder, day))
    )
    for day in missing:
        about = [other for other in days if 0 <= (day - other).days <= LONGEST_DELAY_DAYS]
        rows = [row for other in about for row in decisions(other).get((day - other).days, [])]
        with in_one_step(_file(folder, day)) as partial:
            partial.write_text(_as_csv(rows, day), encoding="utf-8")
    return [_file(folder, day) for day in missing]


def decisions_about(
    feed: DemoFeed, day: datetime.date, *, drifted: bool = False
) -> dict[int, list[Decision]]:
    """All decisions about offers of ``day``, by delay in days, whether their time has come or not."""
    offers = feed.true_categories(day, drifted=drifted)
    count = len(offers)
    draws = Draws(f"{feed.seed} corrections {day}", np.arange(count, dtype=np.uint64))
    looked_at = draws.uniform("looked at") < min(MOST_LOOKED_AT, OFFERS_LOOKED_AT / count)
    delays = _delays(draws)
    second = draws.integers("second", _SECONDS_OF_A_DAY)
    wrong = draws.uniform("wrong") < HUMAN_ERRORS
    corrected = draws.uniform("change of mind") < CHANGES_OF_MIND
    other = draws.uniform("sibling")
    siblings = _siblings(feed.taxonomy_version)
    found: dict[int, list[Decision]] = defaultdict(list)
    for row in np.flatnonzero(looked_at).tolist():
        offer_id, truth = (offers[name][row].as_py() for name in ("offer_id", "category_id"))
        if not offer_id or not truth:
            continue
        delay, beside = int(delays[row]), siblings.get(truth, [truth])
        mistaken = beside[int(other[row] * len(beside))]
        moment = datetime.datetime.combine(day, datetime.time()) + datetime.timedelta(
            days=delay, seconds=int(second[row])
        )
        if corrected[row] and delay < LONGEST_DELAY_DAYS:
            later = (moment + datetime.timedelta(days=1)).isoformat()
            found[delay].append((offer_id, mistaken, moment.isoformat()))
            found[delay + 1].append((offer_id, truth, later))
        else:
            found[delay].append((offer_id, mistaken if wrong[row] else truth, moment.isoformat()))
    return dict(found)


def _delays(draws: Draws) -> npt.NDArray[np.int64]:
    """Geometric, cut at the longest."""
    days = np.log1p(-draws.uniform("delay")) / np.log1p(-DECIDED_PER_DAY)
    return np.asarray(np.minimum(days.astype(np.int64), LONGEST_DELAY_DAYS))


def _siblings(version: int) -> dict[str, list[str]]:
    """The other leaves under the same category, by leaf."""
    every = categories(version)
    parents = {category.parent_id for category in every}
    leaves: dict[str | None, list[str]] = defaultdict(list)
    for category in every:
        if category.category_id not in parents:
            leaves[category.parent_id].append(category.category_id)
    return {
        leaf: [other for other in family if other != leaf] or [leaf]
        for family in leaves.values()
        for leaf in family
    }


def _as_csv(rows: list[Decision], day: datetime.date) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows([*rows, *_bad_rows(rows, day)])
    return text.getvalue()


def _bad_rows(rows: list[Decision], day: datetime.date) -> list[tuple[str, ...]]:
    """What is wrong in real feeds, in turn: a few rows a day."""
    if not rows:
        return []
    offer_id, category_id, moment = rows[0]
    contradicted = rows[len(rows) // 2]
    next_year = day.replace(year=day.year + 1, day=1).isoformat()
    ways = [
        ("", category_id, moment),
        (f"{offer_id}-later", category_id, next_year),
        (offer_id, category_id),
        rows[-1],  # delivered twice
        (offer_id, "", moment),
        (f"{offer_id}-sometime", category_id, "last week"),
        (contradicted[0], category_id, contradicted[2]),  # at one instant, and mostly another category
        (f"{offer_id}-elsewhere", "no-such-category", moment),
    ]
    first, count = day.toordinal() * 3, max(1, round(BAD_ROWS * len(rows)))
    return [ways[(first + number) % len(ways)] for number in range(min(count, len(ways)))]


def _file(folder: Path, day: datetime.date) -> Path:
    return folder / CORRECTIONS_FOLDER / f"corrections-{day.isoformat()}.csv"
