"""Versions of the model that are not served: refused, waiting for a decision, or not brought up."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from offer_assets import policies
from offer_assets.promotion import MODEL_VERSION, name_of
from offer_assets.wording import capital, iso, sentences, unix
from resources.alerts import News
from resources.tracking import RegisteredVersion

_REFUSAL = re.compile(r"offer_endpoint: .* (did not pass the gate|was rejected by .*) and is not served")
"""How the step fails that does not serve a version (see ``offer_assets.release``)."""
_WAITS, _STUCK = "version-waits:", "version-stuck:"
_WAITS_TOO_LONG_SECONDS = 86_400.0
"""A version that passed the gate is forgotten if nobody has decided after so long."""
_SERVED_AFTER_SECONDS = 900.0
"""An approved version is served within minutes; after so long its deployments failed or nothing runs."""


def version_news(
    versions: Sequence[RegisteredVersion],
    open_incidents: Collection[str],
    *,
    since: float,
    now: float,
) -> list[News]:
    """What is to be told of the versions in the registry.

    Args:
        versions: All of them.
        open_incidents: Keys of the incidents that are open.
        since: Unix time; what was refused before is history.
        now: Unix time.
    """
    news = [item for version in versions if (item := _refused(version, since)) is not None]
    stuck = list(_stuck(versions, now))
    news += stuck
    still = {item.incident for item in stuck}
    for key in open_incidents:
        if key.startswith((_WAITS, _STUCK)) and key not in still:
            news.append(
                News(
                    id=f"{key}:resolved:{now:.0f}",
                    incident=key,
                    state="resolved",
                    text="It was decided, serves, or was overtaken by a newer version.",
                    at=iso(now),
                )
            )
    return news


def is_refusal(failed_steps: Sequence[str]) -> bool:
    """Whether a run failed for nothing but that gate or people refuse its version: that is told as such."""
    return len(failed_steps) == 1 and _REFUSAL.match(failed_steps[0]) is not None


def refused_version_news(version: RegisteredVersion, title: str, text: str, at: str = "") -> News:
    """That gate or people refused a version: told once, whoever finds it out first."""
    return News(
        id=f"version-refused:{version.model_version}:{'rejected' if version.passed else 'gate'}",
        incident=f"version-refused:{version.model_version}",
        state="notice",
        title=title,
        text=text,
        asset=MODEL_VERSION,
        link=f"/assets/{MODEL_VERSION}",
        group=policies.RELEASE,
        owners=(policies.ML_TEAM,),
        at=at,
    )


def _refused(version: RegisteredVersion, since: float) -> News | None:
    """That a version was refused, if that happened since then."""
    decision = version.decision
    if version.passed and decision is not None and decision.decision == "rejected":
        at = decision.at or version.registered_at
        return (
            refused_version_news(
                version,
                f"The model {version.model_version} was rejected by {decision.by}",
                sentences(
                    f"{capital(name_of(version))}: {decision.reason}",
                    "It is not served; what was serving goes on serving.",
                ),
                at=at,
            )
            if not decision.at or unix(decision.at) >= since
            else None
        )
    if not version.passed and not version.may_serve and unix(version.registered_at) >= since:
        return refused_version_news(
            version,
            f"The model {version.model_version} did not pass the gate",
            f"{capital(name_of(version))} is not served; what was serving goes on serving. See the gate of "
            "model_version, then train with more labelled offers, or approve it despite the gate.",
            at=version.registered_at,
        )
    return None


def _stuck(versions: Sequence[RegisteredVersion], now: float) -> Iterator[News]:
    """Every version that waits for people, or for its deployment, for too long."""
    promotions = [
        promotion for version in versions for promotion in version.promotions if promotion.kind != "rename"
    ]
    last = max(promotions, key=lambda promotion: promotion.at, default=None)
    for version in versions:
        overtaken = last is not None and int(version.version) <= int(last.registry_version)
        if version.passed and version.approval == "pending" and not overtaken:
            if now - unix(version.registered_at) > _WAITS_TOO_LONG_SECONDS:
                yield _failing(
                    f"{_WAITS}{version.model_version}",
                    f"The model {version.model_version} waits for a decision",
                    f"{capital(name_of(version))} passed the gate and waits since {version.registered_at}. "
                    "Run the job decide_version, or `python -m offer_assets approve "
                    f"{version.version} --reason …` (or reject). What was serving goes on serving.",
                    now,
                )
            continue
        decision = version.decision
        if decision is None or not decision.at or not version.may_serve or version.in_production:
            continue
        is_next = last is None or decision.at > last.at
        if is_next and now - unix(decision.at) > _SERVED_AFTER_SECONDS:
            yield _failing(
                f"{_STUCK}{version.model_version}",
                f"The model {version.model_version} was approved and is not served",
                f"{capital(name_of(version))} was approved by {decision.by} at {decision.at}, and nothing "
                "brought it into production: see the sensor decided_versions and the runs of start_endpoint, "
                "then start that job by hand. What was serving goes on serving.",
                now,
            )


def _failing(incident: str, title: str, text: str, now: float) -> News:
    return News(
        id=f"{incident}:{now:.0f}",
        incident=incident,
        state="failing",
        title=title,
        text=text,
        asset=MODEL_VERSION,
        link=f"/assets/{MODEL_VERSION}",
        group=policies.RELEASE,
        owners=(policies.ML_TEAM,),
        at=iso(now),
    )
