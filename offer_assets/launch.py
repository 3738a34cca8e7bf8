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


def launch(url: str, job: str, *, partition: str = "", wait: bool = True) -> bool:
    """Start ``job``, print where it can be watched, and wait for its outcome.

    Args:
        url: Of the Dagster UI.
        job: Its name.
        partition: For a job with partitions.
        wait: Otherwise it returns as soon as the run is accepted.

    Returns:
        Whether the run succeeded; True where nobody waits.

    Raises:
        InputError: there is no UI at ``url``, it refuses the job, or it was gone for ten minutes.
    """
    from dagster_graphql import DagsterGraphQLClientError

    client = _client(url)
    tags = {_PARTITION_TAG: partition} if partition else None
    try:
        run_id = client.submit_job_execution(job, tags=tags)
    except DagsterGraphQLClientError as error:
        raise InputError(f"{url} did not start {job}: {_one_line(error)}") from None
    print(f"{job}: {url.rstrip('/')}/runs/{run_id}", flush=True)
    if not wait:
        return True
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
    from dagster_graphql import DagsterGraphQLClientError

    answered_at = time.monotonic()
    while True:
        try:
            status = client.get_run_status(run_id)
            answered_at = time.monotonic()
        except DagsterGraphQLClientError as error:
            if time.monotonic() - answered_at > _SECONDS_WITHOUT_AN_ANSWER:
                raise InputError(
                    f"{url} has not answered for {_SECONDS_WITHOUT_AN_ANSWER / 60:.0f} minutes, run {run_id} "
                    f"may go on: {_one_line(error)}"
                ) from None
        else:
            if status in FINISHED:
                return status
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
