"""A code location with the product's own sensors for incidents and nothing else.

They look and send every second, so that a daemon that is killed again and again gets something done.
"""

from __future__ import annotations

import dagster as dg

from resources.environment import resources_for
from resources.settings import Settings
from sensors.incidents import alert_delivery, incidents


def every_second(sensor: dg.SensorDefinition) -> dg.SensorDefinition:
    """The same sensor, due at each turn of the daemon."""
    sensor._min_interval = 1
    return sensor


resources = resources_for(Settings.from_environment())
defs = dg.Definitions(
    sensors=[every_second(incidents), every_second(alert_delivery)],
    resources={name: resources[name] for name in ("alerts", "offer_feed", "artifact_store", "tracking")},
)
