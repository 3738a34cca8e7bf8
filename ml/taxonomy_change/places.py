"""Where a taxonomy lies: a local file or folder, a web address, an object store. Names and bytes only.

What the files mean is decided in :mod:`ml.taxonomy_change.releases`, what is in them in
:mod:`ml.taxonomy_change.formats`.
"""

from __future__ import annotations

import gzip
import io
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ml.errors import InputError

MAX_FILE_BYTES = 256 << 20
"""The largest taxonomies in use have some MB; a hundred times that is something else."""

SECONDS_TO_ANSWER = 30.0
SECONDS_TO_DOWNLOAD = 300.0
"""A server that trickles its answer must not hold up whoever waits for it."""

_T = TypeVar("_T")
_GZIP_MAGIC = b"\x1f\x8b"
_CHAINED = "::"
_UTF_8_MARK = b"\xef\xbb\xbf"


def is_web_address(uri: str) -> bool:
    """Whether ``uri`` is fetched by HTTP."""
    return uri.lower().startswith(("http://", "https://"))


def file_name(uri: str) -> str:
    """Last part of a path or URI: ``tree.csv`` of ``https://host/a/tree.csv?version=2``."""
    if is_web_address(uri):
        parts = urlsplit(uri)
        return unquote(parts.path).rstrip("/").rsplit("/", 1)[-1] or (parts.hostname or uri)
    return uri.rstrip("/").rsplit("/", 1)[-1]


def names_in_folder(location: str, give_up_at: float | None = None) -> list[str] | None:
    """Names of the files that lie in a folder (or under an S3 prefix), sorted; None: it is a file.

    Subfolders are not searched.

    Raises:
        InputError: there is nothing, or it cannot be reached (by ``give_up_at``, of
            :func:`time.monotonic`); the message names the setting.
    """

    def names() -> list[str] | None:
        files, path = _file_system(location)
        if not location.endswith("/") and files.info(path)["type"] != "directory":
            return None
        return _names(files, path)

    return None if is_web_address(location) else _in_time(names, f"CATALOG_TAXONOMY={location}", give_up_at)


def names_beside(uri: str, give_up_at: float | None = None) -> list[str]:
    """Names of the files in the folder of a file, sorted; [] where a folder cannot be listed.

    Raises:
        InputError: the folder cannot be reached (by ``give_up_at``).
    """
    if is_web_address(uri) or _CHAINED in uri:
        return []

    def names() -> list[str]:
        files, path = _file_system(_folder_of(uri) or ".")
        try:
            return _names(files, path)
        except PermissionError:
            return []  # an object store may let its readers have a file, but no list of files

    return _in_time(names, f"CATALOG_TAXONOMY={uri}", give_up_at)


def joined(folder: str, name: str) -> str:
    """Path or URI of the file ``name`` in ``folder``."""
    return f"{folder.rstrip('/')}/{name}"


def beside(uri: str, name: str) -> str:
    """Path or URI of the file ``name`` in the folder of the file ``uri``."""
    return _folder_of(uri) + name


def read_bytes(uri: str, label: str, give_up_at: float | None = None) -> bytes:
    """Content of a file, uncompressed if it was gzipped.

    Args:
        uri: Path, web address, or any URI that fsspec opens.
        label: What messages call the file.
        give_up_at: When not to wait any longer (:func:`time.monotonic`); None: in
            :data:`SECONDS_TO_DOWNLOAD`.

    Raises:
        InputError: it is missing, unreachable, not there in time, empty, larger than
            :data:`MAX_FILE_BYTES`, a truncated gzip file, or a web page (what a proxy or a login answers
            with).
    """
    end = time.monotonic() + SECONDS_TO_DOWNLOAD if give_up_at is None else give_up_at
    content = _in_time(
        lambda: _download(uri, label, end) if is_web_address(uri) else _read_file(uri), label, end
    )
    _check_size(len(content), label)
    content = _uncompressed(content, label)
    start = content[:1024].removeprefix(_UTF_8_MARK).lstrip()
    if not start and not content.strip():
        raise InputError(f"{label} is empty; a taxonomy needs at least one category")
    if start.startswith(b"<"):
        raise InputError(
            f"{label} is a web page or XML, expected a taxonomy as CSV or text; check the address"
        )
    return content


def _read_file(uri: str) -> bytes:
    files, path = _file_system(uri)
    with files.open(path, "rb") as file:
        content: bytes = file.read(MAX_FILE_BYTES + 1)
    return content


def _download(url: str, label: str, give_up_at: float) -> bytes:
    import httpx

    content = bytearray()
    with httpx.stream("GET", url, follow_redirects=True, timeout=SECONDS_TO_ANSWER) as response:
        if not response.is_success:
            raise InputError(
                f"{label} answers with HTTP {response.status_code} {response.reason_phrase}".rstrip()
                + f"; {_advice(response.status_code)}"
            )
        for chunk in response.iter_bytes():
            content += chunk
            _check_size(len(content), label)
            if time.monotonic() > give_up_at:
                raise _too_slow(label)
    return bytes(content)


def _advice(status: int) -> str:
    if status in (401, 403, 407):
        return "check that the address gives access"
    return "check the address" if 400 <= status < 500 and status != 429 else "run again later"


def _uncompressed(content: bytes, label: str) -> bytes:
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            uncompressed = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{label} cannot be read: {_first_line(error)}; the gzip file is damaged, deliver it anew"
        ) from None
    _check_size(len(uncompressed), label)
    return uncompressed


def _check_size(size: int, label: str) -> None:
    if size > MAX_FILE_BYTES:
        raise InputError(
            f"{label} is larger than {MAX_FILE_BYTES >> 20} MB, which no taxonomy is; check that it is the "
            "right file"
        )


def _file_system(location: str) -> tuple[Any, str]:
    """The file system of ``location`` and the path on it, as it is now (not as it was last listed)."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if "://" in location or _CHAINED in location:
        files, path = url_to_fs(location)
    else:
        files, path = LocalFileSystem(), location
    files.invalidate_cache()
    return files, path


def _names(files: Any, path: str) -> list[str]:
    entries = files.ls(path, detail=True)
    names = (
        str(entry["name"]).rsplit("/", 1)[-1]
        for entry in entries
        # A link to a folder counts as a folder.
        if entry["type"] != "directory" and not (entry.get("islink") and files.isdir(entry["name"]))
    )
    return sorted(name for name in names if name)


def _folder_of(uri: str) -> str:
    """Everything up to the last slash, the slash included."""
    return uri[: uri.rfind("/") + 1]


def _in_time(call: Callable[[], _T], label: str, give_up_at: float | None) -> _T:
    """The result of ``call``, which names ``label`` if it fails.

    It runs in a thread of its own: neither a file system nor the resolution of a name can be interrupted,
    and whoever waits for them has to go on.
    """
    if give_up_at is None:
        with _errors_name(label):
            return call()
    outcome: list[_T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with _errors_name(label):
                outcome.append(call())
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="taxonomy", daemon=True)
    thread.start()
    thread.join(max(0.0, give_up_at - time.monotonic()))
    if errors:
        raise errors[0]
    if not outcome:
        raise _too_slow(label)
    return outcome[0]


def _too_slow(label: str) -> InputError:
    return InputError(
        f"{label} is too slow: it was given up before all of it was there; run again, or download it and "
        "give the file"
    )


@contextmanager
def _errors_name(label: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{label}: no such file or folder; check the path") from None
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"{label} cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
