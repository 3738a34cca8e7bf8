"""Offers per second, memory and size of every model on the same offers, and how throughput grows.

    python -m benchmarks.throughput --models DIR            # DIR: --work of benchmarks.quality
    python -m benchmarks.throughput                         # trains tiny models on offers of the demo feed

Each model is measured in a process of its own, with one thread and with all cores in the way that is best
for it: threads where it has any, else a process per core. No two measured offers have the same text and none
comes twice, so no cache answers for a model; what share of the offers repeats an earlier one is in the
result. Results include making the text and tokenizing. Then, as curves: with cores, with offers (10^4 to
10^6, streamed; 10^7 with --full), and with categories (synthetic output layers of 10^2 to 10^4).
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import one_model, report
from benchmarks.labelled_offers import divide, duplicate_share, with_labels
from benchmarks.one_model import Speed, Task
from benchmarks.our_models import MODELS, QUICK, OurModel, Workshop
from benchmarks.plots import curves
from benchmarks.quality import MODELS_FILE, size_of
from ml.artifacts import MANIFEST
from ml.cores import available_cores
from ml.demo.feed import DemoFeed
from ml.errors import InputError
from ml.progress import Progress
from ml.taxonomy import Taxonomy

CURVES = ("cores", "offers", "categories")
CURVE_MODELS = ("compiled", "cascade", "fast")
OFFERS = (10_000, 100_000, 1_000_000)
FULL_OFFERS = 10_000_000
CATEGORIES = (100, 1_000, 10_000)

_TINY_OFFERS = 1_500
_TINY_DAY = datetime.date(2026, 11, 1)

_progress = Progress("throughput")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = _parser().parse_args(arguments)
    with report.refused_plainly():
        figures = run(options)
    print()
    report.show(_columns(figures["models"]))
    report.save(options.name, figures)
    for curve, label in (("cores", "cores"), ("offers", "offers"), ("categories", "categories")):
        if points := figures["curves"].get(curve):
            path = report.RESULTS / f"{options.name}_{curve}.png"
            _draw_curve(points, label, path)
            print(f"drawn in {path}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the options ask for; returns the content of the result file.

    Raises:
        InputError: there are no models in the folder given, or a name is unknown.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    places = read_models(options.models) if options.models else _tiny_models(options.work)
    offers = Path(places["evaluation_set"]) / "offers.parquet"
    table = pq.read_table(offers)
    folders = {name: Path(folder) for name, folder in places["models"].items()}
    if "compiled" in folders:
        folders["endpoint"] = folders["compiled"]
    if options.only is not None:
        folders = {name: folder for name, folder in folders.items() if name in options.only}
    asking = _Asking(options, offers)
    rows = [_row(asking, name, folder) for name, folder in folders.items()]
    drawn = {name: folder for name, folder in folders.items() if name in CURVE_MODELS}
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "cores": lambda: _by_cores(asking, drawn),
        "offers": lambda: _by_offers(asking, drawn, options),
        "categories": lambda: _by_categories(asking, folders),
    }
    return {
        "offers": table.num_rows,
        "duplicate_share": duplicate_share(table),
        "duplicates": "switched off: no two measured offers have the same text",
        "seconds_per_measurement": options.seconds,
        "models": rows,
        "curves": {curve: measures[curve]() for curve in options.curves},
    }


class _Asking:
    """Asks processes for measurements of models on the same offers."""

    def __init__(self, options: argparse.Namespace, offers: Path) -> None:
        self._options, self._offers = options, offers
        self._number = 0

    def speed(self, model: str, folder: Path, cores: int, **changes: Any) -> Speed | str:
        """What was measured, or why nothing."""
        self._number += 1
        task = Task(
            kind=changes.pop("kind", "measure"),
            model=model,
            folder=str(folder),
            result=str(self._options.work / "outcomes" / f"{self._number}.json"),
            offers=str(self._offers),
            cores=cores,
            seconds=self._options.seconds,
            **changes,
        )
        packages = self._options.onnx_packages if model == "onnx" else None
        outcome = one_model.run(task, packages)
        return outcome.speed or outcome.not_run


def _row(asking: _Asking, name: str, folder: Path) -> dict[str, Any]:
    model = one_model.MEASURABLE[name]
    cores = available_cores()
    _progress.say(f"{model.title}: 1 thread, then {cores} cores")
    row: dict[str, Any] = {
        "model": model.title,
        "name": name,
        "is_ours": isinstance(model, OurModel),
        "size_bytes": size_of(folder),
    }
    for key, number in (("one_thread", 1), ("all_cores", cores)):
        row[key] = _plain(asking.speed(name, folder, number))
    return row


def _plain(speed: Speed | str) -> dict[str, Any]:
    return {"not_run": speed} if isinstance(speed, str) else msgspec.to_builtins(speed)


# Curves


def _by_cores(asking: _Asking, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Offers per second with 1 core, 2, and so on."""
    points = []
    for name, folder in folders.items():
        for cores in range(1, available_cores() + 1):
            _progress.say(f"{name}, {cores} of {available_cores()} cores")
            points.append({"model": name, "cores": cores, **_plain(asking.speed(name, folder, cores))})
    return points


