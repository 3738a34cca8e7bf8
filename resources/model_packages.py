"""The model package group of SageMaker's registry: one package per version of the model, found by digest.

Only what SageMaker is asked and told stands here; which of two decisions counts is the business of
``resources.sagemaker_registry``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code
from resources.tracking import as_kept, shortened

Status = Literal["Approved", "Rejected", "PendingManualApproval"]
"""Approval of a package, in SageMaker's words."""

_CONTENT_TYPES = ["application/json", "application/jsonlines"]
_INSTANCE_TYPES = {
    "cpu": [
        f"ml.{family}.{size}"
        for family in ("c7i", "m7i")
        for size in ("large", "xlarge", "2xlarge", "4xlarge")
    ],
    "neuron": [f"ml.inf2.{size}" for size in ("xlarge", "8xlarge", "24xlarge", "48xlarge")],
}
"""Where a model of a target may run; the endpoint's own setting chooses among them."""

_PAGE = 100
_LONGEST_DESCRIPTION = 1024
_LONGEST_PROPERTY = 256
_MOST_PROPERTIES = 50
_DIGEST = re.compile(r"; digest ([0-9a-f]{64})$")
_IN_PROPERTIES = frozenset("_.:/=+-@")
"""What a property may hold beside letters, digits and separators."""

_STAGE, _SERVING, _REPLACED = "Production", "Serving", "Replaced"


class ModelPackage(msgspec.Struct, frozen=True, kw_only=True):
    """A version of the group, as the list tells it."""

    arn: str
    number: int
    """Of the version in the group; MLflow counts for itself."""
    digest: str
    """Of the compiled student."""
    status: Status
    serves: bool
    """Whether it is marked as the one in production."""


class PackageDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What only a look at the single package tells."""

    package: ModelPackage
    reason: str
    """Comment on the approval; empty where there is none."""
    modified_at: str
    """ISO time (UTC) of the last change; empty where there was none."""
    modified_by: str
    """Profile or role of who changed it; empty where SageMaker does not say."""
    properties: dict[str, str]


class ModelPackages(msgspec.Struct, frozen=True, kw_only=True):
    """One group of model packages.

    All methods raise ``InputError`` where a person has to change something, and ``dg.Failure`` where a
    repetition may help (see ``resources.aws.aws_errors``).
    """

    aws: AwsAccess
    group: str

    def by_digest(self) -> dict[str, ModelPackage]:
        """All packages of ours, at one call per hundred; of several with one digest, the first made."""
        found: dict[str, ModelPackage] = {}
        sagemaker = self.aws.client("sagemaker")
        token: dict[str, str] = {}
        while True:
            with aws_errors(f"listing the model package group {self.group}"):
                page = sagemaker.list_model_packages(
                    ModelPackageGroupName=self.group,
                    SortBy="CreationTime",
                    SortOrder="Descending",
                    MaxResults=_PAGE,
                    **token,
                )
            for summary in page["ModelPackageSummaryList"]:
                package = _package(summary)
                known = found.get(package.digest) if package is not None else None
                if package is not None and (known is None or package.number < known.number):
                    found[package.digest] = package
            if not page.get("NextToken"):
                return found
            token = {"NextToken": page["NextToken"]}

    def details(self, arn: str) -> PackageDetails | None:
        """One package, or None where somebody has deleted it."""
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"looking at the model package {arn}"):
            try:
                answer = sagemaker.describe_model_package(ModelPackageName=arn)
            except sagemaker.exceptions.ClientError as error:
                # The service has no code of its own for a package that is not there.
                if error_code(error) in ("ValidationException", "ResourceNotFound"):
                    return None
                raise
        package = _package(answer)
        if package is None:
            return None
        modified = answer.get("LastModifiedTime")
        return PackageDetails(
            package=package,
            reason=answer.get("ApprovalDescription", ""),
            modified_at=as_kept(modified) if modified else "",
            modified_by=_person(answer.get("LastModifiedBy", {})),
            properties=answer.get("CustomerMetadataProperties", {}),
        )

    def make_group(self, description: str) -> None:
        """Make the group, unless it is there."""
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"making the model package group {self.group}"):
            listed = sagemaker.list_model_package_groups(NameContains=self.group, MaxResults=_PAGE)
            names = {group["ModelPackageGroupName"] for group in listed["ModelPackageGroupSummaryList"]}
            if self.group in names:
                return
            try:
                sagemaker.create_model_package_group(
                    ModelPackageGroupName=self.group, ModelPackageGroupDescription=description
                )
            except sagemaker.exceptions.ClientError as error:
                if "already exists" not in str(error):
                    raise

    def create(
        self,
        ref: ArtifactRef,
        *,
        target: str,
        image: str,
        statistics: str,
        status: Status,
        properties: Mapping[str, str],
        code_revision: str,
    ) -> ModelPackage:
        """Add a version to the group.

        Args:
            ref: The compiled student, an artifact in S3.
            target: ``cpu`` or ``neuron``.
            image: URI of the image that serves it.
            statistics: URI in S3 of its metrics, see :meth:`write_statistics`.
            status: Its approval.
            properties: What it was made of and how it was judged.
            code_revision: Of the code that trained it; may be empty.
        """
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"registering model {ref.version} in the model package group {self.group}"):
            answer = sagemaker.create_model_package(
                ModelPackageGroupName=self.group,
                ModelPackageDescription=f"Model {ref.version}; {ref.kind} {ref.key}; digest {ref.digest}",
                InferenceSpecification={
                    "Containers": [{"Image": image, "ModelDataSource": {"S3DataSource": _folder(ref)}}],
                    "SupportedContentTypes": _CONTENT_TYPES,
                    "SupportedResponseMIMETypes": _CONTENT_TYPES,
                    "SupportedRealtimeInferenceInstanceTypes": _INSTANCE_TYPES[target],
                    "SupportedTransformInstanceTypes": _INSTANCE_TYPES[target],
                },
                ModelMetrics={
                    "ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": statistics}}
                },
                ModelApprovalStatus=status,
                CustomerMetadataProperties=_properties(properties),
                **({"MetadataProperties": {"CommitId": code_revision}} if code_revision else {}),
                **({"SecurityConfig": {"KmsKeyId": self.aws.kms_key}} if self.aws.kms_key else {}),
            )
        arn = answer["ModelPackageArn"]
        number = int(arn.rpartition("/")[2])
        return ModelPackage(arn=arn, number=number, digest=ref.digest, status=status, serves=False)

    def write_statistics(self, store: str, digest: str, metrics: Mapping[str, float]) -> str:
        """Put the metrics of a model where its package points to, in the form that SageMaker's pages show.

        Args:
            store: ``s3://bucket/prefix``.
            digest: Of the compiled student.
            metrics: Of its evaluation.

        Returns:
            URI of the object; a model that is judged again has its metrics there replaced.
        """
        place = urlsplit(store)
        key = f"{place.path.strip('/')}/registry/{self.group}/{digest}.json".lstrip("/")
        uri = f"s3://{place.netloc}/{key}"
        body = {
            "multiclass_classification_metrics": {
                name: {"value": value, "standard_deviation": "NaN"} for name, value in metrics.items()
            }
        }
        s3 = self.aws.client("s3")
        with aws_errors(f"writing {uri}"):
            s3.put_object(
                Bucket=place.netloc,
                Key=key,
                Body=msgspec.json.encode(body),
                ContentType="application/json",
                **self.aws.encryption,
            )
        return uri

    def set_status(self, arn: str, status: Status, reason: str) -> None:
        """Approve, reject, or have it wait."""
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"setting the approval of the model package {arn}"):
            sagemaker.update_model_package(
                ModelPackageArn=arn, ModelApprovalStatus=status, ApprovalDescription=_line(reason)
            )

    def mark(self, arn: str, *, serves: bool, why: str) -> None:
        """Mark a package as the one in production, or as one that was replaced there."""
        life_cycle = {
            "Stage": _STAGE,
            "StageStatus": _SERVING if serves else _REPLACED,
            "StageDescription": _line(why),
        }
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"marking the model package {arn} as {life_cycle['StageStatus']}"):
            sagemaker.update_model_package(ModelPackageArn=arn, ModelLifeCycle=life_cycle)

    def describe_anew(self, details: PackageDetails, properties: Mapping[str, str]) -> None:
        """Give a package other properties, where they differ; those not named stay."""
        wanted = details.properties | _properties(properties)
        if wanted == details.properties:
            return
        arn = details.package.arn
        sagemaker = self.aws.client("sagemaker")
        with aws_errors(f"describing the model package {arn}"):
            sagemaker.update_model_package(ModelPackageArn=arn, CustomerMetadataProperties=wanted)


def _package(answer: Mapping[str, Any]) -> ModelPackage | None:
    """Of a summary or a description; None where somebody else has made the package."""
    digest = _DIGEST.search(answer.get("ModelPackageDescription", ""))
    if digest is None:
        return None
    life_cycle = answer.get("ModelLifeCycle", {})
    return ModelPackage(
        arn=answer["ModelPackageArn"],
        number=int(answer["ModelPackageVersion"]),
        digest=digest[1],
        status=answer.get("ModelApprovalStatus", "PendingManualApproval"),
        serves=(life_cycle.get("Stage"), life_cycle.get("StageStatus")) == (_STAGE, _SERVING),
    )


def _folder(ref: ArtifactRef) -> dict[str, str]:
    """An artifact as model data: all objects below its prefix, as they are."""
    if not ref.uri.startswith("s3://"):
        raise InputError(
            f"{ref.kind} {ref.version} lies at {ref.uri}: SageMaker's registry takes models in S3 only"
        )
    return {"S3Uri": ref.uri.rstrip("/") + "/", "S3DataType": "S3Prefix", "CompressionType": "None"}


def _properties(given: Mapping[str, str]) -> dict[str, str]:
    """As SageMaker takes them: short, of few kinds of characters, none empty."""
    kept = {_property(name)[:128]: _property(value) for name, value in sorted(given.items()) if value}
    return dict(list(kept.items())[:_MOST_PROPERTIES])


def _property(text: str) -> str:
    kinds = (unicodedata.category(character)[0] for character in text)
    return "".join(
        c if kind in "LZN" or c in _IN_PROPERTIES else "_" for c, kind in zip(text, kinds, strict=True)
    )[:_LONGEST_PROPERTY]


def _line(text: str) -> str:
    return shortened(" ".join(text.split()), _LONGEST_DESCRIPTION)


def _person(by: Mapping[str, Any]) -> str:
    """Who did something, by the name that people know: a profile in Studio, or the end of a role's ARN."""
    arn = str(by.get("IamIdentity", {}).get("Arn", ""))
    return str(by.get("UserProfileName") or arn.rpartition("/")[2])
