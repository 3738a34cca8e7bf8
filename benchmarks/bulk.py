"""Bulk classification of millions of offers: speed, memory over time, and a kill on the way.

    python -m benchmarks.bulk [--offers 5000000] [--model DIR]

Writes demo offers to a feed of several Parquet files and classifies them with ``python -m ml classify``.
At a place that the seed chooses, parent and workers are killed with signal 9; the same command then goes on
to the end. Verified: every offer of the feed is in the result once and in order, and at a sample of places
(among them the place of the kill) the answers are those that a predictor gives without interruption.

Memory is the resident memory of parent and workers added up, so shared pages count once per process.
It goes to ``benchmarks/results/bulk.json`` and, drawn over the offers done, to ``bulk.png``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import RESULTS, save, show
from ml.artifacts import read_manifest, short_version
from ml.demo.feed import FIRST_DAY, DemoFeed
from ml.feed.reading import discover_files, read_batches
from ml.progress import Progress
from ml.serving.classify import model_folder
from ml.serving.parts import work_folder
from ml.serving.predictor import PREDICTION_SCHEMA, Predictor, prediction_table

MEMORY_LIMIT_MB = 1_500

_SECONDS_BETWEEN_SAMPLES = 0.25
_SAMPLES_KEPT = 60
_SAMPLED_PLACES = 20
_OFFERS_PER_PLACE = 256
_MB = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Run:
    """One start of the command, watched."""

    offers_before: int
    seconds: float = 0.0
    offers: int = 0
    """In finished parts at the end."""
    join_seconds: float = 0.0
    samples: list[tuple[float, int, float]] = field(default_factory=list)
    """Seconds, offers in finished parts, MB of parent and workers together."""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offers", type=int, default=5_000_000, help="offers in all (default: %(default)s)")
    parser.add_argument("--files", type=int, default=10, help="files of the feed (default: %(default)s)")
    parser.add_argument("--model", default="current", help="a compiled_student artifact (default: current)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--seed", type=int, default=17, help="chooses the place of the kill and the sample")
    parser.add_argument("--name", default="bulk", help="name of the result files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures, runs = measure(folder, options)
    show(
        [
            {
                "run": name,
                "offers": run.offers - run.offers_before,
                "seconds": run.seconds,
                "offers_per_second": (run.offers - run.offers_before) / run.seconds,
                "peak MB": max((megabytes for _, _, megabytes in run.samples), default=0.0),
            }
            for name, run in zip(("killed", "resumed"), runs, strict=True)
        ]
    )
    save(options.name, figures)
    (RESULTS / f"{options.name}.png").write_bytes(memory_over_offers(runs))


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[Run]]:
    """Write the feed, classify it with a kill on the way, verify the result."""
    progress = Progress("bulk")
    chance = random.Random(options.seed)
    model = model_folder(options.model)
    feed, output = folder / "feed", folder / "out.parquet"
    generation = _write_feed(feed, options.offers, options.files, options.seed, progress)
    offers = generation["offers"]
    share = chance.uniform(0.2, 0.8)
    command = [
        sys.executable,
        "-m",
        "ml",
        "classify",
        "--model",
        str(model),
        "--workers",
        str(options.workers),
    ]
    command += [str(feed), str(output)]
    killed = _run(command, output, kill_at=int(share * offers))
    progress.say(f"killed with {killed.offers:,} of {offers:,} offers in finished parts; going on")
    resumed = _run(command, output, offers_before=killed.offers)
    verified = verify(model, feed, output, [killed.offers], chance, progress)
    runs = [killed, resumed]
    peak = max(megabytes for run in runs for _, _, megabytes in run.samples)
    figures = {
        "offers": offers,
        "files": options.files,
        "workers": options.workers,
        "model": short_version(read_manifest(model).digest),
        "feed": generation,
        "killed_at": {"share": share, "offers_in_finished_parts": killed.offers},
        "offers_per_second": offers / (killed.seconds + resumed.seconds),
        "join_seconds": resumed.join_seconds,
        "runs": [
            {
                "offers_before": run.offers_before,
                "offers_after": run.offers,
                "seconds": run.seconds,
                "peak_mb": max(megabytes for _, _, megabytes in run.samples),
                "mb_per_million_offers": growth(run),
                "memory": _thinned(run),
            }
            for run in runs
        ],
        "peak_mb": peak,
        "memory_limit_mb": MEMORY_LIMIT_MB,
        "under_memory_limit": peak < MEMORY_LIMIT_MB,
        "verified": verified,
    }
    return figures, runs


def _write_feed(feed: Path, offers: int, files: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Days of a demo feed, one per file."""
    from resource import RUSAGE_SELF, getrusage

    started_at = time.perf_counter()
    per_file = [offers // files + (number < offers % files) for number in range(files)]
    for number, count in enumerate(per_file):
        day = FIRST_DAY + datetime.timedelta(days=number)
        DemoFeed(seed=seed, offers_per_day=count).write_day(feed, day, progress=progress)
    seconds = time.perf_counter() - started_at
    written = sum(pq.read_metadata(path).num_rows for path in feed.iterdir())  # shops repeat some rows
    return {
        "offers": written,
        "seconds": seconds,
        "offers_per_second": written / seconds,
        "peak_mb": getrusage(RUSAGE_SELF).ru_maxrss / 1024,
        "bytes": sum(path.stat().st_size for path in feed.iterdir()),
    }


def _run(command: Sequence[str], output: Path, kill_at: int | None = None, offers_before: int = 0) -> Run:
    """Run the command to its end, or kill it when so many offers lie in finished parts."""
    run = Run(offers_before, offers=offers_before)
    progress = _Finished(output)
    started_at = time.perf_counter()
    joining_since: float | None = None
    process = subprocess.Popen(command)
    while process.poll() is None:
        run.offers = progress.offers() or run.offers
        now = time.perf_counter()
        family = [process.pid, *_children(process.pid)]
        run.samples.append((now - started_at, run.offers, sum(map(_resident_mb, family))))
        if joining_since is None and (work_folder(output) / "joined.partial").exists():
            joining_since = now
        if kill_at is not None and run.offers >= kill_at:
            for number in family:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    ended_at = time.perf_counter()
    run.seconds = ended_at - started_at
    run.join_seconds = ended_at - joining_since if joining_since else 0.0
    if kill_at is None:
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        run.offers = pq.read_metadata(output).num_rows
    elif process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the command ended with status {process.returncode} before it was to be killed")
    else:
        run.offers = progress.offers()
    return run


class _Finished:
    """Counts offers in finished parts; each is looked at once."""

    def __init__(self, output: Path) -> None:
        self._folder = work_folder(output)
        self._rows: dict[str, int] = {}

    def offers(self) -> int:
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in self._rows:
                with suppress(FileNotFoundError):  # joined meanwhile
                    self._rows[path.name] = pq.read_metadata(path).num_rows
        return sum(self._rows.values())


def _children(process: int) -> list[int]:
    """Child processes of all threads of ``process``."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(number) for number in path.read_text().split()]
    return found


def _resident_mb(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * _PAGE_BYTES / _MB


def growth(run: Run) -> float | None:
    """MB per million offers, by least squares over the later half of the run; None of too short a run."""
    middle = (run.offers_before + run.offers) / 2
    points = [(offers, megabytes) for _, offers, megabytes in run.samples if offers >= middle]
    if len({offers for offers, _ in points}) < 3:
        return None
    done, megabytes = np.array(points, dtype=float).T
    return float(np.polyfit(done / 1e6, megabytes, 1)[0])


def _thinned(run: Run) -> list[dict[str, float]]:
    """Some of the samples, evenly spaced in time."""
    step = max(1, len(run.samples) // _SAMPLES_KEPT)
    return [
        {"seconds": round(seconds, 1), "offers": offers, "mb": round(megabytes, 1)}
        for seconds, offers, megabytes in run.samples[::step]
    ]


def verify(
    model: Path, feed: Path, output: Path, places: Sequence[int], chance: random.Random, progress: Progress
) -> dict[str, Any]:
    """Hold ids against the feed's row by row, and answers at some places against those of a predictor."""
    predictor = Predictor.load(model)
    total = pq.read_metadata(output).num_rows
    starts = {max(0, place - _OFFERS_PER_PLACE // 2) for place in places}
    starts |= {chance.randrange(max(1, total - _OFFERS_PER_PLACE)) for _ in range(_SAMPLED_PLACES)}
    compared = different = rows = 0
    with progress.bar("verifying", total, "offers") as bar:
        for offers, answers in _aligned(feed, output):
            if not offers["offer_id"].equals(answers["offer_id"].combine_chunks()):
                raise SystemExit(f"behind row {rows:,}, the result has other offers than the feed")
            for start in starts:
                here = slice(max(0, start - rows), min(len(answers), start + _OFFERS_PER_PLACE - rows))
                if here.start < here.stop:
                    length = here.stop - here.start
                    expected = prediction_table(
                        predictor.predict(offers.slice(here.start, length).to_pylist())
                    )
                    actual = answers.select(PREDICTION_SCHEMA.names).slice(here.start, length)
                    compared += length
                    different += _rows_that_differ(actual, expected)
            rows += len(answers)
            bar.update(len(answers))
    if rows != total:
        raise SystemExit(f"the feed has {rows:,} offers, the result {total:,}")
    if different:
        raise SystemExit(
            f"{different:,} of {compared:,} sampled offers have other answers than uninterrupted"
        )
    return {"offers_once_and_in_order": rows, "answers_compared": compared, "answers_that_differ": different}


def _aligned(feed: Path, output: Path) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
    """The feed batch by batch, each with as many rows of the result."""
    with pq.ParquetFile(output) as file:
        rows = _Rows(file.iter_batches())
        for source in discover_files(str(feed)):
            for batch in read_batches(source):
                yield batch, rows.take(batch.num_rows)
        if rows.take(1).num_rows:
            raise SystemExit("the result has more offers than the feed")


class _Rows:
    """Takes so many rows at a time from batches."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._waiting: list[pa.RecordBatch] = []

    def take(self, count: int) -> pa.Table:
        """The next ``count`` rows; fewer at the end."""
        while sum(batch.num_rows for batch in self._waiting) < count:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._waiting.append(batch)
        if not self._waiting:
            return PREDICTION_SCHEMA.empty_table()
        table = pa.Table.from_batches(self._waiting)
        self._waiting = table.slice(count).combine_chunks().to_batches()
        return table.slice(0, count)


def _rows_that_differ(actual: pa.Table, expected: pa.Table) -> int:
    return sum(ours != theirs for ours, theirs in zip(actual.to_pylist(), expected.to_pylist(), strict=True))


def memory_over_offers(runs: Sequence[Run]) -> bytes:
    """Memory of parent and workers over the offers done, run by run, as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, run, colour in zip(("until the kill", "resumed"), runs, ("#2563eb", "#059669"), strict=True):
        offers = [done / 1e6 for _, done, _ in run.samples]
        axes.plot(offers, [megabytes for _, _, megabytes in run.samples], color=colour, label=name)
    axes.axhline(MEMORY_LIMIT_MB, color="#dc2626", linestyle="--", linewidth=1, label="limit")
    axes.set(
        xlabel="million offers done", ylabel="MB, all processes", ylim=(0, None), title="Bulk classification"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, edgecolor="none")
    content = io.BytesIO()
    canvas.print_png(content, metadata={"Software": None})
    return content.getvalue()


if __name__ == "__main__":
    main()
