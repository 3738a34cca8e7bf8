"""The formats in which taxonomies are published, told apart by content.

- CSV with ``category_id,parent_id,name`` (see :meth:`ml.taxonomy.Taxonomy.read_csv`),
- Google's product taxonomy with ids: ``1604 - Apparel & Accessories > Clothing``,
- Shopify's categories: ``gid://shopify/TaxonomyCategory/aa-1 : Apparel & Accessories > Clothing``.

The two text formats give each category's whole path; its parent is the category whose path is one name
shorter. Further languages are files of the same format, or CSV with ``category_id,name``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from ml.errors import InputError
from ml.taxonomy import PATH_SEPARATOR, Category, Taxonomy, parse_table, parse_text

MappingRows = list[tuple[str, str]]
"""Pairs of a former and a current category id; "" stands for a category that is gone for good."""

_SHOPIFY_ID = "gid://shopify/TaxonomyCategory/"
_GOOGLE_LINE = re.compile(r"(?P<id>[0-9]+) - (?P<path>\S.*)")
_SHOPIFY_LINE = re.compile(re.escape(_SHOPIFY_ID) + r"(?P<id>\S+)\s+:\s+(?P<path>\S.*)")
_LINE_END = re.compile(r"\r\n|\r|\n")
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class _Line:
    """One category of a text format."""

    number: int
    category_id: str
    path: tuple[str, ...]


def parse_tree(content: bytes, label: str) -> Taxonomy:
    """The tree in a file of any of the formats.

    Raises:
        InputError: the file is of none of them, or not a tree; the message calls it ``label`` and names
            the row or line.
    """
    lines = _lines(content, label)
    return Taxonomy.parse_csv(content, label) if lines is None else _tree_of(lines, label)


def parse_names(content: bytes, label: str, known: Container[str]) -> dict[str, str]:
    """Names by category id, from a file in one more language; categories without a name are left out.

    Args:
        content: Of the file.
        label: What messages call the file.
        known: Ids of the tree.

    Raises:
        InputError: the file cannot be read, has an id twice, or one that the tree does not have.
    """
    lines = _lines(content, label)
    if lines is None:
        _, rows = parse_table(content, label, ("category_id", "name"))
        given = [(f"row {number}", row["category_id"], row["name"]) for number, row in enumerate(rows, 1)]
    else:
        given = [(f"line {line.number}", line.category_id, line.path[-1]) for line in lines]
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for place, category_id, name in given:
        if category_id not in known:
            raise InputError(
                f"{label} {place} names category {category_id!r}, which the tree does not have; "
                "give names and tree of the same version"
            )
        if category_id in first:
            raise InputError(
                f"{label} {place} repeats category_id {category_id!r} of {first[category_id]}; "
                "every id may occur once"
            )
        first[category_id] = place
        if name:
            names[category_id] = name
    return names


def parse_mapping(
    content: bytes, label: str, known: Container[str] | None, former_ids: Container[str] | None = None
) -> MappingRows:
    """Pairs of former and current id from CSV with ``from_id,to_id``.

    Args:
        content: Of the file.
        label: What messages call the file.
        known: Ids of the tree that the mapping leads to; None: not checked.
        former_ids: Ids that it may start from; None: not checked.

    Returns:
        The pairs in the order of the file. A former id may lead to several current ones (it was split)
        or, with an empty ``to_id``, to none (it was removed).

    Raises:
        InputError: a row has no ``from_id`` or one that was never used, leads to an id that the tree does
            not have, repeats another or contradicts it.
    """
    _, rows = parse_table(content, label, ("from_id", "to_id"))
    seen: dict[tuple[str, str], int] = {}
    first: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows, 1):
        pair = former, current = row["from_id"], row["to_id"]
        if not former:
            raise InputError(f"{label} row {number} has an empty from_id; name the former category")
        if former_ids is not None and former not in former_ids:
            raise InputError(
                f"{label} row {number} starts from category {former!r}, which no earlier release beside it "
                "has; correct from_id, or put the release that had it back"
            )
        if current and known is not None and current not in known:
            raise InputError(
                f"{label} row {number} leads to category {current!r}, which the tree does not have; "
                "give mapping and tree of the same version"
            )
        if pair in seen:
            raise InputError(f"{label} row {number} repeats row {seen[pair]}; remove one")
        other, other_row = first.setdefault(former, (current, number))
        if bool(other) != bool(current):
            raise InputError(
                f"{label} row {number} contradicts row {other_row}: category {former!r} cannot be removed "
                "and lead to another; remove one of the rows"
            )
        seen[pair] = number
    return list(seen)


def _tree_of(lines: list[_Line], label: str) -> Taxonomy:
    by_path: dict[tuple[str, ...], _Line] = {}
    by_id: dict[str, _Line] = {}
    for line in lines:
        if (same := by_id.setdefault(line.category_id, line)) is not line:
            raise InputError(
                f"{label} line {line.number} repeats the id {line.category_id!r} of line {same.number}; "
                "every id may occur once"
            )
        if (same := by_path.setdefault(line.path, line)) is not line:
            raise InputError(
                f"{label} line {line.number} repeats the path {_shown(PATH_SEPARATOR.join(line.path))} of "
                f"line {same.number}; every path may occur once"
            )
    categories = []
    for line in lines:
        parent = by_path.get(line.path[:-1])
        if parent is None and len(line.path) > 1:
            raise InputError(
                f"{label} line {line.number}: category {line.category_id!r} has no parent, no line gives the "
                f"path {_shown(PATH_SEPARATOR.join(line.path[:-1]))}; add the parent"
            )
        categories.append(
            Category(line.category_id, None if parent is None else parent.category_id, line.path[-1])
        )
    return Taxonomy(categories, source=label)


def _lines(content: bytes, label: str) -> list[_Line] | None:
    """Categories of a file in one of the text formats; None: it is none, so it should be CSV."""
    text = parse_text(content, label)
    numbered = list(_lines_with_content(text))
    if not numbered:
        return None
    first = numbered[0][1]
    data = [(number, line) for number, line in numbered if not line.startswith("#")]
    if not (first.startswith("#") or _GOOGLE_LINE.fullmatch(first) or first.startswith(_SHOPIFY_ID)):
        return None
    if not data:
        raise InputError(f"{label} holds no categories; a taxonomy needs at least one")
    if data[0][1].startswith(_SHOPIFY_ID):
        return [_parsed(number, line, _SHOPIFY_LINE, label) for number, line in data]
    return [_parsed(number, line, _GOOGLE_LINE, label) for number, line in data]


def _parsed(number: int, line: str, pattern: re.Pattern[str], label: str) -> _Line:
    match = pattern.fullmatch(line)
    path = tuple(name.strip() for name in match["path"].split(PATH_SEPARATOR)) if match else ()
    if match is None or not all(path):
        expected = (
            "'<id> - <name> > <name>' (of Google's files, those named taxonomy-with-ids)"
            if pattern is _GOOGLE_LINE
            else f"'{_SHOPIFY_ID}<id> : <name> > <name>'"
        )
        raise InputError(f"{label} line {number} is {_shown(line)}, expected {expected}")
    return _Line(number, match["id"], path)


def _lines_with_content(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if stripped := line.strip():
            yield number, stripped


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…")
