"""Offers: their columns, what makes one acceptable, and the text that models read of it.

The stage here types and validates a day of raw offers with DuckDB, out of core. Every raw row ends in
exactly one of two tables: clean (typed, trimmed) or quarantined (as delivered, with all reasons).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ml.errors import InputError
from ml.stages import OffersParameters
from ml.taxonomy_change.transitions import Transitions

if TYPE_CHECKING:
    import duckdb

    from ml.runner import StageContext

CLEAN_FILE = "offers.parquet"
QUARANTINE_FILE = "quarantine.parquet"


@dataclass(frozen=True)
class Column:
    """One column of an offer."""

    name: str
    type: pa.DataType
    """Type in the clean table; a feed delivers text or whatever its format has."""
    needed: bool
    """Whether a feed without the column, or an offer without a value, is refused."""
    description: str


FEED_COLUMNS = (
    Column("offer_id", pa.string(), True, "Identifies the offer, once per day of the feed."),
    Column("shop_id", pa.string(), True, "The shop that makes the offer."),
    Column("title", pa.string(), True, "The product's name in the shop's words."),
    Column("country", pa.string(), False, "ISO 3166 code of the country it is offered in, upper case."),
    Column("language", pa.string(), False, "ISO 639 code of the text's language, lower case."),
    Column("description", pa.string(), False, "The shop's description."),
    Column("brand", pa.string(), False, "The product's brand."),
    Column("gtin", pa.string(), False, "Global trade item number, as the shop gives it."),
    Column("product_id", pa.string(), False, "Groups the offers of one product."),
    Column("price", pa.float64(), False, "Price in units of `currency`."),
    Column("currency", pa.string(), False, "ISO 4217 code, upper case."),
    Column("shop_category", pa.string(), False, "The shop's own category text or path."),
    Column("url", pa.string(), False, "The offer's page."),
    Column("offered_at", pa.timestamp("us"), False, "When the offer was seen, UTC."),
    Column("category_id", pa.string(), False, "The human label, null where there is none."),
)
"""The columns of an offer feed; the order is that of every table of offers."""

CLEAN_SCHEMA = pa.schema([pa.field(column.name, column.type) for column in FEED_COLUMNS])

REASONS = {
    "malformed_row": "the line could not be split into values; no other reason is looked for",
    "invalid_encoding": "bytes that are not UTF-8",
    "missing_offer_id": "no offer_id",
    "missing_shop_id": "no shop_id",
    "empty_title": "no title",
    "title_too_long": "title above the limit (`max_title_characters`)",
    "control_characters": "C0 or C1 control characters other than tab and line break, in ids or text",
    "invalid_price": "not a number, ambiguous (1,299), negative or infinite",
    "invalid_currency": "not three letters",
    "invalid_country": "not two letters",
    "invalid_language": "not a language tag (de, de-AT)",
    "invalid_offered_at": "no ISO 8601 date or time from 1990 to 2100",
    "unknown_category": "a label that the taxonomy does not have, nor had in an earlier version",
    "duplicate_offer_id": "an acceptable offer of the same id comes before it",
}
"""Why an offer is quarantined; a row gets all that apply, in this order, joined by commas."""

TEXT_VERSION = "2"
"""Version of :func:`offer_text`. Raise it with every change of what the function returns."""

_TITLE_CHARACTERS = 200
_BRAND_CHARACTERS = 60
_SHOP_CATEGORY_CHARACTERS = 120
_TEXT_CHARACTERS = 400
"""Encoders read 48 tokens, about 250 characters; the linear model a little more."""
_MAX_FIELD_CHARACTERS = 2_000
"""Nothing behind this many characters of a field can reach the text; saves work on huge ones."""
_SEPARATOR = " | "
_BAR, _INSTEAD_OF_BAR = "|", "/"
"""Bars within a field give way, so that :func:`title_of` finds the end of the title."""

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff\u00ad]")

_BLANKS = (
    "\t\n\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200b"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
"""What is trimmed from every value: white space of all alphabets, no control characters."""

_CONTROL_SQL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}]"
_CODES = ("country", "language", "price", "currency", "offered_at")
"""Columns whose own rule refuses control characters."""
_PROSE = ("title", "description", "brand", "shop_category")

_MEMORY_LIMIT = "1GB"
_ROW_GROUP_ROWS = 65_536


def check_text_version(folder: Path, version: str) -> None:
    """Refuse a model that learned from another kind of text than :func:`offer_text` makes.

    Raises:
        InputError: ``version``, that of the model in ``folder``, is not ``TEXT_VERSION``.
    """
    if version != TEXT_VERSION:
        raise InputError(
            f"{folder} was trained on offer text version {version}, this version makes {TEXT_VERSION}; "
            "train it again"
        )


def offer_text(offer: Mapping[str, Any]) -> str:
    """What a model reads of an offer; the one way to make it, in training, in bulk and at the endpoint.

    Title, brand (unless the title has it), shop category and description, joined by a bar, which
    every subword vocabulary has as one token; a bar within a field becomes a slash. HTML entities and
    tags are resolved, white space is collapsed, control characters are dropped, each field and the
    whole are cut. An offer gives the same text before and after cleaning.

    Args:
        offer: Values by column name; columns may be absent or null, others are ignored.

    Returns:
        One line of at most 400 characters, empty if the offer has no words at all.
    """
    return _text(
        _field(offer.get("title")),
        _cached_field(offer.get("brand")),
        _cached_field(offer.get("shop_category")),
        _field(offer.get("description")),
    )


def offer_texts(table: pa.Table) -> list[str]:
    """:func:`offer_text` of every row of ``table``; columns that it lacks count as null."""
    nothing = [None] * table.num_rows
    title, brand, shop_category, description = (
        table[name].to_pylist() if name in table.column_names else nothing
        for name in ("title", "brand", "shop_category", "description")
    )
    return [
        _text(_field(row[0]), _cached_field(row[1]), _cached_field(row[2]), _field(row[3]))
        for row in zip(title, brand, shop_category, description, strict=True)
    ]


def title_of(text: str) -> str:
    """The title in what :func:`offer_text` returned; of a text with none, its first field."""
    return text.partition(_SEPARATOR)[0]


def is_blank(value: Any) -> bool:
    """Whether :func:`offer_text` finds nothing to read in this value of a column."""
    return not _field(value)


def _text(title: str, brand: str, shop_category: str, description: str) -> str:
    title = _cut(title, _TITLE_CHARACTERS)
    folded = title.casefold()
    parts = [title]
    if brand and brand.casefold() not in folded:
        parts.append(_cut(brand, _BRAND_CHARACTERS))
    if title and shop_category[-len(title) :].casefold() == folded:  # a breadcrumb that ends in the product
        shop_category = shop_category[: -len(title)].rstrip(" >/|-")
    if shop_category:
        # The end of a shop's path is its most specific part.
        parts.append(_cut(shop_category[::-1], _SHOP_CATEGORY_CHARACTERS)[::-1])
    if description and description.casefold() != folded:
        parts.append(description)
    return _SEPARATOR.join(part for part in parts if part)[:_TEXT_CHARACTERS].rstrip(" |")


def _field(value: Any) -> str:
    """One value as plain text on one line."""
    if value is None:
        return ""
    text = unicodedata.normalize("NFC", str(value)).strip(_BLANKS)[:_MAX_FIELD_CHARACTERS]
    if "&" in text:
        text = unicodedata.normalize("NFC", html.unescape(text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = text.replace(_BAR, _INSTEAD_OF_BAR)
    return " ".join(_CONTROL.sub(" ", text).split())


_cached_field = lru_cache(maxsize=100_000)(_field)
"""Brands and shop categories repeat; titles and descriptions do not."""


def _cut(text: str, characters: int) -> str:
    """At most ``characters`` of ``text``, ending between words if a word ends near there."""
    if len(text) <= characters:
        return text
    text = text[: characters + 1]
    end = text.rfind(" ", characters * 3 // 4)
    return text[: end if end > 0 else characters]


def trimmed_sql(column: str) -> str:
    """SQL: the text of ``column`` without white space around it, null if nothing is left."""
    blanks = _literal(_BLANKS)
    # trim() walks through the whole value, and hardly any value needs it.
    needs_it = f"contains({blanks}, {column}[1]) OR contains({blanks}, {column}[-1])"
    return f"CASE WHEN {needs_it} THEN nullif(trim({column}, {blanks}), '') ELSE {column} END"


def timestamp_sql(text: str) -> str:
    """SQL: the UTC TIMESTAMP in trimmed ISO 8601 ``text``, null if there is none between 1990 and 2100.

    A date alone is its midnight; a time without an offset is UTC. The connection's TimeZone must be UTC.
    """
    moment = f"make_timestamp(epoch_us(try_cast({text} AS TIMESTAMPTZ)))"
    return (
        rf"CASE WHEN regexp_matches({text}, '^(199\d|20\d\d|2100)-\d\d-\d\d($|[T ]\d\d:\d\d)') "
        f"AND year({moment}) BETWEEN 1990 AND 2100 THEN {moment} END"
    )


def price_sql(text: str) -> str:
    """SQL: the price in trimmed ``text`` as DOUBLE, null if it is not one or could be read in two ways.

    A dot alone is the decimal point. ``12,99``, ``1.299,00``, ``1,299.00``, ``1'299.00`` and ``1 299,00``
    are understood; ``1,299`` is 1.299 to some and 1299 to others, and is not.
    """
    separators = r"[ \x{a0}\x{202f}\x{2009}'’]"
    compact = f"regexp_replace({text}, {_literal(separators)}, '', 'g')"
    forms = (
        (r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text),
        (r"[+-]?(\d+,(\d{1,2}|\d{4,})|0,\d+)", f"replace({text}, ',', '.')"),
        (r"[+-]?\d{1,3}((\.\d{3})+,\d+|(\.\d{3}){2,})", f"replace(replace({text}, '.', ''), ',', '.')"),
        (r"[+-]?\d{1,3}((,\d{3})+\.\d+|(,\d{3}){2,})", f"replace({text}, ',', '')"),
        (rf"[+-]?\d{{1,3}}({separators}\d{{3}})+([.,]\d+)?", f"replace({compact}, ',', '.')"),
    )
    cases = " ".join(
        f"WHEN regexp_full_match({text}, {_literal(pattern)}) THEN try_cast({number} AS DOUBLE)"
        for pattern, number in forms
    )
    return f"CASE {cases} END"


def write_offers(context: StageContext, parameters: OffersParameters) -> dict[str, Any]:
    """Stage ``offers``: the clean offers of a day, and the quarantined ones with their reasons.

    Clean values are trimmed (empty is null) and typed, codes have one case. HTML and Unicode forms
    stay in the table as delivered: :func:`offer_text` resolves them, for the endpoint too. Both tables
    keep the feed's order. A label of an earlier version of the taxonomy is no mistake of the feed: it
    stays as delivered, and ``migrated_labels`` says where it belongs today.
    """
    import duckdb

    raw = context.input("raw_offers") / "offers.parquet"
    taxonomy = context.input("catalog_taxonomy") / "taxonomy.parquet"
    change = context.optional_input("taxonomy_change")
    retired = [t.from_id for t in Transitions.read(change).transitions] if change else []
    clean, quarantine = context.output / CLEAN_FILE, context.output / QUARANTINE_FILE
    settings = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(context.scratch)}
    with duckdb.connect(config=settings) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        # A join keeps the order of its left side as long as the planner does not swap the two.
        connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        connection.execute(
            "CREATE TEMP TABLE category AS "
            f"SELECT category_id, false AS is_retired FROM {_parquet(taxonomy)} UNION ALL "
            f"SELECT unnest(?::VARCHAR[]), true EXCEPT SELECT category_id, true FROM {_parquet(taxonomy)}",
            [retired],
        )
        context.progress.say("validating")
        _validate(connection, raw, parameters.max_title_characters)
        context.progress.say("writing clean and quarantined offers")
        connection.execute(_write_clean_sql(raw, clean))
        connection.execute(_write_quarantine_sql(raw, quarantine))
        metrics = _metrics(connection, clean)
    if metrics["raw"] != metrics["clean"] + metrics["quarantined"]:
        raise RuntimeError(f"offers were lost or invented: {metrics}")
    context.progress.say(f"{metrics['clean']:,} clean and {metrics['quarantined']:,} quarantined offers")
    return metrics


def _validate(connection: duckdb.DuckDBPyConnection, raw: Path, max_title: int) -> None:
    """Make the tables ``checked`` (a line per raw row) and ``rejected`` (row, reasons)."""
    texts = [column.name for column in FEED_COLUMNS]
    trimmed = ", ".join(f"{trimmed_sql(name)} AS {name}" for name in texts)
    has_control = " OR ".join(
        f"coalesce(regexp_matches({name}, '{_CONTROL_SQL}'), false)" for name in texts if name not in _CODES
    )
    price = price_sql("price")
    conditions = {
        "invalid_encoding": "problem = 'invalid_encoding'",
        "missing_offer_id": "offer_id IS NULL",
        "missing_shop_id": "shop_id IS NULL",
        "empty_title": "title IS NULL",
        "title_too_long": f"length(title) > {max_title}",
        "control_characters": has_control,
        "invalid_price": (f"price IS NOT NULL AND NOT coalesce({price} >= 0 AND isfinite({price}), false)"),
        "invalid_currency": "NOT regexp_full_match(currency, '[A-Za-z]{3}')",
        "invalid_country": "NOT regexp_full_match(country, '[A-Za-z]{2}')",
        "invalid_language": "NOT regexp_full_match(language, '[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*')",
        "invalid_offered_at": f"offered_at IS NOT NULL AND {timestamp_sql('offered_at')} IS NULL",
        "unknown_category": (
            "category_id IS NOT NULL AND category_id NOT IN (SELECT category_id FROM category)"
        ),
    }
    cases = ", ".join(
        f"CASE WHEN {condition} THEN '{reason}' END" for reason, condition in conditions.items()
    )
    connection.execute(f"""
        CREATE TEMP TABLE checked AS
        SELECT row, offer_id,
            CASE WHEN problem = 'malformed_row' THEN problem
                 ELSE nullif(concat_ws(',', {cases}), '') END AS reason
        FROM (SELECT file_row_number AS row, problem, {trimmed} FROM {_parquet(raw, numbered=True)})
    """)
    connection.execute("""
        CREATE TEMP TABLE duplicated AS
        SELECT offer_id, min(row) FILTER (reason IS NULL) AS kept FROM checked
        WHERE offer_id IS NOT NULL GROUP BY offer_id HAVING count(*) > 1 AND kept IS NOT NULL
    """)
    connection.execute("""
        CREATE TEMP TABLE rejected AS
        SELECT row, concat_ws(',', reason, CASE WHEN row > kept THEN 'duplicate_offer_id' END) AS reason
        FROM checked LEFT JOIN duplicated USING (offer_id)
        WHERE reason IS NOT NULL OR row > kept
    """)


def _write_clean_sql(raw: Path, clean: Path) -> str:
    special = {
        "price": price_sql(trimmed_sql("price")),
        "offered_at": timestamp_sql(trimmed_sql("offered_at")),
        "country": f"upper({trimmed_sql('country')})",
        "currency": f"upper({trimmed_sql('currency')})",
        "language": f"lower(regexp_extract({trimmed_sql('language')}, '^[A-Za-z]+'))",
    }
    columns = ", ".join(
        f"{special.get(column.name, trimmed_sql(column.name))} AS {column.name}" for column in FEED_COLUMNS
    )
    return _copy_sql(
        f"SELECT {columns} FROM {_parquet(raw, numbered=True)} AS raw "
        "ANTI JOIN rejected ON raw.file_row_number = rejected.row",
        clean,
    )


def _write_quarantine_sql(raw: Path, quarantine: Path) -> str:
    delivered = ", ".join(f"raw.{column.name}" for column in FEED_COLUMNS)
    return _copy_sql(
        f"SELECT {delivered}, reason, source_file, source_row, content "
        f"FROM {_parquet(raw, numbered=True)} AS raw "
        "JOIN rejected ON raw.file_row_number = rejected.row ORDER BY rejected.row",
        quarantine,
    )


def _metrics(connection: duckdb.DuckDBPyConnection, clean: Path) -> dict[str, Any]:
    def one_row(query: str) -> tuple[Any, ...]:
        rows: list[tuple[Any, ...]] = connection.execute(query).fetchall()
        return rows[0]

    counts = ", ".join(
        f"count(*) FILTER (list_contains(string_split(reason, ','), '{reason}'))" for reason in REASONS
    )
    (raw,) = one_row("SELECT count(*) FROM checked")
    quarantined, *by_reason = one_row(f"SELECT count(*), {counts} FROM rejected")
    damaged = " OR ".join(f"contains({name}, chr(65533))" for name in _PROSE)
    is_retired = "category_id IN (SELECT category_id FROM category WHERE is_retired)"
    written, labelled, retired, undated, replacement_characters = one_row(
        f"SELECT count(*), count(category_id), count(*) FILTER ({is_retired}), "
        f"count(*) - count(offered_at), count(*) FILTER ({damaged}) FROM {_parquet(clean)}"
    )
    return {
        "raw": raw,
        "clean": written,
        "quarantined": quarantined,
        "labelled": labelled,
        "retired_labels": retired,
        "undated": undated,
        "replacement_characters": replacement_characters,
        **dict(zip(REASONS, by_reason, strict=True)),
    }


def _copy_sql(query: str, path: Path) -> str:
    return (
        f"COPY ({query}) TO {_literal(str(path))} "
        f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP_ROWS})"
    )


def _parquet(path: Path, *, numbered: bool = False) -> str:
    option = ", file_row_number = true" if numbered else ""
    return f"read_parquet({_literal(str(path))}{option})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
