"""How checks are attached to assets: one place for what concerns all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster import PreviewWarning

from ml.evaluation.gate import Proposition


def partitioned_check(
    *, asset: str, partitions_def: dg.PartitionsDefinition, **options: Any
) -> Callable[[Callable[..., dg.AssetCheckResult]], dg.AssetChecksDefinition]:
    """``dg.asset_check`` for one partition at a time.

    Partitioned checks work, but Dagster 1.13 warns at every load that they are in preview. A check of a day
    that did not know its day would be worse, so they are used, and the warning is silenced here.
    """

    def decorate(function: Callable[..., dg.AssetCheckResult]) -> dg.AssetChecksDefinition:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PreviewWarning)
            return dg.asset_check(asset=asset, partitions_def=partitions_def, **options)(function)

    return decorate


def check_result(proposition: Proposition) -> dg.AssetCheckResult:
    """A proposition of the gate, as the UI shows it."""
    metadata = {"limit": proposition.limit}
    if proposition.value is not None:
        metadata["value"] = proposition.value
    return dg.AssetCheckResult(passed=proposition.passed, description=proposition.sentence, metadata=metadata)
