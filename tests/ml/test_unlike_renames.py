"""Renames that may be another use of an id."""

from __future__ import annotations

import pytest

from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.limits import unlike_renames


def renamed(before: str, after: str, german: tuple[str, str] | None = None) -> bool:
    """Whether it is pointed out."""
    old, new = (
        Taxonomy([Category("a", None, name, {"de": german[place]} if german else {})], locales=("de",))
        for place, name in enumerate((before, after))
    )
    return bool(unlike_renames(TaxonomyDiff.between(old, new)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Kettles", "Lawnmowers"),
        ("Rubber Feet", "Garden Hoses"),
        ("TVs", "Washing Machines"),
        ("LED", "Lamps"),
    ],
)
def test_a_name_of_its_own_is_pointed_out(before, after):
    assert renamed(before, after)
    assert renamed(after, before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Rubber Foots", "Rubber Feet"),
        ("TVs", "Televisions"),
        ("PCs", "Personal Computers"),
        ("Kettles", "Electric Kettles & Boilers"),
        ("Jewellery", "Jewelry"),
        ("Kettles", "Kettles"),
    ],
)
def test_a_new_wording_is_not(before, after):
    assert not renamed(before, after)
    assert not renamed(after, before)


def test_names_alike_in_one_language_are_enough():
    assert not renamed("Cell Phones", "Handhelds", ("Handys", "Handys"))
    assert renamed("Kettles", "Lawnmowers", ("Kessel", "Rasen"))
