"""The catalog taxonomy: a tree of categories, read from CSV, validated, kept as Parquet.

Plain Python and pyarrow; no recursion, so the depth of a tree is bounded by :data:`MAX_LEVELS` and
not by the interpreter.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError

TAXONOMY_FILE = "taxonomy.parquet"
PATH_SEPARATOR = " > "
MAX_LEVELS = 100
"""No catalog is anywhere near as deep; a chain this long is a mistake in the parent column."""

_NEEDED_COLUMNS = ("category_id", "parent_id", "name")
_LOCALE_PREFIX = "name_"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MAX_FIELD_CHARACTERS = 1 << 20
_MAX_CYCLE_SHOWN = 8


@dataclass(frozen=True)
class Category:
    """One node of the tree as its source gives it."""

    category_id: str
    parent_id: str | None
    name: str
    """Never empty: where the source has no name, the id stands in."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name by locale (``{"de": "Küche"}``), as far as the source has them."""


class Taxonomy:
    """An immutable, valid tree of categories, in the order of its source.

    Methods that take a category id raise ``KeyError`` for one that the taxonomy does not have;
    ask ``category_id in taxonomy`` first.
    """

    def __init__(
        self, categories: Sequence[Category], *, locales: Sequence[str] = (), source: str = "taxonomy"
    ) -> None:
        """Build the tree.

        Args:
            categories: Nodes in any order.
            locales: Locales whose names are kept as columns.
            source: What error messages call the place the categories come from.

        Raises:
            InputError: no categories, a duplicate id, an orphan, a cycle, or more than
                :data:`MAX_LEVELS` levels; the message names the row (counted from 1).
        """
        if not categories:
            raise InputError(f"{source} holds no categories; a taxonomy needs at least one")
        self.locales = tuple(locales)
        self._categories = {category.category_id: category for category in categories}
        _check_ids_are_unique(categories, source)
        _check_parents_exist(categories, self._categories, source)
        self._children: dict[str, list[str]] = {category_id: [] for category_id in self._categories}
        self.roots: list[str] = []
        for category in categories:
            siblings = self.roots if category.parent_id is None else self._children[category.parent_id]
            siblings.append(category.category_id)
        self._levels = self._levels_from_roots()
        if len(self._levels) < len(self._categories):
            raise InputError(_describe_cycle(categories, self._levels, source))
        self.levels = max(self._levels.values())
        """Number of levels of the deepest branch (a tree of roots only has 1)."""
        if self.levels > MAX_LEVELS:
            deepest = max(self._levels, key=self._levels.__getitem__)
            raise InputError(
                f"{source}: category {deepest!r} lies {self.levels} levels deep, at most {MAX_LEVELS} are "
                "read; correct the parent_id column"
            )

    @classmethod
    def read_csv(cls, path: Path | str) -> Taxonomy:
        """Read ``category_id,parent_id,name[,name_<locale>…]`` from a local file (UTF-8).

        Args:
            path: The file. Header names are matched regardless of case; the delimiter is a comma,
                semicolon, tab or bar; other columns are ignored. Other places and formats are for
                :mod:`ml.taxonomy_change.releases`.

        Raises:
            InputError: the file is missing or unreadable, lacks a column, or is not a tree. The
                message names the file and the row (data rows, counted from 1).
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        return cls.parse_csv(content, str(path))

    @classmethod
    def parse_csv(cls, content: bytes, source: str) -> Taxonomy:
        """As :meth:`read_csv`, from the bytes of a CSV that messages call ``source``."""
        header, rows = parse_table(content, source, _NEEDED_COLUMNS)
        locale_columns = {
            name.removeprefix(_LOCALE_PREFIX): name
            for name in header
            if name.startswith(_LOCALE_PREFIX) and name != _LOCALE_PREFIX
        }
        categories = [_category(row, number, locale_columns, source) for number, row in enumerate(rows, 1)]
        return cls(categories, locales=tuple(locale_columns), source=source)

    @classmethod
    def load(cls, folder_or_parquet: Path | str) -> Taxonomy:
        """Read what :meth:`write` wrote: the Parquet file, or a folder that holds ``taxonomy.parquet``.

        Raises:
            InputError: there is no such file, or it is not a taxonomy.
        """
        path = Path(folder_or_parquet)
        if path.is_dir():
            path = path / TAXONOMY_FILE
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; it should hold a taxonomy") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} is not a taxonomy: {_first_line(error)}") from None
        if missing := [name for name in _NEEDED_COLUMNS if name not in table.column_names]:
            raise InputError(f"{path} is not a taxonomy: it has no column {', '.join(missing)}")
        locale_columns = {
            name.removeprefix(_LOCALE_PREFIX): name
            for name in table.column_names
            if name.startswith(_LOCALE_PREFIX)
        }
        categories = [
            Category(
                category_id=row["category_id"],
                parent_id=row["parent_id"],
                name=row["name"],
                names={locale: row[name] for locale, name in locale_columns.items() if row[name] is not None},
            )
            for row in table.select([*_NEEDED_COLUMNS, *locale_columns.values()]).to_pylist()
        ]
        return cls(categories, locales=tuple(locale_columns), source=str(path))

    def write(self, path: Path | str) -> None:
        """Write the tree as Parquet, one row per category in source order (see :meth:`table`)."""
        pq.write_table(self.table(), path, compression="zstd")

    def table(self) -> pa.Table:
        """One row per category.

        Columns: category_id, parent_id (null at roots), name, level (root = 1), path
        ("A > B > C"), path_ids (root to self), is_leaf, and ``name_<locale>`` (null where absent).
        """
        ids = self.ids
        columns: dict[str, pa.Array[Any]] = {
            "category_id": pa.array(ids, pa.string()),
            "parent_id": pa.array([self._categories[i].parent_id for i in ids], pa.string()),
            "name": pa.array([self.name(i) for i in ids], pa.string()),
            "level": pa.array([self.level(i) for i in ids], pa.int32()),
            "path": pa.array([self.path(i) for i in ids], pa.string()),
            "path_ids": pa.array([self.ancestors(i) for i in ids], pa.list_(pa.string())),
            "is_leaf": pa.array([not self._children[i] for i in ids], pa.bool_()),
        }
        for locale in self.locales:
            columns[_LOCALE_PREFIX + locale] = pa.array(
                [self._categories[i].names.get(locale) for i in ids], pa.string()
            )
        return pa.table(columns)

    @property
    def ids(self) -> list[str]:
        """All category ids, in source order."""
        return list(self._categories)

    @property
    def leaves(self) -> list[str]:
        """Ids of the categories without children, in source order."""
        return [category_id for category_id, children in self._children.items() if not children]

    def __contains__(self, category_id: object) -> bool:
        return category_id in self._categories

    def __len__(self) -> int:
        return len(self._categories)

    def __iter__(self) -> Iterator[str]:
        return iter(self._categories)

    def category(self, category_id: str) -> Category:
        """A category as its source gives it."""
        return self._categories[category_id]

    def name(self, category_id: str, locale: str | None = None) -> str:
        """Name of a category, in ``locale`` where the source has it."""
        category = self._categories[category_id]
        return category.name if locale is None else category.names.get(locale, category.name)

    def parent(self, category_id: str) -> str | None:
        """Id of the parent, None for a root."""
        return self._categories[category_id].parent_id

    def children(self, category_id: str) -> list[str]:
        """Ids of the direct children, in source order."""
        return list(self._children[category_id])

    def is_leaf(self, category_id: str) -> bool:
        """Whether the category has no children."""
        return not self._children[category_id]

    def level(self, category_id: str) -> int:
        """Level of a category; roots are on level 1."""
        return self._levels[category_id]

    def ancestors(self, category_id: str) -> list[str]:
        """Ids from the root down to the category itself: the i-th is its ancestor on level i + 1."""
        path = [category_id]
        while (parent_id := self._categories[path[-1]].parent_id) is not None:
            path.append(parent_id)
        return path[::-1]

    def ancestor_at(self, category_id: str, level: int) -> str:
        """The ancestor at ``level`` (1: root); the category itself where it is less deep, or unknown."""
        ancestors = self.ancestors(category_id) if category_id in self else [category_id]
        return ancestors[min(level, len(ancestors)) - 1]

    def path(self, category_id: str, locale: str | None = None) -> str:
        """Names from the root down to the category: ``"Home > Kitchen > Kettles"``."""
        return PATH_SEPARATOR.join(self.name(ancestor, locale) for ancestor in self.ancestors(category_id))

    def _levels_from_roots(self) -> dict[str, int]:
        """Level of every category that can be reached from a root."""
        levels: dict[str, int] = {}
        level, generation = 1, self.roots
        while generation:
            levels.update(dict.fromkeys(generation, level))
            generation = [child for parent in generation for child in self._children[parent]]
            level += 1
        return levels


def parse_text(content: bytes, source: str) -> str:
    """``content`` as text.

    Raises:
        InputError: it is not UTF-8 (with or without a byte order mark); the message names ``source``.
    """
    if content.startswith(_UTF_16_MARKS):
        raise InputError(f"{source} is UTF-16, expected UTF-8; save it as UTF-8")
    # UTF-16 without its mark passes for UTF-8 full of NULs.
    if (nul := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise InputError(f"{source} holds a NUL character (line {line}), expected UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{source} is not UTF-8 (line {line}); save it as UTF-8") from None


def parse_table(
    content: bytes, source: str, columns: Sequence[str]
) -> tuple[list[str], list[dict[str, str]]]:
    """Header (lower case, trimmed) and rows by column name (values trimmed) of a CSV with a header.

    Raises:
        InputError: it is not CSV, lacks one of ``columns``, or a row has too many or few fields; the
            message names ``source`` and the row (data rows, counted from 1).
    """
    text = parse_text(content, source)
    lines = text.splitlines(keepends=True)
    if not lines:
        raise InputError(f"{source} is empty, expected a CSV with the columns {', '.join(columns)}")
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(lines[0]), strict=True)
    table: list[list[str]] = []
    try:
        table.extend(row for row in reader if row)
    except csv.Error as error:
        raise InputError(f"{source} line {reader.line_num} is not CSV: {error}") from None
    if not table:
        raise InputError(f"{source} is empty, expected a CSV with the columns {', '.join(columns)}")
    header = [name.strip().lower() for name in table[0]]
    if missing := [name for name in columns if name not in header]:
        raise InputError(f"{source} has no column {', '.join(missing)}; it has {', '.join(header)}")
    if doubled := sorted({name for name in header if name and header.count(name) > 1}):
        raise InputError(f"{source} has more than one column {', '.join(doubled)}; name each once")
    rows = []
    for number, row in enumerate(table[1:], 1):
        if len(row) != len(header):
            raise InputError(f"{source} row {number} has {len(row)} fields, the header {len(header)}")
        rows.append({name: value.strip() for name, value in zip(header, row, strict=True)})
    return header, rows


def _delimiter(header: str) -> str:
    return max(",;\t|", key=header.count)


def _category(
    row: Mapping[str, str], number: int, locale_columns: Mapping[str, str], source: str
) -> Category:
    category_id = row["category_id"]
    if not category_id:
        raise InputError(f"{source} row {number} has an empty category_id; every category needs one")
    return Category(
        category_id=category_id,
        parent_id=row["parent_id"] or None,
        name=row["name"] or category_id,
        names={locale: row[column] for locale, column in locale_columns.items() if row[column]},
    )


def _check_ids_are_unique(categories: Sequence[Category], source: str) -> None:
    first_row: dict[str, int] = {}
    for number, category in enumerate(categories, 1):
        first = first_row.setdefault(category.category_id, number)
        if first != number:
            raise InputError(
                f"{source} row {number} repeats category_id {category.category_id!r} of row {first}; "
                "every id may occur once"
            )


def _check_parents_exist(categories: Iterable[Category], known: Mapping[str, Category], source: str) -> None:
    for number, category in enumerate(categories, 1):
        if category.parent_id is not None and category.parent_id not in known:
            raise InputError(
                f"{source} row {number}: category {category.category_id!r} is an orphan, its parent_id "
                f"{category.parent_id!r} is not in the file; add the parent or leave parent_id empty"
            )


def _describe_cycle(categories: Sequence[Category], reached: Mapping[str, int], source: str) -> str:
    """Which categories are their own ancestors: follow the parents from one that no root reaches."""
    rows = {category.category_id: number for number, category in enumerate(categories, 1)}
    parents = {category.category_id: category.parent_id for category in categories}
    current: str | None = next(
        category.category_id for category in categories if category.category_id not in reached
    )
    trail: dict[str, int] = {}
    while current is not None and current not in trail:
        trail[current] = len(trail)
        current = parents[current]
    cycle = [category_id for category_id, place in trail.items() if place >= trail[str(current)]]
    shown = [repr(category_id) for category_id in cycle[:_MAX_CYCLE_SHOWN]]
    shown += ["…"] if len(cycle) > _MAX_CYCLE_SHOWN else []
    return (
        f"{source} row {rows[cycle[0]]}: the parents form a cycle of {len(cycle)}, "
        f"{' → '.join([*shown, repr(cycle[0])])}; give one of them a parent outside of it"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
