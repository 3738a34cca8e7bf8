"""The demo feed's catalog: the category tree in two versions, and the kinds of product sold under it.

``categories.csv`` is the first version of the tree; ``taxonomy_changes.csv`` leads to the
second. A *kind* is what an offer really is. Every leaf of the first version is one kind; the
categories that only the second version tells apart are further kinds, labelled with the coarser
leaf before. So the same products carry the labels of whichever version is asked for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from ml.demo.words import LANGUAGES
from ml.errors import InputError

TAXONOMY_VERSIONS = (1, 2)

NAME_COLUMNS = ("name", *(f"name_{language}" for language in LANGUAGES[1:]))
"""English is the plain ``name``."""

_NEW_KIND_SHARE = 0.3
"""Part of a leaf's products that are of the kind split off from it later."""


class Category(msgspec.Struct, frozen=True):
    """One node: its id, its parent's id ("" at the roots), and its name in each of ``LANGUAGES``."""

    category_id: str
    parent_id: str
    names: tuple[str, ...]


class _Family(msgspec.Struct, frozen=True):
    brands: list[str]
    attributes: list[str]
    models: Literal["code", "word", "line"]
    """'code' (WAN 2840), 'word' (Nova 300 II) or 'line' (Nova Sensitive Gold)."""


class _Leaf(msgspec.Struct, frozen=True):
    price: float
    head: bool = False
    host: str = ""
    synonyms: dict[str, list[str]] = {}


class _Products(msgspec.Struct, frozen=True):
    families: dict[str, _Family]
    leaves: dict[str, _Leaf]


class _Change(msgspec.Struct, frozen=True):
    action: str
    category_id: str
    parent_id: str
    formerly: tuple[str, ...]
    """Categories that the offers had before."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of product: what it is called, who makes it, what it costs."""

    number: int
    segment: str
    family: str
    names: tuple[tuple[str, ...], ...]
    """Per language: the usual name, then synonyms."""
    brands: tuple[str, ...]
    attributes: tuple[str, ...]
    models: Literal["code", "word", "line"]
    """How its models are named, see ``products.json``."""
    price: float
    """Median, in EUR."""
    is_head: bool
    """Belongs to the kinds of which most is sold."""
    host: int | None
    """The kind this is an accessory of."""
    weight: float
    """Relative to the other kinds of the same rank in the catalog: 1, or part of a leaf."""
    labels: tuple[str | None, ...]
    """Category id in each of ``TAXONOMY_VERSIONS``; None: no category any more."""


def check_version(version: int) -> None:
    """Raises :class:`InputError` where there is no such version of the taxonomy."""
    if version not in TAXONOMY_VERSIONS:
        known = ", ".join(str(known) for known in TAXONOMY_VERSIONS)
        raise InputError(f"the demo feed has no taxonomy version {version}; choose one of {known}")


@cache
def categories(version: int) -> tuple[Category, ...]:
    """Nodes of the tree, parents before children.

    Raises:
        InputError: there is no such version.
    """
    check_version(version)
    nodes = {
        row["category_id"]: Category(row["category_id"], row["parent_id"], _names(row))
        for row in _rows("categories.csv")
    }
    if version > 1:
        for change in _changes():
            _apply(change, nodes)
    return tuple(sorted(nodes.values(), key=lambda node: (len(node.category_id), node.category_id)))


def taxonomy_csv(version: int) -> str:
    """The tree as CSV text with ``category_id,parent_id,name`` and a name column per further language."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category_id", "parent_id", *NAME_COLUMNS])
    for node in categories(version):
        writer.writerow([node.category_id, node.parent_id, *node.names])
    return text.getvalue()


def mapping_csv(version: int) -> str:
    """Where categories of the version before went, as CSV text with ``from_id,to_id``; "" for the first.

    As with official mappings, only what was merged or split is in it, not what was removed.
    """
    check_version(version)
    if version == TAXONOMY_VERSIONS[0]:
        return ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["from_id", "to_id"])
    rows = []
    for change in _changes():
        for former in change.formerly:
            if change.action == "add":
                rows.append((former, former))  # it stays, for what is not of the new kind
            rows.append((former, change.category_id))
    writer.writerows(dict.fromkeys(rows))
    return text.getvalue()


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds of product; the position is the kind's number."""
    products = msgspec.json.decode(_resource("products.json"), type=_Products)
    nodes = {node.category_id: node for node in categories(1)}
    numbers = {leaf: number for number, leaf in enumerate(products.leaves)}
    split_off = [change for change in _changes() if change.action in ("add", "split")]
    kept_by_split = {change.formerly[0]: change for change in reversed(split_off) if change.action == "split"}
    split_off = [change for change in split_off if change not in kept_by_split.values()]
    shrunk = {change.formerly[0] for change in split_off}

    def kind(leaf: str, number: int, names: tuple[str, ...] | None, later: str | None) -> Kind:
        entry, node = products.leaves[leaf], nodes[leaf]
        family = products.families[node.parent_id]
        synonyms = [tuple(entry.synonyms.get(language, ())) for language in LANGUAGES]
        usual = [(name, *others) for name, others in zip(node.names, synonyms, strict=True)]
        share = 1.0 if leaf not in shrunk else 1 - _NEW_KIND_SHARE
        return Kind(
            number=number,
            segment=nodes[node.parent_id].parent_id,
            family=node.parent_id,
            names=tuple((name,) for name in names) if names else tuple(usual),
            brands=tuple(family.brands),
            attributes=tuple(family.attributes),
            models=family.models,
            price=entry.price,
            is_head=entry.head and not names,
            host=numbers[entry.host] if entry.host else None,
            weight=_NEW_KIND_SHARE if names else share,
            labels=(leaf, later),
        )

    first = [kind(leaf, number, None, _later_label(leaf, kept_by_split)) for leaf, number in numbers.items()]
    further = [
        kind(change.formerly[0], len(first) + place, change.names, change.category_id)
        for place, change in enumerate(split_off)
    ]
    return (*first, *further)


def _later_label(leaf: str, kept_by_split: Mapping[str, _Change]) -> str | None:
    if leaf in kept_by_split:
        return kept_by_split[leaf].category_id
    for change in _changes():
        if change.action == "merge" and leaf in change.formerly:
            return change.category_id
        if change.action == "remove" and leaf == change.category_id:
            return None
    return leaf


def _apply(change: _Change, nodes: dict[str, Category]) -> None:
    known = nodes.get(change.category_id)
    match change.action:
        case "add" | "split" | "merge":
            nodes[change.category_id] = Category(change.category_id, change.parent_id, change.names)
            if change.action != "add":
                for former in change.formerly:
                    nodes.pop(former, None)
        case "move" if known:
            nodes[change.category_id] = Category(change.category_id, change.parent_id, known.names)
        case "rename" if known:
            nodes[change.category_id] = Category(change.category_id, known.parent_id, change.names)
        case "remove" if known:
            del nodes[change.category_id]
        case _:
            raise ValueError(f"taxonomy_changes.csv: cannot {change.action} {change.category_id}")


@cache
def _changes() -> tuple[_Change, ...]:
    return tuple(
        _Change(
            row["action"], row["category_id"], row["parent_id"], tuple(row["formerly"].split()), _names(row)
        )
        for row in _rows("taxonomy_changes.csv")
    )


def _rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(_resource(name).decode())))


def _names(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in NAME_COLUMNS)


def _resource(name: str) -> bytes:
    return resources.files("ml.demo").joinpath(name).read_bytes()
