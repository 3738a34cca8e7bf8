"""Asking a SageMaker endpoint, with the container's own words where it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
import msgspec

from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code
from resources.endpoints import EndpointError, said_in

_CLIENT_ERRORS = range(400, 500)


def ask(
    aws: AwsAccess, endpoint: str, offers: Sequence[Mapping[str, Any]], slot: str
) -> list[dict[str, Any]]:
    """Predictions of an endpoint, one per offer and in their order.

    Args:
        aws: The way in.
        endpoint: Its name.
        offers: What to catalogue; one request.
        slot: The variant that has to answer; empty: as the weights say.

    Raises:
        InputError: the container refused the offers, or a permission is missing.
        EndpointError: there is no such endpoint, it does not answer, or its container failed.
    """
    runtime = aws.client("sagemaker-runtime")
    target = {"TargetVariant": slot} if slot else {}
    try:
        with aws_errors(f"asking endpoint {endpoint}"), _containers_words(endpoint):
            response = runtime.invoke_endpoint(
                EndpointName=endpoint,
                ContentType="application/json",
                Accept="application/json",
                Body=msgspec.json.encode({"offers": list(offers)}),
                **target,
            )
            answer = msgspec.json.decode(response["Body"].read())
    except EndpointError:
        raise
    except dg.Failure as error:
        raise EndpointError(f"endpoint {endpoint} does not answer: {error.description}") from None
    predictions: list[dict[str, Any]] = answer["predictions"]
    return predictions


@contextmanager
def _containers_words(endpoint: str) -> Iterator[None]:
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error_code(error) == "ValidationError" and "not found" in str(error):
            raise EndpointError(
                f"endpoint {endpoint} does not answer: there is none; materialize offer_endpoint to start it"
            ) from None
        if error_code(error) != "ModelError":
            raise
        status = int(error.response.get("OriginalStatusCode", 500))
        said = said_in(error.response.get("OriginalMessage", ""))
        if status in _CLIENT_ERRORS:
            raise InputError(f"the endpoint refused the offers: {said}") from None
        raise EndpointError(f"endpoint {endpoint} answered {status}: {said}") from None
