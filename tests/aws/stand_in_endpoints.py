"""SageMaker's endpoints in the stand-in: models, configurations and roll-outs over real server processes.

An update starts a new fleet beside the old one, gives it its canary, watches the alarms, moves all
requests over, or takes them back. One second of the service takes ``second`` of the test.
"""

from __future__ import annotations

import base64
import datetime
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moto.applicationautoscaling.models import applicationautoscaling_backends
from moto.sagemaker.models import sagemaker_backends
from werkzeug.wrappers import Request, Response

from tests.aws import stand_in_containers as containers
from tests.aws.stand_in import ACCOUNT, REGION, ServiceError, StandIn
from tests.aws.stand_in_containers import Container, ContainerError
from tests.aws.stand_in_metrics import Metrics, WithPercentiles

_ARN = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:"
_PAGE = 10
_SECONDS_BETWEEN_LOOKS = 0.02
_NOT_PING = "did not pass the ping health check. Please check CloudWatch logs for this endpoint."


@dataclass
class Fleet:
    """The processes of one configuration."""

    config: dict[str, Any]
    containers: dict[str, Container]
    weights: dict[str, float]
    counts: dict[str, int]
    shadow: Container | None = None
    shadow_share: float = 0.0

    def stop(self) -> None:
        for container in [*self.containers.values(), *([self.shadow] if self.shadow else [])]:
            container.stop()


@dataclass
class Endpoint:
    """As the service keeps it."""

    name: str
    config: str
    status: str = "Creating"
    failure: str = ""
    created: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    modified: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    serving: Fleet | None = None
    canary: tuple[float, Fleet] | None = None
    """Share of the requests, and who gets them."""
    pending: str = ""
    pending_status: str = ""
    deployment: dict[str, Any] | None = None
    worker: threading.Thread | None = None
    tags: dict[str, str] = field(default_factory=dict)

    def becomes(self, status: str, failure: str = "") -> None:
        self.status, self.failure, self.modified = status, failure, datetime.datetime.now(datetime.UTC)
        if status in {"InService", "Failed"}:
            self.pending = self.pending_status = ""
            self.canary = None


