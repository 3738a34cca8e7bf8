"""What is registered with which verdict, and what is sent to a fresh endpoint to see whether it answers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import reference
from ml.serving.predictor import TEXT_COLUMNS
from offer_assets import policies
from offer_assets.partitions import CPU
from offer_assets.release import endpoint_sample, lineage_of
from tests.ml.compiled_models import TAXONOMY_CSV, compiled_root
from tests.registry import registry_in
from tests.release_world import BAD, GOOD, REGISTER, TAXONOMY_2, World, failure_of, free_port

__all__ = ["compiled_root"]


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield World(tmp_path, registry_in(tmp_path, tmp_path_factory), instance, free_port())


@pytest.mark.parametrize(
    ("metrics", "approval", "expected"),
    [
        (GOOD, "automatic", ("passed", "automatic", True)),
        (GOOD, "required", ("passed", "pending", False)),
        (BAD, "automatic", ("failed", "pending", False)),
    ],
)
def test_a_version_is_registered_with_verdict_and_approval(world: World, metrics, approval, expected) -> None:
    compiled = world.train("first", metrics=metrics)
    assert world.run(REGISTER, approval=approval).success
    version = world.registered(compiled)
    assert (version.tags["verdict"], version.approval, version.may_serve) == expected
    assert version.metrics["student_weighted_f1"] == metrics["student_weighted_f1"]
    assert version.tags["evaluation"] == world.store.find("student_evaluation", "first").digest


def test_an_evaluation_of_another_student_is_refused(world: World) -> None:
    world.train("first")
    evaluation = world.store.read_pointer("student_evaluation")
    world.train("second")
    world.store.write_pointer("student_evaluation", evaluation)
    assert failure_of(world.run(REGISTER)).startswith("student_evaluation measured student ")


def test_a_model_of_another_taxonomy_than_the_one_in_force_is_registered_as_it_is(world: World) -> None:
    compiled = world.train("first")
    world.adopt(TAXONOMY_2)
    assert world.run(REGISTER).success
    assert world.tracking.versions()[0].ref.digest == compiled.digest


def test_where_only_names_changed_the_model_is_registered_under_the_new_names(
    world: World, compiled_root: Path
) -> None:
    student, compiled = (
        reference(
            shutil.copytree(
                compiled_root / folder, world.store.destination(kind, reference(compiled_root / folder).key)
            )
        )
        for folder, kind in (("student", "student_checkpoint"), ("compiled", "compiled_student"))
    )
    evaluation = world.artifact("student_evaluation", "e", {}, {"student_checkpoint": student.digest}, **GOOD)
    world.store.write_pointer("student_evaluation", evaluation)
    world.store.write_pointer(f"compiled_student/{CPU}", compiled)
    world.adopt(TAXONOMY_CSV)
    passes = msgspec.structs.replace(policies.GATE, min_same_category_compiled=0.0, max_f1_loss_compiled=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "GATE", passes)
        assert world.run(REGISTER).success
        taxonomy = world.adopt(TAXONOMY_CSV.replace(",Kettle", ",Electric kettles"))
        assert world.run(REGISTER).success
    renamed, as_it_was = world.tracking.versions()
    assert as_it_was.ref.digest == compiled.digest
    assert renamed.ref.kind == "renamed_student"
    assert renamed.passed
    assert lineage_of(world.compute, renamed.ref).taxonomy_version == taxonomy.version
    assert world.store.read_pointer("model_version").digest == renamed.ref.digest


def table_of(folder: Path, offers: int, text: str) -> Path:
    file = folder / "offers.parquet"
    columns = {name: [text] * offers for name in TEXT_COLUMNS} | {"brand": [None] * offers}
    ids = [str(number) for number in range(offers)]
    pq.write_table(pa.table({"offer_id": ids, **columns, "url": ids, "price": [1.0] * offers}), file)
    return file


def test_only_what_the_model_reads_is_sent(tmp_path: Path) -> None:
    sample = endpoint_sample(table_of(tmp_path, policies.ENDPOINT_SAMPLE_OFFERS + 5, "a title"))
    assert [offer["offer_id"] for offer in sample] == [
        str(number) for number in range(policies.ENDPOINT_SAMPLE_OFFERS)
    ]
    assert sample[0].keys() == {"offer_id", *TEXT_COLUMNS} - {"brand"}


def test_the_longest_texts_stay_below_the_size_of_a_request(tmp_path: Path) -> None:
    sample = endpoint_sample(table_of(tmp_path, policies.ENDPOINT_SAMPLE_OFFERS, "語" * 20_000))
    assert 1 < len(sample) < policies.ENDPOINT_SAMPLE_OFFERS
    assert len(msgspec.json.encode({"offers": sample})) < 6 << 20
