"""Versions of the model at a terminal: what there is, what serves, what was decided, and deciding it.

Decisions run the same jobs as the UI, in this process and recorded in the same instance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from ml.errors import InputError
from offer_assets.definitions import build_defs
from offer_assets.headless import HeadlessRuns
from offer_assets.instance import instance_for
from offer_assets.jobs import START_ENDPOINT
from offer_assets.promotion import DECIDE_VERSION, ROLLBACK, decide, history_rows, name_of
from offer_assets.promotion import roll_back as roll_back_op
from offer_assets.release import lineage_of
from offer_assets.traffic import SHADOW_VERSION, SPLIT_TRAFFIC, variant_rows
from offer_assets.traffic import shadow as shadow_op
from offer_assets.traffic import split as split_op
from resources.environment import resources_for
from resources.settings import Settings
from resources.tracking import Tracking

_LONGEST_CELL = 60


def versions_table(settings: Settings) -> str:
    """The registered versions, newest first, as text."""
    resources = resources_for(settings)
    with _one_line_errors():
        versions = resources["tracking"].versions()
    rows = [
        {
            "version": version.version,
            "model version": version.model_version,
            "gate": version.tags.get("verdict", ""),
            "approval": _approval_of(version),
            "in production": "yes" if version.in_production else "",
            "weighted F1": f"{version.metrics.get('student_weighted_f1', float('nan')):.4f}",
            "taxonomy": lineage_of(resources["compute"], version.ref).taxonomy_version,
            "registered": version.registered_at[:19] + "Z",
        }
        for version in versions
    ]
    return (
        _as_text(rows) if rows else "no version is registered yet: `make demo` or train_and_release makes one"
    )


def history_table(settings: Settings) -> str:
    """What went into production, newest first, as text."""
    with _one_line_errors():
        history = resources_for(settings)["tracking"].history()
    return _as_text(history_rows(history, limit=None)) if history else "no version has been in production yet"


def approve(
    settings: Settings, *, version: str, reason: str, by: str, despite_gate: bool, deploy: bool
) -> bool:
    """Approve a version; True if that, and the deployment if it was asked for, worked."""
    runs = _runs(settings)
    with runs.instance:
        decided = runs.run(
            DECIDE_VERSION,
            run_config=_config(
                decide, version=version, decision="approved", by=by, reason=reason, despite_gate=despite_gate
            ),
        )
        if not decided:
            return False
        if deploy:
            return runs.run(START_ENDPOINT) and _say_what_serves(settings)
    print(
        f"{_name(settings, version)} is approved. The sensor decided_versions has it served within a minute "
        "while `make dev` (or a Dagster daemon) runs; `python -m offer_assets deploy` does it now."
    )
    return True


def reject(settings: Settings, *, version: str, reason: str, by: str) -> bool:
    """Reject a version; True if that worked."""
    runs = _runs(settings)
    with runs.instance:
        decided = runs.run(
            DECIDE_VERSION,
            run_config=_config(decide, version=version, decision="rejected", by=by, reason=reason),
        )
    if decided:
        print(f"{_name(settings, version)} is rejected and will not be served.")
    return decided


def roll_back(settings: Settings, *, version: str, reason: str, by: str) -> bool:
    """Serve an earlier version again; True if it does."""
    runs = _runs(settings)
    with runs.instance:
        back = runs.run(ROLLBACK, run_config=_config(roll_back_op, version=version, by=by, reason=reason))
    return back and _say_what_serves(settings)


def deploy(settings: Settings) -> bool:
    """Serve the version that the asset ``model_version`` names; True if the run worked."""
    runs = _runs(settings)
    with runs.instance:
        done = runs.run(START_ENDPOINT)
    return done and _say_what_serves(settings)


def shadow(settings: Settings, *, version: str, percent: float, end: bool, reason: str, by: str) -> bool:
    """Let a version see copies of the requests, or none any more; True if that worked.

    Raises:
        InputError: a version is named and the shadow is to end, or neither.
    """
    if end == bool(version):
        raise InputError("shadow takes a version, or --end to send no more copies")
    runs = _runs(settings)
    config = _config(shadow_op, version=version, percent=percent, reason=reason, by=by)
    with runs.instance:
        done = runs.run(SHADOW_VERSION, run_config=config)
    return done and _say_variants(settings)


def split(settings: Settings, *, shares: Sequence[str], reason: str, by: str) -> bool:
    """Let versions share the requests; True if they do.

    Args:
        settings: Of this project.
        shares: Each ``VERSION=WEIGHT``.
        reason: Why.
        by: Who decides.

    Raises:
        InputError: a share is none, or a version has two.
    """
    weights: dict[str, float] = {}
    for share in shares:
        version, _, weight = share.partition("=")
        try:
            weights[version] = float(weight)
        except ValueError:
            raise InputError(f"{share}: expected VERSION=WEIGHT, 3=10 for instance") from None
    if len(weights) < len(shares):
        raise InputError(f"{' '.join(shares)}: expected each version once")
    runs = _runs(settings)
    with runs.instance:
        done = runs.run(SPLIT_TRAFFIC, run_config=_config(split_op, shares=weights, reason=reason, by=by))
    return done and _say_variants(settings)


def endpoint_table(settings: Settings) -> str:
    """What serves, with its variants and what was seen of them, as text."""
    endpoints = resources_for(settings)["endpoints"]
    with _one_line_errors():
        status = endpoints.status()
        if status is None:
            return "nothing answers at the endpoint: `python -m offer_assets deploy` brings it up"
        rows = variant_rows(status, endpoints.observations())
    told = {"url": status.url, "taxonomy": status.taxonomy_version, "since": status.started, **status.details}
    return "\n".join([*(f"{name}: {text}" for name, text in told.items()), "", _as_text(rows)])


def _runs(settings: Settings) -> HeadlessRuns:
    return HeadlessRuns(definitions=build_defs(settings), instance=instance_for(settings), assets_in_all=2)


def _config(op: dg.OpDefinition, **values: Any) -> dict[str, Any]:
    return {"ops": {op.name: {"config": values}}}


def _say_what_serves(settings: Settings) -> bool:
    status = resources_for(settings)["endpoints"].status()
    if status is None:
        print("nothing answers at the endpoint")
        return False
    production = _tracking(settings).production()
    what = name_of(production) if production else "no version"
    print(f"{what} is in production; {status.url} answers with model {status.model_version}.")
    return True


def _say_variants(settings: Settings) -> bool:
    print(endpoint_table(settings))
    return True


def _name(settings: Settings, version: str) -> str:
    found = _tracking(settings).find(version)
    return name_of(found) if found is not None else f"version {version}"


def _tracking(settings: Settings) -> Tracking:
    tracking: Tracking = resources_for(settings)["tracking"]
    return tracking


def _approval_of(version: Any) -> str:
    decision = version.decision
    if decision is not None:
        return f"{decision.decision} by {decision.by}" + (" despite gate" if decision.despite_gate else "")
    return str(version.approval) if version.passed else "none"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a door of this project reports as a failure of a run is one line at a terminal."""
    try:
        yield
    except dg.Failure as failure:
        raise InputError(failure.description or str(failure)) from None


def _as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    header = list(rows[0])
    lines = [header, *([_cell(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"
