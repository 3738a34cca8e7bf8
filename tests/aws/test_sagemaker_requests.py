"""What exactly is asked of the services, held against their real models by botocore's stubber.

The stand-in carries requests out by its own understanding; here each is compared word by word.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from botocore.stub import ANY, Stubber
from hypothesis import given

from ml.errors import InputError
from resources import sagemaker_service
from resources.aws import AwsAccess
from resources.endpoints import RolloutPolicy
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
    split_slots,
)
from resources.sagemaker_scaling import EndpointScaling
from resources.sagemaker_service import EndpointService
from tests.aws.conftest import access

NAME = "offers"
POLICY = RolloutPolicy(
    canary_percent=10, canary_seconds=600, error_percent=1, p99_milliseconds=500, low_confidence_percent=40
)
KEY = "arn:aws:kms:eu-central-1:123456789012:key/k"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> AwsAccess:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    return access(kms_key=KEY)


@pytest.fixture
def stubbed(aws: AwsAccess) -> Iterator[dict[str, Stubber]]:
    """By service; every expected call must come, and no other."""
    services = ("sagemaker", "cloudwatch", "logs", "application-autoscaling")
    stubbers = {service: Stubber(aws.client(service)) for service in services}
    for stubber in stubbers.values():
        stubber.activate()
    yield stubbers
    for stubber in stubbers.values():
        stubber.assert_no_pending_responses()
        stubber.deactivate()


@pytest.fixture
def service(aws: AwsAccess) -> EndpointService:
    return EndpointService(aws, Naming(NAME), 0.01)


def fleet_requests(instance_type: str = "ml.c7i.xlarge", capture_percent: int = 30) -> FleetRequests:
    return FleetRequests(
        naming=Naming(NAME),
        role="arn:aws:iam::123456789012:role/offer-assets-jobs",
        vpc={},
        kms_key=KEY,
        images={"cpu": "image"},
        instance_type=instance_type,
        instances=2,
        capture_percent=capture_percent,
        capture_uri="s3://bucket/store/capture",
    )


def slot(name: str, version: str, weight: float) -> Slot:
    naming = Naming(NAME)
    model = Model(version=version, taxonomy_version="t1", name=naming.model(version, {}), request={})
    return Slot(name=name, model=model, weight=weight)


def test_a_guarded_update_has_a_canary_alarms_and_a_way_back(service, stubbed):
    stubbed["sagemaker"].add_response(
        "update_endpoint",
        {"EndpointArn": "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/offers"},
        {
            "EndpointName": NAME,
            "EndpointConfigName": "config",
            "RetainAllVariantProperties": True,
            "ExcludeRetainedVariantProperties": [
                {"VariantPropertyType": "DesiredWeight"},
                {"VariantPropertyType": "DataCaptureConfig"},
            ],
            "DeploymentConfig": {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "CANARY",
                        "WaitIntervalInSeconds": 600,
                        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 10},
                    },
                    "TerminationWaitInSeconds": 300,
                    "MaximumExecutionTimeoutInSeconds": 4_500,
                },
                "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "a"}, {"AlarmName": "b"}]},
            },
        },
    )
    assert service.begin_update("config", deployment_config(POLICY, ["a", "b"], 300))


def test_without_a_canary_all_requests_move_at_once_and_are_watched(service, stubbed):
    policy = RolloutPolicy(
        canary_percent=10, canary_seconds=0, error_percent=1, p99_milliseconds=1, low_confidence_percent=1
    )
    config = deployment_config(policy, ["a"], 300)["BlueGreenUpdatePolicy"]
    assert config["TrafficRoutingConfiguration"] == {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}
    assert config["TerminationWaitInSeconds"] == 300


def test_alarms_watch_errors_latency_and_confidence(aws, stubbed):
    def query(name, namespace, metric, dimensions):
        stat = {
            "Metric": {"Namespace": namespace, "MetricName": metric, "Dimensions": dimensions},
            "Period": 60,
            "Stat": "Sum",
        }
        return {"Id": name, "MetricStat": stat, "ReturnData": False}

    common = {
        "EvaluationPeriods": 1,
        "TreatMissingData": "notBreaching",
        "ComparisonOperator": "GreaterThanThreshold",
    }
    share = {"Id": "share", "Expression": "100 * part / whole", "Label": ANY, "ReturnData": True}
    variant = [{"Name": "EndpointName", "Value": NAME}, {"Name": "VariantName", "Value": "main"}]
    version = [{"Name": "ModelVersion", "Value": "v1"}]
    expected = [
        {
            "AlarmName": "offers-main-errors",
            "Threshold": 1.0,
            "Metrics": [
                query("part", "AWS/SageMaker", "Invocation5XXErrors", variant),
                query("whole", "AWS/SageMaker", "Invocations", variant),
                share,
            ],
        },
        {
            "AlarmName": "offers-main-latency",
            "Threshold": 500_000.0,
            "Namespace": "AWS/SageMaker",
            "MetricName": "ModelLatency",
            "Dimensions": variant,
            "ExtendedStatistic": "p99",
            "Period": 60,
        },
        {
            "AlarmName": "offers-model-v1-low-confidence",
            "Threshold": 40.0,
            "Metrics": [
                query("part", "OfferAssets/offers", "LowConfidenceOffers", version),
                query("whole", "OfferAssets/offers", "Offers", version),
                share,
            ],
        },
    ]
    for alarm in expected:
        stubbed["cloudwatch"].add_response(
            "put_metric_alarm", {}, {**common, "AlarmDescription": ANY, **alarm}
        )
    metrics = EndpointMetrics(aws, NAME)
    metrics.put_alarms(POLICY, "v1")
    assert metrics.alarm_names("v1") == [alarm["AlarmName"] for alarm in expected]


def test_the_log_is_kept_for_a_month_and_counted_from(aws, stubbed):
    group = "/aws/sagemaker/Endpoints/offers"
    stubbed["logs"].add_client_error(
        "create_log_group", "ResourceAlreadyExistsException", expected_params={"logGroupName": group}
    )
    stubbed["logs"].add_response("put_retention_policy", {}, {"logGroupName": group, "retentionInDays": 30})
    for metric, value in (("Offers", "$.offers"), ("LowConfidenceOffers", "$.low_confidence")):
        stubbed["logs"].add_response(
            "put_metric_filter",
            {},
            {
                "logGroupName": group,
                "filterName": f"offers-{metric}",
                "filterPattern": '{ $.event = "answers" }',
                "metricTransformations": [
                    {
                        "metricName": metric,
                        "metricNamespace": "OfferAssets/offers",
                        "metricValue": value,
                        "dimensions": {"ModelVersion": "$.model_version"},
                        "unit": "Count",
                    }
                ],
            },
        )
    EndpointMetrics(aws, NAME).prepare_log()


def test_instances_follow_the_requests_of_each(aws, stubbed):
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": "endpoint/offers/variant/main",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
    stubbed["application-autoscaling"].add_response(
        "register_scalable_target", {}, {**target, "MinCapacity": 2, "MaxCapacity": 20}
    )
    stubbed["application-autoscaling"].add_response(
        "put_scaling_policy",
        {"PolicyARN": "arn"},
        {
            **target,
            "PolicyName": "offers-main-requests",
            "PolicyType": "TargetTrackingScaling",
            "TargetTrackingScalingPolicyConfiguration": {
                "TargetValue": 900.0,
                "PredefinedMetricSpecification": {
                    "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
                },
                "ScaleOutCooldown": 60,
                "ScaleInCooldown": 600,
            },
        },
    )
    EndpointScaling(aws, NAME, instances=(2, 20), requests_per_minute=900).follow_requests([MAIN])


def test_a_shadow_stands_beside_one_variant_and_has_its_share(service, stubbed):
    fleet = Fleet(slots=[slot(MAIN, "0" * 12, 1.0)], shadow=slot(f"model-{'1' * 12}", "1" * 12, weight=0.25))
    name, request = fleet_requests().config(fleet)
    variant = {
        "InstanceType": "ml.c7i.xlarge",
        "InitialInstanceCount": 2,
        "ModelDataDownloadTimeoutInSeconds": 900,
        "ContainerStartupHealthCheckTimeoutInSeconds": 300,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    stubbed["sagemaker"].add_client_error(
        "describe_endpoint_config",
        "ValidationException",
        'Could not find endpoint configuration "arn".',
        expected_params={"EndpointConfigName": name},
    )
    stubbed["sagemaker"].add_response(
        "create_endpoint_config",
        {"EndpointConfigArn": "arn:aws:sagemaker:eu-central-1:123456789012:endpoint-config/c"},
        {
            "EndpointConfigName": name,
            "ProductionVariants": [
                {**variant, "VariantName": MAIN, "ModelName": ANY, "InitialVariantWeight": 1.0}
            ],
            "ShadowProductionVariants": [
                {**variant, "VariantName": ANY, "ModelName": ANY, "InitialVariantWeight": 0.25}
            ],
            "DataCaptureConfig": {
                "EnableCapture": True,
                "InitialSamplingPercentage": 30,
                "DestinationS3Uri": "s3://bucket/store/capture",
                "KmsKeyId": KEY,
                "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
                "CaptureContentTypeHeader": {
                    "JsonContentTypes": ["application/json", "application/jsonlines", "application/x-ndjson"]
                },
            },
            "KmsKeyId": KEY,
            "Tags": [
                {"Key": f"offer-assets:taxonomy-of-{version}", "Value": "t1"}
                for version in ("0" * 12, "1" * 12)
            ],
        },
    )
    service.make_config(name, request)


def test_weights_alone_are_an_update_of_weights(service, stubbed):
    stubbed["sagemaker"].add_response(
        "update_endpoint_weights_and_capacities",
        {"EndpointArn": "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/offers"},
        {
            "EndpointName": NAME,
            "DesiredWeightsAndCapacities": [
                {"VariantName": "main", "DesiredWeight": 0.75},
                {"VariantName": "b", "DesiredWeight": 0.25},
            ],
        },
    )
    assert service.begin_weighing({"main": 0.75, "b": 0.25})


def test_an_update_that_somebody_else_began_is_told_from_a_refusal(service, stubbed):
    for message in ('Cannot update in-progress endpoint "arn".', "The variant(s) must be deregistered"):
        stubbed["sagemaker"].add_client_error("update_endpoint", "ValidationException", message)
    assert not service.begin_update("config", None)
    with pytest.raises(InputError, match="must be deregistered"):
        service.begin_update("config", None)


def test_what_was_just_created_and_is_not_found_yet_is_waited_for(service, stubbed, monkeypatch):
    monkeypatch.setattr(sagemaker_service, "_SECONDS_TO_BE_SEEN", (0.0, 0.0))
    message = 'Could not find endpoint configuration "arn".'
    for _ in range(2):
        stubbed["sagemaker"].add_client_error("create_endpoint", "ValidationException", message)
    stubbed["sagemaker"].add_response(
        "create_endpoint",
        {"EndpointArn": "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/offers"},
        {"EndpointName": NAME, "EndpointConfigName": "config"},
    )
    assert service.begin_creation("config")
    for _ in range(3):
        stubbed["sagemaker"].add_client_error("update_endpoint", "ValidationException", message)
    with pytest.raises(InputError, match="Could not find endpoint configuration"):
        service.begin_update("config", None)


def test_errors_in_the_log_are_found_behind_an_empty_page(aws, stubbed):
    since = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    asked = {"logGroupName": ANY, "startTime": round(since.timestamp() * 1_000), "filterPattern": '"error:"'}
    stubbed["logs"].add_response("filter_log_events", {"events": [], "nextToken": "2"}, asked)
    event = {"message": "error: the weights are damaged\n"}
    stubbed["logs"].add_response("filter_log_events", {"events": [event]}, {**asked, "nextToken": "2"})
    assert EndpointMetrics(aws, NAME).last_errors(since).endswith("says: error: the weights are damaged")


def test_what_the_service_says_of_an_update_is_understood(service, stubbed):
    now = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    stubbed["sagemaker"].add_response(
        "describe_endpoint",
        {
            "EndpointName": NAME,
            "EndpointArn": "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/offers",
            "EndpointConfigName": "old",
            "EndpointStatus": "Updating",
            "CreationTime": now,
            "LastModifiedTime": now,
            "ProductionVariants": [{"VariantName": "main", "CurrentWeight": 1.0, "DesiredInstanceCount": 3}],
            "PendingDeploymentSummary": {
                "EndpointConfigName": "new",
                "ProductionVariants": [{"VariantName": "main", "VariantStatus": [{"Status": "Baking"}]}],
            },
        },
    )
    described = service.look()
    assert (described.under_way, described.progress, described.instances) == (
        "new",
        "main: Baking",
        {"main": 3},
    )


@pytest.mark.parametrize(
    ("instance_type", "has_key"),
    [
        ("ml.c7i.xlarge", True),
        ("ml.inf2.xlarge", True),
        ("ml.c6gn.xlarge", True),
        ("ml.m5d.large", False),
        ("ml.c6gd.large", False),
        ("ml.g5.xlarge", False),
        ("ml.trn1.2xlarge", False),
        ("ml.p6-b200.48xlarge", False),
    ],
)
def test_a_volume_is_encrypted_by_our_key_unless_its_hardware_does(instance_type, has_key):
    _, request = fleet_requests(instance_type).config(Fleet(slots=[slot(MAIN, "0" * 12, 1.0)]))
    assert ("KmsKeyId" in request) == has_key


def test_nothing_is_captured_where_nothing_shall_be():
    _, request = fleet_requests(capture_percent=0).config(Fleet(slots=[slot(MAIN, "0" * 12, 1.0)]))
    assert "DataCaptureConfig" not in request


def test_a_canary_of_one_instance_is_refused():
    check_canary(POLICY, 2)
    with pytest.raises(InputError, match="MIN_INSTANCES=1"):
        check_canary(POLICY, 1)


VERSIONS = st.lists(
    st.text("0123456789abcdef", min_size=12, max_size=12), min_size=1, max_size=5, unique=True
)
WEIGHTS = st.floats(0.01, 1_000)


@given(VERSIONS, st.data())
def test_a_split_gives_every_version_one_slot_and_its_share(versions, data):
    models = [(slot(MAIN, version, 1).model, data.draw(WEIGHTS)) for version in versions]
    before = data.draw(st.sampled_from([None, "f" * 12, *versions]))
    slots = split_slots(models, before)
    assert sorted(each.model.version for each in slots) == sorted(versions)
    assert len({each.name for each in slots}) == len(slots)
    assert slots[0].name == MAIN
    if before in versions:
        assert slots[0].model.version == before
    total = sum(weight for _, weight in models)
    shares = {model.version: weight / total for model, weight in models}
    assert all(abs(shares[each.model.version] - each.weight) < 1e-5 for each in slots)


@given(VERSIONS, st.lists(WEIGHTS, min_size=5, max_size=5), st.lists(WEIGHTS, min_size=5, max_size=5))
def test_the_name_of_a_configuration_says_what_it_is(versions, weights, others):
    naming, requests = Naming(NAME), fleet_requests()

    def named(weights):
        pairs = zip(versions, weights, strict=False)
        return requests.config(Fleet(slots=[slot(f"s{v}", v, round(w, 3)) for v, w in pairs]))[0]

    assert naming.is_config(named(weights))
    assert len(named(weights)) <= 63
    assert named(weights) == named(list(weights))
    assert naming.fleet_of(named(weights)) == naming.fleet_of(named(others))
    other = fleet_requests(capture_percent=31).config(Fleet(slots=[slot(MAIN, versions[0], 1.0)]))[0]
    assert naming.fleet_of(other) != naming.fleet_of(named(weights))


def test_names_of_an_endpoint_are_not_those_of_one_with_a_longer_name():
    naming, longer = Naming(NAME), Naming(f"{NAME}-b")
    model = longer.model("0" * 12, {})
    assert longer.version_of(model) == "0" * 12
    assert naming.version_of(model) is None
    assert naming.version_of("offers-transform-0123456789ab") is None
