"""What the code asks of AWS, read from its source, as actions of IAM."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import botocore.session
from botocore import xform_name

_IAM = Path(__file__).resolve().parents[2] / "deploy" / "iam"

_MANAGED_TRANSFERS = {
    "upload_file": ("PutObject", "CreateMultipartUpload", "UploadPart", "AbortMultipartUpload"),
    "upload_fileobj": ("PutObject", "CreateMultipartUpload", "UploadPart", "AbortMultipartUpload"),
    "download_file": ("HeadObject", "GetObject"),
    "download_fileobj": ("HeadObject", "GetObject"),
    "copy": ("HeadObject", "CopyObject", "UploadPartCopy", "AbortMultipartUpload"),
}
"""Methods of boto3's S3 client that are no operation but a sequence of them."""

_S3_ACTIONS = {
    "HeadObject": ("GetObject",),
    "HeadBucket": ("ListBucket",),
    "ListObjectsV2": ("ListBucket",),
    "CopyObject": ("GetObject", "PutObject"),
    "UploadPartCopy": ("GetObject", "PutObject"),
    "CreateMultipartUpload": ("PutObject",),
    "UploadPart": ("PutObject",),
    "CompleteMultipartUpload": ("PutObject",),
    "DeleteObjects": ("DeleteObject",),
    "ListParts": ("ListMultipartUploadParts",),
    "ListMultipartUploads": ("ListBucketMultipartUploads",),
}
"""Operations of S3 whose action has another name."""

_PREFIXES = {"sagemaker-runtime": "sagemaker"}
_NO_OPERATION = frozenset({"can_paginate", "close", "get_paginator", "get_waiter"})


@dataclass(frozen=True, order=True)
class Call:
    """One place in the code that calls a service."""

    service: str
    method: str
    place: str


@cache
def calls_in(folder: Path) -> tuple[list[Call], list[str]]:
    """All calls of boto3 clients below ``folder``, and what looks like one and cannot be told.

    A client is what ``x = ….client("service")`` names, in its function, else anywhere in the code (a function
    that is handed a client calls it by the same name).
    """
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    everywhere: dict[str, set[str]] = {}
    for tree in trees.values():
        for name, service in _clients(tree):
            everywhere.setdefault(name, set()).add(service)
    scopes = {path: list(_scopes(tree)) for path, tree in trees.items()}
    own = {node.name for each in scopes.values() for node in each if not isinstance(node, ast.Module)}
    calls, unclear = [], []
    for path in trees:
        uses_aws = "resources.aws" in path.read_text() or path.name == "aws.py"
        for function in scopes[path]:
            here = dict(_clients(function))
            for call in _own_calls(function):
                assert isinstance(call.func, ast.Attribute)
                place = f"{path.relative_to(folder.parent)}:{call.lineno}"
                services = _services_of(call.func.value, here, everywhere)
                method = _method(call)
                if services and method not in _NO_OPERATION:
                    found = [service for service in services if _knows(service, method)]
                    if not found:
                        unclear.append(f"{place}: {method} is no method of {', '.join(sorted(services))}")
                    calls += [Call(service, method, place) for service in found]
                elif not services and uses_aws and method not in own and _is_aws_method(method):
                    unclear.append(f"{place}: {ast.unparse(call.func)}() looks like a call of boto3")
    return calls, unclear


def actions_of(call: Call) -> set[str]:
    """The actions of IAM that the call is allowed by."""
    if call.service == "s3":
        operations = _MANAGED_TRANSFERS.get(call.method) or (_operation(call),)
        return {f"s3:{name}" for each in operations for name in _S3_ACTIONS.get(each, (each,))}
    return {f"{_PREFIXES.get(call.service, call.service)}:{_operation(call)}"}


def methods_called_on(variable: str, module: Path) -> set[str]:
    """Names of the methods that a module calls on a variable of that name."""
    return {
        node.func.attr
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == variable
    }


def _clients(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(variable, service) of every assignment of a client."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (service := _service_made_by(node.value)):
            for target in node.targets:
                if isinstance(target, ast.Name | ast.Attribute):
                    yield ast.unparse(target), service


def _service_made_by(value: ast.AST) -> str:
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.Constant):
        called = value.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in {"client", "client_for"}:
            return str(value.args[0].value)
    return ""


def _scopes(tree: ast.Module) -> Iterator[ast.Module | ast.FunctionDef | ast.AsyncFunctionDef]:
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _own_calls(scope: ast.AST) -> Iterator[ast.Call]:
    """Calls of methods in a function, without those in functions inside it."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node
        waiting += ast.iter_child_nodes(node)


def _services_of(value: ast.AST, here: dict[str, str], everywhere: dict[str, set[str]]) -> set[str]:
    if service := _service_made_by(value):
        return {service}
    if not isinstance(value, ast.Name | ast.Attribute):
        return set()
    name = ast.unparse(value)
    return {here[name]} if name in here else everywhere.get(name, set())


def _method(call: ast.Call) -> str:
    """The method; of ``get_paginator("list_models")`` the one that it pages through."""
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr == "get_paginator" and call.args and isinstance(call.args[0], ast.Constant):
        return str(call.args[0].value)
    return call.func.attr


def _operation(call: Call) -> str:
    return _methods(call.service)[call.method]


def _knows(service: str, method: str) -> bool:
    return method in _methods(service) or (service == "s3" and method in _MANAGED_TRANSFERS)


def _is_aws_method(method: str) -> bool:
    """Whether hardly another library has a method of that name (``search``, say, is anybody's)."""
    services = ("s3", "sagemaker", "sagemaker-runtime", "logs", "cloudwatch", "application-autoscaling")
    of_mlflow = {"create_experiment", "delete_experiment", "update_experiment", "list_experiments"}
    known = any(method in _methods(service) for service in services)
    return known and "_" in method and method not in of_mlflow


@cache
def _methods(service: str) -> dict[str, str]:
    """Operation by method of the client."""
    operations = botocore.session.get_session().get_service_model(service).operation_names
    return {xform_name(operation): operation for operation in operations}


def allowed_actions(document: str) -> set[str]:
    """Actions that a policy of ``deploy/iam`` allows."""
    statements = json.loads((_IAM / f"{document}.json").read_text())["Statement"]
    actions = [statement["Action"] for statement in statements]
    return {name for action in actions for name in ([action] if isinstance(action, str) else action)}


def actions_of_requests(calls: Iterable[tuple[str, str]]) -> set[str]:
    """Actions of IAM for what the stand-in noted: (service, operation, or method and path)."""
    return {_action_of_request(service, operation) for service, operation in calls}


def _action_of_request(service: str, operation: str) -> str:
    if service == "s3":
        method, _, path = operation.partition(" ")
        is_bucket = path.strip("/").count("/") == 0
        names = {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "AbortMultipartUpload"}
        return "s3:ListBucket" if is_bucket and method in names else f"s3:{names.get(method, 'PutObject')}"
    if operation.startswith("POST /endpoints/"):
        return "sagemaker:InvokeEndpoint"
    return f"{_SIGNING_NAMES.get(service, service)}:{operation}"


_SIGNING_NAMES = {"monitoring": "cloudwatch"}
"""Services whose requests are signed under another name than that of their actions."""
