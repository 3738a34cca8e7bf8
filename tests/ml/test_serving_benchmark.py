import subprocess
import sys

import msgspec
import pyarrow.parquet as pq
import pytest

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.evaluation.gate import GateLimits, compiled_matches_uncompiled
from ml.runner import StageSpec, key_of, run_stage
from ml.serving.device_report import read_report
from ml.serving.machine import this_machine
from ml.serving.prices import read_prices
from ml.stages import STAGES, ServingMeasurementParameters
from tests.device_reports import device_report


def measurement(root, output, **parameters):
    return StageSpec(
        stage="serving_measurement",
        inputs={
            "compiled_student": str(root / "compiled"),
            "student_checkpoint": str(root / "student"),
            "evaluation_set": str(root / "evaluation"),
        },
        parameters={"machine": this_machine().description, "seconds": 0.3, **parameters},
        output=str(output),
        workspace=str(output.with_name("measurement.work")),
    )


def comparison(folder, output, **parameters):
    prices = read_prices()
    given = {"prices": prices.instances, "prices_from": prices.in_words, **parameters}
    return StageSpec(
        stage="serving_benchmark",
        inputs={"serving_measurement": str(folder)},
        parameters=msgspec.to_builtins(given),
        output=str(output),
        workspace=str(output.with_name("benchmark.work")),
    )


def test_this_machine_is_measured_and_everything_else_follows_from_it_or_from_reports(
    compiled_root, tmp_path
):
    run_stage(measurement(compiled_root, tmp_path / "measured"))
    measured = read_manifest(tmp_path / "measured")
    assert measured.metrics["machine"] == this_machine().description
    assert measured.metrics["offers_per_second"] > 0
    assert measured.metrics["p99_milliseconds"] > 0

    report_file = tmp_path / "measured" / "report.json"
    here = read_report(report_file.read_bytes(), str(report_file))
    assert (here.target, here.versions.keys()) == ("cpu", {"onnxruntime"})
    assert here.peak_memory_bytes > 10_000_000
    assert compiled_matches_uncompiled(here.gate_metrics, GateLimits()).passed

    report = device_report(model_digest=read_manifest(compiled_root / "compiled").digest)
    run_stage(
        comparison(
            tmp_path / "measured", tmp_path / "benchmark", reports=[report], peak_offers_per_second=50_000
        )
    )
    manifest = read_manifest(tmp_path / "benchmark")
    assert manifest.metrics["measured"] == 2
    assert manifest.metrics["level"] == "OK"
    assert manifest.metrics["cheapest_measured_instance"] == "ml.inf2.xlarge"
    assert "50,000 offers/s" in manifest.metrics["sentence"]
    rows = pq.read_table(tmp_path / "benchmark" / "benchmark.parquet").to_pylist()
    inferentia = next(row for row in rows if row["instance_type"] == "ml.inf2.xlarge")
    assert (inferentia["basis"], inferentia["instances_for_peak"]) == ("measured", 8)
    priceless = next(row for row in rows if row["why_not"].startswith("no price"))
    assert priceless["instance_type"] == here.instance_type
    assert here.instance_type == (this_machine().instance_type or this_machine().description)
    assert priceless["offers_per_second"] == measured.metrics["offers_per_second"]
    latency = pq.read_table(tmp_path / "benchmark" / "latency.parquet").to_pylist()
    assert [row["request_offers"] for row in latency] == [1, 32, 256, 32, 32]
    for name in ("costs_plot.png", "latency_plot.png"):
        assert (tmp_path / "benchmark" / name).read_bytes().startswith(b"\x89PNG")

    run_stage(comparison(tmp_path / "measured", tmp_path / "alone"))
    alone = read_manifest(tmp_path / "alone").metrics
    assert (alone["measured"], alone["cheapest_measured_instance"]) == (1, "")
    assert alone["not_measured"] > 0


def test_a_measurement_of_another_machine_is_refused(compiled_root, tmp_path):
    with pytest.raises(InputError, match="machine 'a fast one': this one is"):
        run_stage(measurement(compiled_root, tmp_path / "measured", machine="a fast one"))
    assert not (tmp_path / "measured").exists()


def test_comparing_needs_nothing_of_what_measuring_needs():
    code = (
        "import sys, ml.serving.benchmark; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_machine_time_or_attempt_is_another_measurement():
    stage = STAGES["serving_measurement"]
    usual = ServingMeasurementParameters(machine="a")
    others = [
        msgspec.structs.replace(usual, **change)
        for change in ({"machine": "b"}, {"seconds": 20.0}, {"attempt": 2})
    ]
    assert len({key_of(stage, parameters, {}) for parameters in (usual, *others)}) == 4
