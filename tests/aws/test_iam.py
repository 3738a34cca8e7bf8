"""The policies of deploy/: they allow what the code does, and nothing else."""

import json
from pathlib import Path

import pytest

from ml.errors import InputError
from offer_assets.__main__ import main
from offer_assets.iam import documents, render
from resources.settings import Settings
from tests.aws.conftest import BUCKET, access
from tests.aws.iam import actions_of, allowed_actions, calls_in, methods_called_on

ROOT = Path(__file__).resolve().parents[2]
IAM = ROOT / "deploy" / "iam"

NEEDED_ALONG = {
    "sagemaker:CreateTrainingJob": {
        "iam:PassRole",
        "kms:CreateGrant",
        "kms:DescribeKey",
        "sagemaker:AddTags",
    },
    "sagemaker:CreateModel": {"iam:PassRole", "sagemaker:AddTags"},
    "sagemaker:CreateEndpointConfig": {"kms:CreateGrant", "kms:DescribeKey", "sagemaker:AddTags"},
    "sagemaker:CreateEndpoint": {"sagemaker:AddTags"},
    "sagemaker:CreateTransformJob": {"kms:CreateGrant", "kms:DescribeKey", "sagemaker:AddTags"},
    "sagemaker:CreateModelPackageGroup": {"sagemaker:AddTags"},
    # As in AWS's managed policy for the model registry; whoever calls needs them, there is no role.
    "sagemaker:CreateModelPackage": {
        "ecr:BatchGetImage",
        "ecr:DescribeImages",
        "kms:CreateGrant",
        "kms:Decrypt",
        "kms:DescribeKey",
        "kms:GenerateDataKey",
        "sagemaker:AddTags",
    },
    "application-autoscaling:RegisterScalableTarget": {"iam:CreateServiceLinkedRole"},
    "s3:GetObject": {
        "kms:Decrypt",
        "s3:ListBucket",  # without it, what is not there is said to be forbidden
    },
    "s3:PutObject": {
        "kms:Decrypt",  # of the parts of an upload, when they are put together
        "kms:GenerateDataKey",
        "s3:AbortMultipartUpload",
    },
}
"""What a call needs beside the action of its own name."""

OF_MLFLOW = {"set_terminated": {"GetRun", "UpdateRun"}, "get_experiment_by_name": {"GetExperimentByName"}}
"""Methods of MLflow's client that call the server by other names than their own."""

WITHOUT_A_RESOURCE = {
    "application-autoscaling:DescribeScalableTargets",
    "application-autoscaling:DescribeScalingPolicies",
    "cloudwatch:GetMetricData",
    "cloudwatch:PutMetricData",
    "ecr:GetAuthorizationToken",
    "sagemaker:ListEndpointConfigs",
    "sagemaker:ListModelPackageGroups",
    "sagemaker:ListModelPackages",
    "sagemaker:ListModels",
    "sagemaker:ListTrainingJobs",
    "sagemaker:ListTransformJobs",
    # Interfaces in the subnets of a VPC are made before they have a name.
    "ec2:CreateNetworkInterface",
    "ec2:CreateNetworkInterfacePermission",
    "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
}
"""Actions that IAM knows no resource for; only these may be allowed on ``*``."""

ACCOUNT = {
    "OFFER_ASSETS_AWS_STORE": "s3://shop-data/offers",
    "OFFER_ASSETS_AWS_REGION": "eu-central-1",
    "OFFER_ASSETS_AWS_ROLE": "arn:aws:iam::123456789012:role/offer-assets-jobs",
    "OFFER_ASSETS_AWS_KMS_KEY": "arn:aws:kms:eu-central-1:123456789012:key/1234abcd",
}


_SSE = "s3:x-amz-server-side-encryption"


@pytest.fixture
def account(monkeypatch) -> Settings:
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    return Settings.from_environment()


def test_every_call_of_aws_can_be_told_from_the_source():
    _, unclear = calls_in(ROOT / "resources")
    assert unclear == [], "write x = ….client('service') and call x.method(…)"


