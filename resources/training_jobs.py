"""What SageMaker is asked for when a stage is to run as a training job, and how its answers read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec

from ml.errors import InputError
from ml.learning.encoder_files import PACKAGED_ENCODER, TEACHER
from ml.stages import Parameters
from ml.training_job import ARTIFACTS_CHANNEL, ENCODER_CHANNEL, INPUT_ERROR, STAGE_CHANNEL
from resources.aws import AwsAccess
from resources.job_logs import LOG_GROUP
from resources.job_plan import JobMachines

ENDED = frozenset({"Completed", "Failed", "Stopped"})
"""Values of ``TrainingJobStatus`` after which nothing comes."""

_NAME_CHARACTERS = 63
_KEY_DIGITS = 16
_RESTARTS = 2
"""After internal errors of the service; interruptions of spot instances do not count."""
_OWN_DISK = re.compile(r"ml\.(g[4-9]|p[4-9]|p3dn|trn|[cmr]\d+[a-z]*d)")
_METRICS = {"training:loss": "loss", "validation:accuracy": "validation accuracy"}
"""Figures of progress lines that the service plots; in messages of Pipes the same lines begin with ``{``."""
_FAILED_FOR_GOOD = re.compile(rf"(?:AlgorithmError: )?{INPUT_ERROR}(.*?)(?:, exit code: \d+)?", re.DOTALL)
_TIMES_OUT = {
    "MaxRuntimeExceeded": "computed for as long as it may",
    "MaxWaitTimeExceeded": "waited for spot capacity for as long as it may",
}
"""By ``SecondaryStatus``."""
_GOES_ON = "run it again and it continues from its last checkpoint"
_CLIENT_ERROR = "ClientError"
"""Begins a reason that is the caller's to mend: no such image, no permission for the data, a full disk."""


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A training job to be: all that is not the same for every job."""

    name: str
    stage: str
    key: str
    run_id: str
    image: str
    machines: JobMachines
    location: str
    """``s3://bucket/prefix``, under which jobs and checkpoints lie."""
    has_inputs: bool
    encoder: str
    """``s3://…/`` of the encoder that the stage starts from; empty: none, or one that the image has."""

    @property
    def folder(self) -> str:
        """Where spec and lists of the job lie, below :attr:`location`."""
        return f"jobs/{self.name}"

    def arguments(self, aws: AwsAccess) -> dict[str, Any]:
        """Arguments of ``create_training_job``."""
        return {
            "TrainingJobName": self.name,
            "AlgorithmSpecification": {
                "TrainingImage": self.image,
                "TrainingInputMode": "File",
                "MetricDefinitions": [
                    {"Name": name, "Regex": rf"^[a-z_]+: .*\b{text} ([0-9][0-9.e+-]*)"}
                    for name, text in _METRICS.items()
                ],
            },
            "RoleArn": aws.role,
            "InputDataConfig": self._channels(),
            "OutputDataConfig": {
                "S3OutputPath": output_path(self.location),
                "CompressionType": "NONE",
                **({"KmsKeyId": aws.kms_key} if aws.kms_key else {}),
            },
            "CheckpointConfig": {"S3Uri": f"{self.location}/checkpoints/{self.stage}/{self.key}/"},
            "ResourceConfig": self._resources(aws),
            "StoppingCondition": self._limits(),
            "RetryStrategy": {"MaximumRetryAttempts": _RESTARTS},
            "EnableNetworkIsolation": True,
            "EnableInterContainerTrafficEncryption": self.machines.instance_count > 1,
            "EnableManagedSpotTraining": self.machines.spot,
            "Environment": {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
            "Tags": [
                {"Key": "offer-assets:stage", "Value": self.stage},
                {"Key": "offer-assets:key", "Value": self.key},
                {"Key": "offer-assets:run", "Value": self.run_id},
            ],
            **aws.vpc,
        }

    def _channels(self) -> list[dict[str, Any]]:
        folder = f"{self.location}/{self.folder}"
        channels = [_channel(STAGE_CHANNEL, "S3Prefix", f"{folder}/{STAGE_CHANNEL}/")]
        if self.has_inputs:
            channels.append(_channel(ARTIFACTS_CHANNEL, "ManifestFile", f"{folder}/{ARTIFACTS_CHANNEL}.json"))
        if self.encoder:
            channels.append(_channel(ENCODER_CHANNEL, "S3Prefix", self.encoder))
        return channels

    def _resources(self, aws: AwsAccess) -> dict[str, Any]:
        machines = self.machines
        has_key = aws.kms_key and not has_own_disk(machines.instance_type)
        return {
            "InstanceType": machines.instance_type,
            "InstanceCount": machines.instance_count,
            "VolumeSizeInGB": machines.volume_gb,
            **({"VolumeKmsKeyId": aws.kms_key} if has_key else {}),
        }

    def _limits(self) -> dict[str, int]:
        seconds = max(1, round(self.machines.max_hours * 3600))
        waiting = {"MaxWaitTimeInSeconds": 2 * seconds} if self.machines.spot else {}
        return {"MaxRuntimeInSeconds": seconds, **waiting}


def job_name(prefix: str, stage: str, key: str, attempt: int) -> str:
    """Name of the n-th job that is to make an artifact, counted from 1: the same for whoever asks."""
    rest = f"-{stage.replace('_', '-')}-{key[:_KEY_DIGITS]}-{attempt}"
    return prefix[: _NAME_CHARACTERS - len(rest)].rstrip("-") + rest


def has_own_disk(instance_type: str) -> bool:
    """Whether its disk is encrypted by its own hardware; the service refuses to be given a key for it."""
    return bool(_OWN_DISK.match(instance_type))


def output_path(location: str) -> str:
    """``S3OutputPath``: the service puts ``<job>/output/model`` below it."""
    return f"{location}/jobs"


def encoder_prefix(stage: str, parameters: Parameters) -> str:
    """Where the encoder that ``parameters`` name lies in S3; empty where nothing has to be brought.

    Raises:
        InputError: it is somewhere that a container without network does not get to.
    """
    encoder = getattr(parameters, "encoder", TEACHER)
    if encoder in (PACKAGED_ENCODER, TEACHER):
        return ""
    if encoder.startswith("s3://"):
        return f"{encoder.rstrip('/')}/"
    setting = "OFFER_ASSETS_STUDENT_ENCODER" if stage == "student_checkpoint" else "OFFER_ASSETS_ENCODER"
    raise InputError(
        f"{stage} runs as a job without network, where encoder {encoder!r} cannot be had: copy its files to "
        f"S3 and set {setting} to their prefix (s3://bucket/prefix), or have the stage run here "
        '(where = "here" in OFFER_ASSETS_AWS_JOBS)'
    )


def failure_of(job: Mapping[str, Any], metadata: Mapping[str, Any]) -> InputError | dg.Failure:
    """Why a job has no artifact, in one line, as what is to be raised.

    Args:
        job: What ``describe_training_job`` says of a job that failed or was stopped.
        metadata: What is shown beside, if it may be tried again.
    """
    name, reason = job["TrainingJobName"], " ".join(job.get("FailureReason", "no reason was given").split())
    if job["SecondaryStatus"] in _TIMES_OUT:
        hours = job["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600
        return dg.Failure(
            f"training job {name} {_TIMES_OUT[job['SecondaryStatus']]} (max_hours is {hours:g}); {_GOES_ON}, "
            "or raise max_hours in OFFER_ASSETS_AWS_JOBS",
            metadata=metadata,
            # A retry would pay for as much again, beyond what a person agreed to.
            allow_retries=job["SecondaryStatus"] != "MaxRuntimeExceeded",
        )
    if job["TrainingJobStatus"] == "Stopped":
        return dg.Failure(f"training job {name} was stopped; {_GOES_ON}", metadata=metadata)
    if match := _FAILED_FOR_GOOD.fullmatch(reason):
        return InputError(match[1])
    if reason.startswith(_CLIENT_ERROR):
        return InputError(f"training job {name}: {reason}")
    return dg.Failure(f"training job {name}: {reason}; {_GOES_ON}", metadata=metadata)


def job_url(region: str, name: str) -> str:
    """Page of a job in the console."""
    return f"https://{region}.console.aws.amazon.com/sagemaker/home?region={region}#/jobs/{name}"


def log_url(region: str, name: str) -> str:
    """Page of a job's log in the console."""
    group = LOG_GROUP.replace("/", "$252F")
    return (
        f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}"
        f"#logsV2:log-groups/log-group/{group}$3FlogStreamNameFilter$3D{name}"
    )


def price_of(job: Mapping[str, Any]) -> str:
    """What is paid for, in words: seconds, and what spot saved."""
    billable, computed = job.get("BillableTimeInSeconds"), job.get("TrainingTimeInSeconds")
    if not billable:
        return "nothing is billed"
    text = f"{billable * job['ResourceConfig']['InstanceCount']:,} instance seconds are billed"
    if job.get("EnableManagedSpotTraining") and computed:
        text += f", {1 - billable / computed:.0%} less for spot"
    return text


def _channel(name: str, kind: str, uri: str) -> dict[str, Any]:
    return {
        "ChannelName": name,
        "InputMode": "File",
        "DataSource": {
            "S3DataSource": {"S3DataType": kind, "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
        },
    }
