"""A client that loads an endpoint and takes the time, one request after the other or at a stated rate."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import numpy as np

from ml.serving.device_report import Latency

_CONNECTIONS = 32
"""At a rate; as many requests can be under way."""

_SECONDS_TO_ANSWER = 60.0


def measure_latency(
    url: str, body: Callable[[], bytes], *, request_offers: int, rate: float, seconds: float
) -> Latency:
    """Send requests and take the time of each.

    Args:
        url: Of the server, without a path.
        body: Makes the body of the next request; called from several threads.
        request_offers: Offers in each body.
        rate: Offers per second, in requests at even intervals whatever the answers take; 0: each request
            waits for the answer to the one before.
        seconds: How long requests are sent.
    """
    interval = request_offers / rate if rate else 0.0
    connections = _CONNECTIONS if rate else 1
    numbers = itertools.count()  # next() on it is atomic
    took: list[list[float]] = [[] for _ in range(connections)]
    failed = [0] * connections
    started_at = time.perf_counter()

    def send(connection: int) -> None:
        parts = urlsplit(url)
        client = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_SECONDS_TO_ANSWER)
        for number in numbers:
            now = time.perf_counter()
            due = started_at + number * interval if rate else now
            if due - started_at >= seconds:
                break
            if due > now:
                time.sleep(due - now)
            if _is_answered(client, body()):
                took[connection].append(time.perf_counter() - due)
            else:
                failed[connection] += 1
        client.close()

    threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started_at
    milliseconds = np.array([each for some in took for each in some]) * 1_000
    p50, p99 = np.percentile(milliseconds, [50, 99]) if len(milliseconds) else (0.0, 0.0)
    return Latency(
        request_offers=request_offers,
        asked_offers_per_second=rate,
        offers_per_second=round(len(milliseconds) * request_offers / elapsed, 1),
        requests=len(milliseconds) + sum(failed),
        failed=sum(failed),
        p50_milliseconds=round(float(p50), 3),
        p99_milliseconds=round(float(p99), 3),
    )


def _is_answered(client: http.client.HTTPConnection, body: bytes) -> bool:
    try:
        client.request("POST", "/invocations", body, {"content-type": "application/json"})
        answer = client.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        client.close()  # the next request opens it again
        return False
    return answer.status == 200