def test_the_orchestrator_may_do_what_the_code_does_and_nothing_else():
    needed = _needed_by(ROOT / "resources")
    allowed = allowed_actions("orchestrator")
    missing = {action: places for action, places in needed.items() if action not in allowed}
    assert missing == {}, f"add to deploy/iam/orchestrator.json: {missing}"
    unneeded = sorted(allowed - set(needed))
    assert unneeded == [], f"remove from deploy/iam/orchestrator.json, as no code needs it: {unneeded}"


def test_a_call_in_the_source_is_found_however_it_is_written(tmp_path):
    code = tmp_path / "resources" / "doors.py"
    code.parent.mkdir()
    code.write_text(
        "from resources.aws import AwsAccess\n"
        "def one(aws):\n    s3 = aws.client('s3')\n    s3.upload_file('a', 'b', 'c')\n"
        "    def inner():\n        return s3.head_object(Bucket='b', Key='k')\n"
        "def two(s3):\n    s3.delete_object(Bucket='b', Key='k')\n"
        "def three(aws):\n    client = aws.client('sagemaker')\n    client.get_paginator('list_models')\n"
        "def four(aws):\n    aws.client('logs').get_log_events(logGroupName='g')\n"
        "def five(thing):\n    thing.create_training_job()\n"
    )
    calls, unclear = calls_in(code.parent)
    assert {(call.service, call.method) for call in calls} == {
        ("s3", "upload_file"),
        ("s3", "head_object"),
        ("s3", "delete_object"),
        ("sagemaker", "list_models"),
        ("logs", "get_log_events"),
    }
    assert len(unclear) == 1
    assert "five" not in unclear[0]
    assert "thing.create_training_job()" in unclear[0]
    needed = {action for call in calls for action in actions_of(call)}
    assert {"s3:PutObject", "s3:AbortMultipartUpload", "s3:GetObject", "sagemaker:ListModels"} <= needed


@pytest.mark.parametrize("document", ["orchestrator", "jobs-role", "deployer"])
def test_a_policy_names_its_actions_and_its_resources(document):
    for statement in json.loads((IAM / f"{document}.json").read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in _list(statement["Action"]):
            service, _, name = action.partition(":")
            assert service, statement["Sid"]
            assert name.isalnum(), f"{statement['Sid']}: {action}"
            if "*" in _list(statement["Resource"]):
                assert action in WITHOUT_A_RESOURCE, f"{statement['Sid']}: {action} has a resource: name it"


def test_the_role_is_handed_to_sagemaker_alone(account):
    policy = json.loads(render(account, "orchestrator"))
    (passing,) = [each for each in policy["Statement"] if "iam:PassRole" in _list(each["Action"])]
    assert passing["Resource"] == ACCOUNT["OFFER_ASSETS_AWS_ROLE"]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}


def test_containers_can_only_be_started_without_a_network(account):
    policy = json.loads(render(account, "orchestrator"))
    for action in ("sagemaker:CreateTrainingJob", "sagemaker:CreateModel"):
        (starting,) = [each for each in policy["Statement"] if action in _list(each["Action"])]
        assert starting["Condition"] == {"Bool": {"sagemaker:NetworkIsolation": "true"}}


def test_jobs_write_nowhere_but_into_folders_of_their_own(account):
    policy = json.loads(render(account, "jobs-role"))
    writing = [
        resource
        for statement in policy["Statement"]
        if {"s3:PutObject", "s3:DeleteObject"} & set(_list(statement["Action"]))
        for resource in _list(statement["Resource"])
    ]
    assert {resource.removeprefix("arn:aws:s3:::shop-data/offers/") for resource in writing} == {
        "jobs/*",
        "checkpoints/*",
        "transform/*",
        "capture/*",
    }


@pytest.mark.parametrize("document", sorted(documents()))
def test_a_rendered_document_is_json_without_placeholders(account, document):
    rendered = render(account, document, repository="shop/offers")
    json.loads(rendered)
    assert "${" not in rendered


def test_without_a_key_of_ones_own_nothing_is_said_about_it(account, monkeypatch):
    monkeypatch.setenv("OFFER_ASSETS_AWS_KMS_KEY", "")
    for document in ("orchestrator", "jobs-role", "bucket-policy"):
        assert "kms:" not in render(Settings.from_environment(), document).replace("aws:kms", "")


