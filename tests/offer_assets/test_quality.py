"""Corrections through the real stages: the two assets, and what their checks say."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import ArtifactRef, reference, short_version, write_manifest
from ml.offers import CLEAN_SCHEMA
from ml.quality.corrections import REASONS
from ml.serving.predictor import PREDICTION_SCHEMA
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Transitions
from offer_assets.quality import few_corrections_are_quarantined, quality_assets, quality_checks
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.corrections_feed import CorrectionsFeed
from resources.io_manager import ArtifactRefIOManager

FIRST = datetime.date(2026, 10, 1)
LEAVES = ["a", "b", "c"]


class Home:
    """A store with a taxonomy and catalogued days, and a folder of corrections."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderArtifactStore(root=str(folder / "home" / "artifacts"), feed="feed")
        self.corrections = folder / "corrections"
        self.corrections.mkdir()
        self.taxonomy = self.make("catalog_taxonomy", "t", write=self._write_taxonomy)
        history = [self.taxonomy.digest]
        self.change = self.make(
            "taxonomy_change",
            "c",
            write=lambda place: Transitions(history=history, transitions=[], adopted_on=[""]).write(place),
            catalog_taxonomy=self.taxonomy.digest,
        )
        self.store.write_pointer("taxonomy_change", self.change)

    def make(self, kind: str, key: str, *, write: Any, **inputs: str) -> ArtifactRef:
        folder = self.store.destination(kind, key)
        folder.mkdir(parents=True)
        write(folder)
        write_manifest(
            folder,
            kind=kind,
            key=key,
            inputs=inputs,
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.0,
        )
        return reference(folder)

    def catalogue(self, day: str, predicted: dict[str, str]) -> None:
        """A day of offers and their categories, as the assets before leave them."""
        offers = [{"offer_id": offer, "country": "DE"} for offer in predicted]
        categories = [
            {
                "offer_id": offer,
                "category_id": category,
                "confidence": 0.9,
                "model_version": "m",
                "taxonomy_version": short_version(self.taxonomy.digest),
            }
            for offer, category in predicted.items()
        ]
        clean = self.make("offers", day, write=_parquet("offers.parquet", offers, CLEAN_SCHEMA))
        done = self.make(
            "catalogued_offers",
            day,
            write=_parquet("catalogued.parquet", categories, PREDICTION_SCHEMA),
            offers=clean.digest,
        )
        self.store.write_pointer(f"offers/{day}", clean)
        self.store.write_pointer(f"catalogued_offers/{day}", done)

    def fill(self, days: int, fall_from: int | None = None) -> None:
        """Days of offers and a file of decisions; from a day on half of the categories are wrong."""
        draws = np.random.default_rng(5)
        lines = []
        for number in range(days):
            day = FIRST + datetime.timedelta(days=number)
            predicted = {f"{number}-{n}": str(draws.choice(LEAVES)) for n in range(120)}
            self.catalogue(day.isoformat(), predicted)
            fell = fall_from is not None and number >= fall_from
            for offer, category in list(predicted.items())[:60]:
                wrong = draws.random() < (0.5 if fell else 0.05)
                lines.append(f"{offer},{str(draws.choice(LEAVES)) if wrong else category},{day}T20:00:00")
        self.deliver("decided.csv", *lines)

    def deliver(self, name: str, *lines: str) -> None:
        (self.corrections / name).write_text("\n".join(["offer_id,category_id,decided_at", *lines, ""]))

    def run(self) -> dg.ExecuteInProcessResult:
        @dg.asset
        def taxonomy_change() -> ArtifactRef:
            return self.change

        return dg.materialize(
            [taxonomy_change, *quality_assets(), *quality_checks()],
            resources={
                "io_manager": ArtifactRefIOManager(store=self.store),
                "artifact_store": self.store,
                "compute": LocalCompute(store=self.store),
                "corrections_feed": CorrectionsFeed(
                    feed=str(self.corrections), home=str(self.folder / "home")
                ),
            },
            raise_on_error=False,
        )

    @staticmethod
    def _write_taxonomy(folder: Path) -> None:
        Taxonomy([Category(name, None, name.upper()) for name in LEAVES]).write(folder / "taxonomy.parquet")


def _parquet(name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Any:
    return lambda folder: pq.write_table(pa.Table.from_pylist(rows, schema), folder / name)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}


