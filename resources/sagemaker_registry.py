"""SageMaker's model registry beside MLflow: approval in either has the same effect.

MLflow (the *inner* tracking) holds everything: runs, versions, decisions, the history of promotions. Each
version is also a package in a model package group, with its metrics, what it was made of, and its
approval. Whoever reads versions brings both into agreement first, by what they agreed on last, which is
kept as a tag of the version: where only one side has changed since, the other follows; where both have,
the newer decision counts. So whatever interrupts a decision, the next read completes it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import dagster as dg
from typing_extensions import override

from ml.artifacts import ArtifactRef, JsonValue, Manifest
from ml.errors import InputError
from resources.aws import AwsAccess
from resources.failures import input_errors_fail_plainly
from resources.model_packages import ModelPackage, ModelPackages, PackageDetails, Status
from resources.tracking import (
    APPROVAL_TAG,
    TARGET_TAG,
    Choice,
    Decision,
    Part,
    Promotion,
    RegisteredVersion,
    Tracking,
    tags_of,
)

CODE_REVISION_TAG = "code_revision"

IN_SAGEMAKER = "sagemaker"
"""Who decided, where SageMaker does not say."""

_PACKAGE_TAG = "sagemaker.package"
_AGREED_TAG = "sagemaker.approval"
"""Approval, in SageMaker's words, on which both registries agreed last."""

_OURS = "Offer Assets: "
"""Begins every comment that is written here, so that none is taken for a person's."""

_CHOICES: dict[Status, Choice] = {"Approved": "approved", "Rejected": "rejected"}


class SageMakerRegistry(Tracking):
    """Tracking in MLflow, with every registered version in a model package group of SageMaker too.

    What serves (:meth:`production`, :meth:`history`) is known without asking SageMaker. Who reads
    decisions does ask: where it does not answer, that is a failure, and nothing is decided without it.
    """

    inner: dg.ResourceDependency[Tracking]
    aws: dg.ResourceDependency[AwsAccess]
    group: str
    """Name of the model package group."""
    store: str
    """``s3://bucket/prefix``; metrics are put below it, under ``registry/``."""
    serving_image: str
    """URI of the image that serves models for cpu."""
    neuron_image: str = ""
    """URI of the image that serves models for neuron."""

    @override
    def record(
        self,
        manifest: Manifest,
        ref: ArtifactRef,
        learning_curve: Sequence[Mapping[str, JsonValue]] = (),
        parts: Sequence[Part] = (),
    ) -> str:
        return self.inner.record(manifest, ref, learning_curve, parts)

    @override
    @input_errors_fail_plainly()
    def register(
        self,
        ref: ArtifactRef,
        metrics: Mapping[str, JsonValue],
        tags: Mapping[str, str],
        approval: Literal["automatic", "pending"] | None = None,
        carried: Decision | None = None,
    ) -> RegisteredVersion:
        version = self.inner.register(ref, metrics, tags, approval, carried)
        statistics = self._packages.write_statistics(self.store, ref.digest, version.metrics)
        self._packages.make_group(f"Versions of the model {version.name}")
        details = self._details_of(version)
        if details is None:
            return self._with_package(version, tags, statistics)
        if version.tags.get(_PACKAGE_TAG) != details.package.arn:
            version = self.inner.annotate(version, {_PACKAGE_TAG: details.package.arn})
        # First what people decided: any change of ours hides when, and by whom.
        version = self._settled(version, details.package)
        self._packages.describe_anew(details, _described(version, tags))
        return version

    @override
    @input_errors_fail_plainly()
    def version_of(self, ref: ArtifactRef) -> RegisteredVersion | None:
        version = self.inner.version_of(ref)
        return self._settled_with_package(version) if version is not None else None

    @override
    @input_errors_fail_plainly()
    def versions(self) -> list[RegisteredVersion]:
        versions = self.inner.versions()
        if not any(_AGREED_TAG in version.tags for version in versions):
            return versions
        packages = self._packages.by_digest()
        return [
            self._settled(version, package) if (package := packages.get(version.ref.digest)) else version
            for version in versions
        ]

    @override
    @input_errors_fail_plainly()
    def decide(
        self,
        version: RegisteredVersion,
        decision: Choice,
        by: str,
        reason: str,
        despite_gate: bool = False,
    ) -> RegisteredVersion:
        # First what somebody may have decided in SageMaker meanwhile: then the same once more is a decision.
        version = self._settled_with_package(self.inner.version_of(version.ref) or version)
        return self._settled_with_package(self.inner.decide(version, decision, by, reason, despite_gate))

    @override
    def annotate(self, version: RegisteredVersion, tags: Mapping[str, str]) -> RegisteredVersion:
        return self.inner.annotate(version, tags)

    @override
    @input_errors_fail_plainly()
    def promote(self, version: RegisteredVersion, promotion: Promotion) -> RegisteredVersion:
        promoted = self.inner.promote(version, promotion)
        # The one that was replaced is marked anew as well.
        return next(found for found in self.versions() if found.version == promoted.version)

    @override
    def production(self) -> RegisteredVersion | None:
        return self.inner.production()

    @override
    def history(self) -> list[Promotion]:
        return self.inner.history()

    @property
    def _packages(self) -> ModelPackages:
        return ModelPackages(aws=self.aws, group=self.group)

    def _details_of(self, version: RegisteredVersion) -> PackageDetails | None:
        """Its package, or None; by name where that is noted, else by a look through the group."""
        arn = version.tags.get(_PACKAGE_TAG)
        if arn and (details := self._packages.details(arn)):
            return details
        package = self._packages.by_digest().get(version.ref.digest)
        return self._packages.details(package.arn) if package is not None else None

    def _settled_with_package(self, version: RegisteredVersion) -> RegisteredVersion:
        """As :meth:`_settled`; one that never had a package stays as it is."""
        details = self._details_of(version) if _AGREED_TAG in version.tags else None
        return self._settled(version, details.package) if details is not None else version

    def _with_package(
        self, version: RegisteredVersion, tags: Mapping[str, str], statistics: str
    ) -> RegisteredVersion:
        target = version.tags.get(TARGET_TAG, "cpu")
        image = self._image_for(target, version)
        parent = self.inner.production()
        status = status_of(version)
        # Before there is a package, so that a person's decision about it is told from ours.
        version = self.inner.annotate(version, {_AGREED_TAG: status})
        package = self._packages.create(
            version.ref,
            target=target,
            image=image,
            statistics=statistics,
            status=status,
            properties=_described(version, tags) | _parent(parent, version),
            code_revision=tags.get(CODE_REVISION_TAG, ""),
        )
        if version.decision is not None:
            self._packages.set_status(package.arn, status, _comment(version))
        return self.inner.annotate(version, {_PACKAGE_TAG: package.arn})

    def _image_for(self, target: str, version: RegisteredVersion) -> str:
        images = {"cpu": self.serving_image, "neuron": self.neuron_image}
        image = images.get(target)
        if not image:
            raise InputError(
                f"model {version.model_version} is compiled for {target}, and no image is known that serves "
                "it: set OFFER_ASSETS_AWS_SERVING_IMAGE (cpu) or OFFER_ASSETS_AWS_NEURON_IMAGE (neuron)"
            )
        return image

    def _settled(self, version: RegisteredVersion, package: ModelPackage) -> RegisteredVersion:
        """The version after both registries were brought into agreement; without a call where they agree."""
        if package.status not in (version.tags.get(_AGREED_TAG), status_of(version)):
            details = self._packages.details(package.arn)
            if details is not None:
                package = details.package
                if _is_newer_than(version, details):
                    version = self.inner.annotate(version, _taken_over(version, details))
        wanted = status_of(version)
        if package.status != wanted:
            self._packages.set_status(package.arn, wanted, _comment(version))
        if version.tags.get(_AGREED_TAG) != wanted:
            version = self.inner.annotate(version, {_AGREED_TAG: wanted})
        if package.serves != version.in_production:
            self._packages.mark(package.arn, serves=version.in_production, why=_last_promotion(version))
        return version


