"""Days catalogued by batch transforms: what is asked and what not, and every way in which a job can end."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pyarrow.parquet as pq
import pytest

from ml.errors import InputError
from ml.serving.predictor import Prediction, Predictor, prediction_table
from resources.compute import LocalCompute, StageResult
from resources.failures import InputFailure
from resources.sagemaker_endpoints import SageMakerEndpoints
from resources.transform_cataloguing import TransformCataloguing
from resources.transform_requests import TransformRequest, transform_name
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn
from tests.aws.stand_in_endpoints import EndpointHost
from tests.aws.stand_in_transform import TransformRunner
from tests.aws.test_sagemaker_compute import at_once, soon
from tests.aws.transforms import (
    ASKED,
    DAY,
    IMAGE,
    LOCATION,
    ScriptedEndpoints,
    catalogue,
    cataloguing_of,
    prediction,
    publish,
    store_of,
)
from tests.ml.bulk import captured_line, offers_artifact
from tests.ml.compiled_models import TITLES, seal
from tests.resources.compute_runs import lines, lines_so_far

KEY = "arn:aws:kms:eu-central-1:123456789012:key/abc"
OFFERS = [{"offer_id": f"ö{number}", "title": TITLES[number % 9], "brand": None} for number in range(40)]

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture(autouse=True)
def known_revision(monkeypatch):
    monkeypatch.setenv("CODE_REVISION", "a test")
    ASKED.clear()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


class Day:
    """A day of offers and a model in S3, and who catalogues it."""

    def __init__(self, stand_in: StandIn, folder: Path, instance: dg.DagsterInstance, compiled: Path) -> None:
        self.stand_in, self.folder, self.instance = stand_in, folder, instance
        self.runner = TransformRunner(stand_in, folder / "instances").install()
        store = store_of(folder / "home")
        self.offers = publish(store, offers_artifact(folder / "offers", OFFERS))
        self.model = publish(store, compiled)
        self.s3 = access().client("s3")
        stand_in.calls.clear()

    def run(self, date: str = DAY, **settings: Any) -> StageResult:
        return catalogue(self.cataloguing(**settings), self.instance, self.offers, self.model, date)

    def cataloguing(self, home: str = "home", **settings: Any) -> TransformCataloguing:
        return cataloguing_of(self.folder / home, **settings)

    def rows(self, result: StageResult) -> list[dict[str, Any]]:
        folder = store_of(self.folder / "home").fetch(result.ref)
        return pq.read_table(folder / "catalogued.parquet").to_pylist()

    def capture(self, hour: str, offers: list[dict[str, Any]], variant: str = "main") -> None:
        predictions = [
            msgspec.convert(prediction(offer, self.model.version, "captured"), Prediction) for offer in offers
        ]
        key = f"offer-assets/capture/offer-assets/{variant}/{hour}/05-00.jsonl"
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=captured_line(offers, predictions))

    def created(self) -> int:
        return self.stand_in.calls.count(("sagemaker", "CreateTransformJob"))

    def asked(self) -> list[str]:
        """Ids of the offers of all requests of all jobs."""
        bodies = [body for job in self.runner.jobs.values() for body in job.asked]
        return [json.loads(line)["offer_id"] for body in bodies for line in body.splitlines()]

    def said(self, text: str) -> bool:
        return any(text in line for line in lines_so_far(self.instance))

    def answers(self) -> list[str]:
        """Keys of what jobs have written."""
        found = self.s3.list_objects_v2(Bucket=BUCKET, Prefix="offer-assets/transform/")
        return [item["Key"] for item in found.get("Contents", ())]


@pytest.fixture
def day(stand_in, tmp_path, instance) -> Iterator[Day]:
    """With a model that is only named; its answers are made up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text('{"target": "cpu", "taxonomy_version": "t"}')
    day = Day(stand_in, tmp_path, instance, seal(tmp_path / "model", "compiled_student"))

    def answer(body: bytes) -> bytes:
        offers = [json.loads(line) for line in body.splitlines()]
        return msgspec.json.Encoder().encode_lines(
            [prediction(offer, day.model.version, "by-job") for offer in offers]
        )

    day.runner.answer = answer
    yield day
    day.runner.close()


@pytest.fixture
def real_day(stand_in, tmp_path, instance, compiled_student) -> Iterator[Day]:
    """With a real model, served by a real process."""
    day = Day(stand_in, tmp_path, instance, compiled_student)
    yield day
    day.runner.close()


