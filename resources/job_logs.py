"""What a training job writes, while it runs: messages of Dagster Pipes for the run, and lines for its log."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster_pipes import PIPES_PROTOCOL_VERSION_FIELD, PipesDefaultMessageWriter
from typing_extensions import override

from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code

LOG_GROUP = "/aws/sagemaker/TrainingJobs"

_LINES_SHOWN = 15


class JobLogReader(dg.PipesMessageReader):
    """Reads all log streams of a job: one for each machine, and again for each restart.

    It reads when it is told to, in the caller's thread. ``PipesCloudWatchMessageReader`` knows one stream, by
    a name that only the running job makes up, and begins at the time of its own start; who takes over a job
    wants to hear what was said before.
    """

    def __init__(self, aws: AwsAccess, job: str, log: Any) -> None:
        self._aws = aws
        self._job = job
        self._log = log
        self._handler: Any = None
        self._read_up_to: dict[str, str] = {}
        self._is_warned = False
        self.last_lines: deque[str] = deque(maxlen=_LINES_SHOWN)

    @override
    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[dict[str, str]]:
        self._handler = handler
        yield {PipesDefaultMessageWriter.STDIO_KEY: PipesDefaultMessageWriter.STDOUT}

    @override
    def no_messages_debug_text(self) -> str:
        return f"Read the log streams {self._job}/… of {LOG_GROUP}."

    def read(self) -> None:
        """Take over what is new. A log that cannot be read is told once, and is no reason to end a job."""
        with self._errors_told_once():
            for stream in self._streams():
                # Each by itself: where to read on in a log that says nothing more is forgotten after a day.
                with self._errors_told_once():
                    self._read_stream(stream)

    def read_rest(self, seconds: float) -> None:
        """Take over what is still on its way after the job's end, waiting ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        self.read()
        while not self._handler.received_closed_message and time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 10))
            self.read()

    @contextmanager
    def _errors_told_once(self) -> Iterator[None]:
        try:
            yield
        except (InputError, dg.Failure) as error:
            if not self._is_warned:
                self._log.warning(f"the job goes on, but its log cannot be read: {error}")
            self._is_warned = True

    def _streams(self) -> list[str]:
        from botocore.exceptions import ClientError

        logs = self._aws.client("logs")
        names: list[str] = []
        following: dict[str, str] = {}
        with aws_errors(f"listing the log streams of training job {self._job}"):
            while True:
                try:
                    answer = logs.describe_log_streams(
                        logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self._job}/", **following
                    )
                except ClientError as error:
                    if error_code(error) == "ResourceNotFoundException":
                        return []  # before the first job of the account has written its first line
                    raise
                names += [stream["logStreamName"] for stream in answer["logStreams"]]
                if "nextToken" not in answer:
                    return sorted(names)
                following = {"nextToken": answer["nextToken"]}

    def _read_stream(self, stream: str) -> None:
        logs = self._aws.client("logs")
        while True:
            following = {"nextToken": self._read_up_to[stream]} if stream in self._read_up_to else {}
            with aws_errors(f"reading the log {LOG_GROUP} {stream}"):
                answer = logs.get_log_events(
                    logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **following
                )
            for event in answer["events"]:
                self._take(event["message"])
            before, self._read_up_to[stream] = self._read_up_to.get(stream), answer["nextForwardToken"]
            if self._read_up_to[stream] == before:  # a page may be empty and not the last
                return

    def _take(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if isinstance(message, dict) and PIPES_PROTOCOL_VERSION_FIELD in message:
            self._handler.handle_message(message)
            return
        self.last_lines.append(line)
        sys.stderr.write(line + "\n")
