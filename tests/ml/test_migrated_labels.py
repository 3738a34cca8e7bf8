import itertools
import random
from collections import Counter

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import MigratedLabelsParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change import labels as labels_module
from ml.taxonomy_change.labels import (
    LABELS_FILE,
    LABELS_SCHEMA,
    WEAK_LABELS_FILE,
    WEAK_LABELS_SCHEMA,
    write_migrated_labels,
)
from ml.taxonomy_change.transitions import Successor, Transition, Transitions
from tests.ml.compiled_models import seal
from tests.ml.tiny_models import tiny_encoder

OLD, NEW = "a" * 64, "b" * 64
LEAVES = ["spout", "boil", "slot", "novel", "map"]
FORMER = ["moved", "guessed", "gone", "divided", "unsure"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(tiny_encoder(tmp_path_factory.mktemp("encoder")))


def transition(former, to, since, *, origin="official", certain=False, confidence=1.0):
    kind = "removed" if not to else "split" if len(to) > 1 else "merged"
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind=kind,
        to=[Successor(category_id=c, share=1 / len(to)) for c in to],
        origin=origin,
        confidence=confidence,
        certain=certain,
        since=since,
        reason="",
        lives_on=former in LEAVES,
    )


class World:
    """A taxonomy with two earlier versions, and days of offers labelled under any of the three."""

    def __init__(self, folder):
        self.folder = folder
        self.number = itertools.count()
        tree = folder / "taxonomy"
        tree.mkdir()
        Taxonomy(
            [Category("home", None, "home"), Category("books", None, "books")]
            + [Category(leaf, "home", leaf) for leaf in LEAVES[:3]]
            + [Category(leaf, "books", leaf) for leaf in LEAVES[3:]]
        ).write(tree / "taxonomy.parquet")
        self.tree = seal(tree, "catalog_taxonomy")
        self.digest = read_manifest(tree).digest
        self.change = self.changed(
            [
                transition("moved", ["slot"], NEW, certain=True),
                transition("guessed", ["novel"], NEW, certain=True, origin="inferred", confidence=0.9),
                transition("gone", [], self.digest),
                transition("divided", ["spout", "boil"], self.digest),
                transition("unsure", ["map"], self.digest, origin="inferred", confidence=0.5),
                transition("slot", ["slot", "spout"], self.digest),
            ]
        )

    def changed(self, transitions, history=None, added=("spout", "boil"), adopted_on=()):
        folder = self.folder / f"change{next(self.number)}"
        folder.mkdir()
        history = history or [OLD, NEW, self.digest]
        Transitions(
            history=history,
            transitions=sorted(transitions, key=lambda t: t.from_id),
            added=sorted(added),
            adopted_on=list(adopted_on),
        ).write(folder)
        return seal(folder, "taxonomy_change")

    def run(self, days, **parameters):
        """Days: (digest of the taxonomy, offers) by date. Labels by (day, offer), weak labels, metrics."""
        place = self.folder / f"run{next(self.number)}"
        folders = {"catalog_taxonomy": self.tree, "taxonomy_change": parameters.pop("change", self.change)}
        for day, (digest, offers) in days.items():
            folder = place / day
            folder.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(offers, CLEAN_SCHEMA), folder / "offers.parquet")
            folders[f"offers/{day}"] = seal(folder, "offers", {"catalog_taxonomy": digest})
        for name in ("output", "checkpoints"):
            (place / name).mkdir(parents=True)
        context = StageContext(folders, place / "output", place / "checkpoints", Progress("test"))
        metrics = write_migrated_labels(context, MigratedLabelsParameters(**parameters))
        labels = pq.read_table(place / "output" / LABELS_FILE)
        weak = pq.read_table(place / "output" / WEAK_LABELS_FILE)
        assert labels.schema.equals(LABELS_SCHEMA)
        assert weak.schema.equals(WEAK_LABELS_SCHEMA)
        rows = {(row["delivered_on"], row["offer_id"]): row for row in labels.to_pylist()}
        assert len(rows) == labels.num_rows
        return rows, weak.to_pylist(), metrics


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def offer(number, title="new", label=None, **columns):
    return {"offer_id": f"o{number}", "shop_id": "s", "title": title, "category_id": label, **columns}


