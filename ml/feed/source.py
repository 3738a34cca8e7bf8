"""The bytes of a feed file, from whatever file system, compressed or not."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from typing_extensions import override

from ml.errors import InputError
from ml.feed.rows import first_line


class Source(io.RawIOBase):
    """An open file that remembers what went wrong in getting its bytes.

    So a network that fails can be told from a file that is broken, whatever the readers above make of
    the error.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Wrap ``file``, which is closed with this."""
        self._file = file
        self.failure: Exception | None = None

    @override
    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except Exception as error:
            self.failure = error
            raise
        buffer[: len(content)] = content
        return len(content)

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    @override
    def tell(self) -> int:
        return self._file.tell()

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return self._file.seekable()

    @override
    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_source(uri: str) -> Source:
    """Open a file for reading.

    Raises:
        InputError: there is none, or it cannot be reached.
    """
    import fsspec

    try:
        return Source(fsspec.open(uri, "rb").open())
    except FileNotFoundError:
        raise InputError(f"{uri}: there is no such file") from None
    except Exception as error:  # every file system has errors of its own
        raise unreachable(uri, error) from error


def unreachable(uri: str, error: Exception) -> InputError:
    """What to tell of a file whose bytes could not be had."""
    return InputError(
        f"{uri} could not be fetched: {first_line(error)}; that says nothing of its content, run again"
    )


@contextmanager
def uncompressed(file: IO[bytes], *, seekable: bool) -> Iterator[IO[bytes]]:
    """The content of a gzipped file; in a temporary file if the reader has to jump about in it."""
    with gzip.GzipFile(fileobj=file) as content:
        if not seekable:
            yield cast("IO[bytes]", content)
            return
        with tempfile.TemporaryFile() as temporary:
            shutil.copyfileobj(content, temporary)
            temporary.seek(0)
            yield temporary
