"""What serves on this machine: as it is noted, and as the endpoint tells it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ml.serving import routing
from ml.serving.routing import RoutedVariant, RouterGoneError, RouterState, VariantState
from resources.endpoints import EndpointStatus, VariantObservation, VariantStatus
from resources.server_process import ServerProcess


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, as ``current.json`` has it."""

    model: str
    """Folder of the compiled student with the most weight."""
    url: str
    model_version: str
    taxonomy_version: str
    pid: int
    """The main process: of the server, or of the router."""
    started: str
    process_started: str
    """Start of the process as the system tells it: a process id alone may by now be another's."""
    log: str = ""
    variants: list[RoutedVariant] = []
    """Behind the router; none where a model serves alone."""
    control: str = ""
    """Socket of the router."""

    @property
    def process(self) -> ServerProcess:
        """The main process."""
        return ServerProcess(pid=self.pid, process_started=self.process_started)

    @property
    def alone(self) -> RoutedVariant:
        """The model with the most weight, as it would serve alone."""
        return RoutedVariant(model=self.model, model_version=self.model_version, weight=1.0)

    @property
    def answering(self) -> list[RoutedVariant]:
        """The models whose answers clients get."""
        return [variant for variant in self.variants if not variant.is_shadow] or [self.alone]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Processes of which only the one in ``current.json`` is to stay (``changing.json``)."""

    processes: list[ServerProcess]


def alone_status(serving: Serving) -> EndpointStatus:
    """Of a model that has the port to itself."""
    variant = serving.alone
    return EndpointStatus(
        url=serving.url,
        model_version=serving.model_version,
        taxonomy_version=serving.taxonomy_version,
        started=serving.started,
        variants=[VariantStatus(name=variant.name, model_version=variant.model_version, weight=1.0)],
        details={"pid": str(serving.pid), "log": serving.log},
    )


def routed_status(serving: Serving, state: RouterState) -> EndpointStatus:
    """Of models behind a router, whose state it told."""
    variants = sorted(state.variants, key=lambda variant: (variant.is_shadow, -variant.weight))
    down = ", ".join(variant.name for variant in variants if not variant.is_up)
    missed = ", ".join(f"{variant.name}: {variant.dropped:,}" for variant in variants if variant.dropped)
    told = {"down": down, "copies_missed": missed}
    return EndpointStatus(
        url=serving.url,
        model_version=serving.model_version,
        taxonomy_version=serving.taxonomy_version,
        started=serving.started,
        variants=[_variant_status(variant) for variant in variants],
        details={
            "pid": str(serving.pid),
            "log": serving.log,
            **{name: text for name, text in told.items() if text},
        },
    )


def _variant_status(variant: VariantState) -> VariantStatus:
    return VariantStatus(
        name=variant.name,
        model_version=variant.model_version,
        weight=variant.weight,
        is_shadow=variant.is_shadow,
    )


def observation_of(variant: VariantState) -> VariantObservation:
    """What a router saw of a variant, as every endpoint tells it."""
    return VariantObservation(
        variant=_variant_status(variant),
        requests=variant.requests,
        errors=variant.errors,
        p99_milliseconds=variant.p99_milliseconds,
        low_confidence_share=variant.low_confidence / variant.offers if variant.offers else None,
    )


def asked(serving: Serving) -> RouterState | None:
    """What the router says; None where there is none, or it does not answer."""
    if not serving.control:
        return None
    try:
        return routing.ask(Path(serving.control))
    except RouterGoneError:
        return None