def status_of(version: RegisteredVersion) -> Status:
    """Whether a version may be served, in SageMaker's words."""
    if version.may_serve:
        return "Approved"
    if version.approval == "rejected" or not version.passed:
        return "Rejected"
    return "PendingManualApproval"


def _is_newer_than(version: RegisteredVersion, details: PackageDetails) -> bool:
    """Whether SageMaker's approval is a decision that is newer than what MLflow holds."""
    agreed, theirs = version.tags.get(_AGREED_TAG), details.package.status
    if theirs == agreed or not details.modified_at:
        return False
    decision = version.decision
    if decision is None:
        return True
    if not decision.at:
        # A tag set by hand in MLflow tells no time: where the order is not known, nothing is served.
        return theirs == "Rejected" or status_of(version) == agreed
    # Also where MLflow says what both agreed on: somebody may have decided the same once more, and later.
    return details.modified_at > decision.at


def _taken_over(version: RegisteredVersion, details: PackageDetails) -> dict[str, str]:
    """Tags for what was decided in SageMaker; what both agree on comes last."""
    status = details.package.status
    agreed = {_AGREED_TAG: status}
    choice = _CHOICES.get(status)
    if choice is None:
        return {APPROVAL_TAG: "pending", **agreed}
    # As with a tag set by hand in MLflow: without a time, it is held against the gate once more.
    counts = choice == "rejected" or version.passed
    decision = Decision(
        decision=choice,
        by=f"{IN_SAGEMAKER}: {details.modified_by}" if details.modified_by else IN_SAGEMAKER,
        reason=details.reason if _is_of_a_person(details.reason) else "decided in SageMaker",
        at=details.modified_at if counts else "",
    )
    return tags_of(decision) | agreed


def _is_of_a_person(comment: str) -> bool:
    return bool(comment.strip()) and not comment.startswith(_OURS)


def _comment(version: RegisteredVersion) -> str:
    """Why a package has the approval that it has."""
    decision = version.decision
    if decision is not None and (version.may_serve or decision.decision == "rejected"):
        return f"{_OURS}{decision.by}: {decision.reason}"
    if not version.passed:
        return (
            f"{_OURS}did not pass the gate; it is approved despite that by the job decide_version "
            "(despite_gate), not here"
        )
    return f"{_OURS}passed the gate" + ("" if version.may_serve else " and waits for a decision")


def _described(version: RegisteredVersion, tags: Mapping[str, str]) -> dict[str, str]:
    """What a package says of its version: identity, verdict, and what it was made of."""
    return {
        **tags,
        "digest": version.ref.digest,
        "artifact": f"{version.ref.kind}/{version.ref.key}",
        "model_version": version.model_version,
        "mlflow_version": f"{version.name}/{version.version}",
    }


def _parent(production: RegisteredVersion | None, version: RegisteredVersion) -> dict[str, str]:
    """The version that was in production when this one was registered."""
    if production is None or production.version == version.version:
        return {}
    return {
        "parent_version": production.version,
        "parent_model_version": production.model_version,
        "parent_package": production.tags.get(_PACKAGE_TAG, ""),
    }


def _last_promotion(version: RegisteredVersion) -> str:
    last = max(version.promotions, key=lambda promotion: promotion.at, default=None)
    return f"{last.kind} by {last.by}: {last.reason}" if last is not None else "in MLflow"
