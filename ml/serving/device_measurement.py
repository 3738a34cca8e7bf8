"""``python -m ml device-report``: parity, throughput and latency of a compiled model on this host.

One call measures all, on an inf2 host as for any other target: throughput through the processes that
classify in bulk, latency through the server that serves, parity in this process. The report is what the
check of the compiled model reads (:mod:`ml.serving.device_report`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from ml.artifacts import verify
from ml.cores import available_cores
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.progress import Progress
from ml.runner import code_revision
from ml.serving.compiled_model import CPU, NEURON, CompiledModel, ModelSettings
from ml.serving.device_report import DeviceReport, Latency, Parity, Throughput
from ml.serving.load import measure_latency
from ml.serving.machine import this_machine
from ml.serving.neuron import NeuronHost, sdk_versions
from ml.serving.parity import compare, evaluation_sample
from ml.serving.pool import PredictorPool, WorkerError
from ml.serving.server import ServerState
from ml.serving.workers import cores_for_workers, single_thread_environment
from ml.stages import SERVABLE

_BULK_OFFERS = 512
"""Offers of a batch, as in ``python -m ml classify``."""

_LOADED_OFFERS = 32
"""Offers of a request at the stated load."""

_SHARE_OF_THROUGHPUT = 0.5
"""The load that is stated where none is asked for, of the throughput measured before."""

_SECONDS_TO_START = 600.0
"""Loading compiled programs onto the cores of a large host takes minutes."""

_SECONDS_TO_END = 60.0
_OFFERS_LOCK = threading.Lock()
_HOW = (
    "throughput: processes of python -m ml classify; latency: python -m ml serve, client on the same host; "
    "every text made distinct by a number, so that no answer came from memory; parity in one process"
)


class MeasurementError(Exception):
    """What was to be measured does not work here."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, and for how long."""

    model: Path
    """A servable artifact."""
    student: Path
    """The ``student_checkpoint`` that it was made of."""
    evaluation_set: Path
    instance_type: str
    """What this host is, for the report."""
    workers: int | None = None
    """Processes; None: one per core of what computes."""
    offers: int = 2_000
    """Offers compared."""
    seconds: float = 20.0
    """Length of each of the measurements."""
    request_sizes: tuple[int, ...] = (1, 32, 256)
    """Offers of a request, measured without other load."""
    rate: float = 0.0
    """Offers per second of the stated load; 0: half of the throughput."""


def main(arguments: Sequence[str]) -> None:
    """Measure and write the report.

    Raises:
        InputError: the model cannot run here, the artifacts do not belong together, or the output cannot be
            written.
    """
    options = _options(arguments)
    progress = Progress("device-report")
    fields = Measurement.__struct_fields__
    try:
        report = measure(Measurement(**{name: getattr(options, name) for name in fields}), progress)
    except (WorkerError, MeasurementError) as error:
        raise SystemExit(f"error: {error}") from None
    unfinished = options.output.with_name(f".{options.output.name}.{os.getpid()}.partial")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    unfinished.rename(options.output)
    progress.say(f"written to {options.output}")


def measure(options: Measurement, progress: Progress) -> DeviceReport:
    """Measure a model on this host.

    Raises:
        InputError: the model cannot run here, or the artifacts do not belong together.
        WorkerError: a process died.
        MeasurementError: the model cannot be served, or no request was answered.
    """
    model, student = options.model, options.student
    manifest = verify(model, kinds=SERVABLE)
    if manifest.inputs.get("student_checkpoint") != verify(student, kinds=["student_checkpoint"]).digest:
        raise InputError(f"--model {model} was not made of --student {student}; give the one it was made of")
    verify(options.evaluation_set, kinds=["evaluation_set"])
    sample = evaluation_sample(options.evaluation_set, options.offers)
    texts = [str(text) for text in sample["text"].to_pylist()]
    settings = ModelSettings.read(model)
    workers = len(cores_for_workers(model, options.workers))

    # A process owns the Neuron cores that it uses: this one loads the model when the others are done.
    throughput = [
        _throughput(model, count, texts, options.seconds, progress) for count in sorted({1, workers})
    ]
    rate = options.rate or _SHARE_OF_THROUGHPUT * throughput[-1].offers_per_second
    latency, peak = _latency(model, workers, texts, rate, options, progress)
    progress.say(f"comparing it with the original on {len(texts):,} offers")
    found = compare(Classifier.load(student).to("cpu").eval(), CompiledModel.open(model), sample)
    progress.say(f"same category on {found['same_category']:.1%}")
    return DeviceReport(
        model_digest=manifest.digest,
        model_kind=manifest.kind,
        target=settings.target,
        instance_type=options.instance_type,
        vcpus=available_cores(),
        neuron_cores=NeuronHost().cores,
        workers=workers,
        parity=msgspec.convert(found, Parity),
        throughput=throughput,
        latency=latency,
        peak_memory_bytes=peak,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(settings.target),
        code_revision=code_revision() or "",
        how_measured=_HOW,
    )


