"""The check of a compiled student: on this machine for cpu, by a device's report for neuron."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import msgspec
import pytest

from ml.artifacts import ArtifactRef
from offer_assets.compilation import cascade_keeps_the_student, compiled_matches_uncompiled
from offer_assets.partitions import COMPILE_TARGETS, CPU, NEURON
from resources.artifact_store import FolderArtifactStore
from resources.device_reports import DeviceReports
from resources.io_manager import ArtifactRefIOManager
from tests.device_reports import device_report

MODEL = "a" * 64
COMPILED = {"offers": 100, "same_category": 1.0, "weighted_f1_compiled": 0.9, "weighted_f1_original": 0.9}
CASCADE = {
    "cascade_offers": 100,
    "cascade_share_fast": 0.5,
    "cascade_share_review": 0.1,
    "cascade_loss": 0.0,
    "cascade_max_loss": 0.01,
    "cascade_loss_p_value": 1.0,
}
REFERENCE = {"device_parity": "not measured", "reference_same_category": 1.0}


class Plant:
    """Makes a compiled student out of nothing, and has it checked."""

    def __init__(self, folder: Path) -> None:
        self.reports = folder / "device-reports"
        self._store = FolderArtifactStore(root=str(folder / "artifacts"), feed="feed")

    def check(
        self, target: str, check: dg.AssetChecksDefinition = compiled_matches_uncompiled, **metrics: object
    ) -> dg.AssetCheckEvaluation:
        @dg.asset(partitions_def=COMPILE_TARGETS)
        def compiled_student() -> ArtifactRef:
            return ArtifactRef(kind="compiled_student", key="0" * 32, digest=MODEL, uri="", metrics=metrics)

        result = dg.materialize(
            [compiled_student, check],
            partition_key=target,
            resources={
                "io_manager": ArtifactRefIOManager(store=self._store),
                "device_reports": DeviceReports(location=str(self.reports)),
            },
        )
        (evaluation,) = result.get_asset_check_evaluations()
        return evaluation

    def report(self, name: str, **fields: object) -> None:
        self.reports.mkdir(exist_ok=True)
        (self.reports / name).write_bytes(msgspec.json.encode(device_report(**fields)))


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    return Plant(tmp_path)


def test_what_was_compared_here_is_enough_for_cpu(plant: Plant) -> None:
    assert plant.check(CPU, **COMPILED).passed
    assert not plant.check(CPU, **COMPILED | {"same_category": 0.5}).passed


def test_a_cascade_is_judged_where_it_was_measured_and_for_neuron_by_its_reference(plant: Plant) -> None:
    lossy = CASCADE | {"cascade_loss": 0.05, "cascade_loss_p_value": 0.01}
    assert plant.check(CPU, cascade_keeps_the_student, **CASCADE).passed
    assert not plant.check(CPU, cascade_keeps_the_student, **lossy).passed
    reference = {f"reference_{name}": value for name, value in lossy.items()}
    failed = plant.check(NEURON, cascade_keeps_the_student, **reference)
    assert not failed.passed
    assert "accuracy differs by -0.0500" in failed.description


def test_without_a_device_report_nothing_is_believed_of_neuron(plant: Plant) -> None:
    plant.report("another-model.json", model_digest="b" * 64)
    evaluation = plant.check(NEURON, **REFERENCE)
    assert not evaluation.passed
    assert evaluation.severity == dg.AssetCheckSeverity.WARN
    assert evaluation.description.startswith(f"no device report of model {MODEL[:12]} yet: run `python -m ml")
    assert str(plant.reports) in evaluation.description


def test_the_report_of_the_very_model_decides(plant: Plant) -> None:
    plant.report("first.json", model_digest=MODEL, measured_at="2026-11-02T10:00:00+00:00")
    passed = plant.check(NEURON, **REFERENCE)
    assert passed.passed
    assert "Measured on inf2.xlarge at 2026-11-02T10:00:00+00:00" in passed.description
    assert passed.metadata["offers_per_second"].value == 15_000.0

    plant.report(
        "second.json", model_digest=MODEL, measured_at="2026-11-03T10:00:00+00:00", same_category=0.8
    )
    failed = plant.check(NEURON, **REFERENCE)
    assert not failed.passed
    assert failed.severity == dg.AssetCheckSeverity.ERROR
    assert "agree on 80.0%" in failed.description


def test_a_report_that_cannot_be_read_is_shown(plant: Plant) -> None:
    plant.report("newer.json", model_digest=MODEL, format=2)
    evaluation = plant.check(NEURON, **REFERENCE)
    assert not evaluation.passed
    assert "1 files there cannot be read" in evaluation.description
    (row,) = evaluation.metadata["unreadable_reports"].value.records
    assert "newer.json has format 2" in row.data["problem"]
