"""Successors of removed categories: the official mapping is believed, the rest is inferred with care."""

from __future__ import annotations

import csv
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.taxonomy_inference import edited, inferred, measured
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change import successors
from ml.taxonomy_change.successors import infer_transitions, late_transitions, match_names, words
from ml.taxonomy_change.transitions import Transition


def tree(rows: str) -> Taxonomy:
    """``"a:Home a/b:Kettles"``: id (after its parent's), then name; ``_`` is a space, ``|`` a German name."""
    categories = []
    for row in rows.split():
        path, name = row.split(":")
        parent, _, category_id = path.rpartition("/")
        name, _, german = name.replace("_", " ").partition("|")
        categories.append(Category(category_id, parent or None, name, {"de": german} if german else {}))
    return Taxonomy(categories, locales=("de",))


def step(old: str, new: str, **options) -> dict[str, Transition]:
    return infer_transitions(tree(old), tree(new), since="v2", **options)


def targets(transition: Transition) -> list[str]:
    return [successor.category_id for successor in transition.to]


HOME = "h:Home h/k:Kitchen k/t:Kettles k/p:Pans h/b:Bath b/s:Soap_Dishes g:Garden g/r:Rakes"


# The official mapping


def test_nothing_removed_and_nothing_mapped_is_no_transition():
    assert step(HOME, HOME) == {}
    assert step(HOME, HOME + " g/n:Spades", mapping=[("t", "t")]) == {}


@pytest.mark.parametrize(
    ("new", "mapping", "expected"),
    [
        ("k/t2:Boilers", [("t", "t2")], {"t": ("replaced", ["t2"])}),
        ("", [("t", "r")], {"t": ("merged", ["r"])}),
        ("k/x:Cookware", [("t", "x"), ("p", "x")], {"t": ("merged", ["x"]), "p": ("merged", ["x"])}),
        ("k/x:Big k/y:Small", [("t", "x"), ("t", "y")], {"t": ("split", ["x", "y"])}),
        ("", [("t", "")], {"t": ("removed", [])}),
        ("k/x:Woks", [("p", "p"), ("p", "x"), ("t", "")], {"p": ("split", ["p", "x"]), "t": ("removed", [])}),
        ("k/x:Woks", [("p", "x"), ("t", "")], {"p": ("replaced", ["x"]), "t": ("removed", [])}),
    ],
)
def test_the_official_mapping_wins(new, mapping, expected):
    gone = {former for former, _ in mapping if former == "t" or (former == "p" and mapping[0][0] == "t")}
    kept = " ".join(row for row in HOME.split() if row.split(":")[0].rpartition("/")[2] not in gone)
    found = step(HOME, f"{kept} {new}", mapping=[*mapping, ("r", "r"), ("unheard", "x")])
    assert {former: (t.kind, targets(t)) for former, t in found.items()} == expected
    assert all((t.origin, t.confidence, t.since) == ("official", 1.0, "v2") for t in found.values())
    assert all(t.certain == (len(t.to) == 1) for t in found.values())
    assert all(t.lives_on == (former not in gone) for former, t in found.items())


def test_shares_of_an_official_split_are_those_of_the_offers_if_known():
    new, mapping = HOME.replace("k/t:Kettles", "k/x:Big k/y:Small"), [("t", "x"), ("t", "y")]
    assert [s.share for s in step(HOME, new, mapping=mapping)["t"].to] == [0.5, 0.5]
    flows = {"t": [("y", 0.6), ("x", 0.2), ("r", 0.2)]}
    found = step(HOME, new, mapping=mapping, flows=flows)["t"]
    assert [(s.category_id, s.share) for s in found.to] == [
        ("y", pytest.approx(0.75)),
        ("x", pytest.approx(0.25)),
    ]


def test_a_part_that_is_gone_for_good_leaves_a_doubt():
    found = step(HOME, HOME.replace("k/t:Kettles", "k/x:Big"), mapping=[("t", "x"), ("t", "")])["t"]
    assert (found.origin, found.kind, targets(found), found.certain) == ("official", "replaced", ["x"], False)


