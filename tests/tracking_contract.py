"""What every tracking has to hold: registering, deciding, promoting."""

from __future__ import annotations

import msgspec
import pytest

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from resources.tracking import MlflowTracking, Promotion, RegisteredVersion, Tracking, now


def ref(kind: str = "student_checkpoint", key: str = "1" * 32, digest: str = "2" * 64) -> ArtifactRef:
    return ArtifactRef(
        kind=kind, key=key, digest=digest, uri=f"s3://offer-assets-tests/artifacts/{kind}/{key}"
    )


def compiled(digit: str) -> ArtifactRef:
    return ref("compiled_student", digit * 32, digit * 64)


def promotion(version: RegisteredVersion, **changes: object) -> Promotion:
    made = Promotion(
        at=now(),
        by="automatic",
        reason="passed the gate",
        run_id="run 1",
        kind="promotion",
        registry_version=version.version,
        model_version=version.model_version,
        replaced=None,
        taxonomy_version="t1",
        data="d1",
        code_revision="abc1234",
        evaluation="e" * 64,
    )
    return msgspec.structs.replace(made, **changes)


def passed(tracking: Tracking, digit: str, approval: str = "automatic") -> RegisteredVersion:
    return tracking.register(compiled(digit), {}, {"verdict": "passed"}, approval=approval)


