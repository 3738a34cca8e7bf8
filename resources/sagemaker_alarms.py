"""Alarms of a SageMaker endpoint, and the metrics that they and people look at.

Errors and latency are metrics of the service. How sure the model is, is not: containers have no network,
so each serving worker writes a line of JSON to its log, and two metric filters count from these lines.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import dagster as dg
import msgspec

from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors
from resources.endpoints import RolloutPolicy
from resources.sagemaker_fleet import MAIN

ANSWERS_PATTERN = '{ $.event = "answers" }'
"""Lines of :mod:`ml.serving.worker` that say of how many offers the model was not sure."""

_SERVICE_NAMESPACE = "AWS/SageMaker"
_DAYS_OF_LOGS = 30
_ALARM_SECONDS = 60
_OBSERVED_SECONDS = 300
"""Of one value of the metrics that :meth:`EndpointMetrics.seen` adds up."""

_MICROSECONDS = 1_000
_LINES_SHOWN = 15


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the metrics tell of one variant."""

    requests: int
    errors: int
    p99_milliseconds: float | None
    low_confidence_share: float | None


class EndpointMetrics:
    """Alarms, metrics and log of one endpoint."""

    def __init__(self, aws: AwsAccess, endpoint: str) -> None:
        self._aws = aws
        self._endpoint = endpoint
        self._namespace = f"OfferAssets/{endpoint}"
        self._log_group = f"/aws/sagemaker/Endpoints/{endpoint}"

    def prepare_log(self) -> None:
        """Make the log group, which keeps its lines for a while, and count in it how sure the model is."""
        logs = self._aws.client("logs")
        with aws_errors(f"preparing the log group {self._log_group}"):
            # It may be there: of an earlier deployment, or SageMaker was first.
            with suppress(logs.exceptions.ResourceAlreadyExistsException):
                logs.create_log_group(logGroupName=self._log_group)
            logs.put_retention_policy(logGroupName=self._log_group, retentionInDays=_DAYS_OF_LOGS)
            for metric, field in (("Offers", "offers"), ("LowConfidenceOffers", "low_confidence")):
                logs.put_metric_filter(
                    logGroupName=self._log_group,
                    filterName=f"{self._endpoint}-{metric}",
                    filterPattern=ANSWERS_PATTERN,
                    metricTransformations=[
                        {
                            "metricName": metric,
                            "metricNamespace": self._namespace,
                            "metricValue": f"$.{field}",
                            "dimensions": {"ModelVersion": "$.model_version"},
                            "unit": "Count",
                        }
                    ],
                )

    def put_alarms(self, policy: RolloutPolicy, version: str) -> None:
        """Set the alarms that watch the roll-out of a version; again is no change."""
        cloudwatch = self._aws.client("cloudwatch")
        alarms = [self._errors(policy), self._latency(policy), self._low_confidence(policy, version)]
        for alarm in alarms:
            with aws_errors(f"setting the alarm {alarm['AlarmName']}"):
                cloudwatch.put_metric_alarm(
                    **alarm, TreatMissingData="notBreaching", ComparisonOperator="GreaterThanThreshold"
                )

    def alarm_names(self, version: str) -> list[str]:
        """Of the alarms that watch the roll-out of a version."""
        return [self._name("errors"), self._name("latency"), self._low_confidence_name(version)]

    def tripped(self, alarms: Sequence[str]) -> dict[str, str]:
        """Those of the alarms that are in ALARM, with what CloudWatch says of each."""
        cloudwatch = self._aws.client("cloudwatch")
        with aws_errors(f"reading the alarms of endpoint {self._endpoint}"):
            found = cloudwatch.describe_alarms(AlarmNames=list(alarms))["MetricAlarms"]
        return {
            alarm["AlarmName"]: f"{alarm.get('StateReason', '')}: {alarm.get('AlarmDescription', '')}"
            for alarm in found
            if alarm["StateValue"] == "ALARM"
        }

    def delete_alarms(self, *, but_of: Sequence[str] = (), all_of_them: bool = False) -> None:
        """Remove alarms that only concern versions other than these; or all, with the filters."""
        cloudwatch = self._aws.client("cloudwatch")
        with aws_errors(f"deleting alarms of endpoint {self._endpoint}"):
            pages = cloudwatch.get_paginator("describe_alarms").paginate(
                AlarmNamePrefix=f"{self._endpoint}-model-"
            )
            kept = {self._low_confidence_name(version) for version in but_of}
            names = [alarm["AlarmName"] for page in pages for alarm in page["MetricAlarms"]]
            unwanted = [name for name in names if name.endswith("-low-confidence") and name not in kept]
            if all_of_them:
                unwanted += [self._name("errors"), self._name("latency")]
            for start in range(0, len(unwanted), 100):
                cloudwatch.delete_alarms(AlarmNames=unwanted[start : start + 100])
        if all_of_them:
            self._delete_filters()

    def seen(self, slot: str, version: str, since: datetime.datetime) -> Seen:
        """What was seen of a variant; of its latency the worst five minutes."""
        offers, unsure = (
            _metric(self._namespace, name, ModelVersion=version) for name in ("Offers", "LowConfidenceOffers")
        )
        queries = {
            "requests": (self._service_metric("Invocations", slot), "Sum"),
            "errors": (self._service_metric("Invocation5XXErrors", slot), "Sum"),
            "latency": (self._service_metric("ModelLatency", slot), "p99"),
            "offers": (offers, "Sum"),
            "unsure": (unsure, "Sum"),
        }
        cloudwatch = self._aws.client("cloudwatch")
        values: dict[str, list[float]] = {name: [] for name in queries}
        with aws_errors(f"reading the metrics of endpoint {self._endpoint}"):
            pages = cloudwatch.get_paginator("get_metric_data").paginate(
                MetricDataQueries=[
                    _query(name, metric, stat, _OBSERVED_SECONDS, returned=True)
                    for name, (metric, stat) in queries.items()
                ],
                StartTime=since,
                EndTime=datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=_ALARM_SECONDS),
            )
            for page in pages:
                for result in page["MetricDataResults"]:
                    values[result["Id"]] += result["Values"]
        offered = sum(values["offers"])
        return Seen(
            requests=round(sum(values["requests"])),
            errors=round(sum(values["errors"])),
            p99_milliseconds=max(values["latency"]) / _MICROSECONDS if values["latency"] else None,
            low_confidence_share=sum(values["unsure"]) / offered if offered else None,
        )

    def last_errors(self, since: datetime.datetime) -> str:
        """What containers said in their log of errors since then; empty if nothing can be read."""
        logs = self._aws.client("logs")
        try:
            with aws_errors(f"reading {self._log_group}"):
                # In pages: one may be empty though a later one is not.
                pages = logs.get_paginator("filter_log_events").paginate(
                    logGroupName=self._log_group,
                    startTime=int(since.timestamp() * 1_000),
                    filterPattern='"error:"',
                )
                events = [event for page in pages for event in page["events"]]
        except (InputError, dg.Failure) as error:
            return f"(its log cannot be read: {error})"
        lines = list(dict.fromkeys(event["message"].strip() for event in events))[-_LINES_SHOWN:]
        return f"{self._log_group} says: " + " | ".join(lines) if lines else ""

    def _errors(self, policy: RolloutPolicy) -> dict[str, Any]:
        return self._share(
            self._name("errors"),
            "percent of the requests end in a server error",
            f"OFFER_ASSETS_ALARM_ERROR_PERCENT={policy.error_percent:g}",
            self._service_metric("Invocation5XXErrors", MAIN),
            self._service_metric("Invocations", MAIN),
            policy.error_percent,
        )

    def _latency(self, policy: RolloutPolicy) -> dict[str, Any]:
        metric = self._service_metric("ModelLatency", MAIN)
        return {
            "AlarmName": self._name("latency"),
            "AlarmDescription": "p99 of the latency in ms: more than "
            f"OFFER_ASSETS_ALARM_P99_MILLISECONDS={policy.p99_milliseconds:g}",
            "Namespace": metric["Namespace"],
            "MetricName": metric["MetricName"],
            "Dimensions": metric["Dimensions"],
            "ExtendedStatistic": "p99",
            "Period": _ALARM_SECONDS,
            "EvaluationPeriods": 1,
            "Threshold": float(policy.p99_milliseconds * _MICROSECONDS),
        }

    def _low_confidence(self, policy: RolloutPolicy, version: str) -> dict[str, Any]:
        return self._share(
            self._low_confidence_name(version),
            f"percent of the offers: model {version} is less than half sure",
            f"OFFER_ASSETS_ALARM_LOW_CONFIDENCE_PERCENT={policy.low_confidence_percent:g}",
            _metric(self._namespace, "LowConfidenceOffers", ModelVersion=version),
            _metric(self._namespace, "Offers", ModelVersion=version),
            policy.low_confidence_percent,
        )

    def _share(
        self, name: str, what: str, setting: str, part: dict[str, Any], whole: dict[str, Any], limit: float
    ) -> dict[str, Any]:
        """Where nothing was counted there is no share: the division by zero is a missing value."""
        return {
            "AlarmName": name,
            "AlarmDescription": f"{what}, more than {setting}",
            "Metrics": [
                _query("part", part, "Sum", _ALARM_SECONDS, returned=False),
                _query("whole", whole, "Sum", _ALARM_SECONDS, returned=False),
                {"Id": "share", "Expression": "100 * part / whole", "Label": what, "ReturnData": True},
            ],
            "EvaluationPeriods": 1,
            "Threshold": float(limit),
        }

    def _service_metric(self, name: str, slot: str) -> dict[str, Any]:
        return _metric(_SERVICE_NAMESPACE, name, EndpointName=self._endpoint, VariantName=slot)

    def _name(self, what: str) -> str:
        return f"{self._endpoint}-{MAIN}-{what}"

    def _low_confidence_name(self, version: str) -> str:
        return f"{self._endpoint}-model-{version}-low-confidence"

    def _delete_filters(self) -> None:
        logs = self._aws.client("logs")
        with aws_errors(f"deleting the metric filters of {self._log_group}"):
            for metric in ("Offers", "LowConfidenceOffers"):
                with suppress(logs.exceptions.ResourceNotFoundException):
                    logs.delete_metric_filter(
                        logGroupName=self._log_group, filterName=f"{self._endpoint}-{metric}"
                    )


def _metric(namespace: str, name: str, **dimensions: str) -> dict[str, Any]:
    return {
        "Namespace": namespace,
        "MetricName": name,
        "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
    }


def _query(name: str, metric: dict[str, Any], stat: str, seconds: int, *, returned: bool) -> dict[str, Any]:
    return {
        "Id": name,
        "MetricStat": {"Metric": metric, "Period": seconds, "Stat": stat},
        "ReturnData": returned,
    }
