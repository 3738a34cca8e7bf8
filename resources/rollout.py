"""When a version that is tried out is bad: the alarms of a roll-out on this machine."""

from __future__ import annotations

from ml.serving.routing import VariantState
from resources.endpoints import RolloutPolicy

_FEWEST_REQUESTS = 5
_FEWEST_ERRORS = 2
_FEWEST_OFFERS = 50
"""Fewer tell nothing: one request that fails, or a few unusual offers, are not the version's fault."""


def alarm_of(seen: VariantState, policy: RolloutPolicy) -> str | None:
    """The alarm that a version trips, with what was seen and its limit; None as long as all is well."""
    if not seen.is_up:
        return f"its server ended, after {seen.requests:,} requests"
    enough = seen.requests >= _FEWEST_REQUESTS
    error_percent = 100 * seen.errors / max(seen.requests, 1)
    if enough and seen.errors >= _FEWEST_ERRORS and error_percent > policy.error_percent:
        return (
            f"{error_percent:.1f} % of its {seen.requests:,} requests ended in a server error, more than "
            f"OFFER_ASSETS_ALARM_ERROR_PERCENT={policy.error_percent:g}"
        )
    p99 = seen.p99_milliseconds
    if enough and p99 is not None and p99 > policy.p99_milliseconds:
        return (
            f"one in a hundred of its {seen.requests:,} requests takes {p99:,.0f} ms or longer, more than "
            f"OFFER_ASSETS_ALARM_P99_MILLISECONDS={policy.p99_milliseconds:g}"
        )
    unsure_percent = 100 * seen.low_confidence / max(seen.offers, 1)
    if seen.offers >= _FEWEST_OFFERS and unsure_percent > policy.low_confidence_percent:
        return (
            f"of {unsure_percent:.1f} % of its {seen.offers:,} offers it is less than half sure, more than "
            f"OFFER_ASSETS_ALARM_LOW_CONFIDENCE_PERCENT={policy.low_confidence_percent:g}"
        )
    return None


def account_of(seen: VariantState) -> str:
    """What was seen of a version that tripped no alarm, as a clause."""
    if not seen.requests:
        return "no request came its way, so nothing was seen of it"
    p99 = f", p99 {seen.p99_milliseconds:,.0f} ms" if seen.p99_milliseconds is not None else ""
    unsure = f", unsure of {seen.low_confidence:,} of {seen.offers:,} offers" if seen.offers else ""
    few = "" if seen.requests >= _FEWEST_REQUESTS else "; too few to judge by"
    return f"{seen.requests:,} requests, {seen.errors:,} server errors{p99}{unsure}{few}"
