"""The offers of a day that are looked at one by one: a uniform sample, with what was predicted for them.

The same for days of the reference and for days that are held against it, or the two would not compare.
Memory does not grow with the number of offers: the engine keeps the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ml.offers import CLEAN_FILE, CLEAN_SCHEMA, offer_texts
from ml.sampling.split import PRODUCT_KEYS
from ml.serving.predictor import Predictor

TRAINED_FILE = "trained.parquet"
CATALOGUED_FILE = "catalogued.parquet"

PREDICTED = ("category_id", "category_path", "confidence", "tier", "needs_review")
"""What is looked at of a prediction."""

_MEMORY_LIMIT = "1GB"
_TEXTS_AT_ONCE = 512


@contextmanager
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    """An engine that works within a fixed amount of memory."""
    with duckdb.connect(config={"memory_limit": _MEMORY_LIMIT}) as database:
        yield database


def write_trained(training_sample: Path, path: Path) -> None:
    """Write what a model that learned from ``training_sample`` has seen: ids, and products by their keys."""
    files = [str(training_sample / f"{name}.parquet") for name in ("labelled", "unlabelled")]
    keys = " UNION ".join(
        f"SELECT '{name}:' || {sql} AS key FROM seen WHERE {sql} IS NOT NULL" for name, sql in _KEYS.items()
    )
    columns = "offer_id, product_id, gtin, title"
    seen = " UNION ALL ".join(f"SELECT {columns} FROM read_parquet('{_quoted(file)}')" for file in files)
    with engine() as database:
        table = database.sql(f"WITH seen AS ({seen}) SELECT key FROM ({keys}) ORDER BY key").to_arrow_table()
    pq.write_table(table.cast(pa.schema([("key", pa.string())])), path, compression="zstd")


_KEYS = {"offer_id": "offer_id", **PRODUCT_KEYS}
"""What two offers share if a model that knows one of them knows the other."""


def sampled_offers(
    offers: Path, day: str, number: int, seed: int, trained: Path, catalogued: Path | None = None
) -> pa.Table:
    """A uniform sample of a day's offers, in random order.

    Args:
        offers: Folder of the ``offers`` artifact.
        day: ISO date; each day has a draw of its own, or offers that stay would be drawn every day.
        number: Offers, at most.
        seed: Of the draw.
        trained: What :func:`write_trained` wrote.
        catalogued: Folder of ``catalogued_offers`` of that day, if there is one.

    Returns:
        The columns of ``CLEAN_SCHEMA`` without the label, ``trained`` (whether the model learned from
        the offer or another one of its product: it is surer of them than it will ever be of others), and
        with ``catalogued`` the columns of :data:`PREDICTED`.
    """
    columns = [name for name in CLEAN_SCHEMA.names if name != "category_id"]
    is_trained = " OR ".join(
        f"coalesce('{name}:' || {sql} IN (SELECT key FROM known), false)" for name, sql in _KEYS.items()
    )
    predicted = list(PREDICTED) if catalogued else []
    with engine() as database:
        database.execute(
            f"CREATE TEMP TABLE chosen AS SELECT {', '.join(columns)}, md5(? || ':' || offer_id) AS draw "
            "FROM read_parquet(?) ORDER BY draw, offer_id LIMIT ?",
            [f"{seed}:{day}", str(offers / CLEAN_FILE), number],
        )
        database.execute("CREATE TEMP TABLE known AS SELECT key FROM read_parquet(?)", [str(trained)])
        joined = ""
        if catalogued:
            predictions = f"read_parquet('{_quoted(catalogued / CATALOGUED_FILE)}')"
            joined = (
                f"LEFT JOIN (SELECT offer_id, {', '.join(predicted)} FROM {predictions} "
                "SEMI JOIN chosen USING (offer_id)) USING (offer_id)"
            )
        table: pa.Table = database.sql(
            f"SELECT {', '.join([*columns, *predicted])}, {is_trained} AS trained FROM chosen {joined} "
            "ORDER BY draw, offer_id"
        ).to_arrow_table()
    return table


def with_each_alone(offers: pa.Table, predictor: Predictor) -> pa.Table:
    """The offers with ``fast_category_id`` and ``student_category_id``, what either model says by itself.

    Both are asked about every offer, whichever answers it: of the answers that the fast model gives alone
    nobody else has a second opinion.
    """
    texts, fast, student = offer_texts(offers), list[str](), list[str]()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        by_fast, by_student = predictor.each_alone(texts[start : start + _TEXTS_AT_ONCE])
        fast += by_fast
        student += by_student
    offers = offers.append_column("fast_category_id", pa.array(fast, pa.string()))
    return offers.append_column("student_category_id", pa.array(student, pa.string()))


def rows_of(offers: pa.Table) -> pd.DataFrame:
    """The offers as the frame takes them."""
    rows: pd.DataFrame = offers.to_pandas(timestamp_as_object=True)
    rows["trained"] = rows["trained"].astype(bool)
    return rows


def _quoted(path: Path | str) -> str:
    return str(path).replace("'", "''")
