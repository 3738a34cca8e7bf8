"""Which instance serves a model at the least cost: from what was measured, and what follows from it.

A row is *measured* on the very type of instance, or *projected* from another measurement by an assumption
that it states, or *not measured*. What is projected never passes for measured.

Costs are those of a steady load. ``offers_per_second`` is of bulk work, with every core busy; how many
instances a peak takes is reckoned from the load at which the latency was measured, which is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from ml.serving.device_report import DeviceReport, Latency
from ml.serving.machine import Machine
from ml.serving.prices import InstancePrice

Basis = Literal["measured", "projected", "not measured"]
Level = Literal["OK", "WARN", "ERROR"]

MEASURED: Basis = "measured"
PROJECTED: Basis = "projected"
NOT_MEASURED: Basis = "not measured"

_CPU, _NEURON = "cpu", "neuron"
_SPARE = 1
"""Instances beyond those that bear the peak: one may fail, or be replaced."""

_MILLION = 1_000_000
_SECONDS_PER_HOUR = 3_600


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the instances of an endpoint have to do together."""

    peak_offers_per_second: float
    p99_milliseconds: float
    max_instances: int


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one type of instance; None: nothing is."""

    instance_type: str
    target: str
    """That the model was compiled for; empty where no target uses what the instance has."""
    basis: Basis
    meets_limits: bool
    vcpus: int
    usd_per_hour: float | None
    offers_per_second: float | None = None
    """In bulk, all cores busy."""
    usd_per_million_offers: float | None = None
    """At that rate."""
    loaded_offers_per_second: float | None = None
    """At which the latency was measured."""
    p50_milliseconds: float | None = None
    p99_milliseconds: float | None = None
    instances_for_peak: int | None = None
    """At the load of the measured latency, and one more."""
    usd_per_hour_for_peak: float | None = None
    why_not: str
    """Limits that are not met; empty: all are."""
    how: str
    """Where and when it was measured, or what a projection assumes."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an instance meets the limits."""

    level: Level
    sentence: str


def compare_instances(
    machine: Machine,
    here: DeviceReport,
    reports: Sequence[DeviceReport],
    prices: Sequence[InstancePrice],
    limits: Limits,
) -> list[InstanceRow]:
    """A row for whatever was measured and for every type that has a price, the cheapest that will do first.

    Args:
        machine: On which ``here`` was measured.
        here: Report of that machine.
        reports: Of other hosts; of those of one type and target, the newest counts.
        prices: Types of instance, each once.
        limits: What they have to do.
    """
    measured = _newest([*reports, here], prices)
    rows = [_measured(report, name, _price_of(name, prices), limits) for name, report in measured]
    known = {(name, report.target) for name, report in measured}
    for price in prices:
        if (price.instance_type, _target(price)) not in known:
            rows.append(_not_measured(price, _bases(price, measured, prices, machine, here), limits))
    return sorted(rows, key=_merit)


def cheapest(rows: Sequence[InstanceRow], basis: Basis | None = None) -> InstanceRow | None:
    """The row that bears the peak at the least cost per hour and meets all limits; None: none does.

    Args:
        rows: Of :func:`compare_instances`.
        basis: Of the rows that are looked at; None: all, and at equal cost what was measured.
    """
    fitting = [row for row in rows if row.meets_limits and basis in (None, row.basis)]
    return min(fitting, key=_merit, default=None)


def verdict(rows: Sequence[InstanceRow], limits: Limits) -> Verdict:
    """Whether some instance meets the limits, and whether that was measured."""
    wanted = (
        f"{limits.peak_offers_per_second:,.0f} offers/s with one instance missing, at most "
        f"{limits.max_instances} instances and p99 {limits.p99_milliseconds:,.0f} ms"
    )
    best, measured = cheapest(rows), cheapest(rows, MEASURED)
    if best is None:
        reasons = "; ".join(f"{row.instance_type}: {row.why_not}" for row in rows if row.basis == MEASURED)
        return Verdict(level="ERROR", sentence=f"no instance is known to bear {wanted}. {reasons}.")
    if measured is None:
        return Verdict(
            level="WARN",
            sentence=f"only by projection: {in_words(best)} for {wanted}. It {best.how}. Measure before you "
            "decide: run python -m ml device-report on that instance.",
        )
    sentence = f"{in_words(measured)} for {wanted}."
    if best is not measured:
        sentence += f" Cheaper by projection only: {in_words(best)}; it {best.how}."
    return Verdict(level="OK", sentence=sentence)


def in_words(row: InstanceRow) -> str:
    """A row that meets the limits, for people."""
    mark = "" if row.basis == MEASURED else f" ({row.basis})"
    return (
        f"{row.instances_for_peak} x {row.instance_type}{mark}, ${row.usd_per_hour_for_peak:,.2f} per hour, "
        f"p99 {row.p99_milliseconds:,.1f} ms, ${row.usd_per_million_offers:,.3f} per million offers in bulk"
    )


def _newest(
    reports: Sequence[DeviceReport], prices: Sequence[InstancePrice]
) -> list[tuple[str, DeviceReport]]:
    """The newest report of each type and target, with the type as the prices call it."""
    newest: dict[tuple[str, str], DeviceReport] = {}
    for report in sorted(reports, key=lambda report: report.measured_at):
        price = _price_of(report.instance_type, prices)
        newest[price.instance_type if price else report.instance_type, report.target] = report
    return [(name, report) for (name, _), report in newest.items()]


def _price_of(name: str, prices: Sequence[InstancePrice]) -> InstancePrice | None:
    """Price of a type; ``c7i.xlarge`` of EC2 is the hardware of ``ml.c7i.xlarge``."""
    return next((price for price in prices if price.instance_type in (name, f"ml.{name}")), None)


