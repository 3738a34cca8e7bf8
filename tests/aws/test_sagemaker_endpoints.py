"""The SageMaker endpoint, over real server processes behind a stand-in of the service.

First what every endpoint promises: the suite of :mod:`tests.resources.test_endpoints`, run again in the world
below. The servers are stand-ins without a model.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ml.artifacts import ArtifactRef, reference, write_manifest
from resources import sagemaker_endpoints as endpoints_module
from resources import sagemaker_service as service_module
from resources.endpoints import EndpointError, Endpoints, EndpointStatus, RolledBackError, Variant
from resources.failures import InputFailure
from resources.sagemaker_endpoints import SageMakerEndpoints
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn
from tests.aws.stand_in_endpoints import Endpoint, EndpointHost
from tests.resources.endpoint_world import Model, World, eventually, variants_of
from tests.resources.test_endpoints import (  # noqa: F401
    test_a_bad_version_is_rolled_back_by_its_alarm,
    test_a_deployed_model_answers_and_says_what_it_is,
    test_a_deployment_at_once_is_not_watched,
    test_a_deployment_ends_a_split,
    test_a_good_version_is_tried_out_and_then_gets_all_requests,
    test_a_new_version_takes_over_from_the_old_one,
    test_a_request_may_name_its_variant,
    test_a_shadow_needs_one_other_version_that_serves,
    test_a_shadow_sees_the_requests_and_answers_none,
    test_a_split_whose_second_version_does_not_come_up_leaves_the_first_serving,
    test_a_split_without_shares_is_refused,
    test_a_stopped_endpoint_is_gone_and_stopping_again_is_nothing,
    test_a_version_that_does_not_come_up_is_not_tried_out,
    test_a_version_that_does_not_come_up_leaves_the_old_one_serving,
    test_a_version_that_serves_alone_answers_to_its_name_only,
    test_nothing_serves_before_the_first_deployment,
    test_one_at_a_time_changes_what_serves,
    test_refused_offers_are_an_input_error_in_the_endpoints_words,
    test_the_same_version_again_goes_on_as_it_is,
    test_versions_share_the_requests_by_weight,
)

STORE = f"s3://{BUCKET}/store"
NAME = "offers"
OFFER = {"offer_id": "1", "title": "a"}


class SageMakerWorld(World):
    def __init__(self, tmp_path: Path, host: EndpointHost) -> None:
        super().__init__(tmp_path)
        self.host = host

    def endpoints(self, **policy: float) -> SageMakerEndpoints:
        if policy.get("canary_seconds", 0) >= 60:  # of the stand-in's: longer than any alarm here takes
            self.host.bake_may_end.clear()
        return sagemaker_endpoints(**policy)

    def model(self, name: str, behaviour: str = "answer", target: str = "cpu") -> Model:
        folder = self.tmp_path / "compiled_student" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(name)
        (folder / "behaviour").write_text(behaviour)
        (folder / "model.json").write_text(json.dumps({"target": target, "taxonomy_version": "t1"}))
        write_manifest(
            folder,
            kind="compiled_student",
            key=name,
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.1,
        )
        prefix = f"store/artifacts/compiled_student/{name}/files"
        for file in folder.iterdir():
            access().client("s3").put_object(
                Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes()
            )
        return folder, reference(folder, f"s3://{BUCKET}/{prefix}")


def sagemaker_endpoints(**settings: object) -> SageMakerEndpoints:
    return SageMakerEndpoints(
        **{
            "aws": access(),
            "location": STORE,
            "name": NAME,
            "serving_image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/serving:1",
            "instance_type": "ml.c7i.xlarge",
            "min_instances": 2,
            "max_instances": 8,
            "capture_percent": 100,
            "watched_seconds": 5,
            "seconds_between_looks": 0.02,
            **settings,
        }
    )


@pytest.fixture
def host(stand_in: StandIn, tmp_path: Path) -> Iterator[EndpointHost]:
    with EndpointHost(stand_in, tmp_path / "host", program="tests.resources.stand_in_server") as host:
        yield host


@pytest.fixture
def world(tmp_path: Path, host: EndpointHost) -> SageMakerWorld:
    return SageMakerWorld(tmp_path, host)


@pytest.fixture
def endpoints(world: SageMakerWorld) -> Endpoints:
    return world.endpoints()


@pytest.fixture
def model(world: SageMakerWorld) -> Callable[..., Model]:
    return world.model


def test_a_repeat_changes_nothing(endpoints, model, stand_in):
    folder, ref = model("first")
    status = endpoints.deploy(folder, ref)
    assert status.url == f"{stand_in.url}/endpoints/{NAME}"
    stand_in.calls.clear()
    assert endpoints.deploy(folder, ref) == status
    changing = {"CreateModel", "CreateEndpointConfig", "CreateEndpoint", "UpdateEndpoint", "AddTags"}
    assert not {operation for _, operation in stand_in.calls} & changing


def test_the_version_before_is_ended(endpoints, model, host):
    endpoints.deploy(*model("first"))
    old = host.endpoints[NAME].serving.containers["main"].process
    endpoints.deploy(*model("second"))
    host.settle(NAME)
    assert old.poll() is not None


def test_a_stopped_endpoint_leaves_no_alarm_and_no_scaling(endpoints, model):
    endpoints.deploy(*model("first"))
    endpoints.stop()
    assert not access().client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert not scaled()
    assert not access().client("logs").describe_metric_filters()["metricFilters"]


def test_a_canary_gets_its_share_before_the_rest_follows(host, model):
    endpoints = sagemaker_endpoints(canary_percent=20, canary_seconds=1)
    endpoints.deploy(*model("first"))
    folder, ref = model("second")
    host.bake_may_end.clear()
    rollout = threading.Thread(target=endpoints.deploy, args=(folder, ref))
    rollout.start()
    eventually(lambda: host.endpoints[NAME].canary is not None)
    answered = [endpoints.invoke([OFFER])[0]["model_version"] for _ in range(60)]
    assert 2 <= answered.count(ref.version) < 30
    host.bake_may_end.set()
    rollout.join()
    assert {endpoints.invoke([OFFER])[0]["model_version"] for _ in range(5)} == {ref.version}


def test_an_alarm_that_somebody_else_sets_takes_it_back_as_well(host, model, stand_in):
    endpoints = sagemaker_endpoints(canary_seconds=1)
    old = endpoints.deploy(*model("first"))
    host.may_go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        rollout = pool.submit(endpoints.deploy, *model("second"))
        eventually(lambda: host.endpoints[NAME].status == "Updating")
        access().client("cloudwatch").set_alarm_state(
            AlarmName=f"{NAME}-main-latency", StateValue="ALARM", StateReason="2.1 s were above 2 s"
        )
        host.may_go_on.set()
        with pytest.raises(
            RolledBackError, match=r"2\.1 s were above 2 s: p99 of the latency in ms: more than"
        ):
            rollout.result()
    assert endpoints.status().model_version == old.model_version


def test_an_alarm_of_the_version_before_does_not_stop_the_one_that_mends_it(host, model, monkeypatch):
    monkeypatch.setattr(endpoints_module, "_SECONDS_FOR_ALARMS_TO_CLEAR", 0.1)
    endpoints = sagemaker_endpoints()
    endpoints.deploy(*model("first"))
    access().client("cloudwatch").set_alarm_state(
        AlarmName=f"{NAME}-main-errors", StateValue="ALARM", StateReason="it fails"
    )
    folder, ref = model("second")
    assert endpoints.deploy(folder, ref).model_version == ref.version
    watched = host.endpoints[NAME].deployment["AutoRollbackConfiguration"]["Alarms"]
    assert [alarm["AlarmName"] for alarm in watched] == [
        f"{NAME}-main-latency",
        f"{NAME}-model-{ref.version}-low-confidence",
    ]


def test_other_weights_move_requests_and_no_server(endpoints, model, host, stand_in):
    first, second = model("first"), model("second")
    endpoints.split([variant(first, 9), variant(second, 1)])
    servers = {slot: each.url for slot, each in host.endpoints[NAME].serving.containers.items()}
    stand_in.calls.clear()
    status = endpoints.split([variant(first, 1), variant(second, 3)])
    assert {slot: each.url for slot, each in host.endpoints[NAME].serving.containers.items()} == servers
    assert status.model_version == second[1].version
    assert [each.weight for each in status.variants] == [0.75, 0.25]
    assert ("sagemaker", "UpdateEndpoint") not in stand_in.calls
    stand_in.calls.clear()
    assert endpoints.split([variant(second, 3), variant(first, 1)]) == status
    assert ("sagemaker", "UpdateEndpointWeightsAndCapacities") not in stand_in.calls


def test_a_deployment_after_a_split_is_watched_and_scaled_like_any_other(endpoints, model, host):
    variants = variants_of(model, first=1, second=3)
    endpoints.split(variants)
    assert len(scaled()) == 2
    endpoints.deploy(*model("third"))
    assert host.endpoints[NAME].deployment["AutoRollbackConfiguration"]["Alarms"]
    assert scaled() == [f"endpoint/{NAME}/variant/main"]


def test_observations_tell_what_was_seen_of_each_variant(endpoints, model):
    first, second = model("first"), model("second", "unsure")
    endpoints.split([variant(first, 1), variant(second, 1)])
    for name in (f"model-{first[1].version}", f"model-{second[1].version}"):
        for _ in range(3):
            endpoints.invoke([OFFER, OFFER], variant=name)
    seen = {each.variant.model_version: each for each in endpoints.observations()}
    assert {version: each.low_confidence_share for version, each in seen.items()} == {
        first[1].version: 0.0,
        second[1].version: 1.0,
    }
    assert {(each.requests, each.errors) for each in seen.values()} == {(3, 0)}
    assert all(0 < each.p99_milliseconds < 60_000 for each in seen.values())


def test_two_deployments_at_once_leave_one_server(endpoints, model, host):
    folder, ref = model("first")
    results: list[EndpointStatus] = []
    threads = [
        threading.Thread(target=lambda: results.append(endpoints.deploy(folder, ref))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert list(host.endpoints) == [NAME]


class TestSageMaker:
    """What only the endpoint on SageMaker has."""

    def test_what_serves_is_isolated_encrypted_and_captured(self, host, model):
        endpoints = sagemaker_endpoints(
            aws=access(
                kms_key="arn:aws:kms:eu-central-1:123456789012:key/k",
                subnets="subnet-0a1b2c3d,subnet-1a1b2c3d",
                security_groups="sg-0a1b2c3d",
            ),
            capture_percent=50,
        )
        _, ref = deployed = model("first")
        endpoints.deploy(*deployed)
        [created] = host.models.values()
        assert created["EnableNetworkIsolation"]
        assert created["VpcConfig"] == {
            "Subnets": ["subnet-0a1b2c3d", "subnet-1a1b2c3d"],
            "SecurityGroupIds": ["sg-0a1b2c3d"],
        }
        assert created["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] == ref.uri + "/"
        [config] = host.configs.values()
        assert config["KmsKeyId"] == config["DataCaptureConfig"]["KmsKeyId"]
        assert config["DataCaptureConfig"]["InitialSamplingPercentage"] == 50
        assert config["DataCaptureConfig"]["DestinationS3Uri"] == f"{STORE}/capture"

    def test_a_captured_request_lies_in_the_store_as_text(self, endpoints, model):
        _, ref = deployed = model("first")
        endpoints.deploy(*deployed)
        endpoints.invoke([OFFER])
        s3 = access().client("s3")
        [found] = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"store/capture/{NAME}/main/")["Contents"]
        event = json.loads(s3.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read())
        given, answered = (
            json.loads(event["captureData"][name]["data"]) for name in ("endpointInput", "endpointOutput")
        )
        assert given == {"offers": [OFFER]}
        assert answered["predictions"][0]["model_version"] == ref.version

    def test_instances_follow_the_requests_and_stay_through_a_roll_out(self, endpoints, model, host):
        endpoints.deploy(*model("first"))
        [policy] = (
            access()
            .client("application-autoscaling")
            .describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        )
        assert policy["ResourceId"] == f"endpoint/{NAME}/variant/main"
        assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 1_500
        host.endpoints[NAME].serving.counts["main"] = 7
        endpoints.deploy(*model("second"))
        assert host.endpoints[NAME].serving.counts == {"main": 7}

    def test_a_larger_smallest_fleet_is_there_for_the_canary_that_needs_it(self, model, host):
        sagemaker_endpoints(min_instances=1).deploy(*model("first"))
        sagemaker_endpoints(min_instances=2, canary_seconds=1).deploy(*model("second"))
        assert host.endpoints[NAME].serving.counts == {"main": 2}

    def test_another_instance_type_is_another_fleet_that_is_scaled_again(self, endpoints, model, host):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        sagemaker_endpoints(instance_type="ml.c7i.2xlarge").deploy(folder, ref)
        [variant] = host.endpoints[NAME].serving.config["ProductionVariants"]
        assert variant["InstanceType"] == "ml.c7i.2xlarge"
        assert scaled() == [f"endpoint/{NAME}/variant/main"]

    def test_the_last_few_versions_stay_and_older_ones_go(self, endpoints, model, host, monkeypatch):
        monkeypatch.setattr(service_module, "_KEPT", 1)
        refs = []
        for number in range(4):
            folder, ref = model(str(number))
            endpoints.deploy(folder, ref)
            refs.append(ref)
        kept = [ref.version for ref in refs[-2:]]
        assert sorted(endpoints._naming.version_of(name) for name in host.models) == sorted(kept)
        assert len(host.configs) == 2
        names = {
            alarm["AlarmName"] for alarm in access().client("cloudwatch").describe_alarms()["MetricAlarms"]
        }
        assert names == {f"{NAME}-main-errors", f"{NAME}-main-latency"} | {
            f"{NAME}-model-{version}-low-confidence" for version in kept
        }

    def test_an_endpoint_of_a_stranger_is_told_and_left_alone(self, endpoints, model, host):
        folder, ref = model("first")
        host.create_model({"ModelName": "strange", "PrimaryContainer": {"Image": "image"}})
        variants = [{"VariantName": "v", "ModelName": "strange", "InstanceType": "ml.c5.large"}]
        host.configs["strange"] = {"ProductionVariants": variants, "EndpointConfigArn": "arn"}
        host.endpoints[NAME] = Endpoint(NAME, "strange", status="InService")
        with pytest.raises(InputFailure, match="OFFER_ASSETS_AWS_ENDPOINT_NAME=offers: there is an endpoint"):
            endpoints.check_available()
        with pytest.raises(InputFailure, match="which is not ours"):
            endpoints.deploy(folder, ref)
        with pytest.raises(InputFailure, match="which is not ours"):
            endpoints.stop()
        assert endpoints.status() is None

    @pytest.mark.parametrize(
        ("settings", "target", "line"),
        [
            ({}, "neuron", "OFFER_ASSETS_AWS_NEURON_IMAGE is not set"),
            ({"neuron_image": "i"}, "neuron", "INSTANCE_TYPE=ml.c7i.xlarge does not run .* for neuron"),
            ({"instance_type": "ml.inf2.xlarge"}, "cpu", "ml.inf2.xlarge does not run .* for cpu"),
            ({}, "gpu", "compiled for gpu; endpoints serve cpu and neuron"),
            ({"min_instances": 1, "canary_seconds": 60}, "cpu", "MIN_INSTANCES=1: .* at most half"),
        ],
    )
    def test_settings_that_contradict_the_model_are_one_line(self, host, model, settings, target, line):
        with pytest.raises(InputFailure, match=line) as failure:
            sagemaker_endpoints(**settings).deploy(*model("first", target=target))
        assert "\n" not in str(failure.value)
        assert not host.endpoints

    def test_a_model_outside_of_s3_is_refused(self, endpoints, model):
        folder, _ = model("first")
        with pytest.raises(InputFailure, match="SageMaker serves what lies in S3"):
            endpoints.deploy(folder, reference(folder))


class TestFaults:
    """Throttled, cut off, killed, deleted by hand."""

    def test_throttling_and_lost_answers_change_nothing_of_the_outcome(
        self, endpoints, model, host, stand_in, no_pauses
    ):
        for operation in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint", "DescribeEndpoint"):
            stand_in.fail_next(f"sagemaker:{operation}", times=2)
        for operation in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint"):
            stand_in.fail_next(f"sagemaker:{operation}", code="InternalFailure", status=500, after=True)
        first, second = model("first"), model("second")
        assert endpoints.deploy(*first).model_version == first[1].version
        stand_in.fail_next("sagemaker:UpdateEndpoint", code="InternalFailure", status=500, after=True)
        assert endpoints.deploy(*second).model_version == second[1].version
        stand_in.fail_next(f"sagemaker:POST /endpoints/{NAME}", times=2)
        assert endpoints.invoke([OFFER])[0]["model_version"] == second[1].version

    def test_a_quota_is_one_line_that_is_not_retried(self, endpoints, model, host, stand_in):
        stand_in.fail_next("sagemaker:CreateEndpoint", times=2, code="ResourceLimitExceeded")
        with pytest.raises(InputFailure, match="ResourceLimitExceeded") as failure:
            endpoints.deploy(*model("first"))
        assert not failure.value.allow_retries

    def test_what_serves_is_scaled_still_when_an_update_is_refused(self, endpoints, model, stand_in):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        stand_in.fail_next("sagemaker:UpdateEndpoint", code="ResourceLimitExceeded")
        with pytest.raises(InputFailure, match="ResourceLimitExceeded"):
            sagemaker_endpoints(instance_type="ml.c7i.2xlarge").deploy(folder, ref)
        assert scaled() == [f"endpoint/{NAME}/variant/main"]

    def test_a_first_version_that_does_not_come_up_leaves_nothing_behind(self, endpoints, model, host):
        words = r"did not come up: .*did not pass the ping health check.*the weights are not what"
        with pytest.raises(EndpointError, match=words):
            endpoints.deploy(*model("first", "broken"))
        assert not host.endpoints
        assert not host.configs
        assert not host.models
        folder, ref = model("second")
        assert endpoints.deploy(folder, ref).model_version == ref.version

    def test_a_roll_out_goes_on_where_its_killed_starter_left_it(
        self, endpoints, model, host, stand_in, monkeypatch
    ):
        endpoints.deploy(*model("first"))
        folder, ref = model("second")
        host.may_go_on.clear()
        with monkeypatch.context() as patched:
            patched.setattr(service_module, "time", Killed)
            with pytest.raises(KeyboardInterrupt):
                endpoints.deploy(folder, ref)
        assert host.endpoints[NAME].status == "Updating"
        host.may_go_on.set()
        stand_in.calls.clear()
        assert endpoints.deploy(folder, ref).model_version == ref.version
        assert ("sagemaker", "UpdateEndpoint") not in stand_in.calls

    def test_a_roll_out_to_something_else_is_waited_for(self, endpoints, model, host, monkeypatch):
        endpoints.deploy(*model("first"))
        host.may_go_on.clear()
        with monkeypatch.context() as patched:
            patched.setattr(service_module, "time", Killed)
            with pytest.raises(KeyboardInterrupt):
                endpoints.deploy(*model("second"))
        threading.Timer(0.3, host.may_go_on.set).start()
        folder, ref = model("third")
        assert endpoints.deploy(folder, ref).model_version == ref.version

    def test_an_endpoint_that_was_deleted_by_hand_is_created_again(self, endpoints, model, host):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        access().client("sagemaker").delete_endpoint(EndpointName=NAME)
        eventually(lambda: NAME not in host.endpoints)
        assert endpoints.status() is None
        assert endpoints.deploy(folder, ref).model_version == ref.version

    def test_a_failing_container_is_told_in_its_words(self, endpoints, model):
        endpoints.deploy(*model("first", "fail"))
        with pytest.raises(EndpointError, match="answered 500: out of memory"):
            endpoints.invoke([OFFER])

    def test_what_cannot_be_cleared_away_does_not_fail_the_roll_out(self, endpoints, model, stand_in):
        folder, ref = model("first")
        stand_in.fail_next("sagemaker:ListEndpointConfigs", code="AccessDeniedException")
        assert endpoints.deploy(folder, ref).model_version == ref.version

    def test_a_denied_endpoint_is_one_line(self, endpoints, model, stand_in):
        stand_in.fail_next("sagemaker:DescribeEndpoint", code="AccessDeniedException")
        with pytest.raises(InputFailure, match=r"looking at endpoint offers: AccessDenied.*deploy/iam"):
            endpoints.check_available()


def variant(model: tuple[Path, ArtifactRef], weight: float) -> Variant:
    return Variant(folder=model[0], ref=model[1], weight=weight)


def scaled() -> list[str]:
    targets = (
        access().client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    )
    return [target["ResourceId"] for target in targets["ScalableTargets"]]


class Killed:
    """In the place of ``time`` in one module: whoever waits there is killed, and nobody else is."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt
