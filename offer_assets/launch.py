"""A job started on a deployment from outside: what continuous training from a workflow does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import dagster as dg

from ml.errors import InputError
from offer_assets.jobs import FINISHED

if TYPE_CHECKING:
    from dagster_graphql import DagsterGraphQLClient

_PARTITION_TAG = "dagster/partition"
_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_WITHOUT_AN_ANSWER = 600.0
"""A deployment that is being replaced is not there for a while; the run goes on meanwhile."""


def launch(url: str, job: str, partition: str = "") -> bool:
    """Start ``job``, print where it can be watched, and wait for its outcome.

    Args:
        url: Of the Dagster UI.
        job: Its name.
        partition: For a job with partitions.

    Returns:
        Whether the run succeeded.

    Raises:
        InputError: there is no UI at ``url``, it refuses the job, or it was gone for ten minutes.
    """
    client = _client(url)
    tags = {_PARTITION_TAG: partition} if partition else None
    try:
        run_id = client.submit_job_execution(job, tags=tags)
    except _errors() as error:
        raise InputError(f"{url} did not start {job}: {_one_line(error)}") from None
    print(f"{job}: {url.rstrip('/')}/runs/{run_id}", flush=True)
    status = _outcome(client, url, run_id)
    print(f"{job}: {status.value}", flush=True)
    return status == dg.DagsterRunStatus.SUCCESS


def _client(url: str) -> DagsterGraphQLClient:
    from dagster_graphql import DagsterGraphQLClient

    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InputError(
            f"--url {url}: expected the address of a Dagster UI, such as https://dagster.example.com"
        )
    return DagsterGraphQLClient(
        parts.hostname,
        port_number=parts.port,
        use_https=parts.scheme == "https",
        path_prefix=parts.path.rstrip("/"),
        timeout=60,
    )


def _outcome(client: DagsterGraphQLClient, url: str, run_id: str) -> dg.DagsterRunStatus:
    answered_at = time.monotonic()
    while True:
        try:
            status = client.get_run_status(run_id)
            answered_at = time.monotonic()
        except _errors() as error:
            if time.monotonic() - answered_at > _SECONDS_WITHOUT_AN_ANSWER:
                raise InputError(
                    f"{url} has not answered for {_SECONDS_WITHOUT_AN_ANSWER / 60:.0f} minutes, run {run_id} "
                    f"may go on: {_one_line(error)}"
                ) from None
        else:
            if status in FINISHED:
                return status
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _errors() -> tuple[type[Exception], ...]:
    """What Dagster's client raises, and what it lets through of the libraries under it."""
    from dagster_graphql import DagsterGraphQLClientError
    from gql.transport.exceptions import TransportError
    from requests.exceptions import RequestException

    return DagsterGraphQLClientError, TransportError, RequestException


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
