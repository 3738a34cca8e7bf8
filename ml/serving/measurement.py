"""Stage ``serving_measurement``: what the compiled student does on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.benchmark import MACHINE_FILE, REPORT_FILE
from ml.serving.device_measurement import Measurement, measure
from ml.serving.machine import this_machine
from ml.stages import ServingMeasurementParameters


def measure_serving(context: StageContext, parameters: ServingMeasurementParameters) -> dict[str, Any]:
    """Stage ``serving_measurement``: a device report of this machine.

    Returns:
        Figures of the report by which two measurements are compared at a glance.

    Raises:
        InputError: this is not the machine that the parameters name, or the model cannot run on it.
    """
    machine = this_machine()
    if parameters.machine != machine.description:
        raise InputError(
            f"machine {parameters.machine!r}: this one is {machine.description!r}, whose figures are others; "
            "give what this one is, or run it there"
        )
    report = measure(
        Measurement(
            model=context.input("compiled_student"),
            student=context.input("student_checkpoint"),
            evaluation_set=context.input("evaluation_set"),
            instance_type=machine.instance_type or machine.description,
            offers=parameters.offers,
            seconds=parameters.seconds,
        ),
        context.progress,
    )
    _write_json(context.output / REPORT_FILE, report)
    _write_json(context.output / MACHINE_FILE, machine)
    return {
        "machine": machine.description,
        "workers": report.workers,
        "offers_per_second": report.offers_per_second,
        "p99_milliseconds": max(latency.p99_milliseconds for latency in report.latency),
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def _write_json(path: Path, content: msgspec.Struct) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
