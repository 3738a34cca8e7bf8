"""What the UI shows of an artifact: figures, tables, schemas, pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from ml.offers import FEED_COLUMNS
from resources.compute import StageResult

MetadataMapping = dict[str, Any]


def materialization(
    result: StageResult, *, asset_key: str | None = None, metadata: Mapping[str, Any] | None = None
) -> dg.MaterializeResult[Any]:
    """The materialization of an artifact: its digest is the data version, its metrics are plotted."""
    return dg.MaterializeResult(
        asset_key=asset_key,
        value=result.ref,
        data_version=dg.DataVersion(result.ref.digest),
        metadata={**(metadata or {}), **artifact_metadata(result)},  # what people look at comes first
    )


def artifact_metadata(result: StageResult) -> MetadataMapping:
    """Where the artifact is, whether it was made now, and its numeric metrics."""
    manifest = result.manifest
    figures = {
        name: value
        for name, value in manifest.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        "dagster/uri": result.ref.uri,
        "version": result.ref.version,
        "made_in_this_run": not result.reused,
        "seconds": manifest.seconds,
        "code_revision": manifest.code_revision or "unknown",
        **figures,
    }


def row_count(rows: int) -> MetadataMapping:
    """The number that the UI shows beside a table asset."""
    return {"dagster/row_count": rows}


def feed_schema() -> dg.TableSchema:
    """Columns of an offer as delivered: text, whatever they should be."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(column.name, "string", description=column.description) for column in FEED_COLUMNS
        ]
    )


def offer_schema(*further: tuple[str, str, str]) -> dg.TableSchema:
    """Columns of a clean offer, and ``further`` ones as ``(name, type, description)``."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                column.name,
                str(column.type),
                description=column.description,
                constraints=dg.TableColumnConstraints(nullable=not column.needed),
            )
            for column in FEED_COLUMNS
        ]
        + schema(further).columns
    )


def schema(columns: Iterable[tuple[str, str, str]]) -> dg.TableSchema:
    """A table schema from ``(name, type, description)``."""
    return dg.TableSchema(
        columns=[dg.TableColumn(name, kind, description=text) for name, kind, text in columns]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue | str:
    """Rows as a table of the UI; numbers are rounded so that a person can compare them."""
    if not rows:
        return "none"
    return dg.MetadataValue.table(
        [dg.TableRecord({key: _cell(value) for key, value in row.items()}) for row in rows]
    )


def picture(png: bytes) -> dg.MarkdownMetadataValue:
    """A PNG that the UI shows in place."""
    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(png).decode('ascii')})")


def _cell(value: Any) -> str | int | float | bool | None:
    if isinstance(value, float):
        return round(value, 4)
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
