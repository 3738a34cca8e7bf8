"""A report as ``python -m ml device-report`` would write it on an inf2 host."""

from __future__ import annotations

from typing import Any

from ml.serving.device_report import DeviceReport, Latency, Parity, Throughput


def device_report(*, same_category: float = 1.0, **fields: Any) -> DeviceReport:
    """A report with some of its fields replaced."""
    usual = {
        "model_digest": "0" * 64,
        "model_kind": "compiled_student",
        "target": "neuron",
        "instance_type": "inf2.xlarge",
        "vcpus": 4,
        "neuron_cores": 2,
        "workers": 2,
        "parity": Parity(
            offers=1_000,
            same_category=same_category,
            weighted_f1_compiled=0.9,
            weighted_f1_original=0.9,
            mean_probability_difference=0.001,
            max_probability_difference=0.01,
        ),
        "throughput": [
            Throughput(workers=1, offers=100_000, offers_per_second=8_000.0),
            Throughput(workers=2, offers=200_000, offers_per_second=15_000.0),
        ],
        "latency": [
            Latency(
                request_offers=32,
                asked_offers_per_second=7_500.0,
                offers_per_second=7_490.0,
                requests=4_700,
                failed=0,
                p50_milliseconds=4.0,
                p99_milliseconds=9.0,
            )
        ],
        "peak_memory_bytes": 1_000_000_000,
        "measured_at": "2026-11-02T10:00:00+00:00",
        "versions": {"torch": "2.9.0", "torch-neuronx": "2.9.0.2.15.32035", "neuronx-cc": "2.27.5334.0"},
        "code_revision": "0123456789ab",
        "how_measured": "by hand",
    }
    return DeviceReport(**usual | fields)