def decision(row):
    return row["category_id"], row["decision"]


def test_labels_move_where_that_is_certain_and_are_put_aside_where_nothing_follows(world):
    offers = [
        offer(place, label=label)
        for place, label in enumerate(["moved", "guessed", "gone", "map", "?", None])
    ]
    rows, _, metrics = world.run({"2026-01-01": (OLD, offers)}, weak_per_category=0)
    assert {key[1]: decision(row) for key, row in rows.items()} == {
        "o0": ("slot", "official"),
        "o1": ("novel", "inferred"),
        "o2": (None, "put_aside"),
    }
    assert rows["2026-01-01", "o1"]["confidence"] == 0.9
    assert rows["2026-01-01", "o1"]["labelled_as"] == "guessed"
    assert (metrics["labelled"], metrics["kept"], metrics["unknown_labels"]) == (5, 1, 1)


def test_labels_of_a_category_that_lives_on_follow_only_changes_made_since(world, encoder):
    offers = [offer(0, "slot", "slot"), offer(1, "x", "moved")]
    days = {"2026-01-01": (OLD, offers), "2026-01-02": (NEW, offers), "2026-01-03": (world.digest, offers)}
    rows, _, metrics = world.run(
        days | {"2025-12-31": ("c" * 64, offers)}, encoder=encoder, weak_per_category=0
    )
    # Days of a version that is not known count as the oldest; an id that is no more always moves on.
    assert {day for day, offer_id in rows if offer_id == "o0"} == {"2025-12-31", "2026-01-01", "2026-01-02"}
    assert {day for day, offer_id in rows if offer_id == "o1"} == {"2025-12-31", *days}
    assert metrics["kept"] == 1


def test_labels_of_a_day_that_is_taken_again_are_those_it_was_delivered_with(world, encoder):
    divided = transition("slot", ["slot", "spout"], world.digest)
    change = world.changed([divided], adopted_on=["", "2026-01-01", "2026-01-03"])
    offers = [offer(0, "spout spout", "slot"), offer(1, "cheap large", "slot")]
    days = {f"2026-01-0{day}": (world.digest, offers) for day in (2, 3, 4)}
    rows, _, metrics = world.run(days, encoder=encoder, weak_per_category=0, change=change)
    # On the day of the adoption shops still label as before.
    assert {day for day, _ in rows} == {"2026-01-02", "2026-01-03"}
    for day in ("2026-01-02", "2026-01-03"):
        assert decision(rows[day, "o0"]) == ("spout", "by_evidence")
        assert decision(rows[day, "o1"]) == (None, "put_aside")
    assert metrics["kept"] == 2


def test_the_text_decides_where_a_category_was_divided(world, encoder):
    titles = ["boil boil", "spout spout", "cheap large"]
    offers = [offer(place, title, "divided") for place, title in enumerate(titles)]
    rows, _, metrics = world.run(
        {"2026-01-01": (OLD, offers)}, encoder=encoder, weak_per_category=0, min_confidence=0.9
    )
    found = {key[1]: decision(row) for key, row in rows.items()}
    assert found["o0"] == ("boil", "by_evidence")
    assert found["o1"] == ("spout", "by_evidence")
    assert found["o2"] == (None, "put_aside")
    assert metrics["decisions"] == {"official": 0, "inferred": 0, "by_evidence": 2, "put_aside": 1}


def test_a_successor_that_is_not_sure_takes_no_labels(world, encoder):
    rows, _, _ = world.run(
        {"2026-01-01": (OLD, [offer(0, "map map", "unsure")])}, encoder=encoder, weak_per_category=0
    )
    assert decision(rows["2026-01-01", "o0"]) == (None, "put_aside")
    rows, _, _ = world.run(
        {"2026-01-01": (OLD, [offer(0, "map map", "unsure")])},
        encoder=encoder,
        weak_per_category=0,
        min_confidence=0.3,
    )
    assert decision(rows["2026-01-01", "o0"]) == ("map", "by_evidence")