def test_a_batch_transform_gives_what_the_model_gives(real_day, compiled_student, tmp_path):
    real_day.runner.payload_bytes = 500
    compute = LocalCompute(store=store_of(tmp_path / "home"))
    made = real_day.run(shard_offers=16, compute=compute)
    expected = Predictor.load(compiled_student).predict(OFFERS)
    folder = store_of(tmp_path / "home").fetch(made.ref)
    assert pq.read_table(folder / "catalogued.parquet").equals(prediction_table(expected))
    (job,) = real_day.runner.jobs.values()
    assert len(job.asked) > 6
    assert sorted(real_day.asked()) == sorted(offer["offer_id"] for offer in OFFERS)
    assert len(real_day.answers()) == 3
    assert job.name == f"offer-assets-{job.name.split('-')[2]}-{real_day.model.version}-1"
    assert any("40 offers in 3 files go through transform job" in line for line in lines(real_day.instance))
    assert any("Completed, 3 of 3 files answered" in line for line in lines(real_day.instance))
    assert [path.suffix for path in (tmp_path / "home/work/bulk").iterdir()] == [".lock"]

    again = real_day.run(shard_offers=16)
    assert again.reused
    assert again.ref == made.ref
    assert real_day.created() == 1


def test_what_the_endpoint_has_answered_is_not_asked_again(day):
    day.capture("2026/11/02/10", OFFERS[:5])
    day.capture("2026/11/03/05", OFFERS[5:7])
    day.capture("2026/11/02/23", OFFERS[7:9], variant=f"model-{day.model.version}")
    day.capture("2026/11/03/06", OFFERS[20:25])
    day.capture("2026/11/01/23", OFFERS[20:25])
    day.capture("2026/11/02/10", OFFERS[20:25], variant="model-of-others")
    rows = day.rows(day.run())
    assert [row["offer_id"] for row in rows] == [offer["offer_id"] for offer in OFFERS]
    assert [row["category_id"] for row in rows] == ["captured"] * 9 + ["by-job"] * 31
    assert sorted(day.asked()) == sorted(offer["offer_id"] for offer in OFFERS[9:])
    assert day.said("3 files of requests were captured by the endpoint on 2026-11-02")


def test_what_a_real_endpoint_captured_is_not_asked_again_and_its_model_is_shared(
    real_day, compiled_student, stand_in, tmp_path
):
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    endpoints = SageMakerEndpoints(
        aws=access(),
        location=LOCATION,
        name="offer-assets",
        serving_image=IMAGE,
        instance_type="ml.c7i.xlarge",
        min_instances=2,
        max_instances=2,
        capture_percent=100,
        seconds_between_looks=0.02,
    )
    with EndpointHost(stand_in, tmp_path / "host"):
        endpoints.deploy(compiled_student, real_day.model)
        endpoints.invoke(OFFERS[:10])
        endpoints.invoke(OFFERS[10:25])
        made = real_day.run(today, endpoints=endpoints)
    expected = Predictor.load(compiled_student).predict(OFFERS)
    folder = store_of(tmp_path / "home").fetch(made.ref)
    assert pq.read_table(folder / "catalogued.parquet").equals(prediction_table(expected))
    assert sorted(real_day.asked()) == sorted(offer["offer_id"] for offer in OFFERS[25:])
    assert stand_in.calls.count(("sagemaker", "CreateModel")) == 1


def test_a_day_that_is_wholly_captured_starts_no_job(day):
    day.capture("2026/11/02/10", OFFERS)
    assert {row["category_id"] for row in day.rows(day.run())} == {"captured"}
    assert day.created() == 0
    assert day.said("every offer was answered already")


def test_few_offers_go_through_the_endpoint_that_serves_the_model(day):
    endpoints = ScriptedEndpoints(version=day.model.version)
    day.capture("2026/11/02/10", OFFERS[:5])
    rows = day.rows(day.run(endpoints=endpoints, bulk_from=36, shard_offers=20))
    assert [row["category_id"] for row in rows] == ["captured"] * 5 + ["by-endpoint"] * 35
    assert [len(request) for request in ASKED] == [20, 15]
    assert day.created() == 0


