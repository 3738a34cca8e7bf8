"""Adopting a release, saying what it changes, and looking at it before: with the real stages and jobs."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef, write_manifest
from ml.taxonomy_change.change import read_change
from offer_assets.definitions import build_defs
from offer_assets.instance import FEED_TAG, process_tag
from offer_assets.jobs import ADOPT_TAXONOMY
from offer_assets.policies import TAXONOMY_FINGERPRINT_TAG
from offer_assets.preview import PREVIEW_TAXONOMY
from offer_assets.taxonomy import taxonomy_in_force
from resources.settings import Settings

ONE = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n3,1,Toasters\n4,1,Lamps\n"
TWO = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n3,1,Toasters\n4,1,Lamps\n5,1,Fridges\n"
TWO_REWRITTEN = "category_id,parent_id,name\n1,,Home\n5,1,Fridges\n2,1,Kettles\n3,1,Toasters\n4,1,Lamps\n"
TWO_RENAMED = "category_id,parent_id,name\n1,,Home\n2,1,Kettles\n3,1,Toasters\n4,1,Bicycles\n5,1,Fridges\n"
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
        self.pointers = folder / "home" / "pointers" / self.store.feed

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


def test_what_a_person_took_is_not_refused_again(catalog: Catalog) -> None:
    """The run that follows a release is started for the one in force, and judges it no more."""
    catalog.run()
    catalog.release("v2", TINY)
    refused = said(catalog.run())
    assert "adopt_taxonomy" in refused
    assert "ops: {catalog_taxonomy: {config: {accept_objections: true}}}" in refused
    config = {"ops": {"catalog_taxonomy": {"config": {"accept_objections": True}}}}
    assert catalog.run(run_config=config).success
    assert catalog.run().success


def test_the_same_release_in_another_file_is_the_version_in_force(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TWO)
    catalog.run()
    before = catalog.store.read_pointer("catalog_taxonomy"), catalog.change()
    fingerprint = catalog.compute.manifest(before[0]).parameters["fingerprint"]
    catalog.release("v3", TWO_REWRITTEN)
    assert catalog.run(tags={TAXONOMY_FINGERPRINT_TAG: fingerprint}).success
    assert (catalog.store.read_pointer("catalog_taxonomy"), catalog.change()) == before


def test_a_mapping_that_comes_late_is_a_change(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TWO)
    catalog.run()
    before = catalog.change()
    (catalog.releases / "v2.mapping.csv").write_text("from_id,to_id\n3,3\n3,5\n")
    assert catalog.run().success
    assert catalog.change().metrics["split"] == 1
    (catalog.releases / "v2.mapping.csv").unlink()
    after = catalog.change()
    assert catalog.run().success
    assert catalog.change() == after != before


def test_a_run_says_whose_it_is_and_in_which_process(catalog: Catalog) -> None:
    result = catalog.run()
    run = catalog.instance.get_run_by_id(result.run_id)
    assert run is not None
    tags = {**process_tag(result.run_id), FEED_TAG: catalog.store.feed}
    assert {name: run.tags.get(name) for name in tags} == tags


def test_a_new_name_that_is_unlike_the_old_one_is_pointed_out(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TWO_RENAMED)
    result = catalog.run()
    assert result.success
    (check,) = [
        found
        for found in result.get_asset_check_evaluations()
        if found.check_name == "renames_keep_their_meaning"
    ]
    assert not check.passed
    assert "'Lamps'" in (check.description or "")


def test_a_change_says_when_it_was_taken(catalog: Catalog) -> None:
    catalog.run()
    catalog.release("v2", TWO)
    catalog.run()
    taken = catalog.compute.manifest(catalog.change()).parameters["adopted_on"]
    assert abs((datetime.datetime.now(datetime.UTC).date() - datetime.date.fromisoformat(taken)).days) <= 1


@pytest.mark.parametrize(("csv", "added"), [(TWO, 1), (ONE, 0)])
def test_before_the_first_change_the_served_model_says_what_is_new(
    catalog: Catalog, csv: str, added: int
) -> None:
    """A home from before there were changes has a model, and the taxonomy that it knows."""
    catalog.run()
    known = catalog.store.read_pointer("catalog_taxonomy")
    (catalog.pointers / "taxonomy_change.json").unlink()
    teacher = made(catalog, "teacher_checkpoint", {})
    student = made(catalog, "student_checkpoint", {"teacher_checkpoint": teacher.digest})
    served = made(
        catalog,
        "compiled_student",
        {"student_checkpoint": student.digest, "catalog_taxonomy": known.digest},
    )
    promote(catalog.resources["tracking"], served)
    catalog.store.write_pointer("offer_endpoint", served)
    catalog.release("v2", csv)
    assert catalog.run().success
    assert catalog.change().metrics["added"] == added
    inputs = catalog.compute.manifest(catalog.change()).inputs
    assert inputs.get("previous_taxonomy") == (known.digest if added else None)
    assert ("student_checkpoint" in inputs) == bool(added)


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