def test_equal_texts_are_judged_once_and_too_many_are_put_aside(world, encoder, monkeypatch):
    monkeypatch.setattr(labels_module, "_TEXTS_PER_TRANSITION", 2)
    titles = ["boil boil", "boil  boil", "boil red", "boil blue", "boil new"]
    offers = [offer(place, title, "divided") for place, title in enumerate(titles)]
    rows, _, metrics = world.run({"2026-01-01": (OLD, offers)}, encoder=encoder, weak_per_category=0)
    answers = {key[1]: decision(row) for key, row in rows.items()}
    assert answers["o0"] == answers["o1"]
    assert metrics["not_looked_at"] in (2, 3)
    assert metrics["put_aside"] >= metrics["not_looked_at"]


def test_finished_shards_are_not_judged_again(world, encoder, monkeypatch):
    monkeypatch.setattr(labels_module, "_QUESTIONS_PER_SHARD", 3)
    offers = [offer(place, f"boil {place}", "divided") for place in range(8)]
    asked = []
    judged = labels_module._answers
    monkeypatch.setattr(
        labels_module,
        "_answers",
        lambda judge, known, texts: asked.append(len(texts)) or judged(judge, known, texts),
    )
    rows, _, _ = world.run({"2026-01-01": (OLD, offers)}, encoder=encoder, weak_per_category=0)
    assert asked == [3, 3, 2]
    assert {row["category_id"] for row in rows.values()} == {"boil"}
    finished = sorted(world.folder.glob("run*/checkpoints/answers-00*.parquet"))
    assert len(finished) == 3


def shops(count, word, start, label=None):
    rng = random.Random(start)
    fillers = ["red", "blue", "large", "small"]
    return [
        offer(start + n, f"{word} {rng.choice(fillers)} {start + n}", label, product_id=f"p{start + n}")
        for n in range(count)
    ]


def test_new_categories_get_weak_labels_from_offers_that_say_so(world, encoder):
    labelled = [
        row
        for n, word in enumerate(["boil", "slot", "novel", "map"])
        for row in shops(6, word, 100 * n, word)
    ]
    unlabelled_title = shops(3, "spout", 900)[0]["title"].upper()
    twin = offer(903, "spout another day", product_id="p900")
    unlabelled = [
        *shops(3, "spout", 900),
        twin,
        offer(950, unlabelled_title),
        offer(960, "spout large", "gone"),
    ]
    unlabelled += shops(5, "boil", 980)
    days = {"2026-01-01": (NEW, labelled + unlabelled)}
    options = {"encoder": encoder, "few_labelled": 4, "min_weak_confidence": 0.5}
    _, weak, metrics = world.run(days, **options)
    assert {row["category_id"] for row in weak} == {"spout"}
    ids = {row["offer_id"] for row in weak}
    assert ids <= {f"o{n}" for n in (900, 901, 902, 903, 950, 960)}
    assert "o960" in ids  # put aside, so its words are all there is
    assert len(ids & {"o900", "o903"}) == 1  # one product
    assert len(ids & {"o900", "o950"}) <= 1  # one title
    assert metrics["few_labelled_categories"] == 1
    assert metrics["weak"] == len(weak)
    _, capped, _ = world.run(days, **options, weak_per_category=1)
    assert len(capped) == 1
    _, again, _ = world.run(days, **options)
    assert again == weak


def test_no_weak_labels_where_no_change_added_a_category_or_without_candidates(world, encoder):
    days = {"2026-01-01": (OLD, shops(5, "spout", 0))}
    first = world.changed([], history=[world.digest], added=())
    assert world.run(days, encoder=encoder, change=first)[1] == []
    days = {"2026-01-01": (OLD, shops(5, "nothing", 0))}
    _, weak, metrics = world.run(days, encoder="does-not-exist")
    assert weak == []
    assert metrics["few_labelled_categories"] == 2


def test_proposals_that_are_too_often_wrong_are_not_made(world, encoder, monkeypatch):
    monkeypatch.setattr(labels_module, "_estimated_precision", lambda *_: 0.4)
    days = {"2026-01-01": (OLD, shops(5, "spout", 0))}
    _, weak, metrics = world.run(days, encoder=encoder)
    assert weak == []
    assert metrics["weak_precision"] == 0.4