@pytest.mark.parametrize(
    ("serving", "bulk_from"),
    [({"version": "another"}, 100), ({"is_shadow": True}, 100), ({"version": ""}, 100), ({}, 40)],
    ids=["another version", "shadow", "nothing", "many offers"],
)
def test_otherwise_a_job_is_started(day, serving, bulk_from):
    endpoints = ScriptedEndpoints(**({"version": day.model.version} | serving))
    rows = day.rows(day.run(endpoints=endpoints, bulk_from=bulk_from))
    assert {row["category_id"] for row in rows} == {"by-job"}
    assert ASKED == []


def test_after_a_failed_job_the_next_run_starts_another(day):
    day.runner.before = lambda job: day.runner.fail("InternalServerError: We encountered an error.")
    with pytest.raises(dg.Failure, match=r"job \S+-1: InternalServerError: We .*; run again") as one:
        day.run()
    assert not isinstance(one.value, InputError)
    assert "log-group/$252Faws$252Fsagemaker$252FTransformJobs" in one.value.metadata["log"].value
    day.runner.before = lambda _job: None
    assert not day.run().reused
    assert [name.rpartition("-")[2] for name in day.runner.jobs] == ["1", "2"]


def test_a_failure_that_a_person_has_to_mend_is_one_line_and_not_retried(day):
    day.runner.before = lambda job: day.runner.fail("ClientError: See job logs\nfor more information")
    with pytest.raises(InputFailure, match=r"-1: ClientError: See job logs for more information \(log: http"):
        day.run()


def test_damaged_answers_are_one_clear_line_and_made_again_once_deleted(day):
    good, day.runner.answer = day.runner.answer, lambda body: b'{"offer_id": "1"'
    with pytest.raises(
        InputError, match=r"offers-000000\.jsonl\.out line 1 is not a prediction.*run again \(.* s3://"
    ):
        day.run()
    assert day.created() == 1
    day.runner.answer = good
    with pytest.raises(InputError, match="line 1 is not a prediction"):
        day.run()
    assert day.created() == 1
    for key in day.answers():
        day.s3.delete_object(Bucket=BUCKET, Key=key)
    assert {row["category_id"] for row in day.rows(day.run())} == {"by-job"}
    assert day.said("are gone: another is due")
    assert day.created() == 2


def test_answers_of_another_model_version_are_refused(day):
    day.runner.answer = lambda body: msgspec.json.Encoder().encode_lines(
        [prediction(json.loads(line), "older", "x") for line in body.splitlines()]
    )
    with pytest.raises(InputError, match=f"by model version older, expected {day.model.version}"):
        day.run()


def test_a_cancelled_run_stops_its_job(day):
    day.runner.before = lambda job: job.stopping.wait(60)

    def cancel() -> None:
        soon(lambda: day.said("InProgress, 0 of 1 files answered"))
        os.kill(os.getpid(), signal.SIGINT)

    at_once(cancel)
    with pytest.raises(BaseException) as interruption:  # noqa: PT011 (Dagster's own is no Exception)
        day.run()
    assert not isinstance(interruption.value, Exception)
    (job,) = day.runner.jobs.values()
    soon(lambda: job.status == "Stopped")
    assert day.said("is stopped with the run")
    day.runner.before = lambda _job: None
    day.run()
    assert [name.rpartition("-")[2] for name in day.runner.jobs] == ["1", "2"]


def test_a_job_whose_start_was_answered_by_nobody_is_watched_and_not_started_twice(day, stand_in):
    stand_in.fail_next("sagemaker:CreateTransformJob", code="InternalFailure", status=500, after=True)
    assert not day.run().reused
    assert len(day.runner.jobs) == 1
    assert day.said("was started already: watching that one")


def test_throttling_while_watching_is_waited_out(day, stand_in):
    stand_in.fail_next("sagemaker:DescribeTransformJob", times=3)
    assert not day.run().reused


def test_a_quota_that_is_used_up_is_one_clear_line(day, stand_in):
    stand_in.fail_next("sagemaker:CreateTransformJob", times=9, code="ResourceLimitExceeded")
    with pytest.raises(InputFailure, match=r"starting transform job \S+: ResourceLimitExceeded"):
        day.run()


