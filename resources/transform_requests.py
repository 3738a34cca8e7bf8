"""What SageMaker is asked for when a batch transform is to catalogue a day, and how its answers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec

from ml.errors import InputError
from ml.serving.sent import JSON_LINES
from resources.aws import AwsAccess
from resources.training_jobs import has_own_disk

_LOG_GROUP = "/aws/sagemaker/TransformJobs"
_NAME_CHARACTERS = 63
_PAYLOAD_MB = 1
"""Some thousand offers: seconds of work, far from the 60 s that a request may take."""
_SECONDS_TO_ANSWER = 600
_RETRIES = 3
_CLIENT_ERROR = "ClientError"
"""Begins a reason that is the caller's to mend: data that cannot be read, a permission, a refusal."""


class TransformRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A transform job to be: all that is not the same for every job."""

    name: str
    model: str
    """Name of the SageMaker model."""
    source: str
    """``s3://…`` of the folder of offers."""
    target: str
    """``s3://…`` of the folder for the answers."""
    instance_type: str
    instances: int
    concurrent: int
    """Requests that an instance gets at once."""
    run_id: str

    def arguments(self, aws: AwsAccess) -> dict[str, Any]:
        """Arguments of ``create_transform_job``."""
        key = aws.kms_key
        has_key = key and not has_own_disk(self.instance_type)
        return {
            "TransformJobName": self.name,
            "ModelName": self.model,
            "MaxConcurrentTransforms": self.concurrent,
            "MaxPayloadInMB": _PAYLOAD_MB,
            "BatchStrategy": "MultiRecord",
            "ModelClientConfig": {
                "InvocationsTimeoutInSeconds": _SECONDS_TO_ANSWER,
                "InvocationsMaxRetries": _RETRIES,
            },
            "TransformInput": {
                "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"{self.source}/"}},
                "ContentType": JSON_LINES[0],
                "SplitType": "Line",
                "CompressionType": "None",
            },
            "TransformOutput": {
                "S3OutputPath": self.target,
                "Accept": JSON_LINES[0],
                "AssembleWith": "Line",
                **({"KmsKeyId": key} if key else {}),
            },
            "TransformResources": {
                "InstanceType": self.instance_type,
                "InstanceCount": self.instances,
                **({"VolumeKmsKeyId": key} if has_key else {}),
            },
            # Whole lines go in and whole lines come out: each answer names its offer.
            "DataProcessing": {"InputFilter": "$", "OutputFilter": "$", "JoinSource": "None"},
            "Tags": [{"Key": "offer-assets:run", "Value": self.run_id}],
        }


def transform_name(prefix: str, prepared: str, model: str, attempt: int) -> str:
    """Name of the n-th job that is to answer what was prepared, counted from 1: the same for whoever asks.

    Args:
        prefix: Begins the names of all that is ours.
        prepared: Version of the ``transform_input``.
        model: Version of the compiled student.
        attempt: Which one it is.
    """
    rest = f"-{prepared}-{model}-{attempt}"
    return prefix[: _NAME_CHARACTERS - len(rest)].rstrip("-") + rest


def transform_failure(job: Mapping[str, Any], region: str) -> InputError | dg.Failure:
    """Why a job has no answers, in one line, as what is to be raised.

    Args:
        job: What ``describe_transform_job`` says of a job that failed or was stopped.
        region: Where it ran.
    """
    name = job["TransformJobName"]
    if job["TransformJobStatus"] == "Stopped":
        return dg.Failure(f"transform job {name} was stopped; run again to start another")
    reason = " ".join(job.get("FailureReason", "no reason was given").split())
    if reason.startswith(_CLIENT_ERROR):
        return InputError(f"transform job {name}: {reason} (log: {_log_url(region, name)})")
    return dg.Failure(
        f"transform job {name}: {reason}; run again to start another",
        metadata={
            "transform job": dg.MetadataValue.url(transform_url(region, name)),
            "log": dg.MetadataValue.url(_log_url(region, name)),
        },
    )


def transform_url(region: str, name: str) -> str:
    """Page of a job in the console."""
    return f"https://{region}.console.aws.amazon.com/sagemaker/home?region={region}#/transform-jobs/{name}"


def _log_url(region: str, name: str) -> str:
    group = _LOG_GROUP.replace("/", "$252F")
    return (
        f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}"
        f"#logsV2:log-groups/log-group/{group}$3FlogStreamNameFilter$3D{name}"
    )
