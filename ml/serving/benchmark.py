"""Stage ``serving_benchmark``: what measurements of a model mean for the choice of an instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.runner import StageContext
from ml.serving.benchmark_plots import costs, latencies
from ml.serving.device_report import DeviceReport, read_report
from ml.serving.instances import (
    MEASURED,
    NOT_MEASURED,
    PROJECTED,
    InstanceRow,
    Limits,
    cheapest,
    compare_instances,
    verdict,
)
from ml.serving.machine import Machine
from ml.stages import ServingBenchmarkParameters

REPORT_FILE = "report.json"
MACHINE_FILE = "machine.json"
"""Of ``serving_measurement``: a device report, and the machine that it is of."""

BENCHMARK_FILE = "benchmark.parquet"
LATENCY_FILE = "latency.parquet"

_COLUMNS: dict[str, pa.DataType] = {
    "instance_type": pa.string(),
    "target": pa.string(),
    "basis": pa.string(),
    "meets_limits": pa.bool_(),
    "vcpus": pa.int64(),
    "usd_per_hour": pa.float64(),
    "offers_per_second": pa.float64(),
    "usd_per_million_offers": pa.float64(),
    "loaded_offers_per_second": pa.float64(),
    "p50_milliseconds": pa.float64(),
    "p99_milliseconds": pa.float64(),
    "instances_for_peak": pa.int64(),
    "usd_per_hour_for_peak": pa.float64(),
    "why_not": pa.string(),
    "how": pa.string(),
}
"""Of :class:`ml.serving.instances.InstanceRow`, which says what each is."""


def compare_serving(context: StageContext, parameters: ServingBenchmarkParameters) -> dict[str, Any]:
    """Stage ``serving_benchmark``: instances side by side, and the cheapest that meets the limits.

    Returns:
        Number of rows by their basis; ``level`` and ``sentence`` of the verdict; the cheapest instance, by
        any basis and among the measured ones (empty where there is none).
    """
    folder = context.input("serving_measurement")
    here = read_report((folder / REPORT_FILE).read_bytes(), str(folder / REPORT_FILE))
    machine = msgspec.json.decode((folder / MACHINE_FILE).read_bytes(), type=Machine)
    limits = Limits(
        peak_offers_per_second=parameters.peak_offers_per_second,
        p99_milliseconds=parameters.p99_milliseconds,
        max_instances=parameters.max_instances,
    )
    rows = compare_instances(machine, here, parameters.reports, parameters.prices, limits)
    found = verdict(rows, limits)
    context.progress.say(f"{found.level}: {found.sentence}")

    latency = latency_rows([here, *parameters.reports])
    pq.write_table(
        pa.Table.from_pylist([msgspec.to_builtins(row) for row in rows], pa.schema(_COLUMNS)),
        context.output / BENCHMARK_FILE,
    )
    pq.write_table(pa.Table.from_pylist(latency), context.output / LATENCY_FILE)
    (context.output / "costs_plot.png").write_bytes(costs(rows))
    (context.output / "latency_plot.png").write_bytes(latencies(latency, limits.p99_milliseconds))
    return {
        "measured": _count(rows, MEASURED),
        "projected": _count(rows, PROJECTED),
        "not_measured": _count(rows, NOT_MEASURED),
        "level": found.level,
        "sentence": found.sentence,
        "prices": parameters.prices_from,
        **_figures("cheapest", cheapest(rows)),
        **_figures("cheapest_measured", cheapest(rows, MEASURED)),
    }


def latency_rows(reports: Sequence[DeviceReport]) -> list[dict[str, Any]]:
    """What was measured over HTTP, one row per host, size of request and load."""
    return [
        {"host": report.instance_type, "target": report.target, **msgspec.structs.asdict(latency)}
        for report in reports
        for latency in report.latency
    ]


def _figures(name: str, row: InstanceRow | None) -> dict[str, Any]:
    if row is None:
        return {f"{name}_instance": ""}
    return {
        f"{name}_instance": row.instance_type,
        f"{name}_basis": row.basis,
        f"{name}_usd_per_hour_for_peak": row.usd_per_hour_for_peak,
        f"{name}_usd_per_million_offers": row.usd_per_million_offers,
    }


def _count(rows: Sequence[InstanceRow], basis: str) -> int:
    return sum(row.basis == basis for row in rows)
