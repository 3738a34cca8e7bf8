"""The endpoint on this machine: server processes that outlive the run that started them.

A model that serves alone has the port to itself. Only where several are needed side by side, a router
(:mod:`ml.serving.router`) takes the port for that time, with the models behind it. Both are processes that
take the port over from each other without losing a request, so every change is the same one: what is to serve
next starts beside what serves now, and the latter ends when the former answers.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.serving import routing
from ml.serving.routing import RoutedVariant, RoutePlan, RouterGoneError
from ml.serving.variants import TARGET_VARIANT_HEADER
from resources.atomic_files import only_one, write_atomically
from resources.endpoints import (
    EndpointError,
    Endpoints,
    EndpointStatus,
    RolledBackError,
    Variant,
    VariantObservation,
    check_shadow,
    said_in,
    shares_of,
)
from resources.failures import input_errors_fail_plainly
from resources.local_serving import Change, Serving, alone_status, asked, observation_of, routed_status
from resources.rollout import account_of, alarm_of
from resources.server_process import Launch, ServerProcess

_HOST = "127.0.0.1"
_ROUTER = "router-"
_SECONDS_PER_PING = 2.0
_SECONDS_PER_INVOCATION = 60.0
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_LEAVE_THE_PORT = 30.0
_SECONDS_OF_A_SHARE = 10.0
"""A version that is tried out has its share so long after whoever watches it looked last."""

_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""httpx reads all of the system's for every call otherwise, 20 ms of work, though nothing here is TLS."""


