"""A lock between machines: an object in S3 that is renewed while it is held, and taken over when it is not.

Every change is conditional on the version of the object that was seen last, so of many only one succeeds.
What time it is S3 says (its ``Date`` against the object's ``Last-Modified``): clocks of machines may differ.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg
import msgspec

from ml.errors import InputError
from resources.aws import AwsAccess
from resources.s3_objects import ConflictError, S3Objects, StampedObject

SECONDS = 60.0
"""For so long after its last renewal a lease holds; a killed holder is waited for at most so long."""

_RENEWALS = 4
"""In that time: the third in a row may fail, and the lease still holds."""
_SECONDS_BETWEEN_LOOKS = 2.0


class LeaseLostError(dg.Failure):
    """The lease could not be renewed in time, and another may have taken it."""


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    """What the object says."""

    holder: str = ""
    """Empty: it was given back."""
    who: str = ""
    """The holder, for people: machine and process."""
    seconds: float = 0.0
    renewals: int = 0


class Lease:
    """A lease that is held."""

    def __init__(self, objects: S3Objects, name: str, seconds: float) -> None:
        self._objects = objects
        self._name = name
        self._holder = uuid.uuid4().hex
        self._content = _Content(
            holder=self._holder, who=f"{socket.gethostname()}, process {os.getpid()}", seconds=seconds
        )
        self._etag = ""
        self._renewed_at = 0.0
        self._ended = threading.Event()
        self._lost = False

    @property
    def uri(self) -> str:
        """Of the object."""
        return self._objects.uri(self._name)

    def check(self) -> None:
        """Make sure that it is still held; to be asked before what must not happen twice.

        Raises:
            LeaseLostError: it is not.
        """
        if self._lost or time.monotonic() - self._renewed_at >= self._content.seconds:
            raise LeaseLostError(
                f"the lease {self.uri} was lost: it was not renewed for {self._content.seconds:g} s, and "
                "another may hold it now; look at what is there, and run again"
            )

    def _take(self, say: Callable[[str], None]) -> None:
        said = ""
        while True:
            found = self._objects.read_stamped(self._name)
            if found is None or _is_free(found, self.uri):
                if self._write(found.etag if found is not None else ""):
                    return
                continue
            held = _parsed(found, self.uri)
            if held.who != said:
                said = held.who
                say(
                    f"waiting for {self.uri}: held by {said}, last renewed {found.written:%H:%M:%S} UTC; "
                    f"it is taken over when it is not renewed for {held.seconds:g} s"
                )
            pause = min(_SECONDS_BETWEEN_LOOKS, held.seconds / _RENEWALS)
            time.sleep(pause * random.uniform(0.5, 1.0))

    def _write(self, instead_of: str) -> bool:
        """Write our content in the place of the version seen; False if another was faster."""
        began_at = time.monotonic()
        encoded = msgspec.json.encode(self._content)
        try:
            self._etag = self._objects.write(self._name, encoded, new=not instead_of, instead_of=instead_of)
        except ConflictError:
            # Perhaps with ourselves: a write succeeded, but its answer was lost.
            found = self._objects.read_stamped(self._name)
            if found is None or _parsed(found, self.uri).holder != self._holder:
                return False
            self._etag = found.etag
            if found.content != encoded:
                return self._write(found.etag)
        self._renewed_at = began_at
        return True

    def _keep(self) -> None:
        """Renew it until it is given back or lost; an error is no loss as long as there is time."""
        while not self._ended.wait(self._content.seconds / _RENEWALS):
            self._content = msgspec.structs.replace(self._content, renewals=self._content.renewals + 1)
            try:
                self._lost = not self._write(self._etag)
            except (dg.Failure, InputError):
                self._lost = time.monotonic() - self._renewed_at >= self._content.seconds
            if self._lost:
                return

    def _give_back(self) -> None:
        if not self._lost:
            # Where this fails the lease ends by itself, a little later.
            with contextlib.suppress(ConflictError, dg.Failure, InputError):
                self._objects.write(self._name, msgspec.json.encode(_Content()), instead_of=self._etag)


@contextmanager
def lease(
    aws: AwsAccess,
    location: str,
    name: str,
    *,
    seconds: float = SECONDS,
    say: Callable[[str], None] | None = None,
) -> Iterator[Lease]:
    """Hold a lock that one process or thread has at a time, on whatever machine. Others wait.

    Args:
        aws: The way into S3.
        location: ``s3://bucket/prefix`` of the store; the object is ``locks/<name>.json`` there.
        name: What is locked. Not to be entered twice by the same thread.
        seconds: After so long without a renewal another may take it; what is killed holds it no longer.
        say: Gets a line when there is somebody to wait for; the log of the run, if not given.

    Raises:
        LeaseLostError: the block came to its end, but the lease had been lost meanwhile.
        InputError: the object may not be read or written.
        dg.Failure: S3 cannot be reached.
    """
    held = Lease(S3Objects(aws, location), f"locks/{name}.json", seconds)
    held._take(say or dg.get_dagster_logger().info)
    keeper = threading.Thread(target=held._keep, name=f"lease {name}", daemon=True)
    keeper.start()
    try:
        yield held
        held.check()
    finally:
        held._ended.set()
        keeper.join()
        held._give_back()


def _is_free(found: StampedObject, place: str) -> bool:
    held = _parsed(found, place)
    return not held.holder or (found.now - found.written).total_seconds() > held.seconds


def _parsed(found: StampedObject, place: str) -> _Content:
    try:
        return msgspec.json.decode(found.content, type=_Content)
    except msgspec.DecodeError as error:
        raise InputError(f"{place} is no lease: {error}; delete it if nothing is being released") from None
