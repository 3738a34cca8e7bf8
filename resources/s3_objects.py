"""Objects under one place in S3: read, written in one step, listed, moved in bulk.

Transfers go through s3transfer: large files in parts, in parallel, each part with its checksum; what fails
half-way is aborted. Retries with growing, random pauses are botocore's (see :mod:`resources.aws`).
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import msgspec

from ml.artifacts import FileEntry
from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code

PART_BYTES = 16 * 1024 * 1024
"""Larger files travel in parts of this size."""
COPY_BYTES = 5 * 1024**3
"""What S3 copies in one request, and only then with a checksum of the whole."""

_PARALLEL = 8
_READS = 5
_MISSING = frozenset({"NoSuchKey", "404"})
_CONFLICTS = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
_SHA256 = "sha256"
_MAKE_AGAIN = "delete the manifest and run again"
"""As long as a job's output has a manifest it is taken for finished, and nothing else is tried."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ConflictError(Exception):
    """The object is not what the writer took it to be: it exists, or was written by another."""


class StampedObject(msgspec.Struct, frozen=True):
    """A small object, with S3's own times."""

    content: bytes
    etag: str
    written: datetime.datetime
    now: datetime.datetime
    """When S3 answered."""


class S3Objects:
    """The objects whose keys begin with the prefix of ``location``; names are what follows it."""

    def __init__(
        self, aws: AwsAccess, location: str, *, part_bytes: int = PART_BYTES, copy_bytes: int = COPY_BYTES
    ) -> None:
        self._aws = aws
        self._bucket, self._prefix = bucket_and_key(location)
        self._part_bytes = part_bytes
        self._copy_bytes = copy_bytes

    def uri(self, name: str) -> str:
        """Full address of an object, or of a folder of objects."""
        return f"s3://{self._bucket}/{self._key(name)}"

    def read(self, name: str) -> bytes | None:
        """Content of a small object; None where there is none."""
        found = self.read_stamped(name)
        return None if found is None else found.content

    def read_stamped(self, name: str) -> StampedObject | None:
        """Content of a small object with its times and version; None where there is none."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        with aws_errors(f"reading {self.uri(name)}"):
            for reads_left in reversed(range(_READS)):
                answer = self._opened(name)
                if answer is None:
                    return None
                try:
                    content = answer["Body"].read()
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    # botocore repeats a request, but not one whose answer broke off half-way.
                    if not reads_left:
                        raise
                    continue
                return StampedObject(
                    content=content,
                    etag=answer["ETag"],
                    written=answer["LastModified"],
                    now=parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]),
                )
        raise AssertionError("the loop returns or raises")

    def _opened(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        s3 = self._aws.client("s3")
        try:
            answer: dict[str, Any] = s3.get_object(Bucket=self._bucket, Key=self._key(name))
        except ClientError as error:
            if error_code(error) not in _MISSING:
                raise
            return None
        return answer

    def write(self, name: str, content: bytes, *, new: bool = False, instead_of: str = "") -> str:
        """Write a small object in one step.

        Args:
            name: Of the object.
            content: All of it.
            new: Only if there is none yet.
            instead_of: Only in the place of the version with this ETag.

        Returns:
            Its ETag.

        Raises:
            ConflictError: the condition does not hold. It may be that an earlier attempt of this very call
                succeeded and only its answer was lost: read before drawing conclusions.
        """
        from botocore.exceptions import ClientError

        s3 = self._aws.client("s3")
        condition = {"IfNoneMatch": "*"} if new else {"IfMatch": instead_of} if instead_of else {}
        with aws_errors(f"writing {self.uri(name)}"):
            try:
                answer = s3.put_object(
                    Bucket=self._bucket,
                    Key=self._key(name),
                    Body=content,
                    ChecksumAlgorithm="SHA256",
                    **condition,
                    **self._aws.encryption,
                )
            except ClientError as error:
                # An object that went away in the meantime is a conflict, too.
                if error_code(error) in _CONFLICTS | (_MISSING if instead_of else frozenset()):
                    raise ConflictError(self.uri(name)) from None
                raise
            return str(answer["ETag"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object of a folder, by its name within and in order, however S3 lists them."""
        s3 = self._aws.client("s3")
        prefix = self._key(folder) + "/"
        found: dict[str, int] = {}
        following: dict[str, str] = {}
        with aws_errors(f"listing s3://{self._bucket}/{prefix}"):
            while True:
                page = s3.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **following)
                found |= {item["Key"].removeprefix(prefix): item["Size"] for item in page.get("Contents", ())}
                if not page.get("IsTruncated"):
                    return dict(sorted(found.items()))
                following = {"ContinuationToken": page["NextContinuationToken"]}

    def has(self, name: str, entry: FileEntry) -> bool:
        """Whether an object has just this content, as far as S3 knows its checksum."""
        s3 = self._aws.client("s3")
        with aws_errors(f"looking at {self.uri(name)}"):
            answer = s3.head_object(Bucket=self._bucket, Key=self._key(name), ChecksumMode="ENABLED")
        checksum = answer.get("ChecksumSHA256", "")
        # That of an object in parts is one of the parts' checksums: for those we noted ours beside it.
        known = answer["Metadata"].get(_SHA256) if "-" in checksum or not checksum else _in_hex(checksum)
        return bool(answer["ContentLength"] == entry.bytes and known == entry.sha256)

    def upload(self, folder: str, files: Mapping[str, FileEntry], source: Path) -> None:
        """Upload files of the local folder ``source``; large ones in parts, several at a time."""
        with self._transfers() as transfers:
            running = {
                name: transfers.upload(
                    str(source / name),
                    self._bucket,
                    self._key(f"{folder}/{name}"),
                    extra_args=self._described(entry),
                )
                for name, entry in files.items()
            }
            for name, transfer in running.items():
                with aws_errors(f"uploading {self.uri(f'{folder}/{name}')}"):
                    transfer.result()

    def download(self, folder: str, names: Iterable[str], target: Path) -> None:
        """Download objects of a folder into the local folder ``target``.

        Raises:
            InputError: an object is missing.
            dg.Failure: the connection broke off again and again.
        """
        from botocore.exceptions import ClientError
        from s3transfer.exceptions import RetriesExceededError

        with self._transfers() as transfers:
            running = {}
            for name in names:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                key = self._key(f"{folder}/{name}")
                running[name] = transfers.download(self._bucket, key, str(target / name))
            for name, transfer in running.items():
                uri = self.uri(f"{folder}/{name}")
                with aws_errors(f"downloading {uri}"):
                    try:
                        transfer.result()
                    except ClientError as error:
                        if error_code(error) not in _MISSING:
                            raise
                        raise InputError(f"{uri} is missing though the manifest lists it") from None
                    except RetriesExceededError as error:
                        reason = error.last_exception
                        raise dg.Failure(f"downloading {uri} broke off: {reason} (run again)") from None

    def copy(self, source: str, folder: str, files: Mapping[str, FileEntry]) -> None:
        """Copy files within S3, from the folder with the address ``source``, and check what arrived.

        S3 tells the checksum of a file that it copies at once; of one above 5 GiB only the size is known
        (and its content held against the digest by whoever fetches it).

        Raises:
            InputError: a file is missing, or differs from its digest.
        """
        bucket, prefix = bucket_and_key(source)

        def copy(name: str) -> None:
            origin = {"Bucket": bucket, "Key": _joined(prefix, name)}
            self._copy(origin, f"{folder}/{name}", files[name])

        _in_parallel(copy, list(files))

    def _copy(self, origin: dict[str, str], name: str, entry: FileEntry) -> None:
        from botocore.exceptions import ClientError

        s3 = self._aws.client("s3")
        uri = f"s3://{origin['Bucket']}/{origin['Key']}"
        target = {"Bucket": self._bucket, "Key": self._key(name)}
        described = {**self._described(entry), "MetadataDirective": "REPLACE"}
        with aws_errors(f"copying {uri} to {self.uri(name)}"):
            try:
                size = s3.head_object(**origin)["ContentLength"]
                if size != entry.bytes:
                    raise InputError(
                        f"{uri} has {size} bytes, its manifest says {entry.bytes}; {_MAKE_AGAIN}"
                    )
                if size > self._copy_bytes:
                    s3.copy(CopySource=origin, **target, ExtraArgs=described, Config=self._transfer_config())
                    return
                copied = s3.copy_object(CopySource=origin, **target, **described)["CopyObjectResult"]
            except ClientError as error:
                if error_code(error) not in _MISSING:
                    raise
                raise InputError(f"{uri} is missing though its manifest lists it; {_MAKE_AGAIN}") from None
        if (checksum := copied.get("ChecksumSHA256")) and _in_hex(checksum) != entry.sha256:
            raise InputError(f"{uri} differs from its digest in the manifest; {_MAKE_AGAIN}")

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Contents of many small objects, several at a time, in the order of ``names``."""
        return _in_parallel(self.read, names)

    def _described(self, entry: FileEntry) -> dict[str, Any]:
        return {
            "ChecksumAlgorithm": "SHA256",
            "Metadata": {_SHA256: entry.sha256},
            **self._aws.encryption,
        }

    def _transfers(self) -> Any:
        from boto3.s3.transfer import create_transfer_manager

        return create_transfer_manager(self._aws.client("s3"), self._transfer_config())

    def _transfer_config(self) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=self._part_bytes,
            multipart_chunksize=self._part_bytes,
            max_concurrency=_PARALLEL,
            # The other client, of AWS's C runtime, knows no SHA-256 per part.
            preferred_transfer_client="classic",
        )

    def _key(self, name: str) -> str:
        return _joined(self._prefix, name)


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Bucket and key (or prefix, without slash at its end) of ``s3://bucket/key``.

    Raises:
        InputError: it is no such address.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise InputError(f"{uri} is no place in S3; expected s3://bucket/prefix")
    return bucket, key.rstrip("/")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Results in the order of ``items``; after an error nothing more is begun."""
    with ThreadPoolExecutor(max_workers=_PARALLEL) as pool:
        running = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_hex(checksum: str) -> str:
    return base64.b64decode(checksum).hex()