def _by_offers(
    asking: _Asking, folders: Mapping[str, Path], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Offers per second and memory of so many offers in one stream; what would take too long is not run."""
    points = []
    sizes = (*OFFERS, FULL_OFFERS) if options.full else OFFERS
    for name, folder in folders.items():
        rate = 0.0
        for size in sizes:
            if rate and size / rate > options.longest:
                reason = (
                    f"would take about {size / rate / 60:.0f} min, --longest is {options.longest / 60:.0f}"
                )
                points.append({"model": name, "offers": size, "not_run": reason})
                continue
            _progress.say(f"{name}, {size:,} offers" + (f", about {size / rate:.0f} s" if rate else ""))
            speed = asking.speed(name, folder, available_cores(), kind="stream", stream_offers=size)
            rate = speed.offers_per_second if isinstance(speed, Speed) else rate
            points.append({"model": name, **_plain(speed), "offers": size})
    return points


def _by_categories(asking: _Asking, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Offers per second with output layers of so many categories, on the same encoder and n-grams."""
    points = []
    for name in ("compiled", "fast"):
        for categories in CATEGORIES if name in folders and "student" in folders else ():
            _progress.say(f"{name}, {categories:,} categories")
            folder = folders["student" if name == "compiled" else name]
            speed = asking.speed(name, folder, 1, categories=categories)
            points.append({"model": name, "categories": categories, **_plain(speed)})
    return points


def _draw_curve(points: Sequence[Mapping[str, Any]], axis: str, path: Path) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if "offers_per_second" in point:
            series.setdefault(one_model.MEASURABLE[point["model"]].title, []).append(
                (point[axis], point["offers_per_second"])
            )
    curves(
        series,
        path,
        title=f"Throughput with {axis}",
        x_label=axis if axis != "offers" else "offers in one stream",
        y_label="offers per second",
        logarithmic=axis != "cores",
    )


# Models


def read_models(folder: Path) -> dict[str, Any]:
    """What the work folder of a finished ``benchmarks.quality`` says where its models and offers are.

    Raises:
        InputError: it does not say, or something of it is gone.
    """
    path = folder / MODELS_FILE
    try:
        places: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: give the --work folder of a finished benchmarks.quality"
        ) from None
    if gone := [place for place in places["models"].values() if not (Path(place) / MANIFEST).exists()]:
        raise InputError(f"{gone[0]}, which {path} names, is gone; run benchmarks.quality again")
    return places


def _tiny_models(work: Path) -> dict[str, Any]:
    """This project's models, trained for a minute on offers of the demo feed."""
    _progress.say(f"training tiny models on {_TINY_OFFERS:,} offers of the demo feed")
    feed = DemoFeed(offers_per_day=_TINY_OFFERS)
    table = next(feed.chunks(_TINY_DAY))
    truth = {row["offer_id"]: row["category_id"] for row in feed.true_categories(_TINY_DAY).to_pylist()}
    workshop = Workshop(work, QUICK)
    taxonomy = workshop.taxonomy(feed.write_taxonomy(work / "taxonomy"))
    labelled = with_labels(table, truth)
    clean = pc.is_in(labelled["category_id"], pa.array(Taxonomy.load(taxonomy).ids))
    for needed in ("offer_id", "shop_id", "title"):  # the demo feed's offers have every fault there is
        clean = pc.and_(clean, pc.is_valid(labelled[needed]))
    divided = divide(labelled.filter(clean), "product", 0.3, 17)
    inputs = {
        "catalog_taxonomy": taxonomy,
        "training_sample": workshop.training_sample(divided.train, "product", 0.1, 17),
        "evaluation_set": workshop.evaluation_set(divided.test, "product", 0.3, 17),
    }
    made = dict(workshop.train(inputs))
    return {
        "models": {model.name: str(made[model.stage]) for model in MODELS},
        **{name: str(folder) for name, folder in inputs.items()},
    }


# Table and options


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        one, all_cores = row["one_thread"], row["all_cores"]
        peak = all_cores.get("peak_memory_bytes")
        shown.append(
            {
                "model": row["model"],
                "1 thread/s": _rounded(one.get("offers_per_second")),
                "all cores/s": _rounded(all_cores.get("offers_per_second")),
                "peak MB": None if peak is None else round(peak / 1e6),
                "MB": round(row["size_bytes"] / 1e6, 1),
                "not run": one.get("not_run") or all_cores.get("not_run"),
            }
        )
    return shown


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="throughput", help="of the result files")
    parser.add_argument("--models", type=Path, metavar="DIR", help="work folder of benchmarks.quality")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks/throughput"))
    parser.add_argument("--only", nargs="*", choices=list(one_model.MEASURABLE))
    parser.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, about")
    parser.add_argument(
        "--longest", type=float, default=240.0, help="seconds that one point of a curve may take"
    )
    parser.add_argument("--full", action="store_true", help=f"also {FULL_OFFERS:,} offers in one stream")
    parser.add_argument("--onnx-packages", type=Path, help="as of benchmarks.quality")
    return parser


if __name__ == "__main__":
    main()
