"""Bulk prediction on all cores: processes of one thread each, answers in order, flat memory.

The parent and its workers speak MessagePack over pipes, each message behind its length. A worker
is ``python -m ml.serving.pool FOLDER``; it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from ml.errors import InputError
from ml.serving.predictor import TEXT_COLUMNS, Prediction, Predictor
from ml.serving.workers import cores_for_workers, single_thread_environment

_LENGTH_BYTES = 4
_BATCHES_PER_WORKER = 2
"""One being computed and one waiting: no worker idles, no more than these are in memory."""

_COLUMNS = ("offer_id", "problem", "country", *TEXT_COLUMNS)

_logger = logging.getLogger(__name__)

Batch = Sequence[Mapping[str, Any]]


class WorkerError(Exception):
    """Worker processes ended though they had work to do."""

    def __init__(self, how: str) -> None:
        super().__init__(
            f"{how}; its own output says why, signal 9 mostly means that memory ran out: run again with "
            "fewer workers"
        )
        self.how = how


class _Greeting(msgspec.Struct):
    """First message of a worker: it is ready, or it cannot be and why."""

    model_version: str = ""
    error: str = ""


class PredictorPool:
    """Predictor processes for one compiled model. Use it as a context manager."""

    def __init__(self, folder: str | Path, workers: int | None = None) -> None:
        """Start the processes and wait until each has loaded the model.

        Args:
            folder: A ``compiled_student`` artifact.
            workers: Number of processes; None: one per core of what computes.

        Raises:
            InputError: the model cannot be loaded (see :meth:`Predictor.load`), or not so many times.
            WorkerError: a worker died while loading.
        """
        self._folder = Path(folder)
        cores = cores_for_workers(self._folder, workers)
        self._workers = [_Worker(self._folder, core) for core in cores]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(len(cores), thread_name_prefix="predictor-pool")
        try:
            for worker in self._workers:
                self.model_version = worker.wait_until_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """Of the worker processes."""
        return [worker.process.pid for worker in self._workers]

    def predict(self, batches: Iterable[Batch]) -> Iterator[list[Prediction]]:
        """Predictions of each batch of offers, in the order of ``batches``, which are read as needed.

        In place of a worker that dies another is started, and gets the batch once more.

        Raises:
            WorkerError: the second died of it, too; what was yielded before stands.
        """
        pending: deque[Future[list[Prediction]]] = deque()
        for batch in batches:
            pending.append(self._threads.submit(self._predict_one, batch))
            if len(pending) >= _BATCHES_PER_WORKER * len(self._workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """End the processes; those at work finish their batch first."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> PredictorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _predict_one(self, batch: Batch) -> list[Prediction]:
        worker = self._idle.get()
        try:
            try:
                return worker.predict(batch)
            except WorkerError as error:
                _logger.warning("%s; another takes its place", error.how)
                worker = self._replace(worker)
                return worker.predict(batch)
        finally:
            self._idle.put(worker)

    def _replace(self, dead: _Worker) -> _Worker:
        dead.close()
        fresh = _Worker(self._folder, dead.neuron_core)
        self._workers[self._workers.index(dead)] = fresh
        fresh.wait_until_ready()
        return fresh


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, folder: Path, neuron_core: int | None) -> None:
        self.neuron_core = neuron_core
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=single_thread_environment(neuron_core),
            process_group=0,  # Ctrl-C is the parent's to handle
        )

    def wait_until_ready(self) -> str:
        greeting = msgspec.msgpack.decode(self._receive(), type=_Greeting)
        if greeting.error:
            raise InputError(greeting.error)
        return greeting.model_version

    def predict(self, batch: Batch) -> list[Prediction]:
        assert self.process.stdin is not None
        offers = [{name: offer.get(name) for name in _COLUMNS} for offer in batch]
        try:
            _write_frame(self.process.stdin, msgspec.msgpack.encode(offers))
        except BrokenPipeError:
            raise self._death() from None
        return msgspec.msgpack.decode(self._receive(), type=list[Prediction])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died with part of a message unread
            self.process.stdin.close()
        self.process.stdout.read()  # a worker still loading has a greeting to get rid of
        self.process.stdout.close()
        self.process.wait()

    def _receive(self) -> bytes:
        assert self.process.stdout is not None
        frame = _read_frame(self.process.stdout)
        if frame is None:
            raise self._death()
        return frame

    def _death(self) -> WorkerError:
        status = self.process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return WorkerError(f"a predictor process ({self.process.pid}) {how}")


def _write_frame(stream: BinaryIO | Any, payload: bytes) -> None:
    stream.write(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload)
    stream.flush()


def _read_frame(stream: BinaryIO | Any) -> bytes | None:
    """The next message; None where the other side is gone."""
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "big")
    payload: bytes = stream.read(length)
    return payload if len(payload) == length else None


def _work(folder: str) -> None:
    """Answer batches from standard input on standard output until the input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    try:
        predictor = Predictor.load(folder)
    except InputError as error:
        _write_frame(answers, msgspec.msgpack.encode(_Greeting(error=str(error))))
        return
    _write_frame(answers, msgspec.msgpack.encode(_Greeting(model_version=predictor.model_version)))
    while (frame := _read_frame(requests)) is not None:
        offers = msgspec.msgpack.decode(frame, type=list[dict[str, Any]])
        try:
            _write_frame(answers, msgspec.msgpack.encode(predictor.predict(offers)))
        except BrokenPipeError:  # nobody is there to take it: the parent was killed
            os._exit(0)


if __name__ == "__main__":
    _work(sys.argv[1])
