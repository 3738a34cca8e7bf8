"""What a compiled model does on the hardware it was compiled for, as one file.

``python -m ml device-report`` (:mod:`ml.serving.device_measurement`) writes it there; the check of the
compiled model and the comparison of instance types read it. A reader refuses a format that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ml.errors import InputError

FORMAT = 1
"""Raised when a field comes to mean something else; a new field needs only a default."""


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Compiled model and original on the same offers of the evaluation set."""

    offers: int
    same_category: float
    """Share of the offers, in [0, 1]."""
    weighted_f1_compiled: float
    weighted_f1_original: float
    mean_probability_difference: float
    max_probability_difference: float
    """Of the probability that the original's choice has."""


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Offers per second in bulk, all workers busy; with one worker, that of one core."""

    workers: int
    offers: int
    offers_per_second: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Answers over HTTP, client and server on the same host."""

    request_offers: int
    """Offers in one request."""
    asked_offers_per_second: float
    """The stated load, requests at even intervals; 0: one request after the other, no load beside it."""
    offers_per_second: float
    """Answered."""
    requests: int
    failed: int
    """Requests that got no answer, or not 200."""
    p50_milliseconds: float
    p99_milliseconds: float
    """From the moment a request was due, so that waiting for a free connection counts."""


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one model on one host."""

    format: int = FORMAT
    model_digest: str
    model_kind: str
    target: str
    instance_type: str
    """``ml.inf2.xlarge``, ``c7i.xlarge``; or what the machine is, where it has no such name."""
    vcpus: int
    neuron_cores: int
    workers: int
    """Of the server whose latency was measured, and of the largest throughput."""
    parity: Parity
    throughput: list[Throughput]
    latency: list[Latency]
    peak_memory_bytes: int
    """Of all worker processes of the server together, each at its peak; 0: the system does not say."""
    measured_at: str
    """ISO time, UTC."""
    versions: dict[str, str]
    """Of the packages that compute, by the name they are distributed under."""
    code_revision: str
    how_measured: str
    """In words, for people who compare reports."""

    @property
    def offers_per_second(self) -> float:
        """Of the whole host."""
        return max((each.offers_per_second for each in self.throughput), default=0.0)

    @property
    def gate_metrics(self) -> Mapping[str, Any]:
        """What :func:`ml.evaluation.gate.compiled_matches_uncompiled` reads."""
        return msgspec.structs.asdict(self.parity)


def read_report(content: bytes, place: str) -> DeviceReport:
    """Decode a report.

    Args:
        content: Of the file.
        place: Of the file, for the message.

    Raises:
        InputError: it is no report, or of another format.
    """
    try:
        report = msgspec.json.decode(content, type=DeviceReport)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{place} is no device report: {error}") from None
    if report.format != FORMAT:
        raise InputError(f"{place} has format {report.format}, this version reads {FORMAT}; measure again")
    return report
