"""CloudWatch of the stand-in for endpoints: what was seen, counted as the code asked, and alarms on it.

Metric filters and alarms are those that the code put into moto; here they are carried out.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from typing import Any

from moto.cloudwatch.models import Alarm, Statistics, cloudwatch_backends
from moto.logs.models import logs_backends

from tests.aws.stand_in import ACCOUNT, REGION

Sample = tuple[float, str, str, dict[str, str], float]
"""Time (monotonic), namespace, metric, dimensions, value."""


class Metrics:
    """What the invocations of all endpoints left behind."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._lock = threading.Lock()

    def note_invocation(self, endpoint: str, slot: str, seconds: float, status: int) -> None:
        """As SageMaker does of each request."""
        dimensions = {"EndpointName": endpoint, "VariantName": slot}
        self._note("AWS/SageMaker", "Invocations", dimensions, 1.0)
        self._note("AWS/SageMaker", "Invocation5XXErrors", dimensions, float(status >= 500))
        self._note("AWS/SageMaker", "ModelLatency", dimensions, seconds * 1_000_000)

    def note_log_line(self, endpoint: str, line: str) -> None:
        """Carry out the metric filters of the endpoint's log group."""
        group = f"/aws/sagemaker/Endpoints/{endpoint}"
        try:
            fields = json.loads(line)
        except ValueError:
            return
        found = {
            each["filterName"]: each
            for each in logs_backends[ACCOUNT][REGION].filters.metric_filters
            if each["logGroupName"] == group
        }
        for metric_filter in found.values():
            wanted = re.fullmatch(r'\{ \$\.(\w+) = "(\w+)" \}', metric_filter["filterPattern"])
            assert wanted, f"the stand-in does not know the pattern {metric_filter['filterPattern']}"
            if fields.get(wanted[1]) != wanted[2]:
                continue
            for transformation in metric_filter["metricTransformations"]:
                self._note(
                    transformation["metricNamespace"],
                    transformation["metricName"],
                    {
                        name: fields[path.removeprefix("$.")]
                        for name, path in transformation["dimensions"].items()
                    },
                    float(fields[transformation["metricValue"].removeprefix("$.")]),
                )

    def tripped(self, alarms: list[str], since: float) -> list[str]:
        """Those of the alarms that are in ALARM, by what was seen since then or by a test's word."""
        known = cloudwatch_backends[ACCOUNT][REGION].alarms
        for alarm in (known[name] for name in alarms if name in known):
            value = self._value(alarm, since)
            if value is not None and value > alarm.threshold:
                alarm.update_state(f"{value:g} was greater than the threshold", "{}", "ALARM")
        return [name for name in alarms if name in known and known[name].state_value == "ALARM"]

    def _note(self, namespace: str, name: str, dimensions: dict[str, str], value: float) -> None:
        with self._lock:
            self._samples.append((time.monotonic(), namespace, name, dimensions, value))
            cloudwatch_backends[ACCOUNT][REGION].put_metric_data(
                namespace,
                [
                    {
                        "MetricName": name,
                        "Value": value,
                        "Dimensions": [{"Name": key, "Value": each} for key, each in dimensions.items()],
                    }
                ],
            )

    def _value(self, alarm: Alarm, since: float) -> float | None:
        assert alarm.comparison_operator == "GreaterThanThreshold"
        if not alarm.metric_data_queries:
            dimensions = {each.name: each.value for each in alarm.dimensions}
            assert alarm.extended_statistic
            return self._statistic(
                alarm.namespace, alarm.metric_name, dimensions, alarm.extended_statistic, since
            )
        values: dict[str, Any] = {}
        for query in alarm.metric_data_queries:
            if query.metric_stat is not None:
                metric = query.metric_stat.metric
                dimensions = {each.name: each.value for each in metric.dimensions}
                values[query.id] = self._statistic(
                    metric.namespace, metric.metric_name, dimensions, query.metric_stat.stat, since
                )
        expression = next(query.expression for query in alarm.metric_data_queries if query.expression)
        try:
            return float(eval(expression, {"__builtins__": {}}, values))
        except (ZeroDivisionError, TypeError):
            return None  # a missing value

    def _statistic(
        self, namespace: str, name: str, dimensions: dict[str, str], statistic: str, since: float
    ) -> float | None:
        with self._lock:
            values = [
                value
                for at, *rest, value in self._samples
                if at >= since and rest == [namespace, name, dimensions]
            ]
        if not values:
            return None
        return sum(values) if statistic == "Sum" else percentile(values, statistic)


def percentile(values: list[float], statistic: str) -> float:
    """``p99`` and its kin."""
    share = float(statistic.removeprefix("p")) / 100
    return sorted(values)[math.ceil(share * len(values)) - 1]


class WithPercentiles:
    """While entered, moto knows percentiles, which it lacks."""

    def __enter__(self) -> None:
        self._own = own = Statistics.get_statistics_for_type

        def statistic(self: Statistics, stat: str) -> Any:
            if stat.startswith("p"):
                return percentile(self.metric_single_values_list, stat)
            return own(self, stat)

        Statistics.get_statistics_for_type = statistic  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Statistics.get_statistics_for_type = self._own  # type: ignore[method-assign]
