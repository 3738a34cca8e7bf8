import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving.predictor import PREDICTION_SCHEMA
from ml.stages import TaxonomyChangeParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.change import (
    IMPACT_FILE,
    changed_categories,
    changed_since,
    read_change,
    write_taxonomy_change,
)
from ml.taxonomy_change.transitions import Transitions
from tests.ml.compiled_models import seal
from tests.ml.tiny_models import TINY_TEACHER, make, tiny_encoder, tiny_inputs

FIRST = {
    "home": None,
    "books": None,
    "kettles": "home",
    "toasters": "home",
    "novels": "books",
    "atlases": "books",
}


class Room:
    """Versions of a taxonomy, one after the other, and the change from each to the next."""

    def __init__(self, folder):
        self.folder = folder
        self.number = 0
        self.tree = self.change = None

    def adopt(
        self, parents, *, names=None, mapping=(), days=None, catalogued=None, teacher=None, **parameters
    ):
        """Adopt a version given as parent by id; returns the metrics. ``days``: offers by (day, digest)."""
        self.number += 1
        place = self.folder / f"v{self.number}"
        tree = place / "tree"
        tree.mkdir(parents=True)
        categories = [Category(c, parent, (names or {}).get(c, c)) for c, parent in parents.items()]
        Taxonomy(categories).write(tree / "taxonomy.parquet")
        if mapping:
            columns = {"from_id": [row[0] for row in mapping], "to_id": [row[1] for row in mapping]}
            pq.write_table(
                pa.table(columns, pa.schema(dict.fromkeys(columns, pa.string()))), tree / "mapping.parquet"
            )
        inputs = {"catalog_taxonomy": seal(tree, "catalog_taxonomy")}
        if self.tree:
            inputs |= {"previous_taxonomy": self.tree, "previous_change": self.change}
        if teacher:
            inputs["teacher_checkpoint"] = teacher
        for (day, digest), offers in (days or {}).items():
            folder = place / "offers" / day
            folder.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(offers, CLEAN_SCHEMA), folder / "offers.parquet")
            inputs[f"offers/{day}"] = seal(folder, "offers", {"catalog_taxonomy": digest})
        for day, rows in (catalogued or {}).items():
            folder = place / "catalogued" / day
            folder.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, PREDICTION_SCHEMA), folder / "catalogued.parquet")
            inputs[f"catalogued_offers/{day}"] = seal(folder, "catalogued_offers")
        for name in ("output", "checkpoints"):
            (place / name).mkdir()
        context = StageContext(inputs, place / "output", place / "checkpoints", Progress("test"))
        metrics = write_taxonomy_change(context, TaxonomyChangeParameters(**parameters))
        self.tree, self.change = tree, seal(place / "output", "taxonomy_change")
        return metrics

    @property
    def digest(self):
        return read_manifest(self.tree).digest


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def offer(number, label=None, title="new"):
    return {"offer_id": f"o{number}", "shop_id": "s", "title": title, "category_id": label}


def without(parents, *gone, **further):
    return {c: parent for c, parent in parents.items() if c not in gone} | further


def test_the_first_version_changes_nothing(room):
    metrics = room.adopt(FIRST)
    change = read_change(room.change)
    assert metrics["is_first"]
    assert metrics["from_version"] is None
    assert metrics["to_version"] == short_version(room.digest)
    assert not change.transitions
    assert change.diff.is_empty
    assert Transitions.read(room.change) == Transitions(
        history=[room.digest], transitions=[], adopted_on=[""]
    )
    assert pq.read_table(room.change / IMPACT_FILE).num_rows == 0
    assert changed_categories(room.change) == {}