def test_a_mapping_that_comes_late_is_for_ids_that_were_gone_before():
    old, new = tree(HOME), tree(HOME.replace("k/p:", "k/p2:"))
    (gone,) = step("q:Grills", HOME).values()
    mapping = [("p", "p2"), ("unheard", "r")]
    earlier = [gone, msgspec.structs.replace(gone, from_id="x", from_name="X", from_path="G > X")]
    assert late_transitions(earlier, old, new, mapping, since="v3") == {}
    found = late_transitions(earlier, old, new, [*mapping, ("x", "p2")], since="v3")
    assert [(t.from_path, t.origin, targets(t), t.certain) for t in found.values()] == [
        ("G > X", "official", ["p2"], True)
    ]
    known = list(found.values())
    assert late_transitions(known, old, new, [("x", "p2")], since="v4") == {}
    assert targets(late_transitions(known, old, new, [("x", "r")], since="v4")["x"]) == ["r"]


# Inferred


def test_a_subtree_with_new_ids_is_found_whole():
    found = step(HOME, HOME.replace("h/k:", "h/k2:").replace("k/t:", "k2/t2:").replace("k/p:", "k2/p2:"))
    assert {former: targets(t) for former, t in found.items()} == {"k": ["k2"], "t": ["t2"], "p": ["p2"]}
    assert all(t.certain and t.kind == "replaced" and t.origin == "inferred" for t in found.values())
    assert found["k"].reason == "same name under the same parent, 2 of its 2 subcategories are there"
    assert found["t"].reason == "same name where its parent went"


def test_a_renamed_parent_is_known_by_its_children():
    found = step(
        HOME, HOME.replace("h/k:Kitchen", "h/k2:Cooking").replace("k/t", "k2/t").replace("k/p", "k2/p")
    )
    assert list(found) == ["k"]
    assert targets(found["k"]) == ["k2"]


def test_names_of_another_locale_count():
    old = "h:Home h/t:Kettles|Wasserkocher h/p:Pans|Pfannen"
    found = step(old, "h:Home h/t2:Hot_Drinks|Wasserkocher h/p:Pans|Pfannen")
    assert targets(found["t"]) == ["t2"]


def test_two_successors_that_are_equally_good_are_not_certain():
    found = step(HOME, HOME.replace("k/t:Kettles", "k/x:Kettles k/y:Kettles"))["t"]
    assert not found.certain
    assert found.confidence < 0.6


def test_a_category_that_was_dropped_does_not_go_to_a_neighbour_of_a_similar_name():
    old = "w:Candle_Making w/m:Metal_Wick_Tabs w/a:Adhesive_Wick_Tabs w/p:Plastic_Wick_Tabs"
    found = step(old, "w:Candle_Making w/a2:Adhesive_Wick_Tabs w/p:Plastic_Wick_Tabs")
    assert targets(found["a"]) == ["a2"]
    assert found["a"].certain
    assert not found["m"].certain
    found = step(old, "w:Candle_Making w/a:Adhesive_Wick_Tabs w/p:Plastic_Wick_Tabs w/n:Wooden_Wick_Tabs")
    assert not found["m"].certain


def test_nothing_like_it_is_removed():
    found = step(HOME, HOME.replace("g:Garden g/r:Rakes", ""))
    assert {former: (t.kind, t.to, t.certain) for former, t in found.items()} == {
        "g": ("removed", [], False),
        "r": ("removed", [], False),
    }
    assert found["g"].reason == "nothing in the new tree resembles it enough"


def test_the_same_name_elsewhere_that_was_there_before_is_at_most_likely():
    old = "w:Women w/l:Leggings b:Baby b/m:Leggings"
    assert not step(old, "w:Women b:Baby b/m:Leggings")["l"].certain


# Evidence of offers and of an encoder


def without_kettles(*added: str) -> str:
    return " ".join([HOME.replace("k/t:Kettles", ""), *added])


def test_offers_alone_name_a_successor_but_never_for_certain():
    found = step(HOME, without_kettles(), flows={"t": [("s", 1.0)]})["t"]
    assert (found.kind, targets(found), found.certain) == ("merged", ["s"], False)
    assert "100 % of its offers go to Soap Dishes" in found.reason