class LocalEndpoints(Endpoints):
    """Server processes on one port of this machine."""

    home: str
    port: int
    workers: int
    program: str = "ml"
    """Module whose commands ``serve`` and ``route`` are the server and the router."""

    @override
    @input_errors_fail_plainly()
    def deploy(self, folder: Path, ref: ArtifactRef, at_once: bool = False) -> EndpointStatus:
        new = RoutedVariant(model=str(folder), model_version=ref.version, weight=1.0)
        with only_one(self._folder / "deploy.lock"):
            old = self._settled()
            in_place = self.status() if old is not None and old.url == self._url else None
            if old is None or in_place is None:
                return alone_status(self._change(old, [new]))
            is_the_same = old.model_version == ref.version
            if is_the_same and len(in_place.variants) == 1:
                return in_place
            if at_once or is_the_same or not self.policy.canary_seconds:
                return alone_status(self._change(old, [new]))
            return alone_status(self._try_out(old, new))

    @override
    @input_errors_fail_plainly()
    def split(self, variants: Sequence[Variant]) -> EndpointStatus:
        plan = _shares(variants)
        with only_one(self._folder / "deploy.lock"):
            old = self._settled()
            if old is None or not self._serves(old, plan):
                self._change(old, plan)
            return self._status()

    @override
    @input_errors_fail_plainly()
    def shadow(self, folder: Path, ref: ArtifactRef, percent: float) -> EndpointStatus:
        with only_one(self._folder / "deploy.lock"):
            old = self._settled()
            answering = old.answering if old is not None and self.status() is not None else []
            check_shadow(ref.version, percent, [each.model_version for each in answering])
            assert old is not None
            shadow = RoutedVariant(
                model=str(folder), model_version=ref.version, weight=percent / 100, is_shadow=True
            )
            plan = [old.alone, shadow]
            if not self._serves(old, plan):
                self._change(old, plan)
            return self._status()

    @override
    @input_errors_fail_plainly()
    def end_shadow(self) -> EndpointStatus | None:
        with only_one(self._folder / "deploy.lock"):
            old = self._settled()
            if old is not None and any(variant.is_shadow for variant in old.variants):
                self._change(old, old.answering)
            return self.status()

    @override
    def observations(self) -> list[VariantObservation]:
        recorded = self._recorded()
        state = asked(recorded) if recorded is not None else None
        return [] if state is None else [observation_of(variant) for variant in state.variants]

    @override
    def releasing(self) -> AbstractContextManager[None]:
        return only_one(self._folder / "release.lock")

    @override
    @input_errors_fail_plainly()
    def check_available(self) -> None:
        recorded = self._recorded()
        if recorded is None or recorded.url != self._url:
            self._check_port_is_free()

    @override
    def status(self) -> EndpointStatus | None:
        recorded = self._recorded()
        if recorded is None:
            return None
        ping = _ping(recorded.url)
        if ping is None or ping.get("model_version") != recorded.model_version:
            return None
        if not recorded.control:
            return alone_status(recorded)
        state = asked(recorded)
        return routed_status(recorded, state) if state is not None else None

    @override
    @input_errors_fail_plainly()
    def invoke(self, offers: Sequence[Mapping[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        import httpx

        url = recorded.url if (recorded := self._recorded()) else self._url
        target = {TARGET_VARIANT_HEADER: variant} if variant else {}
        try:
            response = httpx.post(
                f"{url}/invocations",
                content=msgspec.json.encode({"offers": list(offers)}),
                headers={"content-type": "application/json", **target},
                timeout=_SECONDS_PER_INVOCATION,
                trust_env=False,
                verify=_NO_CERTIFICATES,
            )
        except httpx.HTTPError as error:
            raise EndpointError(
                f"the endpoint at {url} does not answer ({error}): materialize offer_endpoint to start it"
            ) from None
        if 400 <= response.status_code < 500:
            raise InputError(f"the endpoint refused the offers: {said_in(response.text)}")
        if response.status_code != 200:
            said = said_in(response.text)
            raise EndpointError(f"the endpoint at {url} answered {response.status_code}: {said}")
        predictions: list[dict[str, Any]] = response.json()["predictions"]
        return predictions

    @override
    def stop(self) -> bool:
        with only_one(self._folder / "deploy.lock"):
            recorded = self._settled()
            if recorded is not None:
                recorded.process.end()
            self._current.unlink(missing_ok=True)
            return recorded is not None

    def _try_out(self, old: Serving, new: RoutedVariant) -> Serving:
        """Give a version its share for a while, then all requests; or none, if an alarm trips."""
        before = old.alone
        router = self._change(old, [before, msgspec.structs.replace(new, weight=0.0)])
        try:
            self._watch(router, before, new)
            return self._change(router, [new])
        except BaseException:
            # Also when this run is canceled: nobody would watch any more.
            self._return_to(before, router)
            raise

    def _return_to(self, before: RoutedVariant, router: Serving) -> None:
        """Let the version before serve alone again, unless the new one took over in the meantime."""
        current = self._settled()
        if current is not None and current.process != router.process:
            return
        try:
            self._change(current, [before])
        except (EndpointError, InputError) as error:
            _log().error(f"model version {before.model_version} does not serve alone again: {error}")

    def _watch(self, router: Serving, before: RoutedVariant, new: RoutedVariant) -> None:
        policy, control = self.policy, Path(router.control)
        share = policy.canary_percent / 100
        weights = {before.name: 1 - share, new.name: share}
        _log().info(
            f"model version {new.model_version} gets {policy.canary_percent:g} % of the requests for "
            f"{policy.canary_seconds:g} s, beside {before.model_version}"
        )
        deadline = time.monotonic() + policy.canary_seconds
        while True:
            try:
                state = routing.ask(control, weights, _SECONDS_OF_A_SHARE)
            except RouterGoneError as error:
                raise EndpointError(
                    f"the router ended while model version {new.model_version} was tried out, so it was not "
                    f"watched to the end ({error}); see {router.log}, then deploy it again"
                ) from None
            seen = next(variant for variant in state.variants if variant.name == new.name)
            if alarm := alarm_of(seen, policy):
                with suppress(RouterGoneError):  # without a router no request goes to it either
                    routing.ask(control, {before.name: 1.0}, _SECONDS_OF_A_SHARE)
                raise RolledBackError(
                    f"model version {new.model_version} was rolled back: {alarm}. Model version "
                    f"{before.model_version} has all requests again"
                )
            if (left := deadline - time.monotonic()) <= 0:
                _log().info(f"model version {new.model_version} gets all requests: {account_of(seen)}")
                return
            time.sleep(min(left, _SECONDS_BETWEEN_LOOKS))

    def _change(self, old: Serving | None, variants: Sequence[RoutedVariant]) -> Serving:
        """Let ``variants`` serve instead of ``old``, which ends when they answer.

        Raises:
            InputError: a stranger has the port.
            EndpointError: they do not come up; ``old`` goes on serving.
        """
        if old is None or old.url != self._url:
            self._check_port_is_free()
        self._folder.mkdir(parents=True, exist_ok=True)
        start = self._start_alone if len(variants) == 1 else self._start_router
        new = start(variants, [old.process] if old is not None else [])
        _write(self._current, new)
        if old is not None:
            old.process.end()
        self._changing.unlink(missing_ok=True)
        for leftover in set(self._folder.glob(f"{_ROUTER}*.sock")) - {Path(new.control)}:
            leftover.unlink(missing_ok=True)  # of a router that was killed
        return new

    def _start_alone(self, variants: Sequence[RoutedVariant], old: list[ServerProcess]) -> Serving:
        variant = variants[0]
        command = [self.program, "serve", "--model", variant.model]
        return self._start(variant, f"model version {variant.model_version}", command, old)

    def _start_router(self, variants: Sequence[RoutedVariant], old: list[ServerProcess]) -> Serving:
        name = f"{_ROUTER}{uuid.uuid4().hex[:8]}"
        plan, control = self._folder / f"{name}.json", self._folder / f"{name}.sock"
        _write(plan, RoutePlan(variants=list(variants)))
        command = [self.program, "route", "--plan", str(plan), "--control", str(control)]
        command += ["--program", self.program]
        what = " beside ".join(f"model version {variant.model_version}" for variant in reversed(variants))
        main = max(
            (variant for variant in variants if not variant.is_shadow), key=lambda variant: variant.weight
        )
        try:
            started = self._start(main, what, command, old)
        finally:
            plan.unlink()
        return msgspec.structs.replace(started, variants=list(variants), control=str(control))

    def _start(self, main: RoutedVariant, what: str, command: list[str], old: list[ServerProcess]) -> Serving:
        log = self._folder / f"{command[1]}-{main.model_version}.log"
        command += ["--port", str(self.port), "--workers", str(self.workers)]
        launch = Launch(what, command, log)
        try:
            _write(self._changing, Change(processes=[launch.process, *old]))
        except BaseException:
            launch.process.end()  # nobody would find it again
            raise
        state = launch.wait()
        return Serving(
            model=main.model,
            url=self._url,
            model_version=main.model_version,
            taxonomy_version=state.taxonomy_version,
            pid=state.pid,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            process_started=launch.process.process_started,
            log=str(log),
        )

    @property
    def _folder(self) -> Path:
        return Path(self.home).absolute() / "endpoint"

    @property
    def _current(self) -> Path:
        return self._folder / "current.json"

    @property
    def _changing(self) -> Path:
        return self._folder / "changing.json"

    @property
    def _url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def _noted(self) -> Serving | None:
        """What ``current.json`` names, alive or not."""
        try:
            return msgspec.json.decode(self._current.read_bytes(), type=Serving)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _recorded(self) -> Serving | None:
        """What ``current.json`` names, if that process is still the one it was."""
        noted = self._noted()
        return noted if noted is not None and noted.process.is_alive else None

    def _settled(self) -> Serving | None:
        """What serves, after the end of what a change left over whose process was killed half way."""
        recorded = self._recorded()
        with suppress(FileNotFoundError, msgspec.DecodeError):
            for process in msgspec.json.decode(self._changing.read_bytes(), type=Change).processes:
                if recorded is None or process != recorded.process:
                    process.end()
            self._changing.unlink()
        return recorded

    def _serves(self, recorded: Serving, plan: Sequence[RoutedVariant]) -> bool:
        """Whether that is what serves already, in good health."""
        status = self.status() if recorded.url == self._url else None
        if status is None or "down" in status.details:
            return False
        return (recorded.variants or [recorded.alone]) == list(plan)

    def _status(self) -> EndpointStatus:
        status = self.status()
        if status is None:
            raise EndpointError(
                f"the endpoint at {self._url} answered, and stopped to; see the logs in {self._folder}"
            )
        return status

    def _check_port_is_free(self) -> None:
        """The server shares its port with the version before; a stranger must not be shared with.

        Workers of a server that was killed finish what they have begun, and are waited for.
        """
        noted = self._noted()
        was_ours = noted is not None and noted.url == self._url
        deadline = time.monotonic() + (_SECONDS_TO_LEAVE_THE_PORT if was_ours else 0.0)
        while objection := self._objection_to_the_port():
            if time.monotonic() >= deadline:
                raise InputError(
                    f"OFFER_ASSETS_ENDPOINT_PORT={self.port} cannot be used ({objection}): "
                    "choose another port, or end what uses it"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _objection_to_the_port(self) -> str | None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                return error.strerror
        return None


def _shares(variants: Sequence[Variant]) -> list[RoutedVariant]:
    """The variants with weights that sum up to 1."""
    return [
        RoutedVariant(model=str(variant.folder), model_version=variant.ref.version, weight=share)
        for variant, share in zip(variants, shares_of(variants), strict=True)
    ]


def _ping(url: str) -> dict[str, Any] | None:
    """What ``/ping`` says, on a connection of its own; None unless it is healthy."""
    import httpx

    try:
        response = httpx.get(
            f"{url}/ping", timeout=_SECONDS_PER_PING, trust_env=False, verify=_NO_CERTIFICATES
        )
        answer = response.json()
    except (httpx.HTTPError, ValueError):
        return None
    return answer if response.status_code == 200 and isinstance(answer, dict) else None


def _write(file: Path, content: msgspec.Struct) -> None:
    write_atomically(file, msgspec.json.format(msgspec.json.encode(content)))


def _log() -> Any:
    return dg.get_dagster_logger(__name__)
