"""Heavy stages as training jobs whose containers really run: started once, followed, stopped, picked up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml import stages
from ml.artifacts import verify
from ml.errors import InputError
from ml.stages import CompileParameters, Stage, StudentParameters, TeacherParameters
from resources import sagemaker_compute as sagemaker_compute_module
from resources.job_logs import LOG_GROUP, JobLogReader
from resources.job_plan import JobMachines
from resources.sagemaker_compute import SageMakerCompute
from resources.training_jobs import JobRequest, encoder_prefix, failure_of, job_name
from tests.aws.conftest import BUCKET, access
from tests.aws.jobs import IMAGE, LOCATION, compute_of, sagemaker_compute
from tests.aws.stand_in import REGION, ServiceError, StandIn
from tests.aws.stand_in_jobs import Job, JobRunner
from tests.ml.tiny_models import TINY_TEACHER, tiny_encoder, tiny_inputs
from tests.resources.compute_runs import Run, instance_in, lines, lines_so_far, run_of, text_of
from tests.resources.stand_in import STAND_INS

pytestmark = pytest.mark.usefixtures("no_pauses")

KEY = f"arn:aws:kms:{REGION}:123456789012:key/1"


@pytest.fixture(autouse=True)
def _stand_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stage)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with instance_in(tmp_path) as instance:
        yield instance


@pytest.fixture
def jobs(stand_in: StandIn, tmp_path: Path) -> Iterator[tuple[SageMakerCompute, JobRunner]]:
    with sagemaker_compute(stand_in, tmp_path) as world:
        yield world


@pytest.fixture
def compute(jobs: tuple[SageMakerCompute, JobRunner]) -> SageMakerCompute:
    return jobs[0]


@pytest.fixture
def runner(jobs: tuple[SageMakerCompute, JobRunner]) -> JobRunner:
    return jobs[1]


@pytest.fixture
def run(compute: SageMakerCompute, instance: dg.DagsterInstance) -> Run:
    return run_of(compute, instance)


def soon(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def at_once(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def created(stand_in: StandIn) -> int:
    return stand_in.calls.count(("sagemaker", "CreateTrainingJob"))


def only_job(runner: JobRunner) -> Job:
    (job,) = runner.jobs.values()
    return job


def said(instance: dg.DagsterInstance, text: str) -> bool:
    return any(text in line for line in lines_so_far(instance))


def plan_file(folder: Path, stage: str = "heavy", **machines: Any) -> str:
    file = folder / "jobs.toml"
    file.write_text(
        f"[stages.{stage}]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in machines.items())
    )
    return str(file)


def request(**given: Any) -> JobRequest:
    return JobRequest(
        **{
            "name": "offer-assets-heavy-0123456789abcdef-1",
            "stage": "heavy",
            "key": "0123456789abcdef" * 2,
            "run_id": "run",
            "image": IMAGE,
            "machines": JobMachines(),
            "location": LOCATION,
            "has_inputs": True,
            "encoder": "",
            **given,
        }
    )


# --- what the service is asked for


def test_a_job_is_isolated_encrypted_and_in_the_network_of_the_settings():
    aws = access(kms_key=KEY, subnets="subnet-1,subnet-2", security_groups="sg-1")
    asked = request(machines=JobMachines(instance_type="ml.c7i.xlarge")).arguments(aws)
    assert asked["EnableNetworkIsolation"] is True
    assert asked["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert asked["OutputDataConfig"]["KmsKeyId"] == KEY
    assert asked["ResourceConfig"]["VolumeKmsKeyId"] == KEY
    assert asked["RoleArn"] == aws.role


def test_without_a_key_or_a_network_of_ours_none_is_named():
    asked = request().arguments(access())
    assert "VpcConfig" not in asked
    assert "KmsKeyId" not in asked["OutputDataConfig"]
    assert "VolumeKmsKeyId" not in asked["ResourceConfig"]


@pytest.mark.parametrize(
    "kind", ["ml.g5.xlarge", "ml.g6.xlarge", "ml.p4d.24xlarge", "ml.c6gd.large", "ml.trn1.2xlarge"]
)
def test_a_type_with_a_disk_of_its_own_is_given_no_key_for_it(kind):
    asked = request(machines=JobMachines(instance_type=kind)).arguments(access(kms_key=KEY))
    assert "VolumeKmsKeyId" not in asked["ResourceConfig"]


def test_a_spot_job_may_wait_as_long_as_it_may_compute_and_others_do_not_wait():
    spot = request(machines=JobMachines(max_hours=2)).arguments(access())
    assert spot["EnableManagedSpotTraining"] is True
    assert spot["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14_400}
    other = request(machines=JobMachines(max_hours=2, spot=False)).arguments(access())
    assert other["EnableManagedSpotTraining"] is False
    assert other["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200}


def test_machines_encrypt_what_they_say_to_each_other():
    assert not request().arguments(access())["EnableInterContainerTrafficEncryption"]
    several = request(machines=JobMachines(instance_count=2)).arguments(access())
    assert several["EnableInterContainerTrafficEncryption"]


def test_the_service_plots_the_figures_of_progress_lines():
    definitions = request().arguments(access())["AlgorithmSpecification"]["MetricDefinitions"]
    patterns = {definition["Name"]: re.compile(definition["Regex"]) for definition in definitions}
    step = "teacher_checkpoint: training 1,024 of 4,096 offers (25%), 12 s left, 250/s, loss 0.1234"
    epoch = "teacher_checkpoint: epoch 1 of 2: loss 0.987, validation accuracy 0.912"
    assert patterns["training:loss"].search(step)[1] == "0.1234"
    assert patterns["training:loss"].search(epoch)[1] == "0.987"
    assert patterns["validation:accuracy"].search(epoch)[1] == "0.912"
    assert not patterns["training:loss"].search(json.dumps({"message": step}))


@given(
    prefix=st.from_regex(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,40}", fullmatch=True),
    stage=st.sampled_from(sorted(stages.STAGES)),
    key=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    attempt=st.integers(1, 999),
)
def test_names_of_jobs_are_what_the_service_takes_and_tell_artifacts_apart(prefix, stage, key, attempt):
    name = job_name(prefix, stage, key, attempt)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)
    assert len(name) <= 63
    assert name.endswith(f"-{stage.replace('_', '-')}-{key[:16]}-{attempt}")


@pytest.mark.parametrize(
    ("stage", "parameters", "prefix"),
    [
        ("teacher_checkpoint", TeacherParameters(), ""),
        ("student_checkpoint", StudentParameters(), ""),
        ("teacher_checkpoint", TeacherParameters(encoder="s3://models/e5/"), "s3://models/e5/"),
        ("compiled_student", CompileParameters(), ""),
    ],
)
def test_an_encoder_is_brought_from_s3_or_is_in_the_image(stage, parameters, prefix):
    assert encoder_prefix(stage, parameters) == prefix


@pytest.mark.parametrize(
    "encoder", ["intfloat/multilingual-e5-large-instruct", "/models/e5", "https://host/e5"]
)
def test_an_encoder_that_a_container_cannot_get_is_told_with_the_setting(encoder):
    with pytest.raises(InputError, match=r"set OFFER_ASSETS_ENCODER to their prefix \(s3://"):
        encoder_prefix("teacher_checkpoint", TeacherParameters(encoder=encoder))
    with pytest.raises(InputError, match="set OFFER_ASSETS_STUDENT_ENCODER"):
        encoder_prefix("student_checkpoint", StudentParameters(encoder=encoder))


# --- what its answers mean


def ended(status: str = "Failed", secondary: str = "", reason: str = "") -> dict[str, Any]:
    return {
        "TrainingJobName": "job-1",
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary or status,
        "StoppingCondition": {"MaxRuntimeInSeconds": 7200},
        **({"FailureReason": reason} if reason else {}),
    }


@pytest.mark.parametrize(
    ("job", "line"),
    [
        (
            ended(reason="AlgorithmError: RuntimeError: boom, exit code: 1"),
            "AlgorithmError: RuntimeError: boom",
        ),
        (ended(reason="AlgorithmError: , exit code: 137"), "exit code: 137"),
        (ended(reason="CapacityError: Unable to provision requested ML compute capacity."), "CapacityError"),
        (ended(reason="InternalServerError: We encountered an internal error."), "InternalServerError"),
        (ended(), "no reason was given"),
        (ended("Stopped"), "was stopped"),
        (ended("Stopped", "MaxWaitTimeExceeded"), "waited for spot capacity"),
    ],
)
def test_what_a_repetition_may_mend_can_be_retried_and_says_that_it_continues(job, line):
    failure = failure_of(job, {})
    assert isinstance(failure, dg.Failure)
    assert failure.allow_retries
    assert re.search(line, failure.description)
    assert "continues from its last checkpoint" in failure.description


def test_a_job_that_used_up_its_time_is_not_paid_for_again_without_being_asked():
    failure = failure_of(ended("Stopped", "MaxRuntimeExceeded"), {})
    assert isinstance(failure, dg.Failure)
    assert not failure.allow_retries
    assert "computed for as long as it may (max_hours is 2); run it again" in failure.description


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            "AlgorithmError: InputError: row 7, exit code: 2 it says, exit code: 2",
            "row 7, exit code: 2 it says",
        ),
        ("ClientError: Data download failed: AccessDenied", "training job job-1: ClientError: Data download"),
    ],
)
def test_what_only_a_person_mends_is_an_input_error(reason, line):
    failure = failure_of(ended(reason=reason), {})
    assert isinstance(failure, InputError)
    assert str(failure).startswith(line)


# --- jobs that run


def test_a_job_goes_through_its_states_and_tells_what_it_cost_and_where_to_look(run, runner, instance):
    run("heavy", text="abc")
    name = only_job(runner).name
    assert re.fullmatch(r"offer-assets-heavy-[0-9a-f]{16}-1", name)
    assert said(
        instance, f"heavy runs as training job {name} on 1 x ml.m7i.2xlarge (spot), 4 instance hours at"
    )
    assert said(
        instance, f"https://{REGION}.console.aws.amazon.com/sagemaker/home?region={REGION}#/jobs/{name}"
    )
    assert said(instance, f"training job {name}: Completed, ")
    assert said(instance, "instance seconds are billed")


def test_inputs_travel_within_s3_and_not_through_this_machine(run, runner, stand_in, instance, tmp_path):
    upstream = run("light", text="up ").ref
    elsewhere = compute_of(tmp_path / "elsewhere")
    stand_in.calls.clear()
    made = run_of(elsewhere, instance)("heavy", {"upstream": upstream}, text="down").ref
    read = [path for service, path in stand_in.calls if service == "s3" and path.startswith("GET")]
    assert read
    assert not [path for path in read if path.endswith("/text")]
    assert text_of(elsewhere, made) == "up down"
    channels = {channel["ChannelName"]: channel for channel in only_job(runner).request["InputDataConfig"]}
    assert channels["artifacts"]["DataSource"]["S3DataSource"]["S3DataType"] == "ManifestFile"


def test_checkpoints_of_a_crashed_job_are_there_for_the_next_one(run, runner):
    with pytest.raises(dg.Failure, match=r"training job \S+-1: AlgorithmError: , exit code: ") as failure:
        run("heavy", behaviour="be killed once")
    assert "console.aws.amazon.com/cloudwatch" in failure.value.metadata["log"].value
    assert run("heavy", behaviour="be killed once").ref.metrics["continued"] == 1
    assert [name.rpartition("-")[2] for name in runner.jobs] == ["1", "2"]


def test_a_spot_interruption_is_waited_out_and_the_job_continues(run, runner, instance):
    def interrupt() -> None:
        soon(lambda: said(instance, "writes hello"))
        runner.interrupt(only_job(runner).name)

    at_once(interrupt)
    assert run("heavy", behaviour="hang once").ref.metrics["continued"] == 1
    assert only_job(runner).restarts == 1
    assert len([line for line in lines(instance) if "writes hello" in line]) == 2
    assert not any("unexpected message" in line for line in lines(instance))


def test_progress_is_seen_while_the_job_runs_and_a_cancelled_run_stops_it(run, runner, instance):
    def cancel() -> None:
        soon(lambda: said(instance, "writes hello"))
        os.kill(os.getpid(), signal.SIGINT)

    at_once(cancel)
    with pytest.raises(BaseException) as interruption:  # noqa: PT011 (Dagster's own is no Exception)
        run("heavy", behaviour="hang")
    assert not isinstance(interruption.value, Exception)
    soon(lambda: only_job(runner).status == "Stopped")
    assert only_job(runner).containers[0].poll() is not None
    assert said(instance, "is stopped with the run")


ORCHESTRATOR = """
import sys
from pathlib import Path
import dagster as dg
from ml import stages
from tests.aws.jobs import compute_of
from tests.resources.compute_runs import run_of
from tests.resources.stand_in import STAND_INS

