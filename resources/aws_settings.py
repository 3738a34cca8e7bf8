"""Settings of the environment ``aws``: where artifacts lie, as whom and on what jobs and endpoints run.

They may stand in the same file as the others; with ``OFFER_ASSETS_ENV=local`` they are checked and not used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings

_STORE = re.compile(r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#*]*)?$")
_ROLE = re.compile(r"^arn:aws[a-z-]*:iam::\d{12}:role/\S+$")
_INSTANCE = re.compile(r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")
_REGION = re.compile(r"^[a-z]{2}(-[a-z]+)+-\d+$")
_NAME = re.compile(r"^[a-z0-9](-?[a-z0-9]){0,40}$")
_IDS = {
    "subnet": re.compile(r"^subnet-[0-9a-f]+$"),
    "sg": re.compile(r"^sg-[0-9a-f]+$"),
}


def _store(value: str) -> str:
    if value and not _STORE.match(value):
        raise ValueError("must be a bucket and perhaps a prefix, such as s3://my-bucket/offer-assets")
    return value.rstrip("/")


def _role(value: str) -> str:
    if value and not _ROLE.match(value):
        raise ValueError(
            "must be the ARN of a role, such as arn:aws:iam::123456789012:role/offer-assets-jobs"
        )
    return value


def _instance_type(value: str) -> str:
    if not _INSTANCE.match(value):
        raise ValueError("must be an instance type such as ml.c7i.xlarge")
    return value


def _bulk_instance_type(value: str) -> str:
    return _instance_type(value) if value else ""


def _absolute(value: str) -> str:
    return str(Path(value).expanduser().absolute()) if value else ""


def _one_word(value: str) -> str:
    if any(character.isspace() for character in value):
        raise ValueError("must have no spaces")
    return value


def _region(value: str) -> str:
    if value and not _REGION.match(value):
        raise ValueError("must be a region such as eu-central-1")
    return value


def _endpoint_name(value: str) -> str:
    # SageMaker writes names small in its ARNs: policies for a name with capitals would not fit.
    if not _NAME.match(value):
        raise ValueError("must be of small letters, digits and single hyphens, 41 characters at most")
    return value


def _postgres(value: str) -> str:
    if value and not value.startswith("postgresql+psycopg2://"):
        raise ValueError("must be an address such as postgresql+psycopg2://user@host/name")
    return value


def _ids(value: str, prefix: str) -> str:
    given = [name.strip() for name in value.split(",") if name.strip()]
    for name in given:
        if not _IDS[prefix].match(name):
            raise ValueError(f"must be ids separated by commas, such as {prefix}-0a1b2c3d; {name!r} is none")
    return ",".join(given)


def _subnets(value: str) -> str:
    return _ids(value, "subnet")


def _security_groups(value: str) -> str:
    return _ids(value, "sg")


class AwsSettings(BaseSettings):
    """What only the environment ``aws`` needs, with its environment variable (the alias) and its default."""

    aws_store: Annotated[str, AfterValidator(_store)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_STORE",
        description="Where artifacts, pointers, jobs and captured requests lie in S3: s3://bucket/prefix.",
    )
    aws_region: Annotated[str, AfterValidator(_region)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_REGION",
        description="Region of all services. Empty: AWS_REGION or AWS_DEFAULT_REGION.",
    )
    aws_kms_key: Annotated[str, AfterValidator(_one_word)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_KMS_KEY",
        description="KMS key (ARN) that encrypts objects, volumes and captured requests. Empty: the key that "
        "AWS manages for S3.",
    )
    aws_role: Annotated[str, AfterValidator(_role)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_ROLE",
        description="ARN of the role that jobs and model containers run as (deploy/iam/ has its policy).",
    )
    aws_training_image: Annotated[str, AfterValidator(_one_word)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_TRAINING_IMAGE",
        description="URI of the image that jobs run in (deploy/images/training.Dockerfile).",
    )
    aws_serving_image: Annotated[str, AfterValidator(_one_word)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_SERVING_IMAGE",
        description="URI of the image that serves models for cpu (deploy/images/serving.Dockerfile).",
    )
    aws_neuron_image: Annotated[str, AfterValidator(_one_word)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_NEURON_IMAGE",
        description="URI of the image that compiles and serves for neuron (deploy/images/neuron.Dockerfile). "
        "Empty: that target cannot be made.",
    )
    aws_jobs: Annotated[str, AfterValidator(_absolute)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_JOBS",
        description="TOML file that says on which instances the heavy stages run and for how long at most "
        "(jobs.example.toml shows all). Empty: by default.",
    )
    aws_subnets: Annotated[str, AfterValidator(_subnets)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_SUBNETS",
        description="Subnets of jobs and endpoints, separated by commas. Empty: outside of any VPC.",
    )
    aws_security_groups: Annotated[str, AfterValidator(_security_groups)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_SECURITY_GROUPS",
        description="Security groups of jobs and endpoints, separated by commas; goes with the subnets.",
    )
    aws_endpoint_name: Annotated[str, AfterValidator(_endpoint_name)] = Field(
        default="offer-assets",
        validation_alias="OFFER_ASSETS_AWS_ENDPOINT_NAME",
        description="Name of the SageMaker endpoint; names of its models, alarms and jobs begin with it.",
    )
    aws_endpoint_instance_type: Annotated[str, AfterValidator(_instance_type)] = Field(
        default="ml.c7i.xlarge",
        validation_alias="OFFER_ASSETS_AWS_ENDPOINT_INSTANCE_TYPE",
        description="Instance type of the endpoint (serving_benchmark says which is cheapest).",
    )
    aws_endpoint_min_instances: int = Field(
        default=2,
        ge=1,
        validation_alias="OFFER_ASSETS_AWS_ENDPOINT_MIN_INSTANCES",
        description="Instances that always serve; two or more lie in several availability zones.",
    )
    aws_endpoint_max_instances: int = Field(
        default=20,
        ge=1,
        validation_alias="OFFER_ASSETS_AWS_ENDPOINT_MAX_INSTANCES",
        description="Instances to which autoscaling may grow.",
    )
    aws_capture_percent: int = Field(
        default=100,
        ge=0,
        le=100,
        validation_alias="OFFER_ASSETS_AWS_CAPTURE_PERCENT",
        description="Share of requests that the endpoint writes to S3; catalogued_offers does not ask for "
        "their offers again. 0: none.",
    )
    aws_bulk_instance_type: Annotated[str, AfterValidator(_bulk_instance_type)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_AWS_BULK_INSTANCE_TYPE",
        description="Instance type of the jobs that catalogue a day. Empty: the endpoint's.",
    )
    aws_bulk_instances: int = Field(
        default=2,
        ge=1,
        le=100,
        validation_alias="OFFER_ASSETS_AWS_BULK_INSTANCES",
        description="Instances that share such a job.",
    )
    aws_bulk_from: int = Field(
        default=5_000,
        ge=0,
        validation_alias="OFFER_ASSETS_AWS_BULK_FROM",
        description="From so many offers on a day is catalogued by a job, which takes minutes to start; "
        "fewer are sent to the endpoint. 0: always by a job.",
    )
    postgres_url: Annotated[str, AfterValidator(_postgres)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_POSTGRES_URL",
        description="PostgreSQL for Dagster's storage and the outbox of alerts, such as "
        "postgresql+psycopg2://user@host/name. Empty: SQLite files in OFFER_ASSETS_HOME.",
    )
