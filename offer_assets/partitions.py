"""How assets are cut into partitions."""

from __future__ import annotations

import datetime

import dagster as dg

from ml.learning.search_space import STAGE_OF

CPU = "cpu"
NEURON = "neuron"

SEARCHED_MODELS = dg.StaticPartitionsDefinition(list(STAGE_OF))

COMPILE_TARGETS = dg.StaticPartitionsDefinition([CPU, NEURON])


def days_from(first_day: datetime.date) -> dg.DailyPartitionsDefinition:
    """Days from the feed's first to today; today counts, because offers are catalogued as they come."""
    return dg.DailyPartitionsDefinition(start_date=first_day.isoformat(), end_offset=1)
