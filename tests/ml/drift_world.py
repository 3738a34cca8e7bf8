"""Days of believable offers, and the stages of monitoring run over them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import ml.drift.reference
from ml.artifacts import artifact_key, read_manifest, write_manifest
from ml.drift.answers import DayReport, Finding
from ml.drift.frame import Frame
from ml.drift.reference import write_drift_reference
from ml.drift.report import write_drift_report
from ml.drift.series import Judgement, judge
from ml.drift.totals import DayTotals, totals_of
from ml.offers import CLEAN_SCHEMA, offer_text
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving.predictor import PREDICTION_SCHEMA, Prediction
from ml.stages import DriftParameters, DriftReferenceParameters
from ml.taxonomy import Category, Taxonomy

COUNTRIES = {"DE": 0.3, "AT": 0.1, "FR": 0.2, "IT": 0.15, "NL": 0.1, "PL": 0.15}
CURRENCIES = {"PL": "PLN"}
LANGUAGES = {"AT": "de"}
SHOPS, CATEGORIES, WORDS = 80, 40, 600
TODAY = "2026-03-09"
QUARANTINE_SCHEMA = pa.schema([("offer_id", pa.string()), ("reason", pa.string())])

_WORDS = {
    language: np.array([f"{language}{number}wort" for number in range(WORDS)])
    for language in {LANGUAGES.get(country, country.lower()) for country in COUNTRIES}
}


def _falling(number: int, power: float = 1.0) -> Any:
    weights = 1 / np.arange(1, number + 1) ** power
    return weights / weights.sum()


def offers_of(number: int, seed: int) -> pd.DataFrame:
    """A day: 80 shops of power-law size, six countries, prices by category; with its predictions."""
    random = np.random.default_rng(seed)
    country = random.choice(list(COUNTRIES), p=list(COUNTRIES.values()), size=number)
    language = np.array([LANGUAGES.get(code, code.lower()) for code in country], dtype=object)
    category = random.choice(CATEGORIES, p=_falling(CATEGORIES), size=number)
    lengths = random.integers(4, 12, size=number)
    words = random.choice(WORDS, p=_falling(WORDS, 0.7), size=(number, 12))
    confidence = random.beta(6, 2, size=number)
    agrees = random.random(number) < 0.9
    return pd.DataFrame(
        {
            **dict.fromkeys(CLEAN_SCHEMA.names),
            "offer_id": [f"o{seed}-{place}" for place in range(number)],
            "shop_id": [f"shop{shop}" for shop in random.choice(SHOPS, p=_falling(SHOPS), size=number)],
            "title": [
                " ".join(_WORDS[own][numbers[:length]])
                for own, numbers, length in zip(language, words, lengths, strict=True)
            ],
            "country": country,
            "language": language,
            "brand": np.where(random.random(number) < 0.6, "brand", None),
            "shop_category": np.where(random.random(number) < 0.7, "Things", None),
            "price": np.where(
                random.random(number) < 0.95, np.exp(category % 7 + random.normal(0, 0.5, number)), np.nan
            ),
            "currency": [CURRENCIES.get(code, "EUR") for code in country],
            "category_id": [f"c{place}" for place in category],
            "category_path": [path_of(place) for place in category],
            "confidence": confidence,
            "student_category_id": [f"c{place}" for place in category],
            "fast_category_id": [
                f"c{place if same else (place + 1) % CATEGORIES}"
                for place, same in zip(category, agrees, strict=True)
            ],
            "tier": np.where(random.random(number) < 0.7, "student", "fast"),
            "needs_review": confidence < 0.5,
            "taxonomy_known": True,
            "trained": False,
        },
        columns=[
            *CLEAN_SCHEMA.names,
            *("category_path", "confidence", "tier", "needs_review"),
            *("fast_category_id", "student_category_id", "taxonomy_known", "trained"),
        ],
    )


def path_of(category: int) -> str:
    """Path of a category: six top-level ones."""
    return f"Top {category % 6} > Leaf {category}"


def taxonomy() -> Taxonomy:
    """The taxonomy that the offers are predicted in."""
    tops = [Category(f"t{place}", None, f"Top {place}") for place in range(6)]
    leaves = [Category(f"c{place}", f"t{place % 6}", f"Leaf {place}") for place in range(CATEGORIES)]
    return Taxonomy([*tops, *leaves])


def days_before(number: int, last: str = TODAY, gap: int = 1) -> list[str]:
    """ISO dates of so many days before ``last``, oldest first."""
    end = date.fromisoformat(last) - timedelta(days=gap)
    return [(end - timedelta(days=back)).isoformat() for back in reversed(range(number))]


def write_day(folder: Path, rows: pd.DataFrame, quarantined: list[str] | None = None) -> Path:
    """An ``offers`` artifact; ``quarantined`` are the reasons of one row each."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pandas(
        rows[CLEAN_SCHEMA.names].assign(category_id=None), CLEAN_SCHEMA, preserve_index=False
    )
    pq.write_table(table, folder / "offers.parquet")
    bad = [{"offer_id": str(place), "reason": reason} for place, reason in enumerate(quarantined or [])]
    pq.write_table(pa.Table.from_pylist(bad, QUARANTINE_SCHEMA), folder / "quarantine.parquet")
    return folder