def test_a_job_of_another_installation_is_not_taken_for_ours(day):
    day.run()
    (job,) = day.runner.jobs.values()
    job.request["TransformOutput"]["S3OutputPath"] = "s3://elsewhere/transform"
    for key in day.s3.list_objects_v2(Bucket=BUCKET, Prefix="offer-assets/artifacts/catalogued_offers")[
        "Contents"
    ]:
        day.s3.delete_object(Bucket=BUCKET, Key=key["Key"])
    with pytest.raises(InputFailure, match=r"writes to s3://elsewhere/transform, not to s3://"):
        day.run()


ORCHESTRATOR = """
import sys
from pathlib import Path
import dagster as dg
import msgspec
from ml.artifacts import ArtifactRef
from tests.aws.transforms import catalogue, cataloguing_of

offers, model = msgspec.json.decode(sys.argv[2], type=list[ArtifactRef])
with dg.DagsterInstance.ephemeral() as instance:
    catalogue(cataloguing_of(Path(sys.argv[1])), instance, offers, model)
"""


def test_the_job_of_a_killed_orchestrator_is_picked_up_and_not_started_again(day, tmp_path):
    released = threading.Event()
    day.runner.before = lambda _job: released.wait(60)
    given = msgspec.json.encode([day.offers, day.model]).decode()
    orchestrator = subprocess.Popen([sys.executable, "-c", ORCHESTRATOR, str(tmp_path / "killed"), given])
    soon(lambda: bool(day.runner.jobs))
    orchestrator.kill()
    orchestrator.wait()

    def release_once_it_is_watched() -> None:
        soon(lambda: day.said("watching that one"))
        released.set()

    at_once(release_once_it_is_watched)
    assert not day.run().reused
    assert day.created() == 1
    assert len(day.rows(day.run())) == len(OFFERS)


def test_a_model_without_an_image_for_its_target_is_named(day, tmp_path):
    model = tmp_path / "neuron"
    model.mkdir()
    (model / "model.json").write_text('{"target": "neuron", "taxonomy_version": "t"}')
    day.model = publish(store_of(tmp_path / "other"), seal(model, "renamed_student"))
    with pytest.raises(InputFailure, match="for neuron, but OFFER_ASSETS_AWS_NEURON_IMAGE is not set"):
        day.run()


def test_what_is_asked_of_the_service_is_encrypted_isolated_and_named_by_content(day, stand_in):
    models: dict[str, Any] = {}
    create = stand_in.handlers["CreateModel"]
    stand_in.handlers["CreateModel"] = lambda given: models.update(given) or create(given)
    network = {"subnets": "subnet-1", "security_groups": "sg-1"}
    day.run(aws=access(kms_key=KEY, **network), instances=3)
    (job,) = day.runner.jobs.values()
    assert models["EnableNetworkIsolation"]
    assert models["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert models["PrimaryContainer"]["Image"] == IMAGE
    source = models["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"] == store_of(day.folder / "home").uri(day.model) + "/"
    assert models["ModelName"] == job.request["ModelName"]
    asked = job.request
    assert asked["TransformOutput"]["KmsKeyId"] == asked["TransformResources"]["VolumeKmsKeyId"] == KEY
    assert asked["TransformOutput"]["S3OutputPath"] == f"{LOCATION}/transform/{job.name}"
    assert asked["TransformResources"]["InstanceCount"] == 3
    assert asked["BatchStrategy"] == "MultiRecord"
    assert asked["TransformInput"]["ContentType"] == asked["TransformOutput"]["Accept"]
    assert "DataCaptureConfig" not in asked


def test_a_type_with_its_own_encrypted_disk_gets_no_key_for_it():
    request = TransformRequest(
        name="n",
        model="m",
        source="s3://b/s",
        target="s3://b/t",
        instance_type="ml.g5.xlarge",
        instances=1,
        concurrent=4,
        run_id="r",
    )
    arguments = request.arguments(access(kms_key=KEY))
    assert "VolumeKmsKeyId" not in arguments["TransformResources"]
    assert arguments["TransformOutput"]["KmsKeyId"] == KEY


@pytest.mark.parametrize("prefix", ["a", "offer-assets", "x" * 41, "offer-assets-of-a-long-name-in-th-e"])
def test_names_of_jobs_fit_and_differ_by_attempt(prefix):
    names = {transform_name(prefix, "0123456789ab", "ba9876543210", attempt) for attempt in (1, 2, 10)}
    assert len(names) == 3
    assert all(len(name) <= 63 and "--" not in name for name in names)