def test_offers_and_name_together_are_certain_and_against_each_other_are_not():
    new = without_kettles("k/t2:Kettles_&_Boilers")
    alone, both = step(HOME, new)["t"], step(HOME, new, flows={"t": [("t2", 0.9), ("s", 0.1)]})["t"]
    assert targets(both) == ["t2"]
    assert both.certain
    assert both.confidence > alone.confidence
    assert not step(HOME, new, flows={"t": [("s", 1.0)]})["t"].certain


def test_offers_that_spread_make_a_split():
    found = step(HOME, without_kettles(), flows={"t": [("s", 0.4), ("p", 0.35), ("r", 0.23), ("b", 0.02)]})[
        "t"
    ]
    assert (found.kind, found.certain, targets(found)) == ("split", False, ["s", "p", "r"])
    assert sum(s.share for s in found.to) == pytest.approx(1.0)
    assert found.reason == "its offers spread over 3 categories, 40 % of its offers go to Soap Dishes"


def test_little_evidence_weighs_less():
    much = step(HOME, without_kettles(), flows={"t": [("s", 1.0)]})["t"]
    little = step(HOME, without_kettles(), flows={"t": [("s", 0.5)]})["t"]
    assert little.confidence < much.confidence


def test_an_encoder_helps_where_names_share_no_word():
    asked = []

    def similarity(first, second):
        asked.append((list(first), list(second)))
        return np.array([[0.98 if name == "Water Boilers" else 0.3 for name in second] for _ in first])

    new = without_kettles("k/t2:Water_Boilers")
    alone, helped = step(HOME, new)["t"], step(HOME, new, similarity=similarity)["t"]
    assert asked[0][0] == ["Kettles"]
    assert helped.confidence != alone.confidence
    assert not helped.certain


# Any two trees

IDS = [f"c{i}" for i in range(10)]
NAMES = st.sampled_from(["Shoes", "Boots", "Rain Boots", "Bags & Cases", "Bags", "Schuhe", "靴", "& -"])


@st.composite
def any_tree(draw) -> Taxonomy:
    ids = draw(st.lists(st.sampled_from(IDS), min_size=1, unique=True))
    return Taxonomy(
        [Category(i, draw(st.sampled_from([None, *ids[:place]])), draw(NAMES)) for place, i in enumerate(ids)]
    )


PAIRS = st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from([*IDS, ""])), max_size=6)
FLOWS = st.dictionaries(
    st.sampled_from(IDS), st.lists(st.tuples(st.sampled_from(IDS), st.floats(0, 1)), max_size=4), max_size=4
)


@settings(max_examples=80, deadline=None)
@given(any_tree(), any_tree(), PAIRS, FLOWS)
def test_every_removed_id_gets_one_transition_that_makes_sense(old, new, mapping, flows):
    found = infer_transitions(old, new, mapping=mapping, flows=flows, since="v2")
    removed = set(old) - set(new)
    assert removed <= set(found) <= set(old)
    for former, transition in found.items():
        assert transition.from_id == former
        assert transition.from_path == old.path(former)
        assert set(targets(transition)) <= set(new)
        assert targets(transition) != [former]
        assert not transition.to or sum(s.share for s in transition.to) == pytest.approx(1.0)
        assert (transition.kind == "removed") == (not transition.to)
        assert (transition.kind == "split") == (len(transition.to) > 1)
        assert 0 <= transition.confidence <= 1
        assert transition.reason
        if transition.kind == "replaced":
            assert targets(transition)[0] not in old
        if transition.origin == "inferred":
            assert former in removed
            assert transition.certain == (len(transition.to) == 1 and transition.confidence >= 0.8)
    assert found == infer_transitions(old, new, mapping=mapping, flows=flows, since="v2")


# Names


def test_words_are_compared_without_case_accents_plural_and_small_words():
    assert words("Crèmes & Lotions") == words("creme LOTION")
    assert words("&") == ("&",)
    assert words("靴") == ("靴",)


