"""Transitions over many versions: following them at once is following them step by step."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from ml.taxonomy_change.transitions import (
    Successor,
    Transition,
    Transitions,
    certain_moves,
    compose,
    most_likely_moves,
)


def moved(former: str, *to: str | tuple[str, float], since: str = "v2", **changes) -> Transition:
    shares = [(t, 1 / len(to)) if isinstance(t, str) else t for t in to]
    given = {
        "kind": "removed" if not to else "replaced" if len(to) == 1 else "split",
        "origin": "official",
        "confidence": 1.0,
        "certain": len(to) == 1,
        "reason": f"{former} in {since}",
    }
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        to=[Successor(category_id=category_id, share=share) for category_id, share in shares],
        since=since,
        **(given | changes),
    )


def steps(*transitions: Transition) -> dict[str, Transition]:
    return {t.from_id: t for t in transitions}


def shares(transition: Transition) -> dict[str, float]:
    return {s.category_id: pytest.approx(s.share) for s in transition.to}


POOL = "abcdefg"


@st.composite
def chains(draw) -> tuple[set[str], list[tuple[dict[str, list[str]], set[str]]]]:
    """The ids of a first version, and for every later one what became of ids and which there are.

    An id that is gone does not return: what a returned id stands for is another test.
    """
    versions = [set(draw(st.sets(st.sampled_from(POOL), min_size=1)))]
    unused = [f"n{i}" for i in range(30)]
    changes = []
    for _ in range(draw(st.integers(1, 4))):
        previous = versions[-1]
        gone = draw(st.sets(st.sampled_from(sorted(previous)), max_size=len(previous)))
        fresh = {unused.pop() for _ in range(draw(st.integers(1, 3)))}
        current = (previous - gone) | fresh
        divided = (
            draw(st.sets(st.sampled_from(sorted(previous - gone)), max_size=2)) if previous - gone else set()
        )
        change = {
            former: draw(st.lists(st.sampled_from(sorted(current)), unique=True, max_size=3))
            for former in gone
        }
        for former in divided:
            change[former] = sorted({former, draw(st.sampled_from(sorted(fresh)))})
        changes.append((change, current))
        versions.append(current)
    return versions[0], changes


@settings(max_examples=150, deadline=None)
@given(chains())
def test_transitions_composed_are_transitions_followed_one_by_one(chain):
    first, changes = chain
    composed: list[Transition] = []
    previous = first
    where: dict[str, dict[str, float]] = {category_id: {category_id: 1.0} for category_id in first}
    for number, (change, current) in enumerate(changes, 2):
        step = steps(*(moved(former, *to, since=f"v{number}") for former, to in change.items()))
        composed = compose(composed, step, previous, current)
        for former, places in where.items():
            where[former] = followed(places, change)
        for added in current - previous:
            where[added] = {added: 1.0}
        previous = current

        found = {t.from_id: t for t in composed}
        assert [t.from_id for t in composed] == sorted(found)
        for former, places in where.items():
            if former in found:
                assert shares(found[former]) == places
            else:
                assert places == {former: pytest.approx(1.0)}
        for transition in composed:
            assert not transition.to or sum(s.share for s in transition.to) == pytest.approx(1.0)
            assert (transition.kind == "removed") == (not transition.to)
            assert (transition.kind == "split") == (len(transition.to) > 1)
            assert not transition.certain or len(transition.to) == 1
            assert {s.category_id for s in transition.to} <= current
            assert transition.lives_on == (transition.from_id in current)
            assert [s.share for s in transition.to] == sorted((s.share for s in transition.to), reverse=True)


def followed(places: Mapping[str, float], change: Mapping[str, list[str]]) -> dict[str, float]:
    after: dict[str, float] = {}
    for place, share in places.items():
        for target in (targets := change.get(place, [place])):
            after[target] = after.get(target, 0.0) + share / len(targets)
    total = sum(after.values())
    return {place: share / total for place, share in after.items()}


def test_a_chain_is_as_sure_as_its_links():
    earlier = [moved("a", "b", origin="inferred", confidence=0.9)]
    (once,) = compose(earlier, {}, {"b"}, {"b"})
    assert once == earlier[0]
    link = moved("b", "c", since="v3", origin="inferred", confidence=0.5, certain=False)
    a, b = compose(earlier, steps(link), {"b"}, {"c"})
    assert b == link
    assert shares(a) == {"c": 1.0}
    assert (a.confidence, a.certain, a.origin) == (pytest.approx(0.45), False, "inferred")
    assert a.reason == "a in v2; then b in v3"


def test_confidence_counts_the_links_by_their_share():
    link = moved("b", "d", since="v3", origin="inferred", confidence=0.5)
    (a, _) = compose([moved("a", ("b", 0.8), ("c", 0.2))], steps(link), {"b", "c"}, {"d", "c"})
    assert a.confidence == pytest.approx(0.8 * 0.5 + 0.2)
    assert shares(a) == {"d": 0.8, "c": 0.2}


def test_a_replaced_category_whose_successor_is_merged_is_merged():
    a, _ = compose([moved("a", "b")], steps(moved("b", "c", kind="merged", since="v3")), {"b", "c"}, {"c"})
    assert (a.kind, a.certain) == ("merged", True)


def test_an_id_that_is_back_needs_no_transition():
    assert compose([moved("a", "b")], {}, {"b"}, {"a", "b"}) == []
    (b,) = compose([moved("a", "b")], steps(moved("b", "a", since="v3")), {"b"}, {"a"})
    assert b.from_id == "b"


def test_parts_that_come_together_again_leave_no_doubt_but_a_part_that_is_gone_does():
    split = [moved("a", "b", "c")]
    both = steps(moved("b", "d", since="v3"), moved("c", "d", since="v3"))
    a, *_ = compose(split, both, {"b", "c"}, {"d"})
    assert (shares(a), a.certain, a.kind) == ({"d": 1.0}, True, "merged")
    a, *_ = compose(split, steps(moved("c", since="v3")), {"b", "c"}, {"b"})
    assert (shares(a), a.certain) == ({"b": 1.0}, False)
    # What was given up came back: the category is what it was.
    assert [
        t.from_id for t in compose([moved("a", "a", "b")], steps(moved("b", "a", since="v3")), "ab", "a")
    ] == ["b"]


def test_an_id_used_again_for_something_else_goes_to_both_and_is_not_certain():
    reused = moved("a", "b", lives_on=True)
    (a,) = compose([reused], steps(moved("a", "c", since="v3")), {"a", "b"}, {"b", "c"})
    assert (shares(a), a.certain, a.kind, a.since) == ({"b": 0.5, "c": 0.5}, False, "split", "v3")


def test_labels_given_since_a_split_need_no_transition_and_retired_ids_always_do():
    composed = compose(
        [], steps(moved("a", "a", "b", lives_on=True), moved("r", "b")), {"a", "r"}, {"a", "b"}
    )
    known = Transitions(history=["v1", "v2", "v3"], transitions=composed)
    assert set(known.for_labels_of("v1")) == {"a", "r"}
    assert set(known.for_labels_of("unheard of")) == {"a", "r"}
    assert set(known.for_labels_of("v2")) == {"r"}
    # A later change of the part that was split off does not concern labels of what was left.
    later = compose(composed, steps(moved("b", "c", since="v3")), {"a", "b"}, {"a", "c"})
    known = Transitions(history=["v1", "v2", "v3"], transitions=later)
    assert set(known.for_labels_of("v2")) == {"b", "r"}
    assert shares(known.for_labels_of("v1")["a"]) == {"a": 0.5, "c": 0.5}
    # A later change of what was left does.
    later = compose(composed, steps(moved("a", "c", since="v3")), {"a", "b"}, {"b", "c"})
    known = Transitions(history=["v1", "v2", "v3"], transitions=later)
    assert shares(known.for_labels_of("v2")["a"]) == {"b": 0.5, "c": 0.5}
    assert not known.for_labels_of("v2")["a"].certain


def test_what_is_learnt_later_of_a_retired_id_takes_the_place_of_what_was_inferred():
    inferred = moved("a", "b", origin="inferred", confidence=0.5, certain=False)
    late = moved("a", "c", since="v3")
    assert compose([inferred], steps(late), {"b", "c"}, {"b", "c"}) == [late]
    # Also of an id that is back: labels from before it was retired go where the mapping says.
    (back,) = compose([inferred], steps(late), {"b", "c"}, {"a", "b", "c"})
    assert back == msgspec.structs.replace(late, lives_on=True)


def test_an_official_split_that_lost_a_part_does_not_become_certain_later():
    lost = compose([moved("a", "b", "c")], steps(moved("c", since="v3")), {"b", "c"}, {"b"})
    a, *_ = compose(lost, steps(moved("b", "d", since="v4")), {"b"}, {"d"})
    assert (shares(a), a.certain) == ({"d": 1.0}, False)


def test_moves_are_those_that_have_somewhere_to_go():
    known = [moved("a", "b"), moved("c", ("d", 0.7), ("e", 0.3)), moved("f")]
    assert certain_moves(known) == {"a": "b"}
    assert most_likely_moves(known) == {"a": "b", "c": "d"}


def test_transitions_are_written_and_read(tmp_path):
    known = Transitions(history=["v1", "v2"], transitions=[moved("a", "b"), moved("c")])
    known.write(tmp_path)
    assert Transitions.read(tmp_path) == known
    with pytest.raises(InputError, match="make taxonomy_change anew"):
        Transitions.read(tmp_path / "nowhere")
