"""Stage ``drift_report``: whether a day of offers is still what the model was made for.

One answer per question (:data:`ml.drift.questions.QUESTIONS`), in words, numbers and a picture, and beside
them Evidently's page with the distances of whole columns.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.cores import available_cores
from ml.drift.answers import LEVELS, Answer, DayReport, DistanceOfColumn, Question
from ml.drift.evidently_report import LEAST_OFFERS, write_evidently_report
from ml.drift.expected import weekdays_are_known
from ml.drift.frame import SERIES_FILE, Frame
from ml.drift.plots import picture
from ml.drift.questions import LIMITS, QUESTIONS, TAXONOMY_IN_FORCE, UNKNOWN_UNTIL_THE_DAY_IS_OVER
from ml.drift.sample import TRAINED_FILE, rows_of, sampled_offers, with_each_alone
from ml.drift.series import Judgement, expectations, judge
from ml.drift.totals import DayTotals, totals_of
from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.predictor import Predictor
from ml.stages import DriftParameters
from ml.taxonomy import Taxonomy

REPORT_FILE, PAGE_FILE = "drift.json", "report.html"

_FINDINGS_KEPT = 20
_FINDINGS_SAID = 3


def write_drift_report(context: StageContext, parameters: DriftParameters) -> dict[str, Any]:
    """Write ``drift.json``, ``series.parquet``, ``report.html`` and a picture per question that is not OK.

    Returns:
        ``offers``, ``offers_looked_at``, ``reference_days``, ``sentence``, ``failed`` (questions answered
        with WARN or ERROR), ``errors``, ``unknown`` and ``level_<question>`` (of ``answers.LEVELS``).

    Raises:
        InputError: an earlier day was held against another reference.
    """
    day = parameters.day
    whole = Frame.load(context.input("drift_reference"))
    earlier = _earlier(context, whole, day)
    others = whole.without(day) if day in whole.reference_days else whole
    frame = others or whole
    totals = totals_of(context.input("offers"), day, parameters.complete, frame.large_shops)
    offers = _looked_at(context, parameters)
    rows = rows_of(offers)
    context.progress.say(f"{totals.offers:,} offers, {len(rows):,} of them are looked at one by one")
    today = frame.series(day, rows, totals)
    reference = frame.reference_series(today)
    pq.write_table(today, context.output / SERIES_FILE, compression="zstd")
    judgements = judge(day, today, reference, earlier)
    answers = []
    for question in QUESTIONS:
        judgement = judgements[question.name]
        why = _why_unknown(question, totals, len(rows), frame)
        if others is None and question.name != TAXONOMY_IN_FORCE:
            judgement = Judgement(question=question.name, level="UNKNOWN", series=0, findings=[])
            why = f"{day} is all of the reference: there is no other day to hold it against"
        answer = _answer(question, judgement, why)
        if judgement.findings:
            series = expectations(question.name, day, today, reference, earlier)
            title = f"{question.title}, {day}: {answer.level}"
            name = f"{question.name}.png"
            (context.output / name).write_bytes(picture(title, judgement.findings, series, day))
            answer = msgspec.structs.replace(answer, picture=name)
        answers.append(answer)
    columns = _write_page(context.output / PAGE_FILE, others, offers, day)
    report = DayReport(
        day=day,
        offers=totals.offers,
        offers_looked_at=len(rows),
        reference_days=len(frame.reference_days),
        reference_offers=frame.reference_offers,
        weekdays_allowed_for=weekdays_are_known(frame.reference_days),
        sentence=_sentence_of_day(day, answers, totals, frame, "other " if frame is not whole else ""),
        answers=answers,
        columns=columns,
    )
    (context.output / REPORT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    context.progress.say(report.sentence)
    return _metrics(report)


# The day


def _earlier(context: StageContext, frame: Frame, day: str) -> list[pa.Table]:
    """Series of earlier days, all measured in the same frame as this one.

    A day of the reference is measured in a frame of its own: none is earlier than it, and it is earlier
    than none.
    """
    reference = read_manifest(context.input("drift_reference")).digest
    tables = []
    for earlier, folder in context.partitions("earlier").items():
        used = read_manifest(folder).inputs.get("drift_reference", "")
        if used != reference:
            raise InputError(
                f"earlier/{earlier} was held against drift_reference {short_version(used) or '(none)'}, this "
                f"day is against {short_version(reference)}; leave it out, or make it anew against the same"
            )
        if not {earlier, day} & set(frame.reference_days):
            tables.append(pq.read_table(folder / SERIES_FILE))
    return tables


def _looked_at(context: StageContext, parameters: DriftParameters) -> pa.Table:
    """The day's sample with all that was predicted for it."""
    offers = sampled_offers(
        context.input("offers"),
        parameters.day,
        parameters.max_offers,
        parameters.seed,
        context.input("drift_reference") / TRAINED_FILE,
        context.input("catalogued_offers"),
    )
    predictor = Predictor.load(context.input("compiled_student"), threads=available_cores())
    offers = with_each_alone(offers, predictor)
    taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))
    is_known = [category is None or category in taxonomy for category in offers["category_id"].to_pylist()]
    return offers.append_column("taxonomy_known", pa.array(is_known, pa.bool_()))


