"""The choice of an instance, in the graph: what was measured here, and reports from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest

from ml.artifacts import ArtifactRef, write_manifest
from ml.runner import StageContext
from ml.serving.benchmark import MACHINE_FILE, REPORT_FILE
from ml.serving.machine import Machine, this_machine
from ml.stages import STAGES, ServingMeasurementParameters
from offer_assets.benchmark import an_instance_meets_latency_and_peak_load, serving_benchmark
from offer_assets.partitions import COMPILE_TARGETS, CPU, NEURON
from offer_assets.plan import ServingLimits
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.device_reports import DeviceReports
from resources.io_manager import ArtifactRefIOManager
from tests.device_reports import device_report


def measure_nothing(context: StageContext, parameters: ServingMeasurementParameters) -> dict[str, Any]:
    """In place of half a minute of measuring: 2 cores that do 1,000 offers/s."""
    report = device_report(target="cpu", instance_type="here", vcpus=2, neuron_cores=0)
    (context.output / REPORT_FILE).write_bytes(msgspec.json.encode(report))
    machine = Machine(cpu="Fast CPU", cores=2, architecture="x86_64")
    (context.output / MACHINE_FILE).write_bytes(msgspec.json.encode(machine))
    return {"machine": parameters.machine}


class Yard:
    """A store with a student that was compiled for two targets, and a folder of reports."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderArtifactStore(root=str(folder / "artifacts"), feed="feed")
        self.reports = folder / "device-reports"
        self.reports.mkdir()
        self.student = self.made("student_checkpoint", "1")
        inputs = {
            "student_checkpoint": self.student.digest,
            "evaluation_set": self.made("evaluation_set", "1").digest,
        }
        self.cpu, self.neuron = (self.made("compiled_student", name, **inputs) for name in (CPU, NEURON))
        self.store.write_pointer("compiled_student/cpu", self.cpu)

    def made(self, kind: str, content: str, **inputs: str) -> ArtifactRef:
        key = content.encode().hex().ljust(32, "0")
        folder = self.store.destination(kind, key)
        folder.mkdir(parents=True)
        (folder / "content").write_text(kind + content)
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
        found = self.store.find(kind, key)
        assert found is not None
        return found

    def report(self, name: str, model: ArtifactRef, **fields: object) -> None:
        report = device_report(model_digest=model.digest, **fields)
        (self.reports / name).write_bytes(msgspec.json.encode(report))

    def materialize(self, **limits: object) -> dg.ExecuteInProcessResult:
        usual = {
            "prices": "",
            "peak_offers_per_second": 20_000,
            "alarm_p99_milliseconds": 100,
            "aws_endpoint_max_instances": 20,
        }
        upstream = dg.AssetSpec("compiled_student", partitions_def=COMPILE_TARGETS)
        return dg.materialize(
            [upstream, serving_benchmark, an_instance_meets_latency_and_peak_load],
            selection=dg.AssetSelection.assets(serving_benchmark),
            resources={
                "io_manager": ArtifactRefIOManager(store=self.store),
                "artifact_store": self.store,
                "compute": LocalCompute(store=self.store),
                "device_reports": DeviceReports(location=str(self.reports)),
                "serving_limits": ServingLimits(**usual | limits),
            },
            raise_on_error=False,
        )


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    stand_in = replace(STAGES["serving_measurement"], entry_point=f"{__name__}:measure_nothing", heavy=False)
    monkeypatch.setitem(STAGES, "serving_measurement", stand_in)
    return Yard(tmp_path)


def shown(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node("serving_benchmark")
    return {name: value.value for name, value in event.metadata.items()}


def verdict(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def test_without_reports_projections_from_this_machine_are_a_warning(yard: Yard) -> None:
    result = yard.materialize()
    metadata = shown(result)
    assert metadata["machine"] == this_machine().description
    assert "check before you rely on it" in metadata["prices"]
    rows = {record.data["instance_type"]: record.data for record in metadata["instances"].records}
    assert (rows["here"]["basis"], rows["here"]["why_not"]) == ("measured", "no price")
    assert rows["ml.c7i.4xlarge"]["basis"] == "projected"
    assert rows["ml.inf2.xlarge"]["basis"] == "not measured"
    assert len(metadata["latency"].records) == 1
    for plot in ("costs_plot", "latency_plot"):
        assert metadata[plot].startswith("![plot](data:image/png;base64,")
    check = verdict(result)
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description.startswith("only by projection: ")


def test_a_report_of_the_same_student_decides_and_those_of_others_are_left_out(yard: Yard) -> None:
    yard.report("inf2.json", yard.neuron)
    yard.report("other.json", yard.made("compiled_student", "other", student_checkpoint="f" * 64))
    yard.report("unknown.json", yard.student)
    (yard.reports / "half.json").write_text("{")
    result = yard.materialize()
    metadata = shown(result)
    assert metadata["measured"] == 2
    assert metadata["reports_of_other_students"] == 2
    (unreadable,) = metadata["unreadable_reports"].records
    assert "half.json is no device report" in unreadable.data["problem"]
    check = verdict(result)
    assert check.passed
    assert check.description.startswith("4 x ml.inf2.xlarge, $3.96 per hour, p99 9.0 ms")


def test_limits_that_nothing_meets_are_an_error(yard: Yard) -> None:
    check = verdict(yard.materialize(alarm_p99_milliseconds=1))
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "p99 9 ms, limit 1" in check.description


def test_a_new_price_file_is_reckoned_with_and_nothing_is_measured_again(yard: Yard, tmp_path: Path) -> None:
    first = shown(yard.materialize())
    prices = tmp_path / "prices.toml"
    prices.write_text(
        'region = "eu-west-1"\nas_of = "2026-11-01"\n'
        '[instances."ml.c7i.4xlarge"]\nusd_per_hour = 1\nvcpus = 16\nmemory_gib = 32\n'
    )
    second = shown(yard.materialize(prices=str(prices)))
    assert second["prices"] == "eu-west-1, as of 2026-11-01"
    assert second["version"] != first["version"]
    assert len(list((tmp_path / "artifacts" / "serving_measurement").glob("*/manifest.json"))) == 1

    prices.write_text("region")
    failed = yard.materialize(prices=str(prices))
    (failure,) = failed.get_step_failure_events()
    assert "prices.toml: is not TOML" in failure.step_failure_data.error_display_string
