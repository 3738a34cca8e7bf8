"""From a changed taxonomy file to the new version answering in a running daemon; warm beside full retrain.

    python -m benchmarks.taxonomy_change                                    # the demo feed, version 1 to 2
    python -m benchmarks.taxonomy_change --offers FEED --releases OLD.csv NEW.csv [--split-by shop]
    python -m benchmarks.taxonomy_change --offers-from-names --releases A.csv B.csv C.csv

Runs the whole graph under the first release, starts ``dagster dev``, puts one release after the other into
the watched folder (with its mapping, if ``<release>.mapping.csv`` lies beside it), and waits each time until
the endpoint answers with a version of it. Then it trains afresh under the last taxonomy, on the same sample
and evaluation set. Quality is that of the version before (its answers mapped to the new taxonomy), of the
warm start and of the full retrain, on the same offers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import save, show
from ml.taxonomy import Taxonomy
from offer_assets.definitions import build_defs
from offer_assets.headless import HeadlessRuns
from offer_assets.instance import instance_for
from offer_assets.jobs import FOLLOW_TAXONOMY, TRAIN_AND_RELEASE
from offer_assets.partitions import CPU
from resources.environment import resources_for
from resources.settings import Settings

_LONGEST_SECONDS = 3 * 3600.0
_LEAST_CATEGORIES = 40
_OFFERS_PER_CATEGORY = 24
_WARM_FIGURES = ("rows_kept", "rows_merged", "rows_new", "training_seconds")
_GROUPS = ("", "_unchanged", "_changed", "_new", "_weak_categories")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offers", type=Path, help="labelled feed; default: the demo feed")
    parser.add_argument(
        "--offers-from-names", action="store_true", help="make offers of the categories' names"
    )
    parser.add_argument(
        "--releases", type=Path, nargs="+", default=[], help="releases of its taxonomy, in order"
    )
    parser.add_argument("--split-by", default="product", choices=("shop", "product"))
    parser.add_argument("--name", default="taxonomy_change", help="name of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder, "taxonomy")
        if options.releases:
            watched.mkdir()
            _put(options.releases[0], watched)
        if options.offers_from_names:
            options.offers = Path(folder, "offers.parquet")
            _write_offers_from_names(options.releases, options.offers)
        environment = _environment(options, Path(folder, "home"), watched)
        try:
            figures = _measure(options, environment, watched)
        finally:
            _run("stop", environment, check=False)
    for step in figures["steps"]:
        print(f"\n{step['release']}: {step['seconds_from_file_to_answer']:.0f} s from file to answer")
        show(step["seconds_by_stage"])
        show(step["quality"])
    show(figures["full_retrain"]["quality"])
    save(options.name, {"feed": options.offers.name if options.offers else "demo", **figures})


def _environment(options: argparse.Namespace, home: Path, watched: Path) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OFFER_ASSETS_HOME": str(home),
        "OFFER_ASSETS_SPLIT_BY": options.split_by,
        "OFFER_ASSETS_ENDPOINT_PORT": str(port),
    }
    if options.offers:
        environment |= {"OFFER_FEED": str(options.offers.absolute()), "CATALOG_TAXONOMY": str(watched)}
    return environment


def _put(release: Path, watched: Path) -> None:
    """Deliver a release: its mapping first, the tree in one step."""
    mapping = release.with_suffix(".mapping.csv")
    for file in (mapping, release):
        if file.exists():
            partial = watched / f"{file.name}.partial"
            shutil.copyfile(file, partial)
            partial.rename(watched / file.name)


def _write_offers_from_names(releases: Sequence[Path], target: Path) -> None:
    """Offers titled like their category, for a taxonomy that there are no labelled offers of.

    All categories that a later release has no more, and as many others: enough to see that labels, models
    and the endpoint follow; what quality means on real offers is another feed's to say.
    """
    trees = [Taxonomy.read_csv(str(release)) for release in releases]
    first = trees[0]
    leaving = [leaf for leaf in first.leaves if any(leaf not in tree for tree in trees)]
    staying = [leaf for leaf in first.leaves if all(leaf in tree for tree in trees)]
    random = np.random.default_rng(17)
    chosen = [*leaving, *random.choice(staying, size=max(len(leaving), _LEAST_CATEGORIES), replace=False)]
    words = ["new", "set", "classic", "large", "small", "blue", "black", "deluxe", "pack of 2", "original"]
    rows = []
    for category in chosen:
        for number in range(_OFFERS_PER_CATEGORY):
            extra = " ".join(random.choice(words, size=2, replace=False))
            rows.append(
                {
                    "offer_id": f"{category}/{number}",
                    "shop_id": f"shop-{number % 7}",
                    "title": f"{first.name(str(category))} {extra} {random.integers(100, 999)}",
                    "country": "US",
                    "category_id": str(category) if number % 4 else None,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), target)


def _measure(options: argparse.Namespace, environment: dict[str, str], watched: Path) -> dict[str, Any]:
    started_at = time.perf_counter()
    _run("demo", environment)
    first_seconds = time.perf_counter() - started_at
    os.environ.update(environment)
    settings = Settings.from_environment()
    steps = []
    with _dev(environment):
        for release in options.releases[1:] or [None]:
            steps.append(_follow(release, settings, environment, watched))
    return {
        "first_training_seconds": first_seconds,
        "steps": steps,
        "full_retrain": _train_afresh(settings),
    }


def _follow(
    release: Path | None, settings: Settings, environment: dict[str, str], watched: Path
) -> dict[str, Any]:
    """Deliver a release (None: the demo feed's next) and wait until a version of it answers."""
    resources = resources_for(settings)
    store, before = resources["artifact_store"], resources["endpoints"].status()
    with instance_for(settings) as instance:
        earlier = {run.run_id for run in _runs(instance)}
        changed_at = time.time()
        if release is None:
            _run("demo-taxonomy", environment)
        else:
            _put(release, watched)
        run = _wait_for(lambda: _finished(instance, earlier), "the end of the run")
        if run.status != dg.DagsterRunStatus.SUCCESS:
            raise SystemExit(f"run {run.run_id} ended {run.status.value}: see {settings.home}/dagster")
        record = instance.get_run_record_by_id(run.run_id)
        steps = [s for s in instance.get_run_step_stats(run.run_id) if s.start_time and s.end_time]
    assets = sorted((s for s in steps if "_" in s.step_key), key=lambda s: s.start_time)
    after = resources["endpoints"].status()
    assert after.model_version != before.model_version
    served = next(step.end_time for step in assets if step.step_key == "offer_endpoint")
    warm = store.read_pointer("student_evaluation").metrics
    return {
        "release": release.stem if release else "demo version 2",
        "seconds_from_file_to_answer": served - changed_at,
        "seconds_by_stage": [
            {"stage": "settling, sensor, launch", "seconds": record.start_time - changed_at},
            *({"stage": step.step_key, "seconds": step.end_time - step.start_time} for step in assets),
        ],
        "quality": [
            _quality("before, mapped", warm, "production"),
            _quality("warm start", warm, "student"),
            _quality("teacher, warm start", warm, "teacher"),
        ],
        "warm_minus_before": _comparisons(warm),
        "change": store.read_pointer("taxonomy_change").metrics,
        "migrated": store.read_pointer("migrated_labels").metrics,
        "training_sample": store.read_pointer("training_sample").metrics,
        "warm_start": {
            name: {key: store.read_pointer(name).metrics.get(key) for key in _WARM_FIGURES}
            for name in ("teacher_checkpoint", "student_checkpoint")
        },
    }


def _train_afresh(settings: Settings) -> dict[str, Any]:
    """A full retrain under the taxonomy in force, headless."""
    with instance_for(settings) as instance:
        runs = HeadlessRuns(definitions=build_defs(settings), instance=instance, assets_in_all=11)
        started_at = time.perf_counter()
        passed = runs.run(TRAIN_AND_RELEASE, CPU)
        seconds = time.perf_counter() - started_at
    evaluation = resources_for(settings)["artifact_store"].read_pointer("student_evaluation")
    full = evaluation.metrics
    return {
        "seconds": seconds,
        "served": passed,
        "seconds_by_stage": [{"stage": made.name, "seconds": made.seconds} for made in runs.made],
        "quality": [
            _quality("full retrain", full, "student"),
            _quality("teacher, full retrain", full, "teacher"),
        ],
        "full_minus_warm": _comparisons(full),
    }


def _quality(name: str, metrics: dict[str, Any], model: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name}
    for group in _GROUPS:
        row[f"weighted_f1{group}"] = metrics.get(f"{model}_weighted_f1{group}")
    return {**row, "macro_f1": metrics.get(f"{model}_macro_f1")}


def _comparisons(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in metrics.get("comparisons", []) if row["group"] in ("overall", "change")]


def _run(command: str, environment: dict[str, str], *, check: bool = True) -> None:
    subprocess.run([sys.executable, "-m", "offer_assets", command], env=environment, check=check)


@contextlib.contextmanager
def _dev(environment: dict[str, str]) -> Iterator[None]:
    """A webserver and daemon, as ``make dev`` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "offer_assets", "dev", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _runs(instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
    return instance.get_runs(filters=dg.RunsFilter(job_name=FOLLOW_TAXONOMY))


def _finished(instance: dg.DagsterInstance, earlier: set[str]) -> dg.DagsterRun | None:
    """The run that the sensor started for the new release, once it is over."""
    return next((run for run in _runs(instance) if run.run_id not in earlier and run.is_finished), None)


def _wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.5)
    raise SystemExit(f"{what} did not come within {_LONGEST_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
