"""The whole graph with ``OFFER_ASSETS_ENV=aws``: a real ``dagster dev`` on PostgreSQL, and AWS stood in for.

Jobs, batch transforms and endpoints run the commands of their containers on this machine; requests are held
against the service's model. Everything of Dagster is killed while the teacher learns in its job.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from werkzeug.wrappers import Request

from offer_assets.launch import launch
from tests.aws.cloud import Cloud, cloud_at, service_client
from tests.aws.iam import actions_of_requests, allowed_actions
from tests.aws.stand_in import REGION
from tests.postgres import postgres_server, postgres_url
from tests.small_encoder import small_encoder

from .conftest import Ui, environment, run, running_dev, wait_for

__all__ = ["postgres_server", "postgres_url"]

pytestmark = [pytest.mark.xdist_group("aws"), pytest.mark.timeout(4000)]

BUCKET = "offer-assets-whole-graph"
PREFIX = "shop/"
DAYS = ("2026-11-01", "2026-11-02")
SMALL = {
    "OFFER_ASSETS_DEMO_DAYS": "2",
    "OFFER_ASSETS_DEMO_OFFERS_PER_DAY": "1200",
    "OFFER_ASSETS_LABELLED_OFFERS": "800",
    "OFFER_ASSETS_UNLABELLED_OFFERS": "200",
    "OFFER_ASSETS_TEACHER_EPOCHS": "6",
    "OFFER_ASSETS_STUDENT_EPOCHS": "6",
    "OFFER_ASSETS_STUDENT_LAYERS": "1",
    "OFFER_ASSETS_MAX_TOKENS": "32",
    "OFFER_ASSETS_ENCODER": f"s3://{BUCKET}/encoders/small",
    "OFFER_ASSETS_AWS_BULK_FROM": "0",
}
RUNS = "{ runsOrError { ... on Runs { results { runId status jobName } } } }"
SECONDS_FOR_A_RUN_TO_COME = 600


@dataclass
class Production:
    """What came of it."""

    cloud: Cloud
    ui: Ui
    env: dict[str, str]
    home: Path
    days_taken_at_once: bool
    runs: list[dict[str, object]]
    started_jobs: Counter[str]
    """Training jobs by stage."""


class Meeting:
    """Writes of artifacts, held until there are so many: whoever makes them is at work at once."""

    def __init__(self, parent: str, awaited: int) -> None:
        self._artifact = re.compile(rf"{re.escape(parent)}([^/]+)/")
        self._awaited = awaited
        self._came: set[str] = set()
        self.all_came = threading.Event()

    def hold(self, request: Request) -> None:
        """A handler of the stand-in that answers nothing itself; who asks again is held again."""
        artifact = self._artifact.match(request.path)
        if request.method != "PUT" or artifact is None:
            return
        self._came.add(artifact[1])
        if len(self._came) >= self._awaited:
            self.all_came.set()
        self.all_came.wait(SECONDS_FOR_A_RUN_TO_COME)


@pytest.fixture(scope="module")
def production(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    folder = tmp_path_factory.mktemp("aws")
    with cloud_at(folder / "cloud", BUCKET) as cloud:
        upload(small_encoder(folder / "encoder"), cloud, "encoders/small")
        env = environment(folder / "home", **SMALL, **cloud.settings(f"s3://{BUCKET}/{PREFIX}"))
        env |= {
            "OFFER_ASSETS_POSTGRES_URL": postgres_server,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        }
        log = folder / "dev.log"
        with running_dev(env, log) as dev:
            assert launch(dev.ui.url, "adopt_taxonomy")
            ingests = Meeting(f"/{BUCKET}/{PREFIX}artifacts/offers/", len(DAYS))
            cloud.stand_in.raw_handlers.append(ingests.hold)
            with ThreadPoolExecutor() as threads:
                assert all(threads.map(lambda day: launch(dev.ui.url, "ingest_day", day), DAYS))
            cloud.stand_in.raw_handlers.remove(ingests.hold)
            threading.Thread(target=launch_unwatched, args=(dev.ui.url,), daemon=True).start()
            wait_for(lambda: cloud.objects(f"{PREFIX}checkpoints/teacher_checkpoint/"), "a checkpoint")
            dev.kill()
        with running_dev(env, log) as dev:
            assert launch(dev.ui.url, "train_and_release", "cpu"), log.read_text()[-6000:]
            assert launch(dev.ui.url, "catalogue_day", DAYS[-1]), log.read_text()[-6000:]
            assert launch(dev.ui.url, "measure_quality"), log.read_text()[-6000:]
            yield Production(
                cloud=cloud,
                ui=dev.ui,
                env=env,
                home=folder / "home",
                days_taken_at_once=ingests.all_came.is_set(),
                runs=dev.ui.query(RUNS)["runsOrError"]["results"],
                started_jobs=Counter(
                    re.sub(r"^offer-assets-|-[0-9a-f]{16}-\d+$", "", name) for name in cloud.jobs.jobs
                ),
            )


def launch_unwatched(url: str) -> None:
    """Start the training whose Dagster is going to be killed: nobody hears how it ends."""
    from ml.errors import InputError

    try:
        launch(url, "train_and_release", "cpu")
    except InputError:
        return


def client(url: str, service: str) -> Any:
    """As somebody else's, with credentials of the account."""
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    return boto3.session.Session(region_name=REGION, **keys).client(service, endpoint_url=url)


