"""``python -m ml explain``: which words and which similar labelled offers led to an offer's category."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError
from ml.explanation.explaining import Explainer
from ml.explanation.rendering import as_page, as_text
from ml.feed.reading import discover_files, read_batches
from ml.progress import Progress
from ml.serving.classify import model_folder, pipeline_home


def main(arguments: Sequence[str]) -> None:
    """Explain one offer from the command line.

    Raises:
        InputError: a model, the sample or the offer cannot be used.
    """
    options = _options(arguments)
    offer = _given_offer(options.offer) if options.offer is not None else _offer_of_feed(options)
    explainer = Explainer.load(
        options.student,
        options.sample,
        options.index or pipeline_home() / "explanations",
        model=model_folder(options.model) if options.model else None,
        fast=options.fast,
        progress=Progress("explain"),
    )
    explanation = explainer.explain(offer, options.similar, options.category)
    if options.html is not None:
        options.html.write_text(as_page([explanation]), encoding="utf-8")
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode())
    else:
        print(as_text(explanation))


def _given_offer(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InputError(
            f'--offer {text}: {error}; give a JSON object such as {{"title": "Bosch kettle 1.7 l"}}'
        ) from None


def _offer_of_feed(options: argparse.Namespace) -> dict[str, Any]:
    """The first offer of the feed that has the id."""
    if options.offer_id is None or options.feed is None:
        raise InputError("give an offer: --offer JSON, or --offer-id ID with --feed FILE")
    looked_at = 0
    try:
        files = discover_files(options.feed)
    except InputError as error:
        raise InputError(str(error).replace("OFFER_FEED=", "--feed ", 1)) from None
    for file in files:
        for batch in read_batches(file):
            ids = batch.column("offer_id").to_pylist()
            if options.offer_id in ids:
                (offer,) = batch.slice(ids.index(options.offer_id), 1).to_pylist()
                return dict(offer)
            looked_at += batch.num_rows
    raise InputError(
        f"--offer-id {options.offer_id}: none of the {looked_at:,} offers in {options.feed} has this id"
    )


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ml explain",
        description="Say which words of an offer and which similar labelled offers led to its category. The "
        "vectors of the labelled offers are computed at the first call, and kept.",
    )
    parser.add_argument(
        "--student", type=Path, required=True, metavar="DIR", help="a student_checkpoint artifact"
    )
    parser.add_argument(
        "--sample", type=Path, required=True, metavar="DIR", help="the training_sample that it learned from"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="explain the student as compiled in this compiled_student (or 'current')",
    )
    parser.add_argument(
        "--fast", type=Path, metavar="DIR", help="show what this fast_checkpoint makes of each word beside"
    )
    parser.add_argument("--offer", metavar="JSON", help="columns of the offer by name")
    parser.add_argument("--offer-id", metavar="ID", help="an offer of --feed")
    parser.add_argument("--feed", metavar="FEED", help="file, folder, glob or URI of offers")
    parser.add_argument("--category", metavar="ID", help="category to explain instead of the predicted one")
    parser.add_argument(
        "--similar", type=int, default=5, metavar="N", help="labelled offers to show (default: %(default)s)"
    )
    parser.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="keeps the vectors (default: explanations in OFFER_ASSETS_HOME)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with coloured words")
    options = parser.parse_args(arguments)
    if options.similar < 1:
        raise InputError(f"--similar {options.similar}: expected at least 1")
    return options