def test_modules_are_cheap_to_import():
    code = (
        "import sys, ml.taxonomy_change.change, ml.taxonomy_change.labels; "
        "print([name for name in ('torch', 'transformers', 'sklearn') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_only_names(room):
    room.adopt(FIRST)
    metrics = room.adopt(FIRST, names={"kettles": "water boilers"})
    assert metrics["only_names"]
    assert metrics["renamed"] == 1
    assert changed_categories(room.change) == {"kettles": "changed"}
    (impact,) = read_change(room.change).impact
    assert impact.sentence.startswith("“kettles” is now called “water boilers”; 0 labelled offers")


def test_what_is_below_a_moved_or_renamed_department_is_changed_and_counted(room):
    room.adopt(FIRST)
    days = {("2026-01-01", room.digest): [offer(n, "novels") for n in range(3)] + [offer(9, "kettles")]}
    predicted = [
        {"offer_id": f"o{n}", "category_id": c, "model_version": "m", "taxonomy_version": "t"}
        for n, c in [(20, "novels"), (21, "atlases"), (22, "kettles"), (9, "kettles")]
    ]
    feed = {"days": days, "catalogued": {"2026-01-01": predicted}}
    touched = ("labelled_touched", "unlabelled_touched", "traffic_touched")
    below = dict.fromkeys(["atlases", "books", "novels"], "changed")
    moved = FIRST | {"books": "home"}
    metrics = room.adopt(moved, **feed)
    assert changed_categories(room.change) == below
    assert [metrics[name] for name in touched] == [3, 2, 0.5]
    metrics = room.adopt(moved | {"comics": "books"}, names={"books": "reading"}, **feed)
    assert changed_categories(room.change) == below | {"comics": "new"}
    assert [metrics[name] for name in touched] == [3, 2, 0.5]


def test_what_takes_in_whole_categories_is_changed_and_a_part_of_one_is_new(room):
    room.adopt(FIRST)
    first, tree = room.digest, Taxonomy.load(room.tree)
    room.adopt(
        without(FIRST, "novels", "atlases", "toasters", reading="books", grills="home", slots="home"),
        mapping=[
            ("novels", "reading"),
            ("atlases", "reading"),
            ("toasters", "grills"),
            ("toasters", "slots"),
        ],
    )
    expected = {"reading": "changed", "grills": "new", "slots": "new"}
    assert changed_categories(room.change) == expected
    second, known = Taxonomy.load(room.tree), room.digest
    room.adopt(FIRST | {"slots": "home"}, mapping=[("grills", "toasters"), ("reading", "novels")])
    transitions = Transitions.read(room.change)
    third = Taxonomy.load(room.tree)
    assert changed_since(second, third, transitions.for_labels_of(known)) == changed_categories(room.change)
    # Against the first version: slots were not there, everything else is back.
    assert changed_since(tree, third, transitions.for_labels_of(first)).get("slots") == "new"
    assert "kettles" not in changed_since(tree, third, transitions.for_labels_of(first))
    # Retired before the model learned: nothing that happened since.
    assert changed_since(third, third, transitions.for_labels_of(room.digest)) == {}


def test_the_dates_of_adoption_are_kept(room):
    room.adopt(FIRST, adopted_on="2026-01-01")
    room.adopt(without(FIRST, "novels"), adopted_on="2026-02-01")
    room.adopt(without(FIRST, "novels", "atlases"), adopted_on="2026-03-01")
    # Labels from before the first adoption are of the first version too.
    assert Transitions.read(room.change).adopted_on == ["", "2026-02-01", "2026-03-01"]


@pytest.mark.parametrize(
    ("taken_with", "day", "adopted_on", "expected"),
    [
        ("v3", "2026-05-02", ["", "2026-03-01", "2026-05-01"], "v3"),
        ("v3", "2026-05-01", ["", "2026-03-01", "2026-05-01"], "v2"),
        ("v3", "2026-03-01", ["", "2026-03-01", "2026-05-01"], "v1"),
        ("v2", "2026-06-01", ["", "2026-03-01", "2026-05-01"], "v2"),
        ("?", "2026-06-01", ["", "2026-03-01", "2026-05-01"], "?"),
        ("v3", "2026-02-01", ["", "2026-03-01", ""], "v1"),
        ("v3", "2026-03-02", ["", "2026-03-01", ""], "v3"),
        ("v3", "2026-02-01", [], "v3"),
    ],
)
def test_labels_are_of_the_older_of_the_version_in_force_and_the_one_they_were_read_with(
    taken_with, day, adopted_on, expected
):
    known = Transitions(history=["v1", "v2", "v3"], transitions=[], adopted_on=adopted_on)
    assert known.version_of_labels(taken_with, day) == expected


def test_offers_that_a_change_concerns_are_counted(room):
    room.adopt(FIRST)
    first = room.digest
    labelled = [offer(n, "toasters") for n in range(4)] + [offer(9, "novels"), offer(10), offer(11)]
    days = {
        ("2026-01-01", first): labelled,
        ("2026-01-02", first): [offer(0, "toasters"), offer(1, "atlases")],
    }
    predicted = [
        {"offer_id": f"o{n}", "category_id": c, "model_version": "m", "taxonomy_version": "t"}
        for n, c in [(10, "toasters"), (11, "novels"), (0, "toasters"), (12, None), (9, "novels")]
    ]
    mapping = [("toasters", "grills"), ("toasters", "slots")]
    metrics = room.adopt(
        without(FIRST, "toasters", grills="home", slots="home", atlases="home"),
        mapping=mapping,
        days=days,
        catalogued={"2026-01-02": predicted},
        few_labelled=2,
    )
    impact = {i.category_id: i for i in read_change(room.change).impact}
    split = impact["toasters"]
    assert (split.change, split.origin, split.labelled, split.unlabelled) == ("split", "official", 3, 1)
    assert split.traffic_share == 0.5
    assert split.to == ["home > grills", "home > slots"]
    assert split.sentence == (
        "“toasters” is divided into home > grills, home > slots (official); 3 labelled offers, "
        "1 unlabelled offer, 50.0% of traffic."
    )
    moved = impact["atlases"]
    assert (moved.change, moved.labelled, moved.to) == ("moved", 1, ["home"])
    assert (metrics["labelled_touched"], metrics["unlabelled_touched"], metrics["traffic_touched"]) == (
        4,
        1,
        0.5,
    )
    assert {few.category_id: few.labelled for few in read_change(room.change).few_labelled} == {
        "grills": 0,
        "slots": 0,
    }
    assert changed_categories(room.change) == {"grills": "new", "slots": "new", "atlases": "changed"}
    assert pq.read_table(room.change / IMPACT_FILE)["category_id"].to_pylist()[0] == "toasters"


def test_labels_of_the_version_before_last_are_counted_where_they_are_now(room):
    room.adopt(FIRST)
    first = room.digest
    offers = [offer(n, "toasters") for n in range(3)]
    room.adopt(without(FIRST, "toasters", grills="home"), mapping=[("toasters", "grills")])
    second = room.digest
    days = {("2026-01-01", first): offers, ("2026-01-02", second): [offer(7, "grills")]}
    metrics = room.adopt(without(FIRST, "toasters", ovens="home"), mapping=[("grills", "ovens")], days=days)
    transitions = Transitions.read(room.change)
    assert transitions.history == [first, second, room.digest]
    assert {t.from_id: t.to[0].category_id for t in transitions.transitions} == {
        "toasters": "ovens",
        "grills": "ovens",
    }
    assert [t.from_id for t in read_change(room.change).transitions] == ["grills"]
    assert metrics["labelled_touched"] == 4
    assert metrics["few_labelled"] == 1
    assert read_change(room.change).few_labelled[0].labelled == 4


def test_an_official_mapping_that_comes_late_says_where_ids_went_that_were_gone_before(room):
    room.adopt(FIRST)
    days = {("2026-01-01", room.digest): [offer(n, "toasters") for n in range(3)]}
    room.adopt(without(FIRST, "toasters"))
    assert Transitions.read(room.change).transitions[0].kind == "removed"
    metrics = room.adopt(without(FIRST, "toasters", "novels"), mapping=[("toasters", "kettles")], days=days)
    late = {t.from_id: t for t in Transitions.read(room.change).transitions}["toasters"]
    assert (late.origin, late.certain, late.to[0].category_id) == ("official", True, "kettles")
    impact = read_change(room.change).impact[0]
    assert (impact.path, impact.labelled) == ("home > toasters", 3)
    assert impact.sentence.startswith("“toasters” is now part of home > kettles (official)")
    assert metrics["labelled_touched"] == 3


def test_a_change_that_leads_elsewhere_is_refused(room):
    room.adopt(FIRST)
    change = room.change
    room.adopt(without(FIRST, "novels"))
    room.change = change
    with pytest.raises(InputError, match="give the change that led to it"):
        room.adopt(FIRST)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    encoder = tiny_encoder(folder / "encoder")
    return make(
        "teacher_checkpoint", tiny_inputs(folder), TINY_TEACHER | {"encoder": str(encoder)}, folder / "made"
    )[0]


def test_the_teacher_has_no_say_in_what_it_learned_as_one_category(room, teacher):
    room.adopt(FIRST)
    offers = [offer(n, "toasters", "slot crumb slot kettles") for n in range(12)]
    room.adopt(
        FIRST,
        mapping=[("toasters", "toasters"), ("toasters", "kettles")],
        days={("2026-01-01", room.digest): offers},
        teacher=teacher,
    )
    (transition,) = read_change(room.change).transitions
    assert transition.to[0].category_id == "kettles"


def test_offers_that_people_labelled_otherwise_since_have_no_vote(room, teacher):
    room.adopt(FIRST)
    title = "slot crumb"
    room.adopt(
        without(FIRST, "toasters", slot="home", boil="home"),
        mapping=[("toasters", "slot"), ("toasters", "boil")],
        days={
            ("2026-01-01", room.digest): [offer(n, "toasters", title) for n in range(12)],
            ("2026-01-02", room.digest): [offer(n, "kettles", title) for n in range(12)],
        },
        teacher=teacher,
    )
    (transition,) = read_change(room.change).transitions
    assert [successor.share for successor in transition.to] == [0.5, 0.5]


def test_the_teacher_looks_at_offers_of_what_is_gone(room, teacher):
    room.adopt(FIRST)
    offers = [offer(n, "toasters", "slot crumb") for n in range(12)]
    options = {
        "mapping": [("toasters", "slot"), ("toasters", "boil")],
        "days": {("2026-01-01", room.digest): offers},
        "teacher": teacher,
    }
    newer = without(FIRST, "toasters", slot="home", boil="home")
    tree, change = room.tree, room.change
    room.adopt(newer, **options)
    (transition,) = read_change(room.change).transitions
    assert transition.kind == "split"
    assert transition.to[0].category_id == "slot"
    assert transition.to[0].share > 0.5
    written = [(room.change / name).read_bytes() for name in ("change.json", "transitions.json")]
    room.tree, room.change = tree, change
    room.adopt(newer, **options)
    assert written == [(room.change / name).read_bytes() for name in ("change.json", "transitions.json")]


trees = st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.sampled_from(["r", "s"]), max_size=8)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(versions=st.lists(trees, min_size=2, max_size=4))
def test_every_label_of_any_version_has_its_place(tmp_path_factory, versions):
    room = Room(tmp_path_factory.mktemp("room"))
    ever = set()
    adopted = []
    for number, tree in enumerate(versions):
        current = {"r": None, "s": None} | tree
        metrics = room.adopt(current)
        transitions = Transitions.read(room.change)
        change = read_change(room.change)
        assert len(transitions.history) == number + 1
        moves = {t.from_id: t for t in transitions.transitions}
        assert ever - current.keys() <= moves.keys()
        assert all(s.category_id in current for t in moves.values() for s in t.to)
        assert set(changed_categories(room.change)) <= current.keys()
        assert {i.category_id for i in change.impact} <= ever | current.keys()
        assert metrics["removed"] == len(
            {i.category_id for i in change.impact if i.category_id not in current}
        )
        ever |= current.keys()
        now = Taxonomy.load(room.tree)
        for digest, before in adopted:
            changed = changed_since(before, now, transitions.for_labels_of(digest))
            assert changed.keys() <= current.keys()
            assert all(c in before for c in current.keys() - changed.keys())
            assert all(before.path(c) == now.path(c) for c in current.keys() - changed.keys())
            assert all(c not in before for c, difference in changed.items() if difference == "new")
        if adopted:
            assert changed == changed_categories(room.change)
        adopted.append((room.digest, now))
