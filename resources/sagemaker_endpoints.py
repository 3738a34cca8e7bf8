"""Endpoints on SageMaker: what is to serve, how it gets there, and what it means when it does not.

The calls are in :mod:`resources.sagemaker_service`, names and requests in
:mod:`resources.sagemaker_fleet`, alarms in :mod:`resources.sagemaker_alarms`.
"""

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import dagster as dg
from typing_extensions import override

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.serving.variants import variant_of
from resources.aws import AwsAccess
from resources.endpoints import (
    EndpointError,
    Endpoints,
    EndpointStatus,
    RolledBackError,
    Variant,
    VariantObservation,
    VariantStatus,
    check_shadow,
    shares_of,
)
from resources.failures import input_errors_fail_plainly
from resources.s3_lease import lease
from resources.sagemaker_alarms import EndpointMetrics
from resources.sagemaker_fleet import (
    MAIN,
    Fleet,
    FleetRequests,
    Model,
    Naming,
    Slot,
    check_canary,
    deployment_config,
    slot_name,
    split_slots,
)
from resources.sagemaker_invocation import ask
from resources.sagemaker_scaling import EndpointScaling
from resources.sagemaker_service import FAILED, SERVING, Configured, Described, EndpointService

_ATTEMPTS = 6
"""To begin a change while others change the endpoint, too."""

_SECONDS_FOR_ALARMS_TO_CLEAR = 300.0
_OBSERVED = datetime.timedelta(hours=1)
_SAME_WEIGHT = 1e-4