def _write_page(path: Path, frame: Frame | None, offers: pa.Table, day: str) -> list[DistanceOfColumn]:
    """Evidently's page; of too few offers one that says so."""
    of_reference = frame.reference_offers if frame else 0
    if frame is None or min(len(offers), of_reference) < LEAST_OFFERS:
        said = (
            f"No comparison on {day}: {len(offers):,} offers against {of_reference:,} of the "
            f"reference; both need at least {LEAST_OFFERS}."
        )
        path.write_text(
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>Drift</title>"
            f"<p>{html.escape(said)}</p></html>\n",
            encoding="utf-8",
        )
        return []
    return write_evidently_report(frame.columns(rows_of(offers)), frame.reference_columns(), path)


# Words


def _answer(question: Question, judgement: Judgement, why_unknown: str) -> Answer:
    said = "; ".join(finding.sentence for finding in judgement.findings[:_FINDINGS_SAID])
    if rest := len(judgement.findings) - _FINDINGS_SAID:
        said += f"; and {rest} more" if rest > 0 else ""
    if judgement.level == "UNKNOWN":
        said = why_unknown
    elif not judgement.findings:
        said = f"as usual ({judgement.series} series)"
    return Answer(
        question=question.name,
        title=question.title,
        level=judgement.level,
        sentence=said,
        series=judgement.series,
        findings=judgement.findings[:_FINDINGS_KEPT],
        found=len(judgement.findings),
    )


def _why_unknown(question: Question, totals: DayTotals, looked_at: int, frame: Frame) -> str:
    if question.name in UNKNOWN_UNTIL_THE_DAY_IS_OVER and not totals.complete:
        return "the day is not over"
    against = f"{looked_at:,} were looked at, against {frame.reference_offers:,} of the reference"
    if min(looked_at, frame.reference_offers) >= LIMITS.least_offers:
        return f"too few offers can be measured: {against}, but few or none of them have what is asked for"
    return f"too few offers to tell: {against}; both need at least {LIMITS.least_offers} that can be measured"


def _sentence_of_day(day: str, answers: Sequence[Answer], totals: DayTotals, frame: Frame, other: str) -> str:
    failed = sorted((a for a in answers if a.level in ("WARN", "ERROR")), key=lambda a: -LEVELS[a.level])
    unknown, days = sum(answer.level == "UNKNOWN" for answer in answers), len(frame.reference_days)
    against = (
        f"{totals.offers:,} offers against {days} {other}day{'s' if days > 1 else ''} of "
        f"{frame.reference_offers:,} offers looked at"
    )
    not_told = f", {unknown} not answered" if unknown else ""
    if not failed:
        answered = len(answers) - unknown
        return f"Nothing unusual on {day} by {answered} of {len(answers)} questions ({against}{not_told})."
    said = "; ".join(f"{answer.level} {answer.title}: {_strongest(answer)}" for answer in failed)
    return f"{len(failed)} of {len(answers)} questions failed on {day} ({against}{not_told}): {said}."


def _strongest(answer: Answer) -> str:
    more = f" and {answer.found - 1} more" if answer.found > 1 else ""
    return answer.findings[0].sentence + more


def _metrics(report: DayReport) -> dict[str, Any]:
    levels: Mapping[str, int] = {answer.question: LEVELS[answer.level] for answer in report.answers}
    return {
        "offers": report.offers,
        "offers_looked_at": report.offers_looked_at,
        "reference_days": report.reference_days,
        "sentence": report.sentence,
        "failed": sum(answer.level in ("WARN", "ERROR") for answer in report.answers),
        "errors": sum(answer.level == "ERROR" for answer in report.answers),
        "unknown": sum(answer.level == "UNKNOWN" for answer in report.answers),
        **{f"level_{question}": level for question, level in levels.items()},
    }