def upload(folder: Path, cloud: Cloud, prefix: str) -> None:
    for path in folder.iterdir():
        service_client(cloud.url, "s3").upload_file(str(path), BUCKET, f"{prefix}/{path.name}")


def test_a_training_that_outlives_its_daemon_is_picked_up_and_not_started_twice(
    production: Production,
) -> None:
    assert production.started_jobs["teacher-checkpoint"] == 1
    statuses = Counter(
        (str(each["jobName"]), str(each["status"]))
        for each in production.runs
        if each["jobName"] == "train_and_release"
    )
    assert statuses == {("train_and_release", "SUCCESS"): 1, ("train_and_release", "FAILURE"): 1}


def test_two_days_were_taken_at_once(production: Production) -> None:
    assert production.days_taken_at_once


def test_every_stage_of_the_training_was_one_job(production: Production) -> None:
    stages = (
        "teacher-checkpoint",
        "teacher-labels",
        "fast-checkpoint",
        "student-checkpoint",
        "student-evaluation",
        "compiled-student",
    )
    assert {stage: production.started_jobs[stage] for stage in stages} == dict.fromkeys(stages, 1)


def test_every_artifact_lies_encrypted_in_s3_and_none_in_the_home_folder(production: Production) -> None:
    keys = production.cloud.objects(f"{PREFIX}artifacts/")
    kinds = {key.removeprefix(f"{PREFIX}artifacts/").split("/")[0] for key in keys}
    assert {
        "catalog_taxonomy",
        "offers",
        "training_sample",
        "teacher_checkpoint",
        "compiled_student",
        "catalogued_offers",
        "drift_report",
        "live_quality",
    } <= kinds
    s3 = service_client(production.cloud.url, "s3")
    # What the service itself writes (outputs, checkpoints, captures) it encrypts as its requests say.
    ours = [
        key
        for folder in ("artifacts", "digests", "pointers", "registry")
        for key in production.cloud.objects(f"{PREFIX}{folder}/")
    ]
    for key in ours:
        assert s3.head_object(Bucket=BUCKET, Key=key).get("ServerSideEncryption") == "aws:kms", key
    assert not (production.home / "artifacts").exists()


def test_the_endpoint_serves_the_registered_version_and_that_is_an_approved_package(
    production: Production,
) -> None:
    (package,) = production.cloud.registry.packages.values()
    assert package["ModelApprovalStatus"] == "Approved"
    version = package["CustomerMetadataProperties"]["digest"][:12]
    history = run(["offer_assets", "history"], production.env)
    assert version in history.stdout, history.stderr
    endpoint = run(["offer_assets", "endpoint"], production.env)
    assert f"model-{version}" in endpoint.stdout, endpoint.stderr
    said = client(production.cloud.url, "sagemaker-runtime").invoke_endpoint(
        EndpointName="offer-assets",
        ContentType="application/json",
        Body=b'{"offers": [{"offer_id": "1", "title": "Kingston 64GB RAM"}]}',
    )
    assert version in said["Body"].read().decode()


def test_the_day_was_catalogued_by_a_batch_transform_of_that_version(production: Production) -> None:
    (package,) = production.cloud.registry.packages.values()
    version = package["CustomerMetadataProperties"]["digest"][:12]
    statuses = {job.status for job in production.cloud.transforms.jobs.values() if version in job.name}
    assert "Completed" in statuses
    assert "Failed" not in statuses


def test_nothing_was_called_that_the_policy_of_the_orchestrator_does_not_allow(
    production: Production,
) -> None:
    needed = actions_of_requests(production.cloud.stand_in.calls)
    assert {"sagemaker:CreateTrainingJob", "sagemaker:CreateEndpoint", "s3:PutObject"} <= needed
    assert needed <= allowed_actions("orchestrator")
