"""Adopting a release, saying what it changes, and looking at it before: with the real stages and jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef, write_manifest
from ml.taxonomy_change.change import read_change
from offer_assets.definitions import build_defs
from offer_assets.jobs import ADOPT_TAXONOMY
from offer_assets.policies import TAXONOMY_FINGERPRINT_TAG
from offer_assets.preview import PREVIEW_TAXONOMY
from offer_assets.taxonomy import taxonomy_in_force
from resources.settings import Settings

ONE = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n3,1,Toasters\n4,1,Lamps\n"
TWO = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n3,1,Toasters\n4,1,Lamps\n5,1,Fridges\n"
THREE = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n5,1,Fridges\n6,1,Freezers\n"
BROKEN = "category_id,parent_id,name\n1,2,Home\n2,1,Kettles\n"
TINY = "category_id,parent_id,name\n1,,Home\n"


class Catalog:
    """A watched folder of releases, and the graph that takes them."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.releases = folder / "taxonomy"
        self.releases.mkdir()
        self.release("v1", ONE)
        feed = folder / "offers.csv"
        feed.write_text("offer_id,shop_id,title\n1,a,Kettle\n")
        settings = Settings(home=folder / "home", offer_feed=str(feed), catalog_taxonomy=str(self.releases))
        self.definitions = build_defs(settings)
        self.resources = self.definitions.resources or {}
        self.store, self.compute = self.resources["artifact_store"], self.resources["compute"]
        self.instance = instance

    def release(self, name: str, csv: str) -> None:
        (self.releases / f"{name}.csv").write_text(csv)

    def run(self, job: str = ADOPT_TAXONOMY, **options: Any) -> dg.ExecuteInProcessResult:
        return self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance, raise_on_error=False, **options
        )

    def change(self) -> ArtifactRef:
        return self.store.read_pointer("taxonomy_change")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Catalog(tmp_path, instance)


def said(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event for event in result.all_node_events if event.is_step_failure]
    return failure.step_failure_data.user_failure_data.description


def test_each_release_becomes_a_version_with_what_it_changed(catalog: Catalog) -> None:
    assert catalog.run().success
    first = catalog.change()
    assert first.metrics["is_first"]
    catalog.release("v2", TWO)
    assert catalog.run().success
    second = catalog.change()
    assert second.metrics["added"] == 1
    assert second.metrics["from_version"] == taxonomy_in_force(first, catalog.compute).version
    change = read_change(catalog.compute.folder(second))
    assert [category.category_id for category in change.diff.added] == ["5"]
    assert [category.category_id for category in change.few_labelled] == ["5"]


def test_the_same_release_again_keeps_the_change_that_led_to_it(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TWO)
    catalog.run()
    change = catalog.change()
    result = catalog.run()
    assert result.success
    assert catalog.change() == change
    (event,) = result.asset_materializations_for_node("taxonomy_change")
    assert event.metadata["made_in_this_run"].value is False


def test_a_release_that_comes_back_is_the_version_it_was(catalog: Catalog) -> None:
    catalog.run()
    first = catalog.store.read_pointer("catalog_taxonomy")
    catalog.release("v2", TWO)
    catalog.run()
    catalog.release("v3", ONE)
    assert catalog.run().success
    assert catalog.store.read_pointer("catalog_taxonomy").digest == first.digest
    assert catalog.change().metrics["removed"] == 1


@pytest.mark.parametrize(
    ("csv", "sentence"),
    [(BROKEN, "cycle"), (TINY, "OFFER_ASSETS_TAXONOMY_MAX_REMOVED_SHARE|75"), ("a,b\n1,2\n", "category_id")],
)
def test_a_bad_release_is_not_taken_and_what_was_in_force_stays(
    catalog: Catalog, csv: str, sentence: str
) -> None:
    catalog.run()
    before = catalog.store.read_pointer("catalog_taxonomy"), catalog.change()
    catalog.release("v2", csv)
    result = catalog.run()
    assert not result.success
    assert any(part in said(result) for part in sentence.split("|")), said(result)
    assert (catalog.store.read_pointer("catalog_taxonomy"), catalog.change()) == before


def test_a_person_may_take_a_release_that_a_limit_refuses(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TINY)
    config = {"ops": {"catalog_taxonomy": {"config": {"accept_objections": True}}}}
    result = catalog.run(run_config=config)
    assert result.success
    (event,) = result.asset_materializations_for_node("catalog_taxonomy")
    assert "accepted_objections" in event.metadata


def test_a_run_takes_only_the_release_that_it_was_started_for(catalog: Catalog) -> None:
    catalog.run()
    before = catalog.store.read_pointer("catalog_taxonomy")
    catalog.release("v2", TWO)
    result = catalog.run(tags={TAXONOMY_FINGERPRINT_TAG: "of another release"})
    assert "came after the one that this run was started for" in said(result)
    assert catalog.store.read_pointer("catalog_taxonomy") == before


def test_a_preview_shows_the_impact_and_takes_nothing(catalog: Catalog) -> None:
    catalog.run()
    before = catalog.store.read_pointer("catalog_taxonomy"), catalog.change()
    catalog.release("v2", THREE)
    assert catalog.run(PREVIEW_TAXONOMY).success
    assert (catalog.store.read_pointer("catalog_taxonomy"), catalog.change()) == before
    (observed,) = catalog.instance.fetch_observations(dg.AssetKey("catalog_taxonomy_source"), limit=1).records
    metadata = observed.asset_observation.metadata
    assert metadata["release"].value == "v2"
    assert "50" in metadata["would_be_refused"].value
    changes = {row.data["category"]: row.data["change"] for row in metadata["impact"].records}
    assert changes["Home > Fridges"] == changes["Home > Freezers"] == "added"


def test_the_models_in_production_are_pinned_to_the_change(catalog: Catalog) -> None:
    """Whatever is promoted later, a repeat of the training finds the models it started from."""
    catalog.run()
    tracking = catalog.resources["tracking"]
    teacher = made(catalog, "teacher_checkpoint", {})
    student = made(catalog, "student_checkpoint", {"teacher_checkpoint": teacher.digest})
    compiled = made(catalog, "compiled_student", {"student_checkpoint": student.digest})
    promote(tracking, compiled)
    catalog.release("v2", TWO)
    assert catalog.run().success
    inputs = catalog.compute.manifest(catalog.change()).inputs
    assert (inputs["teacher_checkpoint"], inputs["student_checkpoint"]) == (teacher.digest, student.digest)


def made(catalog: Catalog, kind: str, inputs: dict[str, str]) -> ArtifactRef:
    folder = catalog.store.destination(kind, "a")
    folder.mkdir(parents=True)
    (folder / "name").write_text(kind)
    write_manifest(
        folder,
        kind=kind,
        key="a",
        inputs=inputs,
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.0,
    )
    return catalog.store.adopt(kind, "a")


def promote(tracking: Any, ref: ArtifactRef) -> None:
    from resources.tracking import Promotion, now

    registered = tracking.register(ref, {}, {"verdict": "passed"}, approval="automatic")
    tracking.promote(
        registered,
        Promotion(
            at=now(),
            by="test",
            reason="test",
            run_id="run",
            kind="promotion",
            registry_version=registered.version,
            model_version=registered.model_version,
            replaced=None,
            taxonomy_version="",
            data="",
            code_revision="",
            evaluation="",
        ),
    )
