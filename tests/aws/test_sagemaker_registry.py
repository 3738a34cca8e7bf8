"""MLflow and SageMaker's registry side by side: one truth, whoever decides where, and whatever breaks."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from resources.aws import forget_clients
from resources.failures import InputFailure
from resources.model_packages import ModelPackages
from resources.sagemaker_registry import SageMakerRegistry, status_of
from resources.tracking import MlflowTracking, RegisteredVersion
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn
from tests.aws.stand_in_registry import RegistryStandIn
from tests.registry import registry_in
from tests.tracking_contract import (
    TrackingContract,
    compiled,
    passed,
    promotion,
    read_again,
    ref,
    set_by_hand,
)

GROUP = "offer-assets"
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets-serving@sha256:" + "a" * 64


@pytest.fixture
def mlflow(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowTracking:
    return registry_in(tmp_path, tmp_path_factory)


@pytest.fixture
def registry(stand_in: StandIn) -> RegistryStandIn:
    return RegistryStandIn().install(stand_in)


@pytest.fixture
def tracking(mlflow: MlflowTracking, registry: RegistryStandIn) -> SageMakerRegistry:
    return beside(mlflow)


def beside(mlflow: MlflowTracking, **changed: object) -> SageMakerRegistry:
    return SageMakerRegistry(
        inner=mlflow,
        **{"aws": access(), "group": GROUP, "store": f"s3://{BUCKET}/all", "serving_image": IMAGE, **changed},
    )


def arn_of(version: RegisteredVersion) -> str:
    return version.tags["sagemaker.package"]


def package_of(registry: RegistryStandIn, version: RegisteredVersion) -> dict:
    return registry.packages[arn_of(version)]


def status(registry: RegistryStandIn, version: RegisteredVersion) -> str:
    return package_of(registry, version)["ModelApprovalStatus"]


def asked(stand_in: StandIn) -> list[str]:
    """Operations of SageMaker since the last look."""
    operations = [operation for service, operation in stand_in.calls if service == "sagemaker"]
    stand_in.calls.clear()
    return operations


class TestBesideMlflow(TrackingContract):
    pass


def test_a_package_tells_where_the_model_lies_how_good_it_is_and_what_it_was_made_of(tracking, registry):
    first = passed(tracking, "5")
    tracking.promote(first, promotion(first))
    version = tracking.register(
        compiled("6"),
        {"student_weighted_f1": 0.9, "worst": ["c1"]},
        {
            "verdict": "passed",
            "champion": "",
            "taxonomy_version": "0a1b2c3d4e5f",
            "training_sample": "d" * 12,
            "code_revision": "abc1234",
            "note": "größer, (besser) 100%\n" + "x" * 300,
        },
        approval="pending",
    )
    package = package_of(registry, version)
    (container,) = package["InferenceSpecification"]["Containers"]
    assert container["Image"] == IMAGE
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == version.ref.uri + "/"
    assert package["ModelApprovalStatus"] == "PendingManualApproval"
    assert package["MetadataProperties"] == {"CommitId": "abc1234"}
    properties = package["CustomerMetadataProperties"]
    assert properties["note"].startswith("größer_ _besser_ 100__x")
    assert len(properties.pop("note")) == 256
    assert properties == {
        "verdict": "passed",
        "taxonomy_version": "0a1b2c3d4e5f",
        "training_sample": "d" * 12,
        "code_revision": "abc1234",
        "digest": "6" * 64,
        "artifact": f"compiled_student/{'6' * 32}",
        "model_version": "6" * 12,
        "mlflow_version": "offer-categories/2",
        "parent_version": "1",
        "parent_model_version": "5" * 12,
        "parent_package": arn_of(first),
    }
    uri = package["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]
    assert uri == f"s3://{BUCKET}/all/registry/{GROUP}/{'6' * 64}.json"
    s3 = access().client("s3")
    stored = s3.get_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/"))
    assert stored["ServerSideEncryption"] == "aws:kms"
    (figures,) = json.loads(stored["Body"].read()).values()
    assert figures == {"student_weighted_f1": {"value": 0.9, "standard_deviation": "NaN"}}


def test_what_is_registered_again_keeps_its_package_and_tells_the_new_verdict(tracking, registry):
    version = tracking.register(compiled("5"), {"f1": 0.8}, {"verdict": "failed", "evaluation": "e1"})
    assert status(registry, version) == "Rejected"
    again = tracking.register(
        compiled("5"), {"f1": 0.9}, {"verdict": "passed", "evaluation": "e2"}, approval="automatic"
    )
    assert list(registry.packages) == [arn_of(version)] == [arn_of(again)]
    assert status(registry, again) == "Approved"
    properties = package_of(registry, again)["CustomerMetadataProperties"]
    assert (properties["verdict"], properties["evaluation"]) == ("passed", "e2")


def test_a_repetition_changes_nothing(tracking, registry, stand_in):
    version = passed(tracking, "5")
    tracking.promote(version, promotion(version))
    asked(stand_in)
    before = tracking.version_of(compiled("5"))
    again = passed(tracking, "5")
    tracking.promote(again, promotion(again))
    assert tracking.version_of(compiled("5")) == before
    assert {name for name in asked(stand_in) if not name.startswith(("List", "Describe"))} == set()


def test_the_key_encrypts_the_package_and_its_metrics(mlflow, registry):
    key = "arn:aws:kms:eu-central-1:123456789012:key/0a1b"
    version = passed(beside(mlflow, aws=access(kms_key=key)), "5")
    assert package_of(registry, version)["SecurityConfig"] == {"KmsKeyId": key}


def test_a_model_for_neuron_runs_in_its_image_on_its_instances(mlflow, registry):
    tags = {"verdict": "passed", "target": "neuron"}
    with pytest.raises(InputFailure, match=r"^model 5{12} is compiled for neuron, and no image is known"):
        beside(mlflow).register(compiled("5"), {}, tags)
    version = beside(mlflow, neuron_image="neuron:1").register(compiled("5"), {}, tags)
    specification = package_of(registry, version)["InferenceSpecification"]
    assert specification["Containers"][0]["Image"] == "neuron:1"
    assert specification["SupportedRealtimeInferenceInstanceTypes"][0] == "ml.inf2.xlarge"


def test_a_model_outside_of_s3_is_refused_with_its_place(tracking):
    local = ref("compiled_student", "5" * 32, "5" * 64)
    local = type(local)(kind=local.kind, key=local.key, digest=local.digest, uri="/data/artifacts/5")
    with pytest.raises(InputFailure, match=r"^compiled_student 5{12} lies at /data/artifacts/5: "):
        tracking.register(local, {}, {"verdict": "passed"})


def test_an_approval_in_sagemaker_is_one_in_mlflow(tracking, registry, mlflow):
    version = passed(tracking, "5", "pending")
    registry.click(arn_of(version), "Approved", "looks\ngood")
    seen = tracking.find("1")
    assert seen is not None
    assert seen.may_serve
    assert seen.decision is not None
    assert (seen.decision.by, seen.decision.reason) == ("sagemaker: clara", "looks\ngood")
    changed = package_of(registry, version)["LastModifiedTime"]
    assert seen.decision.at == changed.isoformat(timespec="microseconds").replace("+00:00", "Z")
    assert mlflow.version_of(compiled("5")) == seen == tracking.version_of(compiled("5"))


def test_a_decision_reaches_sagemaker_with_who_and_why(tracking, registry):
    version = tracking.decide(passed(tracking, "5", "pending"), "rejected", "anna", "toys\nare wrong")
    package = package_of(registry, version)
    assert package["ModelApprovalStatus"] == "Rejected"
    assert package["ApprovalDescription"] == "Offer Assets: anna: toys are wrong"


def test_a_comment_of_ours_is_not_taken_for_the_reason_of_a_person(tracking, registry):
    version = tracking.decide(passed(tracking, "5", "pending"), "approved", "anna", "looks good")
    registry.click(arn_of(version), "Rejected")
    decision = read_again(tracking, version).decision
    assert decision is not None
    assert (decision.decision, decision.reason) == ("rejected", "decided in SageMaker")


def test_a_version_that_is_set_to_pending_in_sagemaker_waits(tracking, registry):
    version = passed(tracking, "5", "automatic")
    registry.click(arn_of(version), "PendingManualApproval")
    assert read_again(tracking, version).approval == "pending"
    assert not read_again(tracking, version).may_serve


def test_an_approval_in_sagemaker_does_not_get_a_failed_version_past_the_gate(tracking, registry):
    version = tracking.register(compiled("5"), {}, {"verdict": "failed"})
    registry.click(arn_of(version), "Approved", "we need it")
    seen = read_again(tracking, version)
    assert not seen.may_serve
    assert seen.decision is not None
    # As a tag that is set by hand in MLflow: whoever notes decisions holds it against the gate, and says so.
    assert (seen.decision.decision, seen.decision.at) == ("approved", "")
    assert status(registry, version) == "Rejected"
    assert "did not pass the gate" in package_of(registry, version)["ApprovalDescription"]
    tracking.decide(seen, "approved", "anna", "we need it", despite_gate=True)
    assert status(registry, version) == "Approved"


def test_the_version_in_production_is_marked_and_the_one_before_it_no_longer(tracking, registry):
    first, second = passed(tracking, "5"), passed(tracking, "6")
    tracking.promote(first, promotion(first, by="anna", reason="because"))
    cycle = package_of(registry, first)["ModelLifeCycle"]
    assert cycle == {
        "Stage": "Production",
        "StageStatus": "Serving",
        "StageDescription": "promotion by anna: because",
    }
    tracking.promote(second, promotion(second))
    stages = [package_of(registry, version)["ModelLifeCycle"]["StageStatus"] for version in (first, second)]
    assert stages == ["Replaced", "Serving"]


def test_reading_many_versions_costs_one_call_per_hundred(tracking, registry, mlflow, stand_in):
    version = passed(tracking, "5", "pending")
    ours = package_of(registry, version)
    for number in range(2, 252):
        digest = f"{number:064x}"
        registry.packages[f"{number}"] = {
            **ours,
            "ModelPackageArn": ours["ModelPackageArn"].replace("/1", f"/{number}"),
            "ModelPackageVersion": number,
            "ModelPackageDescription": f"Model {digest[:12]}; compiled_student k; digest {digest}",
        }
    asked(stand_in)
    assert tracking.versions() == [version]
    assert asked(stand_in) == ["ListModelPackages"] * 3
    registry.click(arn_of(version), "Approved")
    assert tracking.versions()[0].may_serve
    assert asked(stand_in) == ["ListModelPackages"] * 3 + ["DescribeModelPackage"]
    assert tracking.version_of(compiled("5")).may_serve
    assert asked(stand_in) == ["DescribeModelPackage"]


def test_what_serves_is_known_without_sagemaker(tracking, stand_in):
    version = passed(tracking, "5")
    tracking.promote(version, promotion(version))
    stand_in.fail_next("sagemaker:", times=99, code="AccessDeniedException")
    assert tracking.production() == read_in_mlflow(tracking, version)
    assert [entry.registry_version for entry in tracking.history()] == ["1"]


def read_in_mlflow(tracking: SageMakerRegistry, version: RegisteredVersion) -> RegisteredVersion | None:
    return tracking.inner.version_of(version.ref)


def test_who_reads_decisions_is_told_that_sagemaker_may_not_be_asked(tracking, stand_in):
    version = passed(tracking, "5")
    stand_in.fail_next("sagemaker:", times=99, code="AccessDeniedException")
    for read in (tracking.versions, lambda: tracking.version_of(version.ref)):
        with pytest.raises(InputFailure, match=r"AccessDeniedException: .*deploy/iam"):
            read()


def test_throttling_is_sat_out(tracking, registry, stand_in):
    stand_in.fail_next("sagemaker:ListModelPackageGroups", times=1)
    stand_in.fail_next("sagemaker:CreateModelPackage", times=1, code="InternalFailure", status=500)
    version = passed(tracking, "5")
    assert list(registry.packages) == [arn_of(version)]


def test_an_outage_fails_in_a_way_that_may_be_retried(tracking, registry, stand_in, monkeypatch):
    monkeypatch.setattr("resources.aws._ATTEMPTS", 1)
    forget_clients()
    stand_in.fail_next("sagemaker:", code="ServiceUnavailable", status=503)
    with pytest.raises(dg.Failure, match=r"ServiceUnavailable: .*run again") as failure:
        passed(tracking, "5")
    assert failure.value.allow_retries
    assert status(registry, passed(tracking, "5")) == "Approved"


@pytest.mark.parametrize(
    ("interrupted", "after"),
    [
        ("s3:PUT", False),
        ("sagemaker:ListModelPackageGroups", False),
        ("sagemaker:CreateModelPackageGroup", True),
        ("sagemaker:ListModelPackages", False),
        ("sagemaker:CreateModelPackage", False),
        ("sagemaker:CreateModelPackage", True),
    ],
)
def test_a_registration_that_was_interrupted_is_completed_once(
    tracking, registry, stand_in, interrupted, after
):
    if interrupted == "sagemaker:CreateModelPackage":
        ModelPackages(aws=access(), group=GROUP).make_group("there already")
    stand_in.fail_next(interrupted, code="AccessDenied", status=403, after=after)
    with pytest.raises(dg.Failure, match=r"AccessDenied"):
        passed(tracking, "5", "pending")
    assert [version.approval for version in tracking.inner.versions()] == ["pending"]
    version = passed(tracking, "5", "pending")
    assert list(registry.packages) == [arn_of(version)]
    registry.click(arn_of(version), "Approved")
    assert read_again(tracking, version).may_serve


def test_what_is_decided_before_an_interrupted_registration_is_repeated_counts(tracking, registry, stand_in):
    ModelPackages(aws=access(), group=GROUP).make_group("there already")
    stand_in.fail_next("sagemaker:CreateModelPackage", code="AccessDenied", status=403, after=True)
    with pytest.raises(dg.Failure):
        passed(tracking, "5", "pending")
    (arn,) = registry.packages
    registry.click(arn, "Rejected", "toys")
    assert tracking.versions()[0].approval == "rejected"
    assert passed(tracking, "5", "automatic").approval == "rejected"


def test_moto_takes_the_same_calls(mlflow, stand_in):
    """Without handlers of ours; moto knows neither life cycle nor updates of single fields."""
    tracking = beside(mlflow)
    versions = [passed(tracking, digit, "pending") for digit in "56"]
    sagemaker = access().client("sagemaker")
    sagemaker.update_model_package(
        ModelPackageArn=arn_of(versions[0]), ModelApprovalStatus="Approved", ApprovalDescription="looks good"
    )
    tracking.decide(versions[1], "rejected", "anna", "toys")
    assert [(read.approval, read.decision.reason) for read in tracking.versions()] == [
        ("rejected", "toys"),
        ("approved", "looks good"),
    ]
    described = sagemaker.describe_model_package(ModelPackageName=arn_of(versions[1]))
    assert described["ModelApprovalStatus"] == "Rejected"


def test_a_package_that_somebody_deleted_is_made_again(tracking, registry):
    version = passed(tracking, "5")
    registry.packages.clear()
    assert read_again(tracking, version).may_serve
    again = passed(tracking, "5")
    assert status(registry, again) == "Approved"


def test_packages_of_others_in_the_group_are_left_alone(tracking, registry, stand_in):
    passed(tracking, "5", "pending")
    (ours,) = registry.packages.values()
    arn = ours["ModelPackageArn"] + "0"
    registry.packages[arn] = ours | {"ModelPackageArn": arn, "ModelPackageDescription": "by hand"}
    registry.click(arn, "Rejected")
    asked(stand_in)
    assert [version.approval for version in tracking.versions()] == ["pending"]
    assert asked(stand_in) == ["ListModelPackages"]


@pytest.mark.parametrize("after", [False, True])
def test_a_decision_that_did_not_reach_sagemaker_does_at_the_next_read(tracking, registry, stand_in, after):
    version = passed(tracking, "5", "pending")
    stand_in.fail_next("sagemaker:UpdateModelPackage", code="AccessDenied", status=403, after=after)
    with pytest.raises(dg.Failure, match=r"^setting the approval of the model package arn:"):
        tracking.decide(version, "rejected", "anna", "toys")
    (read,) = tracking.versions()
    assert read.decision is not None
    assert (read.approval, read.decision.by) == ("rejected", "anna")
    assert status(registry, version) == "Rejected"


def test_of_two_decisions_of_which_one_has_no_time_the_rejection_counts(tracking, registry):
    first, second = passed(tracking, "5", "pending"), passed(tracking, "6", "pending")
    registry.click(arn_of(first), "Rejected")
    set_by_hand(tracking, first, "approval", "approved")
    set_by_hand(tracking, second, "approval", "rejected")
    registry.click(arn_of(second), "Approved")
    assert [version.approval for version in tracking.versions()] == ["rejected", "rejected"]
    assert [status(registry, version) for version in (first, second)] == ["Rejected", "Rejected"]


STEPS = ["approved here", "rejected here", "Approved", "Rejected", "lost approved", "lost rejected"]


@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.booleans()), min_size=1, max_size=6))
@example(steps=[("approved here", False), ("Rejected", False), ("approved here", False)])
@example(steps=[("rejected here", False), ("Approved", False), ("rejected here", False)])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_decided_where_both_end_with_the_newest(tracking, registry, stand_in, steps):
    """Here, in SageMaker, or here without reaching it; read in between or not."""
    digest = f"{len(registry.packages):064x}"
    version = tracking.register(
        ref("compiled_student", digest[-32:], digest), {}, {"verdict": "passed"}, approval="pending"
    )
    newest = "PendingManualApproval"
    for step, read in steps:
        if step in ("Approved", "Rejected"):
            # A click on what is shown already is none.
            if status(registry, version) != step:
                registry.click(arn_of(version), step)
                newest = step
        else:
            choice = step.split()[-1] if step.startswith("lost") else step.split()[0]
            standing = tracking.inner.version_of(version.ref)
            if step == "lost rejected" and standing.approval == "rejected":
                continue  # MLflow keeps the first of equal rejections, and knows of no other
            tracker = tracking.inner if step.startswith("lost") else tracking
            tracker.decide(version, choice, "anna", "because")
            newest = choice.capitalize()
        if read:
            assert status_of(read_again(tracking, version)) == newest
    final = next(found for found in tracking.versions() if found.version == version.version)
    assert status_of(final) == status(registry, final) == newest
    assert tracking.inner.version_of(version.ref) == final