@pytest.mark.parametrize(
    ("variable", "value", "document", "said"),
    [
        ("OFFER_ASSETS_AWS_STORE", "", "orchestrator", "OFFER_ASSETS_AWS_STORE"),
        ("OFFER_ASSETS_AWS_ROLE", "", "orchestrator", "OFFER_ASSETS_AWS_ROLE"),
        ("OFFER_ASSETS_AWS_ROLE", ACCOUNT["OFFER_ASSETS_AWS_ROLE"], "deployer-trust", "--repository"),
        ("OFFER_ASSETS_AWS_ROLE", ACCOUNT["OFFER_ASSETS_AWS_ROLE"], "operator", "orchestrator"),
    ],
)
def test_what_a_document_lacks_is_one_line(account, monkeypatch, variable, value, document, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=said):
        render(Settings.from_environment(), document)


def test_the_command_prints_a_policy_that_can_be_applied_as_it_is(account, capsys):
    assert main(["iam", "jobs-role-trust"]) == 0
    (statement,) = json.loads(capsys.readouterr().out)["Statement"]
    assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}


def test_s3_takes_the_policy_and_the_lifecycle_of_the_bucket(account, stand_in):
    s3 = access().client("s3")
    s3.put_bucket_policy(Bucket=BUCKET, Policy=render(account, "bucket-policy"))
    lifecycle = json.loads(render(account, "s3-lifecycle"))
    s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=lifecycle)
    rules = s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    expiring = {rule["Filter"]["Prefix"] for rule in rules if "Expiration" in rule}
    assert expiring == {f"offers/{name}/" for name in ("jobs", "checkpoints", "transform", "capture")}


@pytest.mark.parametrize(
    ("asked", "is_denied"),
    [
        ({}, False),  # the bucket's default: checkpoints of a job, which no request of ours names a key for
        ({_SSE: "aws:kms", f"{_SSE}-aws-kms-key-id": ACCOUNT["OFFER_ASSETS_AWS_KMS_KEY"]}, False),
        ({_SSE: "aws:kms", f"{_SSE}-aws-kms-key-id": "arn:aws:kms:eu-central-1:1:key/other"}, True),
        ({_SSE: "aws:kms"}, True),  # the key that AWS manages
        ({_SSE: "AES256"}, True),
    ],
)
def test_the_bucket_takes_what_our_key_encrypts_and_what_asks_for_nothing(account, asked, is_denied):
    statements = json.loads(render(account, "bucket-policy"))["Statement"]
    puts = [each for each in statements if each["Action"] == "s3:PutObject"]
    assert len(puts) == 2
    assert any(_applies(each["Condition"], asked) for each in puts) == is_denied


def _applies(condition: dict[str, dict[str, str]], context: dict[str, str]) -> bool:
    """Whether a condition holds, by the rules of IAM: what is missing is not equal to anything."""
    holds = {
        "Null": lambda key, value: (key not in context) == (value == "true"),
        "StringNotEquals": lambda key, value: context.get(key) != value,
    }
    return all(
        holds[operator](key, value) for operator, each in condition.items() for key, value in each.items()
    )


def _needed_by(folder: Path) -> dict[str, list[str]]:
    """Actions that the code needs, each with the places that need it."""
    calls, _ = calls_in(folder)
    needed: dict[str, list[str]] = {}
    for call in calls:
        for action in actions_of(call):
            for each in {action, *NEEDED_ALONG.get(action, ())}:
                needed.setdefault(each, []).append(f"{call.place} {call.method}")
    tracking = folder / "tracking.py"
    for method in methods_called_on("client", tracking):
        own_name = "".join(word.title() for word in method.split("_"))
        for name in OF_MLFLOW.get(method, {own_name}):
            # A tracking server asks for each action, an app for the one that stands for all.
            for action in (f"sagemaker-mlflow:{name}", "sagemaker:CallMlflowAppApi"):
                needed.setdefault(action, []).append(f"{tracking.name} {method}")
    return needed


def _list(value) -> list[str]:
    return [value] if isinstance(value, str) else value