def seal(folder: Path, kind: str, **inputs: str) -> str:
    """Give a folder its manifest; returns the digest."""
    return write_manifest(
        folder,
        kind=kind,
        key=artifact_key(kind, "1", {}, inputs),
        inputs=inputs,
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.0,
    ).digest


class OracleModels:
    """Stand in for the compiled model: answer what the offers were made with."""

    def __init__(self) -> None:
        self.by_id: dict[str, dict[str, Any]] = {}
        self.by_text: dict[str, dict[str, Any]] = {}

    def learn(self, rows: pd.DataFrame) -> None:
        """Offers that will be asked for."""
        for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
            self.by_id[row["offer_id"]] = self.by_text[offer_text(row)] = row

    def predict(self, offers: list[dict[str, Any]]) -> list[Prediction]:
        """As :meth:`ml.serving.predictor.Predictor.predict`."""
        return [
            Prediction(
                offer_id=offer["offer_id"],
                category_id=self.by_id[offer["offer_id"]]["category_id"],
                category_path=self.by_id[offer["offer_id"]]["category_path"],
                confidence=self.by_id[offer["offer_id"]]["confidence"],
                tier=self.by_id[offer["offer_id"]]["tier"],
                needs_review=self.by_id[offer["offer_id"]]["needs_review"],
                model_version="m",
                taxonomy_version="t",
            )
            for offer in offers
        ]

    def each_alone(self, texts: list[str]) -> tuple[list[str], list[str]]:
        """As :meth:`ml.serving.predictor.Predictor.each_alone`."""
        rows = [self.by_text[text] for text in texts]
        return [row["fast_category_id"] for row in rows], [row["student_category_id"] for row in rows]


