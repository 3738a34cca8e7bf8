"""The way into AWS: one place makes the clients, and one says what their errors mean to people.

Credentials come from where every AWS tool looks for them (a role, in production) and are kept nowhere.
``AWS_ENDPOINT_URL`` and its kin per service lead the clients elsewhere, as the tests do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from ml.errors import InputError
from resources.redaction import without_secrets

_ATTEMPTS = 8
"""In botocore's mode ``standard``: growing pauses with jitter, for throttling, 5xx and lost connections."""
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_READ = 70
"""An endpoint has 60 s for an answer."""

_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "Forbidden"})
_PERMANENT = _DENIED | {
    "NoSuchBucket",
    "InvalidBucketName",
    "PermanentRedirect",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "ExpiredToken",
    "ExpiredTokenException",
    "ValidationException",
    "ValidationError",
    "ResourceLimitExceeded",
    "KMS.DisabledException",
    "KMS.NotFoundException",
}
"""What no repetition mends: a person has to change a setting, a policy or a quota."""

_CLIENTS_LOCK = threading.Lock()
_CLIENTS: dict[tuple[str, str], Any] = {}


class AwsAccess(dg.ConfigurableResource[Any]):
    """Region, role, key and network that everything in AWS runs with."""

    region: str
    role: str = ""
    """ARN of the role that jobs and model containers run as."""
    kms_key: str = ""
    """Key that encrypts objects, volumes and captured requests; empty: the one that AWS manages."""
    subnets: str = ""
    security_groups: str = ""
    """Ids separated by commas; empty: outside of any VPC."""

    def client(self, service: str) -> Any:
        """A boto3 client, the same one for every caller in this process; clients may be shared by threads."""
        return client_for(service, self.region)

    @property
    def encryption(self) -> dict[str, str]:
        """Arguments that have S3 encrypt an object: with our key, or with the one that AWS manages."""
        key = {"SSEKMSKeyId": self.kms_key} if self.kms_key else {}
        return {"ServerSideEncryption": "aws:kms", **key}

    @property
    def vpc(self) -> dict[str, Any]:
        """``VpcConfig`` of a job or model as arguments of the call; none outside of a VPC."""
        if not self.subnets:
            return {}
        groups = self.security_groups.split(",")
        return {"VpcConfig": {"Subnets": self.subnets.split(","), "SecurityGroupIds": groups}}


def client_for(service: str, region: str) -> Any:
    """See :meth:`AwsAccess.client`."""
    with _CLIENTS_LOCK:
        if (service, region) not in _CLIENTS:
            from botocore.config import Config

            with aws_errors(f"connecting to {service} in {region}"):
                _CLIENTS[service, region] = _session().client(
                    service,
                    region_name=region,
                    config=Config(
                        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                        connect_timeout=_SECONDS_TO_CONNECT,
                        read_timeout=_SECONDS_TO_READ,
                        user_agent_extra="offer-assets",
                    ),
                )
        return _CLIENTS[service, region]


@functools.cache
def _session() -> Any:
    """One for all clients: it reads the descriptions of the services, half a second's work, only once."""
    import boto3

    return boto3.session.Session()


def forget_clients() -> None:
    """Make new clients from now on: tests lead them to other servers."""
    with _CLIENTS_LOCK:
        _CLIENTS.clear()


def error_code(error: Exception) -> str:
    """Code of a service's error (``NoSuchKey``); empty for what is none."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@contextmanager
def aws_errors(doing: str) -> Iterator[None]:
    """Turn what botocore raises into one line that says what was being done, and what to do.

    Args:
        doing: What the body does, as a phrase that names the object: ``reading s3://bucket/key``.

    Raises:
        InputError: a person has to change something (permission, bucket, credentials, quota).
        dg.Failure: the service failed or could not be reached, all attempts used up; a retry may help.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConfigParseError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    )

    try:
        yield
    except NoCredentialsError:
        raise InputError(
            f"{doing}: there are no AWS credentials; run with a role, or set AWS_PROFILE"
        ) from None
    except (
        ConfigParseError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    ) as error:
        raise InputError(f"{doing}: {_one_line(error)}; mend the credentials or AWS_PROFILE") from None
    except ParamValidationError as error:
        raise InputError(f"{doing}: {_one_line(error)}") from None
    except ClientError as error:
        code = error_code(error)
        line = f"{doing}: {code}: {_one_line(error)}"
        if code in _DENIED:
            raise InputError(
                f"{line}; the policies in deploy/iam say what the role has to be allowed"
            ) from None
        if code in _PERMANENT:
            raise InputError(line) from None
        raise dg.Failure(f"{line} (after {_ATTEMPTS} attempts; run again)") from None
    except BotoCoreError as error:
        raise dg.Failure(f"{doing}: {_one_line(error)} (run again)") from None


def _one_line(error: Exception) -> str:
    response = getattr(error, "response", None)
    text = response.get("Error", {}).get("Message", "") if isinstance(response, dict) else ""
    return without_secrets(" ".join((text or str(error)).split())[:500])
