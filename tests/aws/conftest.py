"""What tests of AWS share: the stand-in, with clients of this process led to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from botocore.loaders import create_loader

from resources.aws import AwsAccess, forget_clients
from tests import plain_http
from tests.aws.stand_in import ACCOUNT, REGION, StandIn, environment, running

BUCKET = "offer-assets-tests"


_loader = cache(create_loader)
"""Service models are read once, and not again for each test's clients."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A fresh AWS, with an empty bucket :data:`BUCKET`."""
    with running(StandIn()) as server:
        plain_http.post(f"{server.url}/moto-api/reset").raise_for_status()
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("botocore.session.create_loader", _loader)
        forget_clients()
        access().client("s3").create_bucket(
            Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        server.calls.clear()
        yield server
        forget_clients()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat what failed at once: the pauses between botocore's attempts grow to 20 s."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


def access(**settings: object) -> AwsAccess:
    """The way into the stand-in."""
    return AwsAccess(region=REGION, role=f"arn:aws:iam::{ACCOUNT}:role/offer-assets-jobs", **settings)