def _throughput(
    model: Path, workers: int, texts: Sequence[str], seconds: float, progress: Progress
) -> Throughput:
    """Offers per second of so many processes, loaded and warm."""
    progress.say(f"throughput of {workers} worker{'s' if workers > 1 else ''} for {seconds:g} s")
    offers = _distinct_offers(texts)
    done = 0
    with PredictorPool(model, workers) as pool:
        for _ in pool.predict(list(itertools.islice(offers, _BULK_OFFERS)) for _ in range(2 * workers)):
            pass  # the first batches allocate
        started_at = time.perf_counter()
        for predictions in pool.predict(_batches(offers, started_at + seconds)):
            done += len(predictions)
        elapsed = time.perf_counter() - started_at
    progress.say(f"{done / elapsed:,.0f} offers/s")
    return Throughput(workers=workers, offers=done, offers_per_second=round(done / elapsed, 1))


def _batches(offers: Iterator[dict[str, str]], until: float) -> Iterator[list[dict[str, str]]]:
    while time.perf_counter() < until:
        yield list(itertools.islice(offers, _BULK_OFFERS))


def _latency(
    model: Path,
    workers: int,
    texts: Sequence[str],
    rate: float,
    options: Measurement,
    progress: Progress,
) -> tuple[list[Latency], int]:
    """Latency at each size of request and at the stated load; and the workers' memory, at its peak."""
    offers = _distinct_offers(texts)
    measured = []
    with _server(model, workers) as server:
        for request_offers, asked in [
            *((size, 0.0) for size in options.request_sizes),
            (_LOADED_OFFERS, rate),
        ]:
            load = f"{asked:,.0f} offers/s" if asked else "no other load"
            progress.say(f"latency of requests of {request_offers} at {load} for {options.seconds:g} s")
            made = measure_latency(
                server.url,
                partial(_body, offers, request_offers),
                request_offers=request_offers,
                rate=asked,
                seconds=options.seconds,
            )
            if made.failed == made.requests:
                raise MeasurementError(
                    f"none of {made.requests} requests of {request_offers} offers was answered; the server's "
                    "own output says why"
                )
            progress.say(
                f"p50 {made.p50_milliseconds:.1f} ms, p99 {made.p99_milliseconds:.1f} ms, "
                f"{made.offers_per_second:,.0f} offers/s, {made.failed} of {made.requests} failed"
            )
            measured.append(made)
        return measured, sum(_peak_memory(worker) for worker in server.workers)


def _body(offers: Iterator[dict[str, str]], size: int) -> bytes:
    with _OFFERS_LOCK:
        some = list(itertools.islice(offers, size))
    return msgspec.json.encode({"offers": some})


def _distinct_offers(texts: Sequence[str]) -> Iterator[dict[str, str]]:
    """Offers without end, no two of the same text: a predictor remembers those it has seen."""
    for number, text in enumerate(itertools.cycle(texts)):
        yield {"title": f"{number} {text}"}


@contextmanager
def _server(model: Path, workers: int) -> Iterator[ServerState]:
    """A server of the model on a free port of this machine, while the body runs."""
    with tempfile.TemporaryDirectory(prefix="device-report-") as folder:
        state_file = Path(folder) / "state.json"
        command = [sys.executable, "-m", "ml", "serve", "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", "0", "--workers", str(workers), "--state-file", str(state_file)]
        process = subprocess.Popen(command, env=single_thread_environment())
        try:
            deadline = time.monotonic() + _SECONDS_TO_START
            while not state_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise MeasurementError(f"{model} cannot be served; the server's own output says why")
                time.sleep(0.05)
            yield msgspec.json.decode(state_file.read_bytes(), type=ServerState)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
            process.kill()
            process.wait()


def _peak_memory(process_id: int) -> int:
    """Bytes that a process had in memory at most; 0 where the system does not say (macOS)."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _versions(target: str) -> dict[str, str]:
    """Of the packages that compute a model of this target."""
    if target == NEURON:
        return sdk_versions()
    package = "onnxruntime" if target == CPU else "torch"
    return {package: importlib.metadata.version(package)}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    machine = this_machine()
    default = {field.name: field.default for field in msgspec.structs.fields(Measurement)}
    parser = argparse.ArgumentParser(
        prog="python -m ml device-report",
        description="Measure a compiled model on this host and write a report of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="a compiled_student artifact"
    )
    parser.add_argument(
        "--student", required=True, type=Path, metavar="DIR", help="the student_checkpoint it was made of"
    )
    parser.add_argument(
        "--evaluation-set", required=True, type=Path, metavar="DIR", help="an evaluation_set artifact"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--instance-type",
        default=machine.instance_type or machine.description,
        help="what this host is, e.g. inf2.xlarge; on EC2 and in SageMaker it knows that by itself",
    )
    parser.add_argument(
        "--workers", type=int, help="processes (one per core; on a Neuron host one per Neuron core)"
    )
    parser.add_argument(
        "--offers", type=int, default=default["offers"], help="offers compared; few for a dry run"
    )
    parser.add_argument(
        "--seconds", type=float, default=default["seconds"], help="length of each measurement"
    )
    parser.add_argument(
        "--request-sizes",
        type=int,
        nargs="+",
        default=default["request_sizes"],
        metavar="N",
        help="offers of a request",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=default["rate"],
        help=f"offers/s of the stated load, in requests of {_LOADED_OFFERS}; 0: half of the throughput",
    )
    options = parser.parse_args(arguments)
    for name in ("workers", "offers", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} {value}: expected more than 0")
    if min(options.request_sizes) < 1 or options.rate < 0:
        raise InputError("--request-sizes and --rate: expected at least 1 offer, and no negative rate")
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}: expected a file in a folder that exists")
    return options
