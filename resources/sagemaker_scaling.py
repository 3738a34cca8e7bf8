"""Autoscaling of a SageMaker endpoint: instances follow the requests that each of them gets."""

from __future__ import annotations

from typing import Any

from resources.aws import AwsAccess, aws_errors

_SECONDS_TO_SCALE_OUT_AGAIN = 60
_SECONDS_TO_SCALE_IN_AGAIN = 600
"""New instances take minutes to come up: what was just taken away must not be missed at once."""

_SERVICE = "sagemaker"
_DIMENSION = "sagemaker:variant:DesiredInstanceCount"


class EndpointScaling:
    """Scalable targets of one endpoint, one per variant."""

    def __init__(
        self, aws: AwsAccess, endpoint: str, *, instances: tuple[int, int], requests_per_minute: int
    ) -> None:
        """Scale an endpoint.

        Args:
            aws: The way in.
            endpoint: Its name.
            instances: Fewest and most of one variant.
            requests_per_minute: What an instance is to get; more add instances, fewer take them away.
        """
        self._aws = aws
        self._endpoint = endpoint
        self._fewest, self._most = instances
        self._requests_per_minute = requests_per_minute

    def follow_requests(self, slots: list[str]) -> None:
        """Scale these variants. Calling it again changes nothing."""
        autoscaling = self._aws.client("application-autoscaling")
        for slot in slots:
            with aws_errors(f"scaling variant {slot} of endpoint {self._endpoint}"):
                autoscaling.register_scalable_target(
                    **self._target(slot), MinCapacity=self._fewest, MaxCapacity=self._most
                )
                autoscaling.put_scaling_policy(
                    **self._target(slot),
                    PolicyName=f"{self._endpoint}-{slot}-requests",
                    PolicyType="TargetTrackingScaling",
                    TargetTrackingScalingPolicyConfiguration={
                        "TargetValue": float(self._requests_per_minute),
                        "PredefinedMetricSpecification": {
                            "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
                        },
                        "ScaleOutCooldown": _SECONDS_TO_SCALE_OUT_AGAIN,
                        "ScaleInCooldown": _SECONDS_TO_SCALE_IN_AGAIN,
                    },
                )

    def let_go(self, slots: list[str]) -> None:
        """No longer scale these variants: SageMaker neither removes nor moves one that is scaled."""
        autoscaling = self._aws.client("application-autoscaling")
        if not slots:
            return
        with aws_errors(f"no longer scaling variants {', '.join(slots)} of endpoint {self._endpoint}"):
            targets = autoscaling.describe_scalable_targets(
                ServiceNamespace=_SERVICE, ResourceIds=[self._resource(slot) for slot in slots]
            )["ScalableTargets"]
            for target in targets:
                autoscaling.deregister_scalable_target(
                    ServiceNamespace=_SERVICE,
                    ResourceId=target["ResourceId"],
                    ScalableDimension=_DIMENSION,
                )

    def _resource(self, slot: str) -> str:
        return f"endpoint/{self._endpoint}/variant/{slot}"

    def _target(self, slot: str) -> dict[str, Any]:
        return {
            "ServiceNamespace": _SERVICE,
            "ResourceId": self._resource(slot),
            "ScalableDimension": _DIMENSION,
        }