def test_an_added_word_is_told_from_a_replaced_one():
    assert match_names("Uniforms", "Uniforms & Workwear").replaced == 0
    assert match_names("Metal Tabs", "Adhesive Tabs").replaced > 0.3
    assert match_names("Rubber Foots", "Rubber Footes").replaced == 0
    assert match_names("Tabs, Metal", "Metal Tabs").same


# Flat trees


@pytest.fixture
def names_compared(monkeypatch):
    """Grows by one with every pair of names that is compared."""
    compared = []

    def counting(*names, **options):
        compared.append(names[:2])
        return match_names(*names, **options)

    monkeypatch.setattr(successors, "match_names", counting)
    return compared


def test_of_thousands_of_new_siblings_few_pairs_are_compared(names_compared):
    names = [f"{kind} {i}" for i, kind in enumerate(("Kettle", "Pan", "Soap Dish") * 1000)]
    old = Taxonomy([Category(f"a{i}", None, name) for i, name in enumerate(names)])
    new = Taxonomy([Category(f"b{i}", None, name) for i, name in enumerate(names)])
    found = infer_transitions(old, new, since="v2")
    assert 0 < len(names_compared) < 100 * len(names)  # of 9 million
    assert sum(targets(t) == [f"b{former[1:]}"] for former, t in found.items()) > 2900


# Real trees


@pytest.mark.real_data
def test_real_data_successors_of_an_official_mapping_are_found_without_it(real_data):
    folder = real_data / "taxonomy" / "shopify"
    old, new = (Taxonomy.read_csv(str(folder / f"{name}.csv")) for name in ("2024-10", "2025-03"))
    with (folder / "mapping_2024-10_to_2025-03.csv").open(encoding="utf-8", newline="") as file:
        mapping = [(row["from_id"], row["to_id"]) for row in csv.DictReader(file)]
    truth = dict(mapping)
    found = infer_transitions(old, new, since="v2")
    certain = {former: t for former, t in found.items() if t.certain}
    assert len(certain) >= 45
    assert all(targets(t) == [truth[former]] for former, t in certain.items())
    assert sum(targets(t)[:1] == [truth[former]] for former, t in found.items()) >= 48
    official = infer_transitions(old, new, mapping=mapping, since="v2")
    assert {former: targets(t) for former, t in official.items()} == {a: [b] for a, b in mapping}
    assert {t.kind for t in official.values()} == {"replaced"}


@pytest.mark.real_data
def test_real_data_trees_edited_on_purpose_give_certain_successors_that_are_right(real_data):
    steps = [
        edited(name, Taxonomy.read_csv(str(real_data / "taxonomy" / f"{name}.csv")), seed)
        for name in ("shopify/2024-07", "gpc/2018", "groceries")
        for seed in (101, 102)
    ]
    figures = measured(steps, inferred)
    assert figures["precision_certain"] >= 0.98
    assert figures["recall_certain"] >= 0.7
    assert figures["precision"] >= 0.92


def test_boxer_shorts_for_men_do_not_become_those_for_boys_for_certain():
    old = "c:Clothing c/m:Men's_Underwear m/x:Boxer_Shorts m/y:Briefs c/b:Boys'_Underwear b/z:Boxer_Shorts"
    new = "c:Clothing c/m:Men's_Underwear m/y:Briefs c/b:Boys'_Underwear b/z:Boxer_Shorts"
    assert not step(old, new)["x"].certain


@pytest.mark.real_data
def test_of_ten_thousand_real_categories_few_pairs_are_compared(real_data, names_compared):
    old = Taxonomy.read_csv(str(real_data / "taxonomy" / "shopify" / "2025-03.csv"))
    chosen = set(random.Random(5).sample(old.ids, 2000))
    new = Taxonomy(
        [
            Category(
                f"{i}-new" if i in chosen else i,
                f"{parent}-new" if (parent := old.parent(i)) in chosen else parent,
                old.name(i),
            )
            for i in old
        ]
    )
    found = infer_transitions(old, new, since="v2")
    assert 0 < len(names_compared) < 100 * len(chosen)  # of 4 million
    right = [targets(t) == [f"{former}-new"] for former, t in found.items() if t.certain]
    assert len(found) == 2000
    assert len(right) > 1900
    assert sum(right) >= 0.99 * len(right)