class EndpointHost:
    """Install it into a stand-in; leaving the block ends all server processes."""

    def __init__(self, stand_in: StandIn, folder: Path, program: str = "ml", *, second: float = 0.01) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.may_go_on = threading.Event()
        """Cleared by a test: a roll-out stands still with its new fleet up."""
        self.may_go_on.set()
        self.bake_may_end = threading.Event()
        """Cleared by a test: a canary, or what follows it, is watched until an alarm trips."""
        self.bake_may_end.set()
        self._stand_in = stand_in
        self._folder = folder
        self._program = program
        self._second = second
        self._metrics = Metrics()
        self._percentiles = WithPercentiles()
        self._random = random.Random(7)
        self._copies = ThreadPoolExecutor(2)
        self._is_closing = False
        self._lock = threading.RLock()

    def install(self) -> EndpointHost:
        """Take over SageMaker's operations of models and endpoints."""
        self._folder.mkdir(parents=True, exist_ok=True)
        operations: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
            self.create_model,
            self.describe_model,
            self.delete_model,
            self.list_models,
            self.create_endpoint_config,
            self.describe_endpoint_config,
            self.delete_endpoint_config,
            self.list_endpoint_configs,
            self.list_tags,
            self.create_endpoint,
            self.describe_endpoint,
            self.update_endpoint,
            self.update_endpoint_weights_and_capacities,
            self.delete_endpoint,
            self.add_tags,
        ]
        for operation in operations:
            name = "".join(word.title() for word in operation.__name__.split("_"))
            self._stand_in.handlers[name] = operation
        self._stand_in.raw_handlers.append(self.invoke_endpoint)
        self._percentiles.__enter__()
        return self

    def __enter__(self) -> EndpointHost:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        self._is_closing = True
        self.may_go_on.set()
        for endpoint in self.endpoints.values():
            if endpoint.worker:
                endpoint.worker.join(60)
        self._copies.shutdown()
        for endpoint in self.endpoints.values():
            if endpoint.serving:
                endpoint.serving.stop()
        self._percentiles.__exit__()

    def settle(self, name: str) -> None:
        """Wait until the change under way is over."""
        worker = self.endpoints[name].worker
        if worker:
            worker.join(60)

    # Models and configurations

    def create_model(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["ModelName"]
        _refuse_if(name in self.models, f'Cannot create already existing model "{_ARN}model/{name}".')
        source = given["PrimaryContainer"].get("ModelDataSource", {}).get("S3DataSource", {})
        uri = source.get("S3Uri", "")
        is_prefix = source.get("S3DataType") == "S3Prefix"
        _refuse_if(is_prefix and not uri.endswith("/"), f"{uri}: an S3Prefix has to end in a slash")
        _refuse_if(is_prefix and not containers.has_objects(uri), f"Could not find model data at {uri}.")
        self.models[name] = {**given, "CreationTime": datetime.datetime.now(datetime.UTC)}
        return {"ModelArn": f"{_ARN}model/{name}"}

    def describe_model(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["ModelName"]
        return {"ModelArn": f"{_ARN}model/{name}", **_found(self.models, name, "model")}

    def delete_model(self, given: dict[str, Any]) -> dict[str, Any]:
        _found(self.models, given["ModelName"], "model")
        del self.models[given["ModelName"]]
        return {}

    def list_models(self, given: dict[str, Any]) -> dict[str, Any]:
        return _page(
            given, self.models, "Models", lambda name: {"ModelName": name, "ModelArn": f"{_ARN}model/{name}"}
        )

    def create_endpoint_config(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["EndpointConfigName"]
        arn = f"{_ARN}endpoint-config/{name}"
        _refuse_if(name in self.configs, f'Cannot create already existing endpoint configuration "{arn}".')
        variants = [*given["ProductionVariants"], *(shadows := given.get("ShadowProductionVariants", []))]
        for variant in variants:
            _found(self.models, variant["ModelName"], "model")
            has_disk = re.match(r"ml\.\w*(5d|6gd|7gd)\.|ml\.(g5|trn1)\.", variant["InstanceType"])
            _refuse_if(bool(has_disk) and "KmsKeyId" in given, "KmsKeyId: the instance has local storage")
        counts = len(given["ProductionVariants"]), len(shadows)
        _refuse_if(shadows and counts != (1, 1), "A shadow takes one production variant and one shadow")
        self.configs[name] = {
            **given,
            "EndpointConfigArn": arn,
            "CreationTime": datetime.datetime.now(datetime.UTC),
        }
        return {"EndpointConfigArn": arn}

    def describe_endpoint_config(self, given: dict[str, Any]) -> dict[str, Any]:
        found = _found(self.configs, given["EndpointConfigName"], "endpoint configuration")
        return {key: value for key, value in found.items() if key != "Tags"}

    def delete_endpoint_config(self, given: dict[str, Any]) -> dict[str, Any]:
        _found(self.configs, given["EndpointConfigName"], "endpoint configuration")
        del self.configs[given["EndpointConfigName"]]
        return {}

    def list_endpoint_configs(self, given: dict[str, Any]) -> dict[str, Any]:
        return _page(
            given,
            self.configs,
            "EndpointConfigs",
            lambda name: {
                "EndpointConfigName": name,
                "EndpointConfigArn": self.configs[name]["EndpointConfigArn"],
                "CreationTime": self.configs[name]["CreationTime"],
            },
        )

    def list_tags(self, given: dict[str, Any]) -> dict[str, Any]:
        arn = given["ResourceArn"]
        for config in self.configs.values():
            if config["EndpointConfigArn"] == arn:
                return {"Tags": config.get("Tags", [])}
        if (name := arn.rpartition("endpoint/")[2]) in self.endpoints:
            tags = self.endpoints[name].tags
            return {"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}
        return {"Tags": sagemaker_backends[ACCOUNT][REGION].list_tags(given["ResourceArn"])}

    def add_tags(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["ResourceArn"].rpartition("endpoint/")[2]
        if name in self.endpoints:
            self.endpoints[name].tags |= {tag["Key"]: tag["Value"] for tag in given["Tags"]}
            return {"Tags": given["Tags"]}
        return {"Tags": sagemaker_backends[ACCOUNT][REGION].add_tags(given["ResourceArn"], given["Tags"])}

    # Endpoints

    def create_endpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["EndpointName"]
        with self._lock:
            exists = name in self.endpoints
            _refuse_if(exists, f'Cannot create already existing endpoint "{_ARN}endpoint/{name}".')
            config = _found(self.configs, given["EndpointConfigName"], "endpoint configuration")
            endpoint = self.endpoints[name] = Endpoint(name, given["EndpointConfigName"])
        self._begin(endpoint, lambda: self._create(endpoint, config))
        return {"EndpointArn": f"{_ARN}endpoint/{name}"}

    def describe_endpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        endpoint = self._endpoint(given)
        answer: dict[str, Any] = {
            "EndpointName": endpoint.name,
            "EndpointArn": f"{_ARN}endpoint/{endpoint.name}",
            "EndpointConfigName": endpoint.config,
            "EndpointStatus": endpoint.status,
            "CreationTime": endpoint.created,
            "LastModifiedTime": endpoint.modified,
        }
        if endpoint.failure:
            answer["FailureReason"] = endpoint.failure
        if endpoint.deployment:
            answer["LastDeploymentConfig"] = endpoint.deployment
        if endpoint.serving:
            answer["ProductionVariants"] = [
                {
                    "VariantName": slot,
                    "CurrentWeight": weight,
                    "DesiredWeight": weight,
                    "CurrentInstanceCount": endpoint.serving.counts[slot],
                    "DesiredInstanceCount": endpoint.serving.counts[slot],
                }
                for slot, weight in endpoint.serving.weights.items()
            ]
        if endpoint.pending:
            answer["PendingDeploymentSummary"] = {
                "EndpointConfigName": endpoint.pending,
                "ProductionVariants": [
                    {
                        "VariantName": each["VariantName"],
                        "VariantStatus": [{"Status": endpoint.pending_status or "Creating"}],
                    }
                    for each in self.configs[endpoint.pending]["ProductionVariants"]
                ],
            }
        return answer

    def update_endpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            endpoint = self._changeable(given)
            config = _found(self.configs, given["EndpointConfigName"], "endpoint configuration")
            self._check_update(endpoint, config, given)
            endpoint.pending, endpoint.deployment = given["EndpointConfigName"], given.get("DeploymentConfig")
            endpoint.becomes("Updating")
        excluded = {each["VariantPropertyType"] for each in given.get("ExcludeRetainedVariantProperties", [])}
        keeps_counts = given.get("RetainAllVariantProperties") and "DesiredInstanceCount" not in excluded
        self._begin(endpoint, lambda: self._update(endpoint, config, bool(keeps_counts)))
        return {"EndpointArn": f"{_ARN}endpoint/{endpoint.name}"}

    def update_endpoint_weights_and_capacities(self, given: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            endpoint = self._changeable(given)
            assert endpoint.serving
            for each in given["DesiredWeightsAndCapacities"]:
                _refuse_if(each["VariantName"] not in endpoint.serving.weights, "Could not find the variant")
                if "DesiredWeight" in each:
                    endpoint.serving.weights[each["VariantName"]] = each["DesiredWeight"]
                if "DesiredInstanceCount" in each:
                    endpoint.serving.counts[each["VariantName"]] = each["DesiredInstanceCount"]
            endpoint.becomes("Updating")
        self._begin(endpoint, lambda: self._after(5, lambda: endpoint.becomes("InService")))
        return {"EndpointArn": f"{_ARN}endpoint/{endpoint.name}"}

    def delete_endpoint(self, given: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            endpoint = self._endpoint(given)
            _refuse_if(
                endpoint.status not in {"InService", "Failed"},
                f'Cannot update in-progress endpoint "{_ARN}endpoint/{endpoint.name}".',
            )
            endpoint.becomes("Deleting")
        self._begin(endpoint, lambda: self._delete(endpoint))
        return {}

    def invoke_endpoint(self, request: Request) -> Response | None:
        match = re.fullmatch(r"/endpoints/([\w-]+)/invocations", request.path)
        if not match or request.method != "POST":
            return None
        endpoint = self.endpoints.get(match[1])
        if endpoint is None or endpoint.serving is None:
            return _json(
                400, "ValidationError", Message=f"Endpoint {match[1]} of account {ACCOUNT} not found."
            )
        target = request.headers.get("X-Amzn-SageMaker-Target-Variant", "")
        if target and target not in endpoint.serving.containers:
            return _json(400, "ValidationError", Message=f"Variant {target} not found for Request.")
        container, fleet = self._routed(endpoint, target)
        body, content_type = request.get_data(), request.content_type or "application/json"
        try:
            answer = self._ask(endpoint, container, body, content_type, target)
        finally:
            self._is_answered(container)
        if fleet.shadow:
            self._copies.submit(self._copy, endpoint, fleet, body, content_type)
        if answer.status_code >= 300:
            return _json(
                424,
                "ModelError",
                Message=f"Received error ({answer.status_code}) from primary with message {answer.text}",
                OriginalStatusCode=answer.status_code,
                OriginalMessage=answer.text,
                LogStreamArn="",
            )
        output_type = answer.headers.get("content-type", "application/json")
        self._capture(
            endpoint, container.slot, fleet.config, (body, content_type), (answer.content, output_type)
        )
        return Response(
            answer.content,
            content_type=output_type,
            headers={"x-Amzn-Invoked-Production-Variant": container.slot},
        )

    # What takes its time

    def _begin(self, endpoint: Endpoint, work: Callable[[], None]) -> None:
        endpoint.worker = threading.Thread(target=work, daemon=True)
        endpoint.worker.start()

    def _create(self, endpoint: Endpoint, config: dict[str, Any]) -> None:
        try:
            endpoint.serving = self._fleet(endpoint, config)
        except ContainerError as error:
            endpoint.becomes("Failed", str(error))
        else:
            endpoint.becomes("InService")

    def _update(self, endpoint: Endpoint, config: dict[str, Any], keeps_counts: bool) -> None:
        began = time.monotonic()
        try:
            green = self._fleet(endpoint, config)
        except ContainerError as error:
            endpoint.becomes("InService", str(error))
            return
        blue = endpoint.serving
        assert blue
        if keeps_counts:
            green.counts |= {slot: count for slot, count in blue.counts.items() if slot in green.counts}
        deployment = endpoint.deployment or {}
        policy = deployment.get("BlueGreenUpdatePolicy", {})
        alarms = [
            each["AlarmName"] for each in deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])
        ]
        self.may_go_on.wait()
        for share, seconds in _steps(policy):
            endpoint.pending_status = "Baking"
            endpoint.canary = (share, green)
            tripped = self._tripped(alarms, seconds, began)
            if tripped:
                endpoint.canary = None
                endpoint.becomes("RollingBack")
                green.stop()
                names = ", ".join(tripped)
                endpoint.becomes("InService", f"Rolled back: the alarms [{names}] went into ALARM state.")
                return
        with self._lock:
            endpoint.serving, endpoint.config = green, config["EndpointConfigName"]
            endpoint.becomes("InService")
        blue.stop()

    def _delete(self, endpoint: Endpoint) -> None:
        if endpoint.serving:
            endpoint.serving.stop()
            endpoint.serving = None
        del self.endpoints[endpoint.name]

    def _after(self, seconds: float, work: Callable[[], None]) -> None:
        time.sleep(seconds * self._second)
        work()

    def _fleet(self, endpoint: Endpoint, config: dict[str, Any]) -> Fleet:
        started: dict[str, Container] = {}
        shadows = config.get("ShadowProductionVariants", [])
        try:
            for variant in [*config["ProductionVariants"], *shadows]:
                slot = variant["VariantName"]
                model = self.models[variant["ModelName"]]
                started[slot] = containers.start(self._program, self._folder, slot, model)
        except ContainerError as error:
            containers.log_lines(endpoint.name, slot, str(error))
            for container in started.values():
                container.stop()
            raise ContainerError(f"The primary container for production variant {slot} {_NOT_PING}") from None
        shadow = started.pop(shadows[0]["VariantName"]) if shadows else None
        variants = config["ProductionVariants"]
        return Fleet(
            config,
            started,
            {each["VariantName"]: each["InitialVariantWeight"] for each in variants},
            {each["VariantName"]: each["InitialInstanceCount"] for each in variants},
            shadow,
            shadows[0]["InitialVariantWeight"] / variants[0]["InitialVariantWeight"] if shadows else 0.0,
        )

    def _tripped(self, alarms: list[str], seconds: float, since: float) -> list[str]:
        deadline = time.monotonic() + seconds * self._second
        while True:
            if tripped := self._metrics.tripped(alarms, since):
                return tripped
            is_over = time.monotonic() > deadline and (not alarms or self.bake_may_end.is_set())
            if self._is_closing or is_over:
                return []
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _routed(self, endpoint: Endpoint, target: str) -> tuple[Container, Fleet]:
        with self._lock:
            fleet = endpoint.serving
            assert fleet
            if endpoint.canary and self._random.random() < endpoint.canary[0]:
                fleet = endpoint.canary[1]
            slots = list(fleet.weights)
            slot = target or self._random.choices(slots, [fleet.weights[each] for each in slots])[0]
            container = fleet.containers[slot]
            container.under_way += 1
            if fleet.shadow:
                fleet.shadow.under_way += 1
            return container, fleet

    def _ask(
        self, endpoint: Endpoint, container: Container, body: bytes, content_type: str, target: str = ""
    ) -> Any:
        begun = time.monotonic()
        answer = container.ask(body, content_type, target)
        seconds = time.monotonic() - begun
        self._metrics.note_invocation(endpoint.name, container.slot, seconds, answer.status_code)
        if counted := answer.headers.get("x-offers"):
            offers, unsure = counted.split(";")
            line = {"event": "answers", "model_version": container.model_version}
            line |= {"offers": int(offers), "low_confidence": int(unsure)}
            self._metrics.note_log_line(endpoint.name, json.dumps(line))
        return answer

    def _copy(self, endpoint: Endpoint, fleet: Fleet, body: bytes, content_type: str) -> None:
        assert fleet.shadow
        try:
            if self._random.random() < fleet.shadow_share:
                self._ask(endpoint, fleet.shadow, body, content_type)
        finally:
            self._is_answered(fleet.shadow)

    def _is_answered(self, container: Container) -> None:
        with self._lock:
            container.under_way -= 1

    def _capture(
        self,
        endpoint: Endpoint,
        slot: str,
        config: dict[str, Any],
        given: tuple[bytes, str],
        answered: tuple[bytes, str],
    ) -> None:
        capture = config.get("DataCaptureConfig", {})
        share = capture.get("InitialSamplingPercentage", 0) / 100
        if not capture.get("EnableCapture", bool(capture)) or self._random.random() >= share:
            return
        now = datetime.datetime.now(datetime.UTC)
        as_text = capture.get("CaptureContentTypeHeader", {}).get("JsonContentTypes", [])
        event = {
            "captureData": {
                "endpointInput": _captured("INPUT", *given, as_text),
                "endpointOutput": _captured("OUTPUT", *answered, as_text),
            },
            "eventMetadata": {
                "eventId": str(uuid.uuid4()),
                "inferenceTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
            "eventVersion": "0",
        }
        bucket, _, prefix = capture["DestinationS3Uri"].removeprefix("s3://").partition("/")
        name = f"{now:%Y/%m/%d/%H/%M-%S}-{now.microsecond // 1000:03d}-{uuid.uuid4()}.jsonl"
        key = f"{prefix.rstrip('/')}/{endpoint.name}/{slot}/{name}"
        containers.write_object(bucket, key, json.dumps(event).encode() + b"\n")

    def _endpoint(self, given: dict[str, Any]) -> Endpoint:
        name = given["EndpointName"]
        if name not in self.endpoints:
            raise ServiceError("ValidationException", f'Could not find endpoint "{_ARN}endpoint/{name}".')
        return self.endpoints[name]

    def _changeable(self, given: dict[str, Any]) -> Endpoint:
        endpoint = self._endpoint(given)
        arn = f"{_ARN}endpoint/{endpoint.name}"
        _refuse_if(endpoint.status != "InService", f'Cannot update in-progress endpoint "{arn}".')
        return endpoint

    def _check_update(self, endpoint: Endpoint, config: dict[str, Any], given: dict[str, Any]) -> None:
        """What the service refuses at once."""
        assert endpoint.serving
        before = {
            each["VariantName"]: each["InstanceType"]
            for each in endpoint.serving.config["ProductionVariants"]
        }
        after = {each["VariantName"]: each["InstanceType"] for each in config["ProductionVariants"]}
        guarded = "DeploymentConfig" in given
        _refuse_if(guarded and set(before) != set(after), "DeploymentConfig takes the same variant names")
        policy = given.get("DeploymentConfig", {}).get("BlueGreenUpdatePolicy", {})
        canary = policy.get("TrafficRoutingConfiguration", {}).get("CanarySize", {}).get("Value", 0)
        _refuse_if(canary > 50, "CanarySize is at most half of the capacity")
        targets = applicationautoscaling_backends[ACCOUNT][REGION].targets.get(
            "sagemaker:variant:DesiredInstanceCount", {}
        )
        scaled = [
            slot
            for slot, instance_type in before.items()
            if after.get(slot) != instance_type and f"endpoint/{endpoint.name}/variant/{slot}" in targets
        ]
        _refuse_if(
            bool(scaled),
            f"The variant(s) {scaled} must be deregistered as scalable targets with AutoScaling before they "
            "can be removed or have their instance type updated.",
        )


def _steps(policy: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """(share of the requests, seconds) of a blue/green roll-out, one after the other."""
    routing = policy.get("TrafficRoutingConfiguration", {})
    if routing.get("Type") == "CANARY":
        yield routing["CanarySize"]["Value"] / 100, routing["WaitIntervalInSeconds"]
    yield 1.0, policy.get("TerminationWaitInSeconds", 0)


def _captured(mode: str, body: bytes, content_type: str, as_text: list[str]) -> dict[str, str]:
    is_text = content_type.split(";", maxsplit=1)[0].strip() in as_text
    return {
        "observedContentType": content_type,
        "mode": mode,
        "data": body.decode() if is_text else base64.b64encode(body).decode(),
        "encoding": "JSON" if is_text else "BASE64",
    }


def _found(things: dict[str, dict[str, Any]], name: str, what: str) -> dict[str, Any]:
    if name not in things:
        kind = what.replace("endpoint configuration", "endpoint-config")
        raise ServiceError("ValidationException", f'Could not find {what} "{_ARN}{kind}/{name}".')
    return things[name]


def _refuse_if(condition: object, message: str) -> None:
    if condition:
        raise ServiceError("ValidationException", message)


def _page(
    given: dict[str, Any],
    things: dict[str, dict[str, Any]],
    key: str,
    row: Callable[[str], dict[str, Any]],
) -> dict[str, Any]:
    """Newest first; in pages."""
    names = [name for name in things if given.get("NameContains", "") in name]
    names.sort(key=lambda name: things[name]["CreationTime"], reverse=True)
    start = int(given.get("NextToken", 0))
    end = start + given.get("MaxResults", _PAGE)
    rest = {"NextToken": str(end)} if end < len(names) else {}
    return {key: [row(name) for name in names[start:end]], **rest}


def _json(status: int, code: str, **content: Any) -> Response:
    return Response(
        json.dumps(content),
        status=status,
        content_type="application/json",
        headers={"x-amzn-ErrorType": code},
    )
