"""The diff of two taxonomies is exact, and so are the objections to a step."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff, categories_of
from ml.taxonomy_change.limits import TaxonomyLimits, objections
from ml.taxonomy_change.transitions import Successor, Transition

LIMITS = TaxonomyLimits()
IDS = [f"c{i}" for i in range(12)]
LOCALES = ("de", "fr")
NAMES = st.sampled_from(["Shoes", "Boots", "Bags", "Schuhe", "Taschen & Koffer", "靴"])


@st.composite
def trees(draw) -> Taxonomy:
    """Trees over few ids, so that two of them share many: any parents, any names, any locales."""
    ids = draw(st.permutations(draw(st.lists(st.sampled_from(IDS), min_size=1, unique=True))))
    locales = draw(st.lists(st.sampled_from(LOCALES), unique=True))
    categories = [
        Category(
            category_id,
            draw(st.sampled_from([None, *ids[:place]])),
            draw(NAMES),
            {locale: draw(NAMES) for locale in locales if draw(st.booleans())},
        )
        for place, category_id in enumerate(ids)
    ]
    return Taxonomy(draw(st.permutations(categories)), locales=locales)


def content(tree: Taxonomy) -> object:
    return categories_of(tree), tree.locales


def tree(rows: str, **names: dict[str, str]) -> Taxonomy:
    """``"a:Home a/b:Kettles"``: id (after its parent's), then name; ``_`` is a space."""
    categories = []
    for row in rows.split():
        path, name = row.split(":")
        parent, _, category_id = path.rpartition("/")
        categories.append(
            Category(category_id, parent or None, name.replace("_", " "), names.get(category_id, {}))
        )
    return Taxonomy(categories, locales=sorted({locale for given in names.values() for locale in given}))


@settings(max_examples=150, deadline=None)
@given(trees(), trees())
def test_the_diff_makes_the_new_tree_of_the_old(old, new):
    diff = TaxonomyDiff.between(old, new)
    assert content(diff.apply(old)) == content(new)
    assert diff.is_empty == (content(old) == content(new))
    assert {c.category_id for c in diff.added} == set(new) - set(old)
    assert {c.category_id for c in diff.removed} == set(old) - set(new)
    kept = set(old) & set(new)
    assert [m.category_id for m in diff.moved] == sorted(i for i in kept if old.parent(i) != new.parent(i))
    before, after = categories_of(old), categories_of(new)
    assert [r.category_id for r in diff.renamed] == sorted(
        i for i in kept if (before[i].name, before[i].names) != (after[i].name, after[i].names)
    )
    back = TaxonomyDiff.between(new, old)
    assert (back.added, back.removed) == (diff.removed, diff.added)


@settings(max_examples=50, deadline=None)
@given(trees())
def test_a_tree_does_not_differ_from_itself_in_another_order(a):
    turned = Taxonomy(list(categories_of(a).values())[::-1], locales=a.locales)
    diff = TaxonomyDiff.between(a, turned)
    assert diff.is_empty
    assert not diff.only_names
    assert content(diff.apply(a)) == content(a)


@settings(max_examples=50, deadline=None)
@given(trees(), trees(), trees())
def test_diffs_apply_one_after_the_other_and_survive_json(a, b, c):
    first, second = TaxonomyDiff.between(a, b), TaxonomyDiff.between(b, c)
    decoded = msgspec.json.decode(msgspec.json.encode(second), type=TaxonomyDiff)
    assert decoded == second
    assert content(decoded.apply(first.apply(a))) == content(c)


@settings(max_examples=100, deadline=None)
@given(trees(), trees(), trees())
def test_a_diff_is_applied_to_what_it_starts_from_or_refused(old, new, other):
    """Applied to another tree it is refused, unless that tree is the same wherever the diff looks."""
    diff = TaxonomyDiff.between(old, new)
    looked_at = {c.category_id for c in (*diff.added, *diff.removed)}
    looked_at |= {change.category_id for change in (*diff.renamed, *diff.moved)}
    try:
        diff.apply(other)
    except InputError:
        assert content(other) != content(old)
    else:
        assert other.locales == old.locales
        assert all((i in other) == (i in old) for i in looked_at)


def test_changes_are_told_apart():
    old = tree("a:Home a/b:Kettles a/c:Pans d:Garden", b={"de": "Kessel"}, c={"de": "Pfannen"})
    new = tree("a:Home a/b:Kettles b/d:Garden d/e:Rakes", b={"de": "Wasserkocher"})
    diff = TaxonomyDiff.between(old, new)
    assert [c.category_id for c in diff.added] == ["e"]
    assert [c.category_id for c in diff.removed] == ["c"]
    assert [(m.category_id, m.before, m.after) for m in diff.moved] == [("d", None, "b")]
    (renamed,) = diff.renamed
    assert (renamed.before.names, renamed.after.names) == ({"de": "Kessel"}, {"de": "Wasserkocher"})
    assert not diff.only_names


def test_new_names_and_new_locales_are_only_names():
    old = tree("a:Home a/b:Kettles")
    assert TaxonomyDiff.between(old, tree("a:Home a/b:Teapots")).only_names
    translated = Taxonomy(
        [dataclasses.replace(c, names={"de": "x"}) for c in categories_of(old).values()], locales=["de"]
    )
    assert TaxonomyDiff.between(old, translated).only_names
    assert not TaxonomyDiff.between(old, tree("a:Home b:Kettles")).only_names


@pytest.mark.parametrize(
    ("base", "named"),
    [("a:Home a/b:Kettles", "'c'"), ("a:Home a/c:Pots", "'c'"), ("a:Home a/c:Pans a/d:Cups", "'d'")],
)
def test_a_wrong_base_is_refused_by_name(base, named):
    diff = TaxonomyDiff.between(tree("a:Home a/c:Pans"), tree("a:Home a/d:Cups"))
    with pytest.raises(InputError, match=f"does not start from this taxonomy: category {named}"):
        diff.apply(tree(base))


def test_a_base_in_other_languages_is_refused():
    old = tree("a:Home")
    diff = TaxonomyDiff.between(old, tree("a:Home b:Garden"))
    with pytest.raises(InputError, match=r"locales \(de\), expected \(\)"):
        diff.apply(Taxonomy([Category("a", None, "Home")], locales=["de"]))


# Objections


def retired(category_id: str, path: str) -> Transition:
    return Transition(
        from_id=category_id,
        from_name=path.rsplit(" > ", 1)[-1],
        from_path=path,
        kind="replaced",
        to=[Successor(category_id="a", share=1.0)],
        origin="official",
        confidence=1.0,
        certain=True,
        since="v2",
        reason="",
    )


HOME = "a:Home a/b:Kettles a/c:Pans d:Garden d/e:Rakes"


def test_a_step_without_surprises_meets_no_objection():
    new = tree("a:Home a/b:Electric_Kettles a/c2:Pans d:Garden c2/e:Rakes d/f:Spades")
    assert objections(tree(HOME), new, [("c", "c2")], [], LIMITS) == []
    assert objections(None, new, [], [], LIMITS) == []


def test_too_many_removed_without_an_official_successor():
    new = tree("a:Home a/b:Kettles a/z:Pans d:Garden")
    (sentence,) = objections(tree(HOME), new, [], [], LIMITS)
    assert sentence.startswith("2 of 5 categories (40 %) are gone without an official successor ('c', 'e')")
    assert "at most 30 % may be" in sentence
    assert objections(tree(HOME), new, [("c", "z")], [], LIMITS) == []
    assert objections(tree(HOME), new, [], [], TaxonomyLimits(max_removed_share=0.4)) == []
    assert objections(tree(HOME), new, [("c", ""), ("e", "")], [], LIMITS) == [sentence]


def test_a_retired_id_that_returns_as_something_else():
    new = tree(HOME + " d/x:Hoses")
    (sentence,) = objections(tree(HOME), new, [], [retired("x", "Home > Curtains")], LIMITS)
    assert "'x' was retired as 'Home > Curtains' and returns as 'Garden > Hoses'" in sentence
    assert objections(tree(HOME), new, [], [retired("x", "Home > Garden Hoses")], LIMITS) == []
    assert objections(tree(HOME), new, [], [retired("x", "Garden > Curtains")], LIMITS) == []
    assert objections(tree(HOME + " d/x:Hoses"), new, [], [retired("x", "Home > Curtains")], LIMITS) == []


def test_a_living_id_that_silently_becomes_something_else():
    new = tree("a:Home a/b:Kettles d/c:Lawnmowers d:Garden d/e:Rakes")
    (sentence,) = objections(tree(HOME), new, [], [], LIMITS)
    assert "'c' was 'Home > Pans' and is now 'Garden > Lawnmowers'" in sentence
    assert objections(tree(HOME), new, [("c", "b")], [], LIMITS) == []
    # Another name in the same place is a rename, another place for the same name a move; a translation
    # of every name is neither, and a parent with a new id is no other place.
    for rows in (
        "a:Home a/b:Kettles a/c:Woks d:Garden d/e:Rakes",
        "a:Home a/b:Kettles d/c:Frying_Pans d:Garden d/e:Rakes",
        "a:Heim a/b:Wasserkocher a/c:Bratgeschirr d:Anlage d/e:Harken",
        "a2:Home a2/b:Boiler a2/c:Woks d:Garden d/e:Rakes",
    ):
        assert objections(tree(HOME), tree(rows), [], [], LIMITS) == [], rows


def test_many_reused_ids_are_counted():
    old = tree("a:Home d:Garden " + " ".join(f"a/k{i}:Kettles" for i in range(6)))
    new = tree("a:Home d:Garden " + " ".join(f"d/k{i}:Lawn" for i in range(6)))
    found = objections(old, new, [], [], LIMITS)
    assert len(found) == 4
    assert found[-1].startswith("In all, 6 ids change their meaning")


def test_a_mapping_of_other_trees():
    rows = [("zz", "b"), ("c", "yy")]
    to, of = objections(tree(HOME), tree(HOME), rows, [], LIMITS)
    assert "'yy', which the new taxonomy does not have" in to
    assert "'zz', which no earlier version has" in of
    assert objections(tree(HOME), tree(HOME), [("zz", "b")], [retired("zz", "Home > Z")], LIMITS) == []
    assert objections(None, tree(HOME), rows, [], LIMITS) == [to]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("old", "new", "mapping"),
    [
        ("gpc/2018", "gpc/2020-06", None),
        ("shopify/2024-07", "shopify/2024-10", None),
        ("shopify/2024-10", "shopify/2025-03", None),
        ("shopify/2024-10", "shopify/2025-03", "shopify/mapping_2024-10_to_2025-03"),
    ],
)
def test_real_data_steps_meet_no_objection_and_their_diff_is_exact(real_data, old, new, mapping):
    def path(name: str) -> Path:
        return real_data / "taxonomy" / f"{name}.csv"

    before, after = Taxonomy.read_csv(str(path(old))), Taxonomy.read_csv(str(path(new)))
    rows = []
    if mapping:
        with path(mapping).open(encoding="utf-8", newline="") as file:
            rows = [(row["from_id"], row["to_id"]) for row in csv.DictReader(file)]
    assert objections(before, after, rows, [], LIMITS) == []
    assert content(TaxonomyDiff.between(before, after).apply(before)) == content(after)