def test_good_days_pass_every_check_and_show_what_they_rest_on(home):
    home.fill(12)
    result = home.run()
    assert result.success
    found = checks(result)
    assert {name: check.passed for name, check in found.items()} == {
        "every_corrections_file_was_read": True,
        "few_corrections_are_quarantined": True,
        "corrections_agree_with_predictions": True,
        "category_shares_match_corrections": True,
        "corrections_keep_coming": True,
        "corrections_are_about_catalogued_offers": True,
    }
    assert found["every_corrections_file_was_read"].description == "all 1 files were read"
    (materialization,) = result.asset_materializations_for_node("live_quality")
    assert {"summary", "plot_accuracy", "plot_shares", "days_by_quality", "groups", "delay"} <= set(
        materialization.metadata
    )
    page = materialization.metadata["report"].value
    assert str(page).endswith("/report.html")
    for name in set(found) - {"every_corrections_file_was_read", "few_corrections_are_quarantined"}:
        assert found[name].metadata["report"].value == page
        assert "data:image/png;base64," in str(found[name].metadata["plot"].value)
    assert "720 labelled offers of 12 days are right" in str(materialization.metadata["summary"].value)


def test_a_fall_of_the_newest_days_is_an_error_in_words(home):
    home.fill(12, fall_from=9)
    check = checks(home.run())["corrections_agree_with_predictions"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert (check.description or "").startswith("share right: ")
    assert check.metadata["level"].value == "ERROR"


def test_too_few_labels_pass_and_say_so(home):
    home.fill(1)
    check = checks(home.run())["corrections_agree_with_predictions"]
    assert check.passed
    assert (check.description or "").startswith("UNKNOWN: too few to tell: ")
    assert check.metadata["level"].value == "UNKNOWN"


def test_no_corrections_at_all_is_no_failure(home):
    home.catalogue("2026-10-01", {"o": "a"})
    result = home.run()
    assert result.success
    found = checks(result)
    assert all(check.passed for check in found.values())
    assert found["every_corrections_file_was_read"].description == "there is no file of corrections yet"


def test_a_broken_file_fails_its_check_and_stops_no_other(home):
    home.fill(3)
    (home.corrections / "broken.parquet").write_bytes(b"not Parquet")
    result = home.run()
    assert result.success
    check = checks(result)["every_corrections_file_was_read"]
    assert not check.passed
    assert "broken.parquet" in (check.description or "")


def test_a_feed_of_nonsense_fails_the_quarantine_check(home):
    home.catalogue("2026-10-01", {"o": "a"})
    home.deliver("decided.csv", "o,a,2026-10-01", "o,nowhere,2026-10-02", "p,a,soon", ",a,2026-10-02")
    check = checks(home.run())["few_corrections_are_quarantined"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert (check.description or "").startswith("75.00% of 4 decisions of the files since ")


def test_a_feed_that_breaks_is_judged_by_what_it_delivers_now():
    """A hundred thousand good decisions of last year do not excuse the thousand bad ones of this week."""
    metrics = {
        "rows": 101_000,
        "quarantined": 1_000,
        "quarantined_by_fault_of_the_feed": 1_000,
        "recent_since": "2026-10-05",
        "recent_rows": 1_000,
        "recent_quarantined_by_fault_of_the_feed": 1_000,
        **dict.fromkeys(REASONS, 0),
    }
    taken = ArtifactRef(kind="corrections", key="k", digest="d", uri="u", metrics=metrics)
    check = few_corrections_are_quarantined(taken)
    assert isinstance(check, dg.AssetCheckResult)
    assert not check.passed
    assert (check.description or "").startswith("100.00% of 1,000 decisions of the files since 2026-10-05 ")
    assert "; 0.99% of 101,000 in all" in (check.description or "")


def test_a_feed_that_lost_all_its_files_fails_in_words(home):
    home.fill(3)
    assert home.run().success
    (home.corrections / "decided.csv").unlink()
    result = home.run()
    (failure,) = [event for event in result.get_step_failure_events() if event.step_key == "corrections"]
    assert "the corrections feed has no file any more; it had 1 before" in str(failure.event_specific_data)


def test_labels_that_became_too_few_do_not_pass(home):
    """A feed of four weeks that says too little to judge anything by."""
    for number in range(30):
        day = (FIRST + datetime.timedelta(days=number)).isoformat()
        home.catalogue(day, {f"{number}-{n}": "a" for n in range(3)})
    home.deliver(
        "decided.csv",
        *(f"{number}-0,a,{FIRST + datetime.timedelta(days=number)}T20:00:00" for number in range(30)),
    )
    check = checks(home.run())["corrections_agree_with_predictions"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert (check.description or "").startswith("UNKNOWN: too few to tell: ")


def test_without_a_catalogued_day_the_failure_says_what_to_do_first(home):
    home.deliver("decided.csv", "o,a,2026-10-01")
    result = home.run()
    assert not result.success
    (failure,) = [event for event in result.get_step_failure_events() if event.step_key == "live_quality"]
    assert "materialize catalogued_offers first" in str(failure.event_specific_data)
