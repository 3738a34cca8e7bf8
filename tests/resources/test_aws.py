"""The way into AWS: what its errors mean to people."""

from __future__ import annotations

import pytest
from botocore.exceptions import (
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    UnauthorizedSSOTokenError,
)

from ml.errors import InputError
from resources import aws
from resources.aws import AwsAccess, aws_errors


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError(),
        PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        ProfileNotFound(profile="nobody"),
        UnauthorizedSSOTokenError(),
    ],
)
def test_credentials_that_do_not_work_are_the_readers_to_mend(error):
    with pytest.raises(InputError, match=r"^reading s3://b/k: .*AWS_PROFILE"), aws_errors("reading s3://b/k"):
        raise error


def test_a_profile_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(aws, "_session", aws._session.__wrapped__)
    with pytest.raises(InputError, match=r"connecting to s3 in eu-north-1: .*\(nobody\)"):
        AwsAccess(region="eu-north-1").client("s3")