def set_by_hand(tracking: Tracking, version: RegisteredVersion, name: str, value: str) -> None:
    """As a person does on MLflow's pages."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_of(tracking).tracking_uri)
    client.set_model_version_tag(version.name, version.version, name, value)


def read_again(tracking: Tracking, version: RegisteredVersion) -> RegisteredVersion:
    found = tracking.version_of(version.ref)
    assert found is not None
    return found


def mlflow_of(tracking: Tracking) -> MlflowTracking:
    """MLflow, also of a tracking that keeps versions elsewhere too."""
    inner = getattr(tracking, "inner", tracking)
    assert isinstance(inner, MlflowTracking)
    return inner


class TrackingContract:
    """To be derived from where there is a fixture ``tracking``."""

    def test_a_digest_is_registered_once_and_takes_the_new_verdict(self, tracking):
        tracking.register(compiled("5"), {"accuracy": 0.9}, {"verdict": "failed"})
        again = tracking.register(compiled("5"), {"accuracy": 0.91}, {"verdict": "passed"})
        assert (again.version, again.tags["verdict"], again.metrics) == ("1", "passed", {"accuracy": 0.91})
        assert tracking.register(compiled("6"), {}, {}).version == "2"

    def test_a_version_is_found_by_its_artifact(self, tracking):
        assert tracking.version_of(compiled("5")) is None
        registered = tracking.register(compiled("5"), {}, {"verdict": "passed"})
        tracking.register(compiled("6"), {}, {})
        assert tracking.version_of(compiled("5")) == registered

    def test_one_version_at_a_time_is_in_production(self, tracking):
        assert tracking.production() is None
        first = tracking.register(compiled("5"), {}, {})
        second = tracking.register(compiled("6"), {}, {})
        assert tracking.production() is None
        assert tracking.promote(first, promotion(first)).in_production
        tracking.promote(second, promotion(second))
        in_production = tracking.production()
        assert in_production is not None
        assert in_production.ref == second.ref
        earlier = tracking.version_of(first.ref)
        assert earlier is not None
        assert not earlier.in_production

    def test_versions_are_listed_newest_first_with_the_one_in_production(self, tracking):
        assert tracking.versions() == []
        registered = [tracking.register(compiled(digit), {"accuracy": 0.5}, {}) for digit in "567"]
        tracking.promote(registered[1], promotion(registered[1]))
        versions = tracking.versions()
        assert [version.version for version in versions] == ["3", "2", "1"]
        assert [version.in_production for version in versions] == [False, True, False]
        assert versions == [read_again(tracking, version) for version in reversed(registered)]
        assert versions[0].registered_at <= now()

    def test_a_decision_is_kept_with_who_when_and_why(self, tracking):
        pending = passed(tracking, "5", "pending")
        assert (pending.approval, pending.decision, pending.may_serve) == ("pending", None, False)
        before = now()
        approved = tracking.decide(pending, "approved", "anna", "looks good")
        assert approved.may_serve
        assert approved.decision is not None
        assert before <= approved.decision.at <= now()
        assert (approved.decision.by, approved.decision.reason) == ("anna", "looks good")
        assert not approved.decision.despite_gate
        rejected = tracking.decide(approved, "rejected", "ben", "labels of toys are wrong")
        assert (rejected.approval, rejected.may_serve) == ("rejected", False)
        assert rejected.decision is not None
        assert rejected.decision.by == "ben"

    def test_the_same_decision_again_is_no_new_one(self, tracking):
        version = passed(tracking, "5", "pending")
        rejected = tracking.decide(version, "rejected", "anna", "toys")
        assert tracking.decide(version, "rejected", "anna", "toys") == rejected
        tracking.promote(tracking.decide(version, "approved", "anna", "looks good"), promotion(version))
        first = read_again(tracking, version)
        assert tracking.decide(version, "approved", "anna", "looks good") == first

    def test_approving_again_what_does_not_serve_counts_as_of_now(self, tracking):
        five, six = passed(tracking, "5", "pending"), passed(tracking, "6")
        first = tracking.decide(five, "approved", "anna", "looks good")
        tracking.promote(first, promotion(first))
        tracking.promote(six, promotion(six))
        again = tracking.decide(five, "approved", "anna", "looks good")
        assert first.decision is not None
        assert again.decision is not None
        assert again.decision.at > tracking.history()[-1].at > first.decision.at

    def test_a_decision_holds_for_the_same_model_under_other_names_until_there_is_a_newer_one(self, tracking):
        def copy() -> RegisteredVersion:
            carried = read_again(tracking, version).decision
            return tracking.register(compiled("6"), {}, {"verdict": "failed"}, carried=carried)

        version = tracking.register(compiled("5"), {}, {"verdict": "failed"})
        assert copy().approval == "pending"
        tracking.decide(version, "approved", "anna", "we need it", despite_gate=True)
        assert copy().may_serve
        assert copy().decision == read_again(tracking, version).decision
        tracking.decide(copy(), "rejected", "ben", "toys")
        assert copy().approval == "rejected"
        tracking.decide(version, "approved", "anna", "it was the feed", despite_gate=True)
        assert copy().may_serve
        set_by_hand(tracking, copy(), "approval", "rejected")
        assert copy().approval == "rejected"

    def test_what_a_person_decided_stays_when_the_version_is_registered_again(self, tracking):
        tracking.decide(passed(tracking, "5", "pending"), "rejected", "anna", "toys")
        assert passed(tracking, "5", "automatic").approval == "rejected"
        tracking.decide(passed(tracking, "6", "pending"), "approved", "anna", "fine")
        assert passed(tracking, "6", "pending").approval == "approved"

    def test_approval_follows_the_policy_until_somebody_decided_or_it_is_in_production(self, tracking):
        assert passed(tracking, "5", "pending").approval == "pending"
        version = passed(tracking, "5", "automatic")
        assert version.approval == "automatic"
        assert passed(tracking, "5", "pending").approval == "pending"
        version = passed(tracking, "5", "automatic")
        tracking.promote(version, promotion(version))
        assert passed(tracking, "5", "pending").approval == "automatic"

    def test_a_version_that_failed_the_gate_is_approved_only_on_purpose(self, tracking):
        failed = tracking.register(compiled("5"), {}, {"verdict": "failed"})
        assert not failed.may_serve
        with pytest.raises(InputError, match=r"^version 1 \(model 5{12}\) did not pass the gate"):
            tracking.decide(failed, "approved", "anna", "we need it")
        approved = tracking.decide(failed, "approved", "anna", "we need it", despite_gate=True)
        assert approved.may_serve
        assert approved.decision is not None
        assert approved.decision.despite_gate

    def test_an_approval_of_a_version_that_passed_does_not_outlive_a_failed_verdict(self, tracking):
        tracking.decide(passed(tracking, "5", "pending"), "approved", "anna", "fine", despite_gate=True)
        failed = tracking.register(compiled("5"), {}, {"verdict": "failed"})
        assert (failed.approval, failed.may_serve) == ("approved", False)

    def test_a_tag_set_in_mlflow_decides_too(self, tracking):
        version = passed(tracking, "5", "pending")
        set_by_hand(tracking, version, "approval", " Approved ")
        by_hand = read_again(tracking, version)
        assert by_hand.may_serve
        assert by_hand.decision is not None
        assert (by_hand.decision.by, by_hand.decision.at) == ("mlflow", "")
        assert by_hand in tracking.versions()

    def test_a_tag_set_in_mlflow_overrules_an_earlier_decision(self, tracking):
        version = tracking.decide(passed(tracking, "5", "pending"), "approved", "anna", "fine")
        set_by_hand(tracking, version, "approval", "rejected")
        by_hand = read_again(tracking, version)
        assert not by_hand.may_serve
        assert by_hand.decision is not None
        assert by_hand.decision.by == "mlflow"
        assert passed(tracking, "5", "automatic").approval == "rejected"

    def test_a_tag_set_in_mlflow_does_not_get_a_failed_version_past_the_gate(self, tracking):
        version = tracking.register(compiled("5"), {}, {"verdict": "failed"})
        set_by_hand(tracking, version, "approval", "approved")
        assert not read_again(tracking, version).may_serve

    def test_the_history_tells_every_promotion_oldest_first(self, tracking):
        assert tracking.history() == []
        five, six = passed(tracking, "5"), passed(tracking, "6")
        entries = [
            promotion(five),
            promotion(six, replaced=five.model_version, by="anna", reason="ä better model"),
            promotion(five, replaced=six.model_version, kind="rollback"),
        ]
        for version, entry in zip((five, six, five), entries, strict=True):
            tracking.promote(version, entry)
        assert tracking.history() == entries
        assert read_again(tracking, five).promotions == [entries[0], entries[2]]

    def test_a_promotion_that_is_repeated_is_told_once(self, tracking):
        version = passed(tracking, "5")
        first = promotion(version)
        for entry in (first, promotion(version), promotion(version, run_id="run 2")):
            assert tracking.promote(version, entry).in_production
        assert tracking.history() == [first]
