"""AWS on this machine: moto's server, with what it lacks done for real by handlers of our own.

Every request that SageMaker's JSON protocol carries is held against botocore's service model first, so that a
handler sees what the real service would accept. Operations without a handler go on to moto. Each call is
noted, so that a test can hold the calls against the IAM policies; faults can be put before any of them.
"""

from __future__ import annotations

import io
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import botocore.session
from botocore.model import OperationModel, ServiceModel
from botocore.validate import ParamValidator
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

REGION = "eu-central-1"
ACCOUNT = "123456789012"
SERVICE_CREDENTIALS = {"aws_access_key_id": "the-service-itself", "aws_secret_access_key": "testing"}
"""With these a handler does what AWS does on its own side: no call of ours, and not subject to faults."""

_SECONDS_TO_STOP = 0.02

Handler = Callable[[dict[str, Any]], Mapping[str, Any] | None]
"""An operation of SageMaker: its validated input to its output."""


class ServiceError(Exception):
    """What a handler raises to answer as the service does when it refuses."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


@dataclass
class Fault:
    """An answer in place of the real one, for the next ``times`` calls that it fits."""

    operation: str
    """As ``sagemaker:CreateTrainingJob`` or ``s3:PUT /bucket/key``; the beginning is enough."""
    times: int
    code: str = "ThrottlingException"
    status: int = 400
    after: bool = False
    """The call is carried out, only its answer is lost."""


@dataclass
class StandIn:
    """The server; ``url`` is what ``AWS_ENDPOINT_URL`` has to be."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    """By operation of SageMaker (``CreateTrainingJob``)."""
    raw_handlers: list[Callable[[Request], Response | None]] = field(default_factory=list)
    """Asked first, for protocols other than SageMaker's own (``InvokeEndpoint``); None: not theirs."""
    faults: list[Fault] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(service, operation or ``METHOD /path``) of every request."""
    url: str = ""

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._model = _sagemaker()
        self._lock = threading.Lock()
        self._conditional_writes = threading.Lock()

    def fail_next(self, operation: str, times: int = 1, **fault: Any) -> None:
        """Answer the next calls of ``operation`` with an error."""
        with self._lock:
            self.faults.append(Fault(operation, times, **fault))

    def by_moto(self, request: Request) -> Response:
        """What moto answers, for a handler that wants to change it."""
        environ = request.environ | {"wsgi.input": _Rewound(request.get_data())}
        return Response.from_app(self._moto, environ, buffered=True)

    def calls_by_service(self) -> dict[str, set[str]]:
        """Operations that were called, by service."""
        grouped: dict[str, set[str]] = defaultdict(set)
        for service, operation in self.calls:
            grouped[service].add(operation)
        return grouped

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        if SERVICE_CREDENTIALS["aws_access_key_id"] in request.headers.get("Authorization", ""):
            return self._moto(environ, start_response)
        service, operation = _what_is_asked(request)
        with self._lock:
            self.calls.append((service, operation))
        fault = self._fault_for(f"{service}:{operation}")
        if fault is not None and not fault.after:
            return _refusal(service, ServiceError(fault.code, "a fault of the test", fault.status))(
                environ, start_response
            )
        for raw in self.raw_handlers:
            response = raw(request)
            if response is not None:
                return response(environ, start_response)
        if service == "sagemaker" and operation in self.handlers:
            answer: Any = self._handled(operation, request)
        else:
            environ["wsgi.input"] = _Rewound(request.get_data())
            answer = self._conditional_write if _is_conditional_write(service, request) else self._moto
        if fault is not None:
            list(answer(environ, lambda *_: None))
            answer = _refusal(service, ServiceError(fault.code, "a fault of the test", fault.status))
        return answer(environ, start_response)

    def _conditional_write(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """What S3 does and moto does not: ``If-Match``, and either condition checked and met in one step."""
        with self._conditional_writes:
            wanted = environ.get("HTTP_IF_MATCH")
            if wanted is not None:
                look = Response.from_app(
                    self._moto, Request(environ).environ | {"REQUEST_METHOD": "HEAD", "CONTENT_LENGTH": "0"}
                )
                if look.status_code == 404:
                    return _refusal("s3", ServiceError("NoSuchKey", "none", 404))(environ, start_response)
                if look.headers["ETag"].strip('"') != wanted.strip('"'):
                    return _refusal("s3", ServiceError("PreconditionFailed", "If-Match", 412))(
                        environ, start_response
                    )
            return Response.from_app(self._moto, environ, buffered=True)(environ, start_response)

    def _handled(self, operation: str, request: Request) -> Response:
        try:
            given = json.loads(request.get_data() or b"{}")
            _check(self._model.operation_model(operation), given)
            output = self.handlers[operation](given) or {}
        except ServiceError as error:
            return _refusal("sagemaker", error)
        return Response(json.dumps(output, default=_as_number), content_type="application/x-amz-json-1.1")

    def _fault_for(self, called: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and called.startswith(fault.operation):
                    fault.times -= 1
                    return fault
        return None


@cache
def _sagemaker() -> ServiceModel:
    loader = botocore.session.get_session().get_component("data_loader")
    return ServiceModel(loader.load_service_model("sagemaker", "service-2"))


@contextmanager
def running(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve, with nothing in it, on a free port of the loopback interface until the block ends."""
    moto_api_backend.reset()
    server = make_server("127.0.0.1", 0, stand_in, threaded=True, request_handler=_Quiet)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(_SECONDS_TO_STOP,), daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def environment(url: str) -> dict[str, str]:
    """Environment variables that lead every AWS client of a process to the stand-in."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class _Quiet(WSGIRequestHandler):
    """Without a line per request on stderr."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class _Rewound:
    """The body again, for whoever reads it after us."""

    def __init__(self, body: bytes) -> None:
        self._stream = io.BytesIO(body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _what_is_asked(request: Request) -> tuple[str, str]:
    """Service by the signature's scope, operation by the target header, action or method and path."""
    scope = request.headers.get("Authorization", "").partition("Credential=")[2].split(",")[0].split("/")
    service = scope[3] if len(scope) > 3 else "s3"
    if target := request.headers.get("X-Amz-Target"):
        return service, target.rpartition(".")[2]
    if request.mimetype == "application/x-www-form-urlencoded" and service != "s3":
        body = request.get_data().decode(errors="replace")
        for pair in body.split("&"):
            if pair.startswith("Action="):
                return service, pair.removeprefix("Action=")
    return service, f"{request.method} {request.path}"


def _is_conditional_write(service: str, request: Request) -> bool:
    conditions = {"If-Match", "If-None-Match"}
    return service == "s3" and request.method == "PUT" and any(name in request.headers for name in conditions)


def _check(operation: OperationModel, given: dict[str, Any]) -> None:
    if operation.input_shape is None:
        return
    report = ParamValidator().validate(given, operation.input_shape)
    if report.has_errors():
        raise ServiceError("ValidationException", report.generate_report())


def _refusal(service: str, error: ServiceError) -> Response:
    if service == "s3":
        body = f"<Error><Code>{error.code}</Code><Message>{error.message}</Message></Error>"
        return Response(body, status=error.status, content_type="application/xml")
    body = json.dumps({"__type": error.code, "message": error.message})
    return Response(body, status=error.status, content_type="application/x-amz-json-1.1")


def _as_number(value: Any) -> float:
    """Times travel as seconds since 1970."""
    return float(value.timestamp())
