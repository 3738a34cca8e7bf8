"""Heavy stages as SageMaker training jobs.

A job is named by what it makes and by how many were tried before, so that whoever wants the same artifact
finds the job that is making it: a daemon that was restarted, a retry after a kill, a second run. All of a job
lies in S3 below ``jobs/<name>``, and its checkpoints below ``checkpoints/<stage>/<key>``, where the next job
of the same artifact continues.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import MANIFEST
from ml.errors import InputError
from ml.stages import Stage
from ml.training_job import ARTIFACTS_CHANNEL, PIPES_CONTEXT_FILE, SPEC_FILE, STAGE_CHANNEL, JobSpec
from resources.aws import AwsAccess, aws_errors, error_code
from resources.compute import AnyContext, LocalCompute, StageWork, ignore_preview_of_pipes
from resources.job_logs import JobLogReader
from resources.job_plan import JobMachines, machines_for, read_plan
from resources.s3_artifact_store import S3ArtifactStore
from resources.s3_objects import S3Objects
from resources.training_jobs import (
    ENDED,
    JobRequest,
    encoder_prefix,
    failure_of,
    job_name,
    job_url,
    log_url,
    output_path,
    price_of,
)

_LOOKS_MISSED = 20
"""So many in a row end the watching, though not the job: the service answers nobody, or not us."""
_SECONDS_TO_STOP = 20.0
_FIRST_PAUSE = 1.0
"""Seconds between the first looks; the pauses grow with the time that a job takes."""

Job = dict[str, Any]
"""What ``describe_training_job`` says."""


class SageMakerCompute(LocalCompute):
    """Jobs for the stages that the plan gives to jobs; for the others, as in ``local``, this machine."""

    # Dagster reads these annotations as they stand: no postponed annotations in this module.
    aws: dg.ResourceDependency[AwsAccess]
    store: dg.ResourceDependency[S3ArtifactStore]
    training_image: str
    neuron_image: str = ""
    """Of the jobs that compile for ``neuron``; empty: there are none."""
    name: str
    """Begins the name of every job."""
    jobs: str = ""
    """Path of the TOML file with the plan; see :mod:`resources.job_plan`."""
    poll_seconds: float = 15.0
    """Time between two looks at a job that runs for a while, on average."""
    log_seconds: float = 10.0
    """So long the last lines of a job may be on their way."""

    @override
    def _make(self, context: AnyContext, stage: Stage, key: str, work: StageWork) -> None:
        machines = machines_for(read_plan(self.jobs), stage)
        if machines.where == "here":
            super()._make(context, stage, key, work)
            return
        attempts, job = self._last_job(stage, key)
        if job is not None and self._is_adopted(context, job, stage, key):
            return
        if job is None or job["TrainingJobStatus"] in ENDED:
            request = self._request(context, stage, key, attempts + 1, machines, work)
            name = request.name
        else:
            request = None
            name = job["TrainingJobName"]
        reader = JobLogReader(self.aws, name, context.log)
        with self._session(context, name, reader) as pipes_context:
            if request is not None:
                self._start(context, request, work, pipes_context)
            else:
                context.log.info(f"{stage.name} is being made by training job {name}: watching that one")
            ended = self._watch(context, name, reader)
            reader.read_rest(self.log_seconds)
        self._conclude(context, ended, reader)
        self.store.adopt_from(_output_of(ended), stage.name, key)

    def _last_job(self, stage: Stage, key: str) -> tuple[int, Job | None]:
        """How many jobs were there for an artifact, and the last of them."""
        attempts, last = 0, None
        while (job := self._described(job_name(self.name, stage.name, key, attempts + 1))) is not None:
            attempts, last = attempts + 1, job
        ours = output_path(self._location)
        if last is not None and (theirs := last["OutputDataConfig"]["S3OutputPath"]) != ours:
            raise InputError(
                f"training job {last['TrainingJobName']} writes to {theirs}, not to {ours}: it is of another "
                "installation in this account; give this one another OFFER_ASSETS_AWS_ENDPOINT_NAME"
            )
        return attempts, last

    def _described(self, name: str) -> Job | None:
        """What the service says of a job; None where there is none of this name."""
        from botocore.exceptions import ClientError

        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"looking at training job {name}"):
            try:
                return dict(sagemaker.describe_training_job(TrainingJobName=name))
            except ClientError as error:
                if _is_missing(error):
                    return None
                raise

    def _is_adopted(self, context: AnyContext, job: Job, stage: Stage, key: str) -> bool:
        """Take over what an earlier job made, whose watcher did not live to see it."""
        if job["TrainingJobStatus"] != "Completed":
            return False
        if S3Objects(self.aws, _output_of(job)).read(MANIFEST) is None:
            context.log.warning(
                f"{_output_of(job)} of training job {job['TrainingJobName']} is gone: another is due"
            )
            return False
        self.store.adopt_from(_output_of(job), stage.name, key)
        context.log.info(f"{stage.name} was made by training job {job['TrainingJobName']} meanwhile")
        return True

    def _request(
        self,
        context: AnyContext,
        stage: Stage,
        key: str,
        attempt: int,
        machines: JobMachines,
        work: StageWork,
    ) -> JobRequest:
        return JobRequest(
            name=job_name(self.name, stage.name, key, attempt),
            stage=stage.name,
            key=key,
            run_id=context.op_execution_context.run_id,
            image=self._image(work),
            machines=machines,
            location=self._location,
            has_inputs=bool(work.inputs),
            encoder=encoder_prefix(stage.name, work.parameters),
        )

    def _image(self, work: StageWork) -> str:
        if getattr(work.parameters, "target", "") != "neuron":
            return self.training_image
        if not self.neuron_image:
            raise InputError(
                "target neuron is compiled in an image of its own: set OFFER_ASSETS_AWS_NEURON_IMAGE"
            )
        return self.neuron_image

    @contextmanager
    def _session(self, context: AnyContext, name: str, reader: JobLogReader) -> Iterator[Any]:
        """Hear what a job says, and stop it if the run is interrupted; yields what it is told of the run."""
        ignore_preview_of_pipes()
        with dg.open_pipes_session(
            context=context.op_execution_context,
            context_injector=dg.PipesEnvContextInjector(),
            message_reader=reader,
        ) as session:
            try:
                yield session.context_data
            except BaseException as interruption:
                if not isinstance(interruption, Exception):  # Dagster's own is none
                    self._stop(context, name)
                raise

    def _start(self, context: AnyContext, request: JobRequest, work: StageWork, pipes_context: Any) -> None:
        """Start a job, unless it is there by now: several may want it, and an answer may be lost."""
        from botocore.exceptions import BotoCoreError, ClientError

        self._write_channels(request, work, pipes_context)
        machines = request.machines
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"starting training job {request.name}"):
            try:
                sagemaker.create_training_job(**request.arguments(self.aws))
            except (BotoCoreError, ClientError):
                if self._described(request.name) is None:
                    raise
                context.log.info(f"training job {request.name} was started already: watching that one")
                return
        context.log.info(
            f"{request.stage} runs as training job {request.name} on {machines.instance_count} x "
            f"{machines.instance_type}{' (spot)' if machines.spot else ''}, {machines.max_instance_hours:g} "
            f"instance hours at most: {job_url(self.aws.region, request.name)}"
        )

    def _write_channels(self, request: JobRequest, work: StageWork, pipes_context: Any) -> None:
        objects = S3Objects(self.aws, self._location)
        folders = {
            name: self.store.uri(ref).removeprefix(f"{self._location}/") for name, ref in work.inputs.items()
        }
        spec = JobSpec(
            stage=request.stage,
            inputs=folders,
            parameters=msgspec.to_builtins(work.parameters),
            from_encoder_channel=["encoder"] if request.encoder else [],
        )
        channel = f"{request.folder}/{STAGE_CHANNEL}"
        objects.write(f"{channel}/{SPEC_FILE}", msgspec.json.encode(spec))
        objects.write(f"{channel}/{PIPES_CONTEXT_FILE}", msgspec.json.encode(pipes_context))
        files = [
            f"{folders[name]}/{file}"
            for name, ref in work.inputs.items()
            for file in (*self.store.manifest(ref).files, MANIFEST)
        ]
        listing = [{"prefix": f"{self._location}/"}, *files]
        objects.write(f"{request.folder}/{ARTIFACTS_CHANNEL}.json", msgspec.json.encode(listing))

    def _watch(self, context: AnyContext, name: str, reader: JobLogReader) -> Job:
        """Wait for the end of a job, and say what it is at."""
        told, missed, started_at = "", 0, time.monotonic()
        while True:
            try:
                job = self._described(name)
            except dg.Failure:
                if missed >= _LOOKS_MISSED:
                    raise
                job = None
            missed = missed + 1 if job is None else 0
            if missed > _LOOKS_MISSED:
                raise dg.Failure(f"training job {name} is gone; run again")
            reader.read()
            if job is not None:
                if job["SecondaryStatus"] != told:
                    told = job["SecondaryStatus"]
                    context.log.info(f"training job {name}: {told}{_remark(job)}")
                if job["TrainingJobStatus"] in ENDED:
                    return job
            # Soon at first, for what fails at once; at random, lest many that watch ask together.
            pause = min(self.poll_seconds, _FIRST_PAUSE + (time.monotonic() - started_at) / 10)
            time.sleep(pause * random.uniform(0.75, 1.25))

    def _stop(self, context: AnyContext, name: str) -> None:
        """Stop a job that nobody wants any more; its checkpoints stay."""
        sagemaker = self.aws.client("sagemaker")
        try:
            if (job := self._described(name)) is None or job["TrainingJobStatus"] in ENDED:
                return
            with aws_errors(f"stopping training job {name}"):
                sagemaker.stop_training_job(TrainingJobName=name)
            deadline = time.monotonic() + _SECONDS_TO_STOP
            while (job := self._described(name)) is not None and job["TrainingJobStatus"] not in ENDED:
                if time.monotonic() > deadline:
                    break
                time.sleep(min(1.0, self.poll_seconds))
        except (InputError, dg.Failure) as error:
            context.log.warning(
                f"stop training job {name} by hand ({job_url(self.aws.region, name)}): {error}"
            )
            return
        context.log.info(f"training job {name} is stopped with the run")

    def _conclude(self, context: AnyContext, job: Job, reader: JobLogReader) -> None:
        """Say what a job cost, and raise why it has no artifact, if it has none."""
        name = job["TrainingJobName"]
        context.log.info(f"training job {name}: {job['TrainingJobStatus']}, {price_of(job)}")
        if job["TrainingJobStatus"] != "Completed":
            raise failure_of(
                job,
                {
                    "training job": dg.MetadataValue.url(job_url(self.aws.region, name)),
                    "log": dg.MetadataValue.url(log_url(self.aws.region, name)),
                    "last lines": "\n".join(reader.last_lines),
                },
            )

    @property
    def _location(self) -> str:
        return self.store.location.rstrip("/")


def _output_of(job: Job) -> str:
    return str(job["ModelArtifacts"]["S3ModelArtifacts"]).rstrip("/")


def _remark(job: Job) -> str:
    """What the service says beside the state that a job is in."""
    transitions = job.get("SecondaryStatusTransitions") or [{}]
    message = " ".join(transitions[-1].get("StatusMessage", "").split())
    return f" ({message})" if message else ""


def _is_missing(error: Exception) -> bool:
    """The service model knows ``ResourceNotFound``; what the service says is a validation error."""
    code = error_code(error)
    return code == "ResourceNotFound" or (code == "ValidationException" and "not found" in str(error))