class SageMakerEndpoints(Endpoints):
    """A SageMaker endpoint: blue/green with a canary, alarms and automatic rollback.

    Models, configurations and the endpoint are named by their content. Whatever is interrupted is found
    again by the next call: an update under way is waited for instead of started twice.
    """

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    aws: dg.ResourceDependency[AwsAccess]
    location: str
    """Of the store: ``s3://bucket/prefix``."""
    name: str
    serving_image: str
    neuron_image: str = ""
    instance_type: str
    min_instances: int
    max_instances: int
    capture_percent: int
    requests_per_minute: int = 1_500
    """Autoscaling aims at so many requests to one instance."""
    watched_seconds: int = 300
    """So long alarms can bring the version before back after all requests moved to the new one."""
    seconds_between_looks: float = 15.0

    @override
    @input_errors_fail_plainly()
    def deploy(self, folder: Path, ref: ArtifactRef, at_once: bool = False) -> EndpointStatus:
        check_canary(self.policy, self.min_instances)
        fleet = _alone(self._requests.model(folder, ref))
        described = self._service.look()
        if described is None or described.under_way != self._requests.config(fleet)[0]:
            now = self._in_service()
            if now is not None and set(now.models) != {MAIN} and not at_once:
                # A guarded roll-out takes the same variants before and after: a split ends first.
                self._bring_to(_alone(self._main_in_service(now)), guarded=False)
        return self._bring_to(fleet, guarded=not at_once)

    @override
    @input_errors_fail_plainly()
    def split(self, variants: Sequence[Variant]) -> EndpointStatus:
        shares = shares_of(variants)
        if len(variants) == 1:
            return self.deploy(variants[0].folder, variants[0].ref)
        models = [
            (self._requests.model(each.folder, each.ref), share)
            for each, share in zip(variants, shares, strict=True)
        ]
        now = self._in_service()
        main = self._version(now.models.get(MAIN, "")) if now else None
        return self._bring_to(Fleet(slots=split_slots(models, main)), guarded=False)

    @override
    @input_errors_fail_plainly()
    def shadow(self, folder: Path, ref: ArtifactRef, percent: float) -> EndpointStatus:
        model = self._requests.model(folder, ref)
        now = self._in_service()
        check_shadow(
            ref.version, percent, [self._version(each) for each in now.models.values()] if now else []
        )
        assert now is not None
        shadow = Slot(name=slot_name(model), model=model, weight=round(percent / 100, 6))
        return self._bring_to(_alone(self._main_in_service(now), shadow), guarded=False)

    @override
    @input_errors_fail_plainly()
    def end_shadow(self) -> EndpointStatus | None:
        now = self._in_service()
        if now is None or now.shadow is None:
            return self.status()
        return self._bring_to(_alone(self._main_in_service(now)), guarded=False)

    @override
    @input_errors_fail_plainly()
    def observations(self) -> list[VariantObservation]:
        described = self._service.look()
        now = self._configured(described)
        if described is None or now is None:
            return []
        since = max(described.modified, datetime.datetime.now(datetime.UTC) - _OBSERVED)
        observations = []
        for slot, variant in self._variants(described, now).items():
            seen = self._metrics.seen(slot, variant.model_version, since)
            observations.append(
                VariantObservation(
                    variant=variant,
                    requests=seen.requests,
                    errors=seen.errors,
                    p99_milliseconds=seen.p99_milliseconds,
                    low_confidence_share=seen.low_confidence_share,
                )
            )
        return observations

    @override
    @contextmanager
    def releasing(self) -> Iterator[None]:
        with lease(self.aws, self.location, f"endpoint-{self.name}"):
            yield

    @override
    @input_errors_fail_plainly()
    def check_available(self) -> None:
        check_canary(self.policy, self.min_instances)
        self._check_is_ours(self._service.look())

    @override
    @input_errors_fail_plainly()
    def status(self) -> EndpointStatus | None:
        described = self._service.look()
        now = self._configured(described)
        if described is None or now is None:
            return None
        variants = self._variants(described, now)
        serving = next(iter(variants.values()))
        return EndpointStatus(
            url=f"{self.aws.client('sagemaker-runtime').meta.endpoint_url}/endpoints/{self.name}",
            model_version=serving.model_version,
            taxonomy_version=now.taxonomy_versions.get(serving.model_version, ""),
            started=self._service.deployed_at(described),
            variants=list(variants.values()),
            details={
                "arn": described.arn,
                "status": described.status,
                "configuration": described.config,
                "instances": ", ".join(f"{slot}: {n}" for slot, n in sorted(described.instances.items())),
            },
        )

    @override
    @input_errors_fail_plainly()
    def invoke(self, offers: Sequence[Mapping[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        return ask(self.aws, self.name, offers, self._slot_of(variant) if variant else "")

    @override
    @input_errors_fail_plainly()
    def stop(self) -> bool:
        described = self._service.settled()
        if described is None:
            return False
        self._check_is_ours(described)
        self._scaling.let_go(list(described.weights))
        self._service.delete()
        self._metrics.delete_alarms(all_of_them=True)
        return True

    @property
    def _naming(self) -> Naming:
        return Naming(self.name)

    @property
    def _service(self) -> EndpointService:
        return EndpointService(self.aws, self._naming, self.seconds_between_looks)

    @property
    def _metrics(self) -> EndpointMetrics:
        return EndpointMetrics(self.aws, self.name)

    @property
    def _scaling(self) -> EndpointScaling:
        return EndpointScaling(
            self.aws,
            self.name,
            instances=(self.min_instances, self.max_instances),
            requests_per_minute=self.requests_per_minute,
        )

    @property
    def _requests(self) -> FleetRequests:
        return FleetRequests(
            naming=self._naming,
            role=self.aws.role,
            vpc=self.aws.vpc,
            kms_key=self.aws.kms_key,
            images={"cpu": self.serving_image, "neuron": self.neuron_image},
            instance_type=self.instance_type,
            instances=self.min_instances,
            capture_percent=self.capture_percent,
            capture_uri=f"{self.location.rstrip('/')}/capture",
        )

    def _bring_to(self, fleet: Fleet, *, guarded: bool) -> EndpointStatus:
        """Have the endpoint serve ``fleet``; returns when it does.

        Args:
            fleet: What is to serve.
            guarded: By a canary with alarms. Takes the same variants before and after.

        Raises:
            RolledBackError: an alarm tripped; what served before serves on.
            EndpointError: it did not come up; the same.
        """
        config, request = self._requests.config(fleet)
        weights = {slot.name: slot.weight for slot in fleet.slots}
        for _ in range(_ATTEMPTS):
            before = self._service.look()
            since = before.modified if before else datetime.datetime.now(datetime.UTC)
            awaited = before.under_way if before else ""
            now = self._service.settled()
            self._check_is_ours(now)
            if awaited == config:
                return self._outcome(now, config, fleet, since)
            if now is not None and now.status in FAILED:
                self._service.delete()
                continue
            if now is not None and self._naming.fleet_of(now.config) == self._naming.fleet_of(config):
                if _alike(now.weights, weights):
                    return self._outcome(now, now.config, fleet, since)
                if self._service.begin_weighing(weights):
                    return self._outcome(self._service.settled(), now.config, fleet, since)
                continue
            since = datetime.datetime.now(datetime.UTC)
            if self._begin(now, config, request, fleet, guarded=guarded):
                return self._outcome(self._service.settled(), config, fleet, since)
        raise EndpointError(
            f"endpoint {self.name} could not be changed: others changed it {_ATTEMPTS} times; run again"
        )

    def _begin(
        self, now: Described | None, config: str, request: dict[str, Any], fleet: Fleet, *, guarded: bool
    ) -> bool:
        """Begin to create or update the endpoint; False: others were first."""
        for model in fleet.models:
            self._service.make_model(model)
        self._service.make_config(config, request)
        self._metrics.prepare_log()
        version = fleet.slots[0].model.version
        alarms = self._quiet(version) if guarded and now is not None else []
        self._metrics.put_alarms(self.policy, version)
        if now is None:
            return self._service.begin_creation(config)
        configured = self._service.configured(now.config)
        moves = configured is None or configured.instance_types != {self.instance_type}
        staying = set() if moves else {slot.name for slot in fleet.slots}
        self._scaling.let_go([slot for slot in now.weights if slot not in staying])
        deployment = deployment_config(self.policy, alarms, self.watched_seconds) if guarded else None
        too_few = any(instances < self.min_instances for instances in now.instances.values())
        try:
            return self._service.begin_update(config, deployment, keeps_instances=not too_few)
        except BaseException:
            self._scaling.follow_requests(sorted(now.weights))  # what serves goes on serving, scaled
            raise

    def _quiet(self, version: str) -> list[str]:
        """The alarms that can judge a new version: those that what serves does not trip by itself."""
        alarms = self._metrics.alarm_names(version)
        deadline = time.monotonic() + _SECONDS_FOR_ALARMS_TO_CLEAR
        while (tripped := self._metrics.tripped(alarms)) and time.monotonic() < deadline:
            time.sleep(self.seconds_between_looks)
        for name, reason in tripped.items():
            dg.get_dagster_logger().warning(
                f"alarm {name} is in ALARM already ({reason}): it cannot judge the new one and is left out"
            )
        return [name for name in alarms if name not in tripped]

    def _outcome(
        self, now: Described | None, config: str, fleet: Fleet, since: datetime.datetime
    ) -> EndpointStatus:
        """What a change came to: the endpoint's new status, or why it stayed as it was."""
        if now is None:
            raise EndpointError(
                f"endpoint {self.name} was deleted by somebody while it was changed; run again to create it"
            )
        if now.status in FAILED:
            said = self._metrics.last_errors(since)
            self._service.delete()
            self._service.forget(config, [model.name for model in fleet.models])
            raise EndpointError(
                f"{_versions(fleet)} did not come up: endpoint {self.name}: {now.failure} {said}".rstrip()
            )
        self._scaling.follow_requests(sorted(now.weights))
        if now.config != config or now.status != "InService":
            self._raise_rolled_back(now, fleet, since)
        self._service.note_deployed(now)
        self._clear_away(config)
        status = self.status()
        if status is None:
            raise EndpointError(f"endpoint {self.name} was deleted by somebody just now; run again")
        return status

    def _raise_rolled_back(self, now: Described, fleet: Fleet, since: datetime.datetime) -> NoReturn:
        version = fleet.slots[0].model.version
        tripped = self._metrics.tripped(self._metrics.alarm_names(version))
        serves = (
            f"Model version {self._serving(now)} has all requests again"
            if now.status == "InService"
            else f"Endpoint {self.name} is {now.status} and may serve both versions: deploy one again"
        )
        line = f"{_versions(fleet)} was taken back: {now.failure}"
        if tripped:
            alarms = "; ".join(f"alarm {name}: {reason}" for name, reason in tripped.items())
            raise RolledBackError(f"{line} {alarms}. {serves}")
        if "alarm" in now.failure.lower():
            raise RolledBackError(f"{line} {serves}")
        said = self._metrics.last_errors(since)
        raise EndpointError(f"{_versions(fleet)} did not come up: {now.failure} {said} {serves}")

    def _clear_away(self, config: str) -> None:
        """What is superseded goes; that it cannot go is no reason to call a roll-out failed."""
        try:
            kept = self._service.forget_superseded(config)
            self._metrics.delete_alarms(but_of=sorted(kept))
        except (InputError, dg.Failure) as error:
            dg.get_dagster_logger().warning(f"superseded models are left where they are: {error}")

    def _check_is_ours(self, described: Described | None) -> None:
        if described is not None and described.config and not self._naming.is_config(described.config):
            raise InputError(
                f"OFFER_ASSETS_AWS_ENDPOINT_NAME={self.name}: there is an endpoint of that name with the "
                f"configuration {described.config}, which is not ours; choose another name, or delete it"
            )

    def _in_service(self) -> Configured | None:
        """What serves once nothing is in progress any more."""
        return self._configured(self._service.settled())

    def _configured(self, described: Described | None) -> Configured | None:
        """What an endpoint serves; None: nothing, or nothing of ours."""
        if described is None or described.status not in SERVING:
            return None
        if not self._naming.is_config(described.config):
            return None
        return self._service.configured(described.config)

    def _variants(self, described: Described, now: Configured) -> dict[str, VariantStatus]:
        """By slot: those that answer first, by weight; then the shadow."""
        total = sum(described.weights.values()) or 1.0
        variants = {
            slot: VariantStatus(
                name=variant_of(self._version(model)),
                model_version=self._version(model),
                weight=round(described.weights.get(slot, 0.0) / total, 6),
            )
            for slot, model in now.models.items()
        }
        variants = dict(sorted(variants.items(), key=lambda each: (-each[1].weight, each[0])))
        if now.shadow:
            slot, model, share = now.shadow
            version = self._version(model)
            variants[slot] = VariantStatus(
                name=variant_of(version), model_version=version, weight=share, is_shadow=True
            )
        return variants

    def _slot_of(self, variant: str) -> str:
        described = self._service.look()
        now = self._configured(described)
        variants = self._variants(described, now) if described and now else {}
        for slot, status in variants.items():
            if status.name == variant and not status.is_shadow:
                return slot
        known = ", ".join(status.name for status in variants.values() if not status.is_shadow) or "nothing"
        raise InputError(f"endpoint {self.name}: there is no variant {variant} here: {known} serves")

    def _version(self, model: str) -> str:
        return self._naming.version_of(model) or model

    def _main_in_service(self, now: Configured) -> Model:
        """The model in the main slot, which is there already, as it is."""
        version = self._version(now.models[MAIN])
        return Model(
            version=version,
            taxonomy_version=now.taxonomy_versions.get(version, ""),
            name=now.models[MAIN],
            request={},
        )

    def _serving(self, described: Described) -> str:
        now = self._configured(described)
        models = now.models.values() if now else ()
        return " and ".join(self._version(model) for model in models) or "before"


def _alone(model: Model, shadow: Slot | None = None) -> Fleet:
    return Fleet(slots=[Slot(name=MAIN, model=model, weight=1.0)], shadow=shadow)


def _versions(fleet: Fleet) -> str:
    return " and ".join(f"model version {model.version}" for model in fleet.models)


def _alike(left: Mapping[str, float], right: Mapping[str, float]) -> bool:
    """Whether the weights give the same shares."""
    if set(left) != set(right) or not sum(left.values()):
        return False
    return all(
        abs(left[name] / sum(left.values()) - right[name] / sum(right.values())) < _SAME_WEIGHT
        for name in left
    )