stages.STAGES.update(STAND_INS)
with dg.DagsterInstance.ephemeral() as instance:
    run_of(compute_of(Path(sys.argv[1])), instance)("heavy", text="abc")
"""


def test_the_job_of_a_killed_orchestrator_is_picked_up_and_not_started_again(
    run, runner, stand_in, instance, tmp_path
):
    released = threading.Event()
    runner.before = lambda _: released.wait(60)
    orchestrator = subprocess.Popen([sys.executable, "-c", ORCHESTRATOR, str(tmp_path / "killed")])
    soon(lambda: bool(runner.jobs))
    orchestrator.kill()
    orchestrator.wait()

    def release_once_it_is_watched() -> None:
        soon(lambda: said(instance, "watching that one"))
        released.set()

    at_once(release_once_it_is_watched)
    assert not run("heavy", text="abc").reused
    assert created(stand_in) == 1
    assert any("writes abc" in line for line in lines(instance)), "what was said before is heard, too"


def test_two_that_start_the_same_at_once_share_one_job(stand_in, jobs, tmp_path):
    compute, runner = jobs
    both_looked = threading.Barrier(2)
    looks = threading.Semaphore(2)
    describe = stand_in.handlers["DescribeTrainingJob"]

    def described(given: dict[str, Any]) -> Any:
        if looks.acquire(blocking=False):
            both_looked.wait(60)
            raise ServiceError("ValidationException", "Requested resource not found.")
        return describe(given)

    stand_in.handlers["DescribeTrainingJob"] = described
    results = []

    def run_it() -> None:
        with dg.DagsterInstance.ephemeral() as instance:
            results.append(run_of(compute, instance)("heavy", text="abc"))

    threads = [at_once(run_it), at_once(run_it)]
    for thread in threads:
        thread.join(120)
    assert created(stand_in) == 2
    assert len(runner.jobs) == 1
    assert [result.ref for result in results] == [results[0].ref] * 2


def test_throttling_of_the_service_is_survived(run, runner, stand_in):
    def throttle(_: Job) -> None:
        stand_in.fail_next("sagemaker:DescribeTrainingJob", times=20)
        stand_in.fail_next("logs:GetLogEvents", times=3)

    runner.before = throttle
    stand_in.fail_next("sagemaker:CreateTrainingJob", times=3)
    assert not run("heavy").reused
    assert len(runner.jobs) == 1
    assert all(fault.times == 0 for fault in stand_in.faults)


@pytest.mark.parametrize("times", [1, 8])
def test_a_job_whose_start_was_answered_by_an_error_is_not_started_twice(run, runner, stand_in, times):
    stand_in.fail_next(
        "sagemaker:CreateTrainingJob", times=times, code="InternalFailure", status=500, after=True
    )
    assert not run("heavy").reused
    assert len(runner.jobs) == 1


def test_what_the_role_may_not_do_is_one_line_that_is_not_retried(run, stand_in):
    stand_in.fail_next("sagemaker:CreateTrainingJob", code="AccessDeniedException")
    with pytest.raises(dg.Failure, match=r"starting training job .*: AccessDenied.*deploy/iam") as failure:
        run("heavy")
    assert not failure.value.allow_retries


def test_a_log_that_cannot_be_read_is_told_once_and_ends_no_job(run, stand_in, instance):
    stand_in.fail_next("logs:DescribeLogStreams", times=1_000, code="AccessDeniedException")
    assert not run("heavy").reused
    assert len([line for line in lines(instance) if "its log cannot be read" in line]) == 1


def test_one_log_that_cannot_be_read_on_keeps_no_other_from_being_read(stand_in):
    logs = access().client("logs")
    logs.create_log_group(logGroupName=LOG_GROUP)
    for stream in ("job-1/algo-1-1", "job-1/algo-1-2"):
        logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
        event = {"timestamp": int(time.time() * 1000), "message": f"line of {stream}"}
        logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=[event])
    warned: list[str] = []
    reader = JobLogReader(access(), "job-1", SimpleNamespace(warning=warned.append))
    stand_in.fail_next("logs:GetLogEvents", code="InvalidParameterException")
    reader.read()
    assert list(reader.last_lines) == ["line of job-1/algo-1-2"]
    assert len(warned) == 1


def test_what_a_job_finished_while_nobody_watched_is_taken_over(run, runner, stand_in):
    stand_in.fail_next("s3:GET /" + BUCKET + "/offer-assets/jobs/", code="AccessDenied", status=403)
    with pytest.raises(dg.Failure, match="AccessDenied"):
        run("heavy")
    assert not run("heavy").reused
    assert len(runner.jobs) == 1


def test_a_job_whose_output_is_gone_is_followed_by_another(run, runner, stand_in, instance):
    stand_in.fail_next("s3:GET /" + BUCKET + "/offer-assets/jobs/", code="AccessDenied", status=403)
    with pytest.raises(dg.Failure, match="AccessDenied"):
        run("heavy")
    prefix = f"offer-assets/jobs/{only_job(runner).name}/output/model/manifest.json"
    access().client("s3").delete_object(Bucket=BUCKET, Key=prefix)
    assert not run("heavy").reused
    assert len(runner.jobs) == 2
    assert said(instance, "is gone")


def test_a_job_that_runs_out_of_time_says_which_setting_that_is(stand_in, instance, tmp_path):
    with sagemaker_compute(stand_in, tmp_path, jobs=plan_file(tmp_path, max_hours=0.0003)) as (compute, _):
        run = run_of(compute, instance)
        with pytest.raises(dg.Failure, match="raise max_hours in OFFER_ASSETS_AWS_JOBS"):
            run("heavy", behaviour="hang")


def test_a_stage_that_is_to_run_here_runs_here(stand_in, instance, tmp_path):
    with sagemaker_compute(stand_in, tmp_path, jobs=plan_file(tmp_path, where="here")) as (compute, runner):
        made = run_of(compute, instance)("heavy", text="abc").ref
        assert not runner.jobs
        assert text_of(compute, made) == "abc"


def test_a_job_of_another_installation_is_not_mistaken_for_ours(run, runner, stand_in):
    def theirs(given: dict[str, Any]) -> dict[str, Any]:
        if not given["TrainingJobName"].endswith("-1"):
            raise ServiceError("ValidationException", "Requested resource not found.")
        return Job(given | {"OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/other/jobs"}}).description()

    stand_in.handlers["DescribeTrainingJob"] = theirs
    with pytest.raises(dg.Failure, match="of another installation in this account"):
        run("heavy")
    assert not runner.jobs


def test_a_service_that_answers_nothing_for_long_ends_the_watching_and_not_the_job(
    run, runner, stand_in, monkeypatch
):
    monkeypatch.setattr(sagemaker_compute_module, "_LOOKS_MISSED", 2)
    fault = {"times": 24, "code": "ServiceUnavailable", "status": 503}
    runner.before = lambda _: stand_in.fail_next("sagemaker:DescribeTrainingJob", **fault)
    with pytest.raises(dg.Failure, match=r"looking at training job .*ServiceUnavailable.*run again"):
        run("heavy")
    assert not run("heavy").reused
    assert len(runner.jobs) == 1


def test_neuron_is_compiled_in_its_own_image(stand_in, instance, tmp_path, monkeypatch):
    compiled = Stage(
        name="compiled_student",
        version="1",
        summary="",
        entry_point="none:none",
        parameters=CompileParameters,
        heavy=True,
    )
    monkeypatch.setitem(stages.STAGES, "compiled_student", compiled)
    neuron = CompileParameters(target="neuron")
    with sagemaker_compute(stand_in, tmp_path) as (compute, runner):
        with pytest.raises(dg.Failure, match="set OFFER_ASSETS_AWS_NEURON_IMAGE"):
            run_of(compute, instance)("compiled_student", given=neuron)
        assert not runner.jobs
    with sagemaker_compute(stand_in, tmp_path, neuron_image="neuron:1") as (compute, runner):
        with pytest.raises(dg.Failure, match="compiled_student needs"):
            run_of(compute, instance)("compiled_student", given=neuron)
        assert only_job(runner).request["AlgorithmSpecification"]["TrainingImage"] == "neuron:1"


def test_two_machines_train_a_real_teacher_from_an_encoder_in_s3(stand_in, instance, tmp_path):
    encoder = tiny_encoder(tmp_path / "encoder", layers=1)
    for file in encoder.iterdir():
        access().client("s3").upload_file(str(file), BUCKET, f"encoders/tiny/{file.name}")
    plan = plan_file(tmp_path, "teacher_checkpoint", instance_count=2)
    with sagemaker_compute(stand_in, tmp_path, program="ml", jobs=plan) as (compute, runner):
        inputs = {}
        for kind, folder in tiny_inputs(tmp_path / "inputs", train=16, validation=8).items():
            key = verify(folder).key
            shutil.copytree(folder, compute.store.destination(kind, key))
            inputs[kind] = compute.store.adopt(kind, key)
        parameters = TeacherParameters(**TINY_TEACHER | {"epochs": 1}, encoder=f"s3://{BUCKET}/encoders/tiny")
        result = run_of(compute, instance)("teacher_checkpoint", inputs, given=parameters)
        assert result.ref.metrics["rows"] == 16
        assert result.manifest.parameters["encoder"] == f"s3://{BUCKET}/encoders/tiny"
        assert len(only_job(runner).containers) == 2
    assert len([line for line in lines(instance) if "epoch 1 of 1" in line]) == 1