def _measured(report: DeviceReport, name: str, price: InstancePrice | None, limits: Limits) -> InstanceRow:
    how = f"measured on {report.instance_type} at {report.measured_at}, {report.workers} workers"
    return _row(report, name, price, limits, basis=MEASURED, factor=1.0, how=how)


def _bases(
    price: InstancePrice,
    measured: Sequence[tuple[str, DeviceReport]],
    prices: Sequence[InstancePrice],
    machine: Machine,
    here: DeviceReport,
) -> list[tuple[DeviceReport, str]]:
    """Measurements that say something of a type, the best first, each with what has to be assumed."""
    target = _target(price)
    of_family = [
        (other, report)
        for name, report in measured
        if (other := _price_of(name, prices)) and other.family == price.family and report.target == target
    ]
    of_family.sort(key=lambda pair: abs(math.log(_units(price) / _units(pair[0]))))
    cores = "Neuron core" if target == _NEURON else "vCPU"
    bases = [
        (report, f"a {cores} does what one of {other.instance_type} does") for other, report in of_family
    ]
    if target == here.target == _CPU and machine.architecture == price.architecture:
        bases.append((here, f"a vCPU does what a core of this machine ({machine.cpu}) does"))
    return bases


def _not_measured(
    price: InstancePrice, bases: Sequence[tuple[DeviceReport, str]], limits: Limits
) -> InstanceRow:
    for report, assumption in bases:
        units = report.neuron_cores if report.target == _NEURON else report.vcpus
        if units > 0:
            factor = _units(price) / units
            how = (
                f"assumes that {assumption} ({_units(price)} instead of {units}), "
                "with the same latency at as much load for each"
            )
            return _row(report, price.instance_type, price, limits, basis=PROJECTED, factor=factor, how=how)
    reason = "run python -m ml device-report there"
    return InstanceRow(
        instance_type=price.instance_type,
        target=_target(price),
        basis=NOT_MEASURED,
        meets_limits=False,
        vcpus=price.vcpus,
        usd_per_hour=price.usd_per_hour,
        why_not="not measured",
        how=reason if _target(price) else f"no target uses its {price.accelerator}",
    )


def _row(
    report: DeviceReport,
    name: str,
    price: InstancePrice | None,
    limits: Limits,
    *,
    basis: Basis,
    factor: float,
    how: str,
) -> InstanceRow:
    """Figures of an instance that has ``factor`` times what the measured one has."""
    loaded = _loaded(report)
    bulk, at_load = factor * report.offers_per_second, factor * loaded.offers_per_second
    instances = math.ceil(limits.peak_offers_per_second / at_load) + _SPARE if at_load > 0 else None
    hourly = price.usd_per_hour if price else None
    problems = _problems(loaded, instances, price, factor * report.peak_memory_bytes / 2**30, limits)
    return InstanceRow(
        instance_type=name,
        target=report.target,
        basis=basis,
        meets_limits=not problems,
        vcpus=price.vcpus if price else report.vcpus,
        usd_per_hour=hourly,
        offers_per_second=bulk,
        usd_per_million_offers=usd_per_million(hourly, bulk) if hourly and bulk > 0 else None,
        loaded_offers_per_second=at_load,
        p50_milliseconds=loaded.p50_milliseconds,
        p99_milliseconds=loaded.p99_milliseconds,
        instances_for_peak=instances,
        usd_per_hour_for_peak=instances * hourly if instances and hourly else None,
        why_not="; ".join(problems),
        how=how,
    )


def usd_per_million(usd_per_hour: float, offers_per_second: float) -> float:
    """Cost of a million offers on an instance that is never idle."""
    return usd_per_hour / (offers_per_second * _SECONDS_PER_HOUR) * _MILLION


def _loaded(report: DeviceReport) -> Latency:
    """Latency at the highest load that was answered at a stated rate, or else one request after the other."""
    stated = [latency for latency in report.latency if latency.asked_offers_per_second > 0]
    found = max(stated or report.latency, key=lambda latency: latency.offers_per_second, default=None)
    return found or Latency(
        request_offers=0,
        asked_offers_per_second=0,
        offers_per_second=0,
        requests=0,
        failed=0,
        p50_milliseconds=0,
        p99_milliseconds=0,
    )


def _problems(
    loaded: Latency,
    instances: int | None,
    price: InstancePrice | None,
    memory_gib: float,
    limits: Limits,
) -> list[str]:
    problems = []
    if price is None:
        problems.append("no price")
    elif memory_gib > price.memory_gib:
        problems.append(f"needs {memory_gib:.1f} GiB of memory, has {price.memory_gib:g}")
    if loaded.failed:
        problems.append(f"{loaded.failed} of {loaded.requests} requests failed")
    if loaded.p99_milliseconds > limits.p99_milliseconds:
        problems.append(f"p99 {loaded.p99_milliseconds:,.0f} ms, limit {limits.p99_milliseconds:,.0f}")
    if instances is None:
        problems.append("no request was answered under load")
    elif instances > limits.max_instances:
        problems.append(f"{instances:,} instances for the peak, limit {limits.max_instances}")
    return problems


def _target(price: InstancePrice) -> str:
    return {"": _CPU, _NEURON: _NEURON}.get(price.accelerator, "")


def _units(price: InstancePrice) -> int:
    """What throughput grows with: cores of what computes."""
    return price.accelerator_cores if price.accelerator == _NEURON else price.vcpus


def _merit(row: InstanceRow) -> tuple[bool, float, bool, str, str]:
    hourly = row.usd_per_hour_for_peak
    costs = hourly if hourly is not None else math.inf
    return (not row.meets_limits, costs, row.basis != MEASURED, row.instance_type, row.target)