def test_the_estimate_looks_at_as_many_offers_as_the_search(world, encoder, monkeypatch):
    monkeypatch.setattr(labels_module, "_SEARCHED_OFFERS", 5)
    monkeypatch.setattr(labels_module, "_ESTIMATE_CATEGORIES", 1)
    compared = []
    search = labels_module._candidates

    def watched(database, taxonomy, categories, offers, *args, **options):
        if offers == "compared":
            rows = database.sql("SELECT category_id, count(*) FROM compared GROUP BY ALL").fetchall()
            compared.append((categories, dict(rows)))
        return search(database, taxonomy, categories, offers, *args, **options)

    monkeypatch.setattr(labels_module, "_candidates", watched)
    words = ["boil", "slot", "novel", "map"]
    labelled = [row for n, word in enumerate(words) for row in shops(6, word, 100 * n, word)]
    days = {"2026-01-01": (NEW, labelled + shops(3, "spout", 900))}
    world.run(days, encoder=encoder, few_labelled=4)
    (([treated_as_new], offers),) = compared
    assert offers.pop(treated_as_new) == labels_module._ESTIMATE_OWN_OFFERS
    assert sum(offers.values()) == 5


def test_a_change_that_leads_elsewhere_is_refused(world):
    other = world.changed([], history=[OLD, NEW])
    with pytest.raises(InputError, match="make taxonomy_change of this version"):
        world.run({"2026-01-01": (OLD, [offer(0)])}, change=other)


words = st.sampled_from(["boil", "spout", "map", "slot", "novel", "new", "cheap"])
offers_of_a_day = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.lists(words, min_size=1, max_size=3),
        st.none() | st.sampled_from([*LEAVES, *FORMER, "home", "nobody knows"]),
    ),
    max_size=14,
    unique_by=lambda row: row[0],
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    days=st.lists(
        st.tuples(st.sampled_from([OLD, NEW, None, "e" * 64]), offers_of_a_day), min_size=1, max_size=3
    ),
    adopted_on=st.lists(st.sampled_from(["", "2026-01-01", "2026-01-02"]), min_size=3, max_size=3).map(
        sorted
    ),
)
def test_every_label_stands_moves_is_put_aside_or_unknown(tmp_path_factory, encoder, days, adopted_on):
    world = World(tmp_path_factory.mktemp("world"))
    known = msgspec.structs.replace(Transitions.read(world.change), adopted_on=adopted_on)
    change = world.changed(known.transitions, adopted_on=adopted_on)
    feed = {
        f"2026-01-0{place + 1}": (
            digest or world.digest,
            [offer(number, " ".join(title), label) for number, title, label in offers],
        )
        for place, (digest, offers) in enumerate(days)
    }
    rows, weak, metrics = world.run(feed, encoder=encoder, few_labelled=2, change=change)
    counts = Counter()
    usable = set()
    for day, (digest, offers) in feed.items():
        needed = known.for_labels_of(known.version_of_labels(digest, day))
        assert needed.keys() >= known.for_labels_of(digest).keys()
        for row in offers:
            if (label := row["category_id"]) is None:
                assert (day, row["offer_id"]) not in rows
                continue
            decided = rows.get((day, row["offer_id"]))
            assert (decided is not None) == (label in needed)
            if decided is None:
                place = "kept" if label in [*LEAVES, "home"] else "unknown_labels"
            else:
                assert decided["labelled_as"] == label
                assert 0 <= decided["confidence"] <= 1
                allowed = {successor.category_id for successor in needed[label].to}
                assert decided["category_id"] in allowed | {None}
                assert (decided["category_id"] is None) == (decided["decision"] == "put_aside")
                place = "put_aside" if decided["category_id"] is None else "migrated"
            counts[place] += 1
            if place in ("kept", "migrated"):
                usable.add(row["offer_id"])
    for place in ("kept", "migrated", "put_aside", "unknown_labels"):
        assert metrics[place] == counts[place]
    assert metrics["labelled"] == counts.total()
    assert not usable & {row["offer_id"] for row in weak}
    assert {row["category_id"] for row in weak} <= set(LEAVES)
    assert len({row["offer_id"] for row in weak}) == len(weak)