class DriftWorld:
    """Runs both stages in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder = folder
        self.models = OracleModels()
        monkeypatch.setattr(
            ml.drift.reference.Predictor, "load", staticmethod(lambda folder, threads=1: self.models)
        )
        for name in ("compiled_student", "taxonomy"):
            (folder / name).mkdir()
        taxonomy().write(folder / "taxonomy" / "taxonomy.parquet")

    def reference(
        self,
        offers: Mapping[str, pd.DataFrame],
        trained: pd.DataFrame | None = None,
        *,
        name: str = "reference",
        **parameters: Any,
    ) -> tuple[Path, dict[str, Any]]:
        """Run ``drift_reference``; the artifact and its metrics."""
        inputs = {"compiled_student": self.folder / "compiled_student"}
        for day, rows in offers.items():
            self.models.learn(rows)
            place = self.folder / f"{name}-offers-{day}"
            inputs[f"offers/{day}"] = place if place.exists() else write_day(place, rows)
        sample = self.folder / f"{name}-sample"
        sample.mkdir(exist_ok=True)
        empty = offers_of(1, 0).iloc[:0]
        for file, rows in (("labelled", empty if trained is None else trained), ("unlabelled", empty)):
            table = pa.Table.from_pandas(rows[CLEAN_SCHEMA.names], CLEAN_SCHEMA, preserve_index=False)
            pq.write_table(table, sample / f"{file}.parquet")
        inputs["training_sample"] = sample
        output = self.folder / name
        output.mkdir(exist_ok=True)
        metrics = write_drift_reference(self._context(inputs, output), DriftReferenceParameters(**parameters))
        seal(output, "drift_reference")
        return output, metrics

    def report(
        self,
        reference: Path,
        rows: pd.DataFrame,
        *,
        day: str = TODAY,
        earlier: Mapping[str, Path] | None = None,
        quarantined: list[str] | None = None,
        **parameters: Any,
    ) -> tuple[Path, DayReport, dict[str, Any]]:
        """Run ``drift_report``; the artifact, ``drift.json`` and the metrics."""
        self.models.learn(rows)
        output = self.folder / f"report-{day}-{len(list(self.folder.iterdir()))}"
        inputs = {
            "drift_reference": reference,
            "compiled_student": self.folder / "compiled_student",
            "offers": write_day(output.with_name(output.name + "-offers"), rows, quarantined),
            "catalogued_offers": self._catalogued(output.with_name(output.name + "-catalogued"), rows),
            "catalog_taxonomy": self.folder / "taxonomy",
            **{f"earlier/{on}": folder for on, folder in (earlier or {}).items()},
        }
        output.mkdir()
        metrics = write_drift_report(self._context(inputs, output), DriftParameters(day=day, **parameters))
        seal(output, "drift_report", drift_reference=read_manifest(reference).digest)
        report = msgspec.json.decode((output / "drift.json").read_bytes(), type=DayReport)
        return output, report, metrics

    def _catalogued(self, folder: Path, rows: pd.DataFrame) -> Path:
        folder.mkdir()
        table = pa.Table.from_pandas(
            rows[["offer_id", "category_id", "category_path", "confidence", "tier", "needs_review"]].assign(
                model_version="m", taxonomy_version="t"
            ),
            PREDICTION_SCHEMA,
            preserve_index=False,
        )
        pq.write_table(table, folder / "catalogued.parquet")
        return folder

    def _context(self, inputs: Mapping[str, Path], output: Path) -> StageContext:
        checkpoints = output.with_name(output.name + "-checkpoints")
        checkpoints.mkdir(exist_ok=True)
        return StageContext(inputs, output, checkpoints, Progress("test"))


def totals_for(folder: Path, day: str, rows: pd.DataFrame, complete: bool = True) -> DayTotals:
    """Totals of offers that are not in a file yet."""
    return totals_of(write_day(folder / f"day-{day}-{len(list(folder.iterdir()))}", rows), day, complete)


def answers_of(
    frame: Frame, folder: Path, rows: pd.DataFrame, day: str = TODAY, *, complete: bool = True
) -> dict[str, Judgement]:
    """What is said of a day, by question; without the stage around it."""
    totals = totals_for(folder, day, rows, complete)
    series = frame.series(day, rows, totals)
    return judge(day, series, frame.reference_series(series))


def failed(answers: Mapping[str, Judgement]) -> set[str]:
    """Questions that are answered with WARN or ERROR."""
    return {name for name, answer in answers.items() if answer.level in ("WARN", "ERROR")}


def finding(answers: Mapping[str, Judgement], question: str, **what: str) -> Finding:
    """The finding of a question about this measure, group or segment."""
    found = [
        f
        for f in answers[question].findings
        if all(getattr(f, name) == value for name, value in what.items())
    ]
    assert found, [f.sentence for f in answers[question].findings]
    return found[0]
