"""How checks are attached to assets: one place for what concerns all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import PreviewWarning

from ml.drift.answers import Answer
from ml.evaluation.gate import Proposition
from offer_assets.metadata import picture, table


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


def answer_result(
    answer: Answer, report: Path, *, may_be_unknown: bool, complete: bool = True
) -> dg.AssetCheckResult:
    """An answer of monitoring, as the UI shows it. What should be known and is not did not pass.

    By ``level`` and ``complete``, whoever looks for incidents knows that passing says nothing yet
    (``offer_assets.check_outcomes.is_no_answer``).

    Args:
        answer: To the question that the check asks.
        report: The stored page; the plots lie beside it.
        may_be_unknown: Whether there is nothing wrong with not knowing.
        complete: Whether what was asked about is over.
    """
    findings = [
        {
            "what": finding.measure,
            "where": finding.group or "all offers",
            "segment": finding.segment,
            "value": finding.value,
            "usual": finding.usual,
            "usual_low": finding.usual_low,
            "usual_high": finding.usual_high,
            "days": finding.days,
            "p_value": finding.p_value,
            "level": finding.level,
            "in_words": finding.sentence,
        }
        for finding in answer.findings
    ]
    shown = {"plot": picture((report.parent / answer.picture).read_bytes())} if answer.picture else {}
    sentence = f"UNKNOWN: {answer.sentence}" if answer.level == "UNKNOWN" else answer.sentence
    return dg.AssetCheckResult(
        passed=answer.level == "OK" or (answer.level == "UNKNOWN" and may_be_unknown),
        severity=dg.AssetCheckSeverity.ERROR if answer.level == "ERROR" else dg.AssetCheckSeverity.WARN,
        description=sentence,
        metadata={
            "answer": sentence,  # the check's page shows the metadata, the lists show the description
            **shown,
            "level": answer.level,
            "complete": complete,
            "series_tested": answer.series,
            "findings": table(findings),
            "findings_in_all": answer.found,
            "report": dg.MetadataValue.path(report),
        },
    )
