"""Choosing an encoder and settings on real offers, and whether the choice holds on offers of other shops.

    python -m benchmarks.choosing NAME --models DIR --encoders packaged-minilm:1 packaged-minilm:3
    python -m benchmarks.choosing NAME --models DIR --search fast student --trials 20 --minutes 15

DIR is the ``--work`` folder of a finished ``benchmarks.quality``: its training sample is what the stages
``encoder_comparison`` (with the parameters of ``teacher_checkpoint``) and ``hyperparameter_search`` learn
from and choose by. What a search found is then trained once more beside what was set, and both answer the
held-out offers, which had no part in the choice. What was finished before a kill is kept.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import pyarrow.parquet as pq

from benchmarks import one_model, report
from benchmarks.one_model import Task
from benchmarks.our_models import Parameters, Workshop, changes_of
from benchmarks.quality import scored
from benchmarks.throughput import read_models
from ml.artifacts import read_manifest
from ml.cores import available_cores
from ml.errors import InputError
from ml.learning.encoder_files import split_layers
from ml.learning.search_space import STAGE_OF, SearchedModel
from ml.progress import Progress
from ml.stages import stage_named
from ml.taxonomy import Taxonomy

_INPUTS = ("training_sample", "catalog_taxonomy")

_progress = Progress("choosing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose and report."""
    options = _parser().parse_args(arguments)
    with report.refused_plainly():
        figures = run(options)
    for rows, columns in ((figures["encoders"], _encoder_columns), (figures["searches"], _search_columns)):
        if rows:
            print()
            report.show([columns(row) for row in rows])
    report.save(f"choosing_{options.name}", figures)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison and the searches that were asked for; returns the content of the result file.

    Raises:
        InputError: nothing was asked for, the folder has no models, or a setting is wrong.
    """
    if not options.encoders and not options.search:
        raise InputError("nothing to choose: give --encoders or --search")
    places, changes = read_models(options.models), changes_of(options.quick, options.set)
    inputs = {name: Path(places[name]) for name in _INPUTS}
    evaluation = Path(places["evaluation_set"])
    return {
        "changed_parameters": {stage: dict(values) for stage, values in changes.items()},
        "encoders": _compared(options, inputs, changes) if options.encoders else [],
        "searches": [_searched(options, model, inputs, evaluation, changes) for model in options.search],
    }


def _compared(
    options: argparse.Namespace, inputs: Mapping[str, Path], changes: Parameters
) -> list[dict[str, Any]]:
    """A row per encoder."""
    encoders = [
        {"encoder": encoder, "layers": layers} for encoder, layers in map(split_layers, options.encoders)
    ]
    folder = Workshop(options.models, {}).make(
        "encoder_comparison", inputs, encoders=encoders, training=dict(changes.get("teacher_checkpoint", {}))
    )
    _keep_plot(folder / "quality_over_throughput.png", f"choosing_{options.name}")
    rows: list[dict[str, Any]] = msgspec.json.decode((folder / "encoders.json").read_bytes())
    return rows


def _searched(
    options: argparse.Namespace,
    model: SearchedModel,
    inputs: Mapping[str, Path],
    evaluation: Path,
    changes: Parameters,
) -> dict[str, Any]:
    """What a search found, and how it and what was set do on the held-out offers."""
    stage = stage_named(STAGE_OF[model])
    made = dict(inputs)
    if model != "teacher":
        made |= Workshop(options.models, changes).train(inputs, "teacher_labels")
    folder = Workshop(options.models, {}).make(
        "hyperparameter_search",
        made,
        model=model,
        fixed=dict(changes.get(stage.name, {})),
        trials=options.trials,
        budget_seconds=options.minutes * 60,
    )
    _keep_plot(folder / "parameters.png", f"choosing_{options.name}_{model}")
    found = msgspec.json.decode((folder / "best_parameters.json").read_bytes())
    metrics = read_manifest(folder).metrics
    held_out = {}
    for choice, searched in (("as_set", {}), ("found", found["searched"])):
        _progress.say(f"{model} {choice.replace('_', ' ')}, on held-out offers")
        changed = {**changes, stage.name: {**changes.get(stage.name, {}), **searched}}
        trained = Workshop(options.models, changed).make(stage.name, {of: made[of] for of in stage.inputs})
        held_out[choice] = _on_held_out(options, model, trained, evaluation, inputs)
    return {
        "model": model,
        **{name: metrics[name] for name in ("trials", "finished", "pruned", "refused", "trial_seconds")},
        "ended_by": metrics["ended_by"],
        "searched": found["searched"],
        "importances": found["importances"],
        "validation": {
            "as_set": metrics["set_mean_weighted_f1"],
            "found": metrics["best_mean_weighted_f1"],
        },
        "held_out": held_out,
    }


def _on_held_out(
    options: argparse.Namespace, model: str, folder: Path, evaluation: Path, inputs: Mapping[str, Path]
) -> dict[str, Any]:
    offers = evaluation / "offers.parquet"
    outcome = one_model.run(
        Task(
            kind="answer",
            model=model,
            folder=str(folder),
            result=str(options.models / "outcomes" / "choosing.json"),
            offers=str(offers),
            cores=available_cores(),
        )
    )
    if outcome.not_run:
        raise InputError(f"the {model} in {folder} cannot be measured: {outcome.not_run}")
    learned = pq.read_table(inputs["training_sample"] / "labelled.parquet", columns=["category_id"])
    return scored(
        Taxonomy.load(inputs["catalog_taxonomy"]),
        pq.read_table(offers, columns=["category_id"]),
        outcome.answers,
        Counter(learned["category_id"].to_pylist()),
    )


def _keep_plot(plot: Path, name: str) -> None:
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(plot, report.RESULTS / f"{name}.png")


def _encoder_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "encoder": row["name"],
        "mean F1": row["mean_weighted_f1"],
        "macro F1": row["macro_f1"],
        "texts/s": row["texts_per_second"],
        "training s": row["training_seconds"],
        "on the front": "yes" if row["on_front"] else "",
        "left out": row["reason"],
    }


def _search_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "search of": row["model"],
        "trials": row["trials"],
        "given up": row["pruned"],
        "minutes": row["trial_seconds"] / 60,
        "validation: as set": row["validation"]["as_set"],
        "validation: found": row["validation"]["found"],
        "held out: as set": row["held_out"]["as_set"]["mean"],
        "held out: found": row["held_out"]["found"]["mean"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result: benchmarks/results/choosing_NAME.json")
    parser.add_argument("--models", required=True, type=Path, help="work folder of benchmarks.quality")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="ENCODER[:LAYERS]", help="to compare with each other"
    )
    parser.add_argument(
        "--search", nargs="+", default=[], choices=get_args(SearchedModel), help="models to search for"
    )
    parser.add_argument("--trials", type=int, default=20, help="of each search at most")
    parser.add_argument("--minutes", type=float, default=15.0, help="after which no trial begins")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="STAGE.PARAMETER=VALUE", help="as of benchmarks.quality"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, as of benchmarks.quality")
    return parser


if __name__ == "__main__":
    main()
