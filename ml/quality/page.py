"""Live quality as one HTML page: sentence, answers, pictures and tables, all in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from ml.quality.answers import CategoryShares
    from ml.quality.live import QualityReport

_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;color:#334155;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.25em .7em;text-align:left;"
    "border-bottom:1px solid #cbd5e1;vertical-align:top}td.number{text-align:right;white-space:nowrap}"
    "img{max-width:100%}.WARN{background:#fed7aa}.ERROR{background:#fca5a5}.UNKNOWN{background:#e2e8f0}"
)
_CAPTIONS = {
    "accuracy.png": "Accuracy by day",
    "shares.png": "Shares of categories",
    "decisions.png": "Decisions by day",
}
_MOST_SHARES = 100


def page(
    report: QualityReport,
    shares: Sequence[CategoryShares],
    name_of: Callable[[str], str],
    pictures: Mapping[str, bytes],
) -> str:
    """The whole page."""
    answers = "".join(
        f"<tr class='{answer.level}'><td>{_text(answer.title)}</td><td>{answer.level}</td>"
        f"<td>{_text(answer.sentence)}</td></tr>"
        for answer in report.answers
    )
    findings = [
        {
            "question": finding.question,
            "level": finding.level,
            "in words": finding.sentence,
            "p-value": finding.p_value,
        }
        for answer in report.answers
        for finding in answer.findings
    ]
    parts = [
        f"<h1>Live quality, days to {_text(report.newest_day)}</h1><p>{_text(report.sentence)}</p>",
        f"<h2>Answers</h2><table><tr><th>question</th><th>level</th><th>answer</th></tr>{answers}</table>",
        _section("Findings", findings),
        *(
            f"<h2>{_CAPTIONS[name]}</h2><img alt='{_CAPTIONS[name]}' "
            f"src='data:image/png;base64,{base64.b64encode(png).decode('ascii')}'>"
            for name, png in pictures.items()
        ),
        _section("Days", [msgspec.structs.asdict(day) for day in report.days]),
        _section("Groups", [msgspec.structs.asdict(group) for group in report.groups]),
        _section("Predicted and decided shares", _share_rows(shares, name_of)),
    ]
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Live quality</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _share_rows(shares: Sequence[CategoryShares], name_of: Callable[[str], str]) -> list[dict[str, Any]]:
    return [
        {
            "category": name_of(share.category_id),
            "labels": share.labels,
            "predicted": share.predicted,
            "as decided": share.actual,
            "difference": share.difference,
            "95 % from": share.low,
            "to": share.high,
            "before": share.older_difference,
            "newest days": share.recent_difference,
            "on all days": share.verdict,
        }
        for share in shares[:_MOST_SHARES]
    ]


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(_cell(value) for value in row.values())}</tr>" for row in rows)
    return f"<h2>{title}</h2><table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, float):
        return f"<td class='number'>{value:.4g}</td>"
    if isinstance(value, int):
        return f"<td class='number'>{value:,}</td>"
    return f"<td>{_text('' if value is None else str(value))}</td>"


def _text(value: str) -> str:
    return html.escape(value)
