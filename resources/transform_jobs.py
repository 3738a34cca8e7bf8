"""Batch transforms as they run: found again, started once, watched, and stopped with their run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code
from resources.s3_objects import S3Objects
from resources.transform_requests import TransformRequest, transform_failure, transform_url

_ENDED = frozenset({"Completed", "Failed", "Stopped"})
"""Values of ``TransformJobStatus`` after which nothing comes."""
_LOOKS_MISSED = 20
"""So many in a row end the watching, though not the job: the service answers nobody, or not us."""
_SECONDS_TO_STOP = 20.0

Job = dict[str, Any]
"""What ``describe_transform_job`` says."""


class TransformJobs:
    """The jobs whose answers lie below ``<location>/transform``."""

    def __init__(self, aws: AwsAccess, location: str, log: Any, poll_seconds: float) -> None:
        self._aws = aws
        self._objects = S3Objects(aws, location)
        self._log = log
        self._poll_seconds = poll_seconds

    def target(self, name: str) -> str:
        """``s3://…`` of the folder for the answers of a job."""
        return self._objects.uri(_answers_of(name))

    def answered(
        self, names: Iterator[str], shards: int, request: Callable[[str], TransformRequest], start: str
    ) -> str:
        """Name of a job that has answered: one that did so already, one that is at it, or else a new one.

        Args:
            names: Names of the jobs for these offers, the first to be tried first.
            shards: Files that are to be answered.
            request: What is asked of the service under one of these names.
            start: What the log says before a job is started.

        Raises:
            InputError: the job failed, or would, for a reason that a person has to mend.
            dg.Failure: it failed or was stopped; another may be tried.
        """
        job, name = None, next(names)
        while (following := self._described(name)) is not None:
            job, name = following, next(names)
        if job is not None and self._has_answers(job):
            self._log.info(f"the offers were answered by transform job {job['TransformJobName']}")
            return str(job["TransformJobName"])
        if job is not None and job["TransformJobStatus"] not in _ENDED:
            name = job["TransformJobName"]
            with self._stopped_with_run(name):
                self._log.info(f"the offers are being answered by transform job {name}: watching that one")
                job = self._watch(name, shards)
        else:
            asked = request(name)
            with self._stopped_with_run(name):
                self._start(asked, start)
                job = self._watch(name, shards)
        if job["TransformJobStatus"] != "Completed":
            raise transform_failure(job, self._aws.region)
        return name

    def fetch(self, name: str, folder: Path) -> None:
        """Download the answers of a job, whatever subfolders they lie in: their names are all different."""
        by_folder: dict[str, list[str]] = {}
        for answers in self._objects.sizes(_answers_of(name)):
            subfolder, _, file = f"{_answers_of(name)}/{answers}".rpartition("/")
            by_folder.setdefault(subfolder, []).append(file)
        for subfolder, files in by_folder.items():
            self._objects.download(subfolder, files, folder)

    def _has_answers(self, job: Job) -> bool:
        """Whether what a job answered, whose watcher did not live to see it, can be taken over."""
        if job["TransformJobStatus"] != "Completed":
            return False
        if self._objects.sizes(_answers_of(job["TransformJobName"])):
            return True
        self._log.warning(f"the answers of transform job {job['TransformJobName']} are gone: another is due")
        return False

    def _described(self, name: str) -> Job | None:
        """What the service says of a job; None where there is none of this name."""
        from botocore.exceptions import ClientError

        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"looking at transform job {name}"):
            try:
                job = dict(sagemaker.describe_transform_job(TransformJobName=name))
            except ClientError as error:
                if _is_missing(error):
                    return None
                raise
        if (theirs := job["TransformOutput"]["S3OutputPath"].rstrip("/")) != self.target(name):
            raise InputError(
                f"transform job {name} writes to {theirs}, not to {self.target(name)}: it is of another "
                "installation in this account; give this one another OFFER_ASSETS_AWS_ENDPOINT_NAME"
            )
        return job

    def _start(self, request: TransformRequest, what: str) -> None:
        """Start a job, unless it is there by now: several may want it, and an answer may be lost."""
        from botocore.exceptions import BotoCoreError, ClientError

        self._log.info(
            f"{what} go through transform job {request.name} on {request.instances} x "
            f"{request.instance_type}: {transform_url(self._aws.region, request.name)}"
        )
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"starting transform job {request.name}"):
            try:
                sagemaker.create_transform_job(**request.arguments(self._aws))
            except (BotoCoreError, ClientError):
                if self._described(request.name) is None:
                    raise
                self._log.info(f"transform job {request.name} was started already: watching that one")

    def _watch(self, name: str, shards: int) -> Job:
        """Wait for the end of a job, and say how far it is."""
        told, missed = "", 0
        while True:
            try:
                job = self._described(name)
                answered = len(self._objects.sizes(_answers_of(name)))
            except dg.Failure:
                if missed >= _LOOKS_MISSED:
                    raise
                job = None
            missed = missed + 1 if job is None else 0
            if job is not None:
                state = f"{job['TransformJobStatus']}, {answered:,} of {shards:,} files answered"
                if state != told:
                    told = state
                    self._log.info(f"transform job {name}: {state}")
                if job["TransformJobStatus"] in _ENDED:
                    return job
            # At random, lest many that watch ask all at once.
            time.sleep(self._poll_seconds * random.uniform(0.75, 1.25))

    @contextmanager
    def _stopped_with_run(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as interruption:
            if not isinstance(interruption, Exception):  # Dagster's own is none
                self._stop(name)
            raise

    def _stop(self, name: str) -> None:
        """Stop a job that nobody wants any more."""
        sagemaker = self._aws.client("sagemaker")
        try:
            if (job := self._described(name)) is None or job["TransformJobStatus"] in _ENDED:
                return
            with aws_errors(f"stopping transform job {name}"):
                sagemaker.stop_transform_job(TransformJobName=name)
            deadline = time.monotonic() + _SECONDS_TO_STOP
            while (job := self._described(name)) is not None and job["TransformJobStatus"] not in _ENDED:
                if time.monotonic() > deadline:
                    break
                time.sleep(min(1.0, self._poll_seconds))
        except (InputError, dg.Failure) as error:
            url = transform_url(self._aws.region, name)
            self._log.warning(f"stop transform job {name} by hand ({url}): {error}")
            return
        self._log.info(f"transform job {name} is stopped with the run")


def _answers_of(name: str) -> str:
    return f"transform/{name}"


def _is_missing(error: Exception) -> bool:
    """The service model knows ``ResourceNotFound``; what the service says is a validation error."""
    code = error_code(error)
    is_told = any(words in str(error) for words in ("not found", "Could not find"))
    return code == "ResourceNotFound" or (code == "ValidationException" and is_told)
