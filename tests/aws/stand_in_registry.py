"""SageMaker's model registry for the stand-in: what moto lacks of it or gets wrong.

moto's ``update_model_package`` clears the approval, its comment and all properties that a call does not
name, and it knows no life cycle. Here requests are also held against the lengths, patterns and values of
botocore's service model, which botocore itself does not check.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import botocore.session
import regex
from botocore.model import ServiceModel, Shape

from tests.aws.stand_in import ACCOUNT, REGION, ServiceError, StandIn

_PAGE = 100
_CLOSING = regex.compile(r"\$\{\d+,\d+\}$")
"""What the model has after some patterns: a length, as if it were a part of the pattern."""


@dataclass
class RegistryStandIn:
    """Groups and packages, kept in memory."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By ARN, in the order of their creation."""

    def install(self, stand_in: StandIn) -> RegistryStandIn:
        """Have the stand-in answer with this registry."""
        stand_in.handlers |= {
            "CreateModelPackageGroup": self._create_group,
            "ListModelPackageGroups": self._list_groups,
            "CreateModelPackage": self._create,
            "DescribeModelPackage": self._describe,
            "ListModelPackages": self._list,
            "UpdateModelPackage": self._update,
        }
        return self

    def click(self, arn: str, status: str, comment: str | None = None) -> None:
        """A person sets the approval in Studio; without a comment, the last one stays."""
        package = self.packages[arn]
        package["ModelApprovalStatus"] = status
        if comment is not None:
            package["ApprovalDescription"] = comment
        package["LastModifiedTime"] = _now()
        package["LastModifiedBy"] = {"UserProfileName": "clara"}

    def _create_group(self, given: dict[str, Any]) -> Mapping[str, Any]:
        _hold("CreateModelPackageGroup", given)
        name = given["ModelPackageGroupName"]
        if name in self.groups:
            raise ServiceError("ValidationException", "Model Package Group already exists.")
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model-package-group/{name}"
        self.groups[name] = {
            "ModelPackageGroupName": name,
            "ModelPackageGroupArn": arn,
            "ModelPackageGroupStatus": "Completed",
            "CreationTime": _now(),
        }
        return {"ModelPackageGroupArn": arn}

    def _list_groups(self, given: dict[str, Any]) -> Mapping[str, Any]:
        _hold("ListModelPackageGroups", given)
        wanted = given.get("NameContains", "")
        return {"ModelPackageGroupSummaryList": [g for name, g in self.groups.items() if wanted in name]}

    def _create(self, given: dict[str, Any]) -> Mapping[str, Any]:
        _hold("CreateModelPackage", given)
        group = given["ModelPackageGroupName"]
        self._require(group)
        for container in given["InferenceSpecification"]["Containers"]:
            source = container["ModelDataSource"]["S3DataSource"]
            if source["S3DataType"] == "S3Prefix" and not source["S3Uri"].endswith("/"):
                raise ServiceError("ValidationException", "a prefix has to end with a slash")
        number = 1 + sum(package["ModelPackageGroupName"] == group for package in self.packages.values())
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model-package/{group}/{number}"
        self.packages[arn] = {
            **{name: value for name, value in given.items() if name != "ClientToken"},
            "ModelPackageArn": arn,
            "ModelPackageVersion": number,
            "ModelPackageStatus": "Completed",
            "ModelPackageStatusDetails": {"ValidationStatuses": []},
            "CreationTime": _now(),
        }
        return {"ModelPackageArn": arn}

    def _describe(self, given: dict[str, Any]) -> Mapping[str, Any]:
        return self._package(given["ModelPackageName"])

    def _list(self, given: dict[str, Any]) -> Mapping[str, Any]:
        _hold("ListModelPackages", given)
        group = given["ModelPackageGroupName"]
        self._require(group)
        found = [package for package in self.packages.values() if package["ModelPackageGroupName"] == group]
        if given.get("SortOrder") == "Descending":
            found.reverse()
        start, size = int(given.get("NextToken", 0)), given.get("MaxResults", _PAGE)
        told = (
            "ModelPackageGroupName",
            "ModelPackageVersion",
            "ModelPackageArn",
            "ModelPackageDescription",
            "CreationTime",
            "ModelPackageStatus",
            "ModelApprovalStatus",
            "ModelLifeCycle",
        )
        page = [
            {name: package[name] for name in told if name in package}
            for package in found[start : start + size]
        ]
        more = {"NextToken": str(start + size)} if start + size < len(found) else {}
        return {"ModelPackageSummaryList": page, **more}

    def _update(self, given: dict[str, Any]) -> Mapping[str, Any]:
        _hold("UpdateModelPackage", given)
        package = self._package(given["ModelPackageArn"])
        properties = package.get("CustomerMetadataProperties", {}) | given.get(
            "CustomerMetadataProperties", {}
        )
        package |= given | {"CustomerMetadataProperties": properties, "LastModifiedTime": _now()}
        package["LastModifiedBy"] = {"IamIdentity": {"Arn": "arn:aws:sts::1:assumed-role/dagster/us"}}
        return {"ModelPackageArn": package["ModelPackageArn"]}

    def _package(self, arn: str) -> dict[str, Any]:
        if arn not in self.packages:
            raise ServiceError("ValidationException", f"ModelPackage {arn} does not exist.")
        return self.packages[arn]

    def _require(self, group: str) -> None:
        if group not in self.groups:
            raise ServiceError("ValidationException", f"ModelPackageGroup {group} does not exist.")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@functools.cache
def _model() -> ServiceModel:
    loader = botocore.session.get_session().get_component("data_loader")
    return ServiceModel(loader.load_service_model("sagemaker", "service-2"))


def _hold(operation: str, given: dict[str, Any]) -> None:
    shape = _model().operation_model(operation).input_shape
    assert shape is not None
    if faults := list(_faults(shape, given, operation)):
        raise ServiceError("ValidationException", "; ".join(faults))


def _faults(shape: Shape, value: Any, place: str) -> Any:
    """Where a value breaks the lengths, patterns and values that the service model names."""
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from _faults(shape.members[name], inner, f"{place}.{name}")
    elif shape.type_name == "list":
        for inner in value:
            yield from _faults(shape.member, inner, f"{place}[]")
    elif shape.type_name == "map":
        for key, inner in value.items():
            yield from _faults(shape.key, key, f"{place} key")
            yield from _faults(shape.value, inner, f"{place}.{key}")
    longest = shape.metadata.get("max")
    if longest is not None and hasattr(value, "__len__") and len(value) > longest:
        yield f"{place} is longer than {longest}: {value!r}"
    pattern = shape.metadata.get("pattern")
    if pattern and not regex.fullmatch(_CLOSING.sub("", pattern), value):
        yield f"{place} does not fit {pattern}: {value!r}"
    values = shape.metadata.get("enum")
    if values and value not in values:
        yield f"{place} is none of {values}: {value!r}"
