"""All that the stand-in can do, together: what a whole deployment needs of AWS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from tests import plain_http
from tests.aws.stand_in import ACCOUNT, REGION, SERVICE_CREDENTIALS, StandIn, environment, running
from tests.aws.stand_in_endpoints import EndpointHost
from tests.aws.stand_in_jobs import JobRunner
from tests.aws.stand_in_registry import RegistryStandIn
from tests.aws.stand_in_transform import TransformRunner


@dataclass
class Cloud:
    """AWS with everything installed, and a bucket."""

    stand_in: StandIn
    bucket: str
    jobs: JobRunner
    transforms: TransformRunner
    endpoints: EndpointHost
    registry: RegistryStandIn

    @property
    def url(self) -> str:
        return self.stand_in.url

    def objects(self, prefix: str) -> list[str]:
        """Keys of the bucket that begin so."""
        pages = service_client(self.url, "s3").get_paginator("list_objects_v2")
        return [
            item["Key"]
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix)
            for item in page.get("Contents", ())
        ]

    def settings(self, store: str) -> dict[str, str]:
        """Environment variables of a deployment here."""
        registry = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/offer-assets"
        return {
            **environment(self.url),
            "OFFER_ASSETS_ENV": "aws",
            "OFFER_ASSETS_AWS_STORE": store,
            "OFFER_ASSETS_AWS_REGION": REGION,
            "OFFER_ASSETS_AWS_ROLE": f"arn:aws:iam::{ACCOUNT}:role/offer-assets-jobs",
            "OFFER_ASSETS_AWS_TRAINING_IMAGE": f"{registry}/training:1",
            "OFFER_ASSETS_AWS_SERVING_IMAGE": f"{registry}/serving:1",
        }


@contextmanager
def cloud_at(folder: Path, bucket: str) -> Iterator[Cloud]:
    """A fresh AWS whose containers work below ``folder``; all of their processes end with the block."""
    with ExitStack() as stack:
        stand_in = stack.enter_context(running(StandIn()))
        plain_http.post(f"{stand_in.url}/moto-api/reset").raise_for_status()
        service_client(stand_in.url, "s3").create_bucket(
            Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        jobs = JobRunner(stand_in, folder / "jobs").install()
        stack.callback(jobs.close)
        transforms = TransformRunner(stand_in, folder / "transforms").install()
        stack.callback(transforms.close)
        endpoints = stack.enter_context(EndpointHost(stand_in, folder / "endpoints"))
        registry = RegistryStandIn().install(stand_in)
        yield Cloud(stand_in, bucket, jobs, transforms, endpoints, registry)


def service_client(url: str, service: str) -> Any:
    """A client as the service itself would have it: its calls are not noted as the product's."""
    session = boto3.session.Session(region_name=REGION, **SERVICE_CREDENTIALS)
    return session.client(service, endpoint_url=url)
