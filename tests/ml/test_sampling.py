import random
from collections import Counter

import msgspec
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ml.artifacts import MANIFEST
from ml.errors import InputError
from ml.evaluation.verification import shared_groups, unknown_labels
from ml.offers import CLEAN_SCHEMA, TEXT_VERSION, offer_texts
from ml.sampling.split import Split
from ml.sampling.stages import write_evaluation_set, write_training_sample
from ml.stages import EvaluationSetParameters, TrainingSampleParameters
from ml.taxonomy_change.transitions import Successor, Transition
from tests.ml.sampling_workshop import CATEGORIES, Workshop, describe


def offer(number, **columns):
    return {"offer_id": f"o{number}", "shop_id": "s0", "title": f"title {number}", **columns}


def files_of(artifact):
    """All but the manifest, which has a date."""
    return [path for path in artifact.iterdir() if path.name != MANIFEST]


def rows_of(path):
    return pq.read_table(path).to_pylist()


def keys_of(row, split_by):
    keys = {
        ("product", (row["product_id"] or "").strip()),
        ("gtin", (row["gtin"] or "").strip().lstrip("0")),
        ("title", " ".join(row["title"].lower().split())),
    }
    if split_by == "shop":
        keys.add(("shop", row["shop_id"]))
    return {key for key in keys if key[1]}


def all_keys(rows, split_by):
    return {key for row in rows for key in keys_of(row, split_by)}


@st.composite
def feeds(draw):
    """One to three days of offers with few products, GTINs, titles and shops, so that they collide."""
    pool = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "shop_id": st.sampled_from([f"s{n}" for n in range(5)]),
                    "title": st.sampled_from(
                        [
                            f"{word}{gap}{n}"
                            for word in ("Lamp", "LAMP", "sofa")
                            for gap in (" ", "  ")
                            for n in range(6)
                        ]
                    ),
                    "product_id": st.none() | st.sampled_from([f"p{n}" for n in range(9)]),
                    "gtin": st.none() | st.sampled_from(["04006381333931", "4006381333931", "96385074", ""]),
                    "category_id": st.none() | st.sampled_from([*CATEGORIES, "gone"]),
                }
            ),
            min_size=8,
            max_size=50,
        )
    )
    days = draw(st.integers(1, 3))
    feed = {f"2026-01-0{day + 1}": [] for day in range(days)}
    for number, columns in enumerate(pool):
        for day in draw(st.sets(st.sampled_from(sorted(feed)), min_size=1)):
            feed[day].append({"offer_id": f"o{number}", **columns})
    return feed


splits = st.sampled_from(["product", "shop"])
property_test = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def attempt(stage, *arguments, **parameters):
    """The stage's answer; feeds from which nothing can be learned are no example."""
    try:
        return stage(*arguments, **parameters)
    except InputError:
        assume(False)


@property_test
@given(feed=feeds(), split_by=splits, seed=st.integers(0, 5))
def test_nothing_is_on_both_sides_and_caps_hold(tmp_path_factory, feed, split_by, seed):
    workshop = Workshop(tmp_path_factory.mktemp("sampling"))
    evaluation, evaluation_metrics = attempt(
        workshop.evaluation_set, feed, split_by=split_by, share=0.4, cap_per_category=3, seed=seed
    )
    training, metrics = attempt(
        workshop.training_sample,
        feed,
        evaluation,
        split_by=split_by,
        evaluation_share=0.4,
        cap_per_category=4,
        cap_per_product=4,
        labelled=9,
        unlabelled=5,
        validation_share=0.3,
        seed=seed,
    )
    measured = rows_of(evaluation / "offers.parquet")
    labelled = rows_of(training / "labelled.parquet")
    unlabelled = rows_of(training / "unlabelled.parquet")
    train = [row for row in labelled if row["split"] == "train"]
    validation = [row for row in labelled if row["split"] == "validation"]

    assert not all_keys(measured, split_by) & all_keys(labelled + unlabelled, split_by)
    assert not all_keys(train, split_by) & all_keys(validation, split_by)

    def largest(rows, key):
        return max([sum(key(row) == key(other) for other in rows) for row in rows], default=0)

    assert largest(measured, lambda row: row["category_id"]) <= 3
    assert largest(labelled, lambda row: row["category_id"]) <= 4
    assert largest([row for row in labelled if row["product_id"]], lambda row: row["product_id"]) <= 4
    assert len(labelled) <= 9
    assert len(unlabelled) <= 5

    delivered = {row["offer_id"]: row for day in sorted(feed) for row in feed[day]}
    assert len(train) + len(validation) == len(labelled)
    assert metrics["labelled"] == len(labelled)
    assert metrics["train"] == len(train)
    assert metrics["unlabelled"] == len(unlabelled)
    assert evaluation_metrics["offers"] == len(measured)
    assert {row["category_id"] for row in measured + labelled} <= set(CATEGORIES)
    assert {row["category_id"] for row in unlabelled} <= {None}
    for rows in (measured, labelled, unlabelled):
        ids = [row["offer_id"] for row in rows]
        assert ids == sorted(set(ids))
        assert set(ids) <= set(delivered)
    labels = {row["offer_id"] for row in delivered.values() if row["category_id"] in CATEGORIES}
    assert {row["offer_id"] for row in measured + labelled} <= labels
    assert not {row["offer_id"] for row in unlabelled} & labels
    # Every category can be learned (a product has no more labels here than its cap leaves room for).
    assert {row["category_id"] for row in train} == {delivered[name]["category_id"] for name in labels}
    assert metrics["categories_without_training"] == 0


@property_test
@given(feed=feeds(), split_by=splits, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(tmp_path_factory, feed, split_by, order):
    contents = []
    for shuffled in (False, True):
        days = {day: list(rows) for day, rows in feed.items()}
        if shuffled:
            for rows in days.values():
                order.shuffle(rows)
        workshop = Workshop(tmp_path_factory.mktemp("sampling"))
        evaluation, _ = attempt(workshop.evaluation_set, days, split_by=split_by, share=0.4)
        training, _ = attempt(
            workshop.training_sample, days, evaluation, split_by=split_by, evaluation_share=0.4, unlabelled=4
        )
        paths = sorted([*files_of(evaluation), *training.iterdir()])
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]


@property_test
@given(first=feeds(), second=feeds(), split_by=splits)
def test_the_evaluation_set_only_grows_and_is_stable_without_news(tmp_path_factory, first, second, split_by):
    workshop = Workshop(tmp_path_factory.mktemp("sampling"))
    parameters = {"split_by": split_by, "share": 0.4, "cap_per_category": 3}
    evaluation, _ = attempt(workshop.evaluation_set, first, **parameters)
    again, metrics = workshop.evaluation_set(first, previous=evaluation, **parameters)
    assert metrics["added"] == 0
    assert {p.name: p.read_bytes() for p in files_of(again)} == {
        p.name: p.read_bytes() for p in files_of(evaluation)
    }

    news = {
        f"2026-02-{day[-2:]}": [{**row, "offer_id": "n" + row["offer_id"]} for row in rows]
        for day, rows in second.items()
    }
    grown, metrics = attempt(workshop.evaluation_set, {**first, **news}, previous=evaluation, **parameters)
    before, after = rows_of(evaluation / "offers.parquet"), rows_of(grown / "offers.parquet")
    assert [row for row in after if row in before] == before
    assert metrics["kept"] == len(before)
    assert metrics["added"] == len(after) - len(before)
    assert set(Split.read(evaluation).training_only) <= set(Split.read(grown).training_only)


def shop_feed(offers=400, products=150, shops=12, labelled=0.5):
    """A larger believable feed: products are sold by several shops, a half is labelled."""
    chance = random.Random(3)
    rows = []
    for number in range(offers):
        product = chance.randrange(products)
        rows.append(
            offer(
                number,
                shop_id=f"s{chance.randrange(shops)}",
                title=f"product {product} by shop {chance.randrange(4)}",
                product_id=f"p{product}",
                category_id=CATEGORIES[product % 4] if chance.random() < labelled else None,
            )
        )
    return {"2026-01-01": rows}


@pytest.mark.parametrize("split_by", ["product", "shop"])
def test_later_days_never_bring_a_trained_product_into_the_evaluation_set(tmp_path, split_by):
    feed = shop_feed()
    chosen = {"split_by": split_by}
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(feed, cap_per_category=5, share=0.3, **chosen)
    training, _ = workshop.training_sample(feed, evaluation, evaluation_share=0.3, **chosen)
    trained = {row["offer_id"] for row in rows_of(training / "labelled.parquet")}

    grown, metrics = workshop.evaluation_set(
        feed, previous=evaluation, cap_per_category=40, share=0.3, **chosen
    )
    assert metrics["added"] > 0
    assert not trained & {row["offer_id"] for row in rows_of(grown / "offers.parquet")}


def test_a_category_of_one_held_out_product_is_left_for_training_for_good(tmp_path):
    workshop = Workshop(tmp_path, ["a", "b", "rare"])
    feed = shop_feed()
    for row in feed["2026-01-01"]:
        row["category_id"] = row["category_id"] and ("a" if row["category_id"] in "ac" else "b")
    feed["2026-01-01"].append(offer("rare", product_id="only one", category_id="rare"))
    evaluation, _ = workshop.evaluation_set(feed, share=0.95)
    training, metrics = workshop.training_sample(feed, evaluation, evaluation_share=0.95)
    assert "rare" in {row["category_id"] for row in rows_of(training / "labelled.parquet")}
    assert metrics["categories_without_training"] == 0

    feed["2026-01-02"] = [offer(f"more {n}", product_id=f"r{n}", category_id="rare") for n in range(30)]
    grown, _ = workshop.evaluation_set(feed, previous=evaluation, share=0.95)
    rare = {row["product_id"] for row in rows_of(grown / "offers.parquet") if row["category_id"] == "rare"}
    assert rare
    assert "only one" not in rare


def test_the_newest_version_of_an_offer_counts_and_a_label_is_not_lost(tmp_path):
    feed = shop_feed()
    labelled = next(row for row in feed["2026-01-01"] if row["category_id"])
    feed["2026-01-02"] = [
        {**row, "price": 7.0, "category_id": row["category_id"] if row is not labelled else None}
        for row in feed["2026-01-01"]
    ]
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(feed)
    training, _ = workshop.training_sample(feed, evaluation)
    everything = [
        *rows_of(evaluation / "offers.parquet"),
        *rows_of(training / "labelled.parquet"),
        *rows_of(training / "unlabelled.parquet"),
    ]
    for row in everything:
        is_older = row["offer_id"] == labelled["offer_id"] and row["category_id"] is not None
        assert row["price"] == (None if is_older else 7.0)
    unlabelled = {row["offer_id"] for row in rows_of(training / "unlabelled.parquet")}
    assert labelled["offer_id"] not in unlabelled


def test_rows_whose_category_left_the_taxonomy_are_left_out_and_counted(tmp_path):
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(shop_feed())
    gone = sum(row["category_id"] == "d" for row in rows_of(evaluation / "offers.parquet"))
    workshop.set_taxonomy(["a", "b", "c"])
    shrunk, metrics = workshop.evaluation_set(shop_feed(), previous=evaluation)
    assert gone > 0
    assert metrics["labels_gone"] == gone
    assert {row["category_id"] for row in rows_of(shrunk / "offers.parquet")} == {"a", "b", "c"}


def test_too_many_offers_leave_every_category_room_like_the_root_of_its_size(tmp_path):
    workshop = Workshop(tmp_path)
    sizes = {"a": 900, "b": 100, "c": 9, "d": 1}
    numbers = iter(range(2000))
    rows = [
        offer(next(numbers), category_id=category) for category, size in sizes.items() for _ in range(size)
    ]
    evaluation, _ = workshop.evaluation_set({"2026-01-01": rows}, share=0.02)
    training, _ = workshop.training_sample(
        {"2026-01-01": rows}, evaluation, evaluation_share=0.02, cap_per_category=900, labelled=100
    )
    categories = [row["category_id"] for row in rows_of(training / "labelled.parquet")]
    counts = {category: categories.count(category) for category in sizes}
    assert sum(counts.values()) == 100
    assert counts["a"] == pytest.approx(3 * counts["b"], rel=0.1)
    assert counts["d"] == 1


def test_the_output_has_the_clean_columns_and_the_model_s_text(tmp_path):
    workshop = Workshop(tmp_path)
    evaluation, metrics = workshop.evaluation_set(shop_feed())
    training, _ = workshop.training_sample(shop_feed(), evaluation)
    assert metrics["text_version"] == TEXT_VERSION
    for path in (evaluation / "offers.parquet", *sorted(training.glob("*.parquet"))):
        table = pq.read_table(path)
        assert table.select(CLEAN_SCHEMA.names).schema.equals(CLEAN_SCHEMA)
        assert table["text"].to_pylist() == offer_texts(table.select(CLEAN_SCHEMA.names))
    assert set(pq.read_table(training / "labelled.parquet")["split"].to_pylist()) == {"train", "validation"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None] * 20, "at least two categories, found none"),
        (["a"] * 20, "found offers of one category only"),
        (["gone"] * 20, "none of the 20 labels in the offers is a category of the taxonomy"),
    ],
)
def test_offers_that_nothing_can_be_learned_from_are_an_input_error(tmp_path, labels, message):
    feed = {"2026-01-01": [offer(n, category_id=label) for n, label in enumerate(labels)]}
    with pytest.raises(InputError, match=message):
        Workshop(tmp_path).evaluation_set(feed)


def test_an_evaluation_set_without_offers_is_an_input_error_that_names_the_share(tmp_path):
    with pytest.raises(InputError, match=r"none is held out at share 0\.0; raise the share"):
        Workshop(tmp_path).evaluation_set(shop_feed(), share=0.0)


def test_a_training_sample_split_otherwise_than_the_evaluation_set_is_refused(tmp_path):
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(shop_feed(), split_by="shop")
    with pytest.raises(
        InputError, match="split_by is product here but the evaluation set was made with shop"
    ):
        workshop.training_sample(shop_feed(), evaluation)


def test_an_evaluation_set_without_its_split_is_refused(tmp_path):
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(shop_feed())
    (evaluation / "split.json").write_bytes(msgspec.json.encode({"share": 1}))
    with pytest.raises(InputError, match=r"split\.json cannot be read"):
        workshop.training_sample(shop_feed(), evaluation)


DECISIONS = [("official", "a"), ("inferred", "b"), ("by_evidence", "c"), ("put_aside", None)]


def decided(feed):
    """What becomes of the labels ``gone``, each decision in turn, and weak labels for some of the others."""
    labels, weak = [], []
    for day, rows in feed.items():
        for row in rows:
            number = int(row["offer_id"][1:])
            decision, category = DECISIONS[number % 4]
            keys = {"offer_id": row["offer_id"], "delivered_on": day}
            if row["category_id"] == "gone":
                labels.append(
                    {
                        **keys,
                        "labelled_as": "gone",
                        "category_id": category,
                        "decision": decision,
                        "confidence": 0.9,
                    }
                )
            has_label = row["category_id"] and not (row["category_id"] == "gone" and category is None)
            if not has_label and number % 3:
                weak.append({**keys, "category_id": "new", "confidence": 0.7, "similarity": 0.5})
    return labels, weak


@settings(property_test, max_examples=12)
@given(feed=feeds(), split_by=splits, seed=st.integers(0, 5))
def test_labels_of_today_s_taxonomy_are_learned_from_and_only_certain_ones_measured(
    tmp_path_factory, feed, split_by, seed
):
    labels, weak = decided(feed)
    workshop = Workshop(tmp_path_factory.mktemp("sampling"), [*CATEGORIES, "new"])
    evaluation, _ = attempt(
        workshop.evaluation_set, feed, labels=labels, split_by=split_by, share=0.4, seed=seed
    )
    limits = {"cap_per_category": 4, "cap_per_product": 4, "labelled": 9, "validation_share": 0.3}
    training, metrics = attempt(
        workshop.training_sample,
        feed,
        evaluation,
        labels=labels,
        weak=weak,
        split_by=split_by,
        evaluation_share=0.4,
        seed=seed,
        **limits,
    )
    measured, learned = rows_of(evaluation / "offers.parquet"), rows_of(training / "labelled.parquet")
    unlabelled = rows_of(training / "unlabelled.parquet")
    delivered = {
        (row["offer_id"], row["title"], row["category_id"]) for rows in feed.values() for row in rows
    }
    moves = {row["offer_id"]: row for row in labels}
    for row in [*measured, *learned]:
        assert (row["offer_id"], row["title"], row["labelled_as"]) in delivered
        if row["label_source"] == "human":
            assert row["category_id"] == row["labelled_as"]
        elif row["label_source"] in ("migrated", "by_evidence"):
            by_evidence = moves[row["offer_id"]]["decision"] == "by_evidence"
            assert row["label_source"] == ("by_evidence" if by_evidence else "migrated")
            assert row["category_id"] == moves[row["offer_id"]]["category_id"]
        else:
            assert row["category_id"] == "new"
    assert {row["label_source"] for row in measured} <= {"human", "migrated"}
    assert not {moves[row["offer_id"]]["decision"] for row in measured if row["offer_id"] in moves} - {
        "official",
        "inferred",
    }
    assert {row["split"] for row in learned if row["label_source"] in ("weak", "by_evidence")} <= {"train"}
    confidences = {"human": 1.0, "migrated": 0.9, "by_evidence": 0.9, "weak": 0.7}
    assert all(row["label_confidence"] == confidences[row["label_source"]] for row in learned)

    assert not any(shared_groups(training, evaluation, split_by).values())
    tables = [training / "labelled.parquet", evaluation / "offers.parquet"]
    assert unknown_labels(tables, workshop.folder / "taxonomy") == {}
    sources = Counter(row["label_source"] for row in learned)
    assert metrics["migrated"] == sources["migrated"]
    assert metrics["by_evidence"] == sources["by_evidence"]
    assert metrics["weak"] == sources["weak"]
    assert metrics["categories_with_weak_labels_only"] == (1 if sources["weak"] else 0)
    assert metrics["labelled"] == len(learned) <= limits["labelled"]
    assert max(Counter(row["category_id"] for row in learned).values()) <= limits["cap_per_category"]
    products = Counter(row["product_id"] for row in learned if row["product_id"])
    assert max(products.values(), default=0) <= limits["cap_per_product"]

    put_aside = {name for name, move in moves.items() if move["decision"] == "put_aside"}
    assert metrics["put_aside"] == len(put_aside)
    assert not {row["offer_id"] for row in unlabelled} & {row["offer_id"] for row in learned}
    assert {row["category_id"] for row in unlabelled} <= {None}
    key_sets = [keys_of(row, split_by) for row in measured]
    for rows in feed.values():
        for row in rows:
            if row["offer_id"] in put_aside and row["offer_id"] in {r["offer_id"] for r in unlabelled}:
                assert not any(keys_of(row, split_by) & keys for keys in key_sets)


def transition(former, *to, certain=True, since):
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind="removed" if not to else "merged" if len(to) == 1 else "split",
        to=[Successor(category_id=category, share=1 / len(to)) for category in to],
        origin="inferred",
        confidence=0.9,
        certain=certain,
        since=since,
        reason="",
    )


def counted(evaluation):
    rows = rows_of(evaluation / "offers.parquet")
    return Counter((row["labelled_as"], row["category_id"], row["label_source"]) for row in rows)


def test_evaluation_rows_follow_certain_transitions_from_version_to_version(tmp_path):
    workshop, feed = Workshop(tmp_path), shop_feed()
    evaluation, metrics = workshop.evaluation_set(feed)
    before = counted(evaluation)
    assert metrics["migrated"] == 0
    sizes = {category: before[category, category, "human"] for category in CATEGORIES}
    assert all(sizes.values())

    workshop.next_version(["a", "b", "e", "f"], transition("c", "e", since="v2"), transition("d", since="v2"))
    unlabelled = {day: [{**row, "category_id": None} for row in rows] for day, rows in feed.items()}
    # Only what the previous set holds can be measured: offers of later days bring other labels.
    later = {"2026-03-01": [offer(9000 + n, category_id="ab"[n % 2]) for n in range(40)]}
    second, metrics = workshop.evaluation_set(unlabelled | later, previous=evaluation, share=0.15)
    assert metrics["labels_put_aside"] == sizes["d"]
    assert metrics["labels_gone"] == 0
    assert metrics["migrated"] == sizes["c"]
    assert metrics["kept"] == sum(sizes.values()) - sizes["d"]
    assert counted(second)["c", "e", "migrated"] == sizes["c"]

    # c → e of the second version goes on to f; a is split, b is gone without a word.
    workshop.next_version(
        ["a", "g", "f"],
        transition("c", "f", since="v3"),
        transition("e", "f", since="v3"),
        transition("a", "a", "g", certain=False, since="v3"),
        transition("d", since="v2"),
    )
    later = {"2026-03-01": [offer(9000 + n, category_id="fg"[n % 2]) for n in range(40)]}
    third, metrics = workshop.evaluation_set(unlabelled | later, previous=second, share=0.15)
    held = counted(second)
    assert metrics["labels_put_aside"] == held["a", "a", "human"]
    assert metrics["labels_gone"] == held["b", "b", "human"]
    assert metrics["kept"] == sizes["c"]
    assert counted(third)["c", "f", "migrated"] == sizes["c"]

    # Labels that were given after the split stay: they mean what the category means today.
    fourth, metrics = workshop.evaluation_set(unlabelled | later, previous=third, share=0.15)
    assert counted(fourth) == counted(third)
    assert metrics["labels_put_aside"] == 0


def test_an_evaluation_set_from_before_labels_could_move_is_carried_over(tmp_path):
    workshop, feed = Workshop(tmp_path), shop_feed()
    evaluation, _ = workshop.evaluation_set(feed)
    path = evaluation / "offers.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["labelled_as", "label_source"]), path)
    again, metrics = workshop.evaluation_set(feed, previous=evaluation)
    assert metrics["added"] == 0
    assert {(row["labelled_as"], row["label_source"]) for row in rows_of(again / "offers.parquet")} == {
        (category, "human") for category in CATEGORIES
    }


def weak_for(feed, category="new"):
    return [
        {
            "offer_id": row["offer_id"],
            "delivered_on": day,
            "category_id": category,
            "confidence": 0.8,
            "similarity": 0.5,
        }
        for day, rows in feed.items()
        for row in rows
        if not row["category_id"]
    ]


def test_weak_labels_do_not_change_who_validates_and_find_room_where_labels_are_many(tmp_path):
    workshop, feed = Workshop(tmp_path, [*CATEGORIES, "new"]), shop_feed()
    evaluation, _ = workshop.evaluation_set(feed)
    alone, _ = workshop.training_sample(feed, evaluation)
    weak = weak_for(feed)
    both, metrics = workshop.training_sample(feed, evaluation, weak=weak)
    rows = rows_of(both / "labelled.parquet")
    assert metrics["weak"] == sum(row["label_source"] == "weak" for row in rows) > 0
    assert [row for row in rows if row["label_source"] != "weak"] == rows_of(alone / "labelled.parquet")

    crowded, metrics = workshop.training_sample(feed, evaluation, weak=weak, labelled=50)
    categories = Counter(row["category_id"] for row in rows_of(crowded / "labelled.parquet"))
    assert metrics["labelled"] <= 50
    assert metrics["categories_with_weak_labels_only"] == 1
    assert 5 <= categories["new"] <= 18


def test_a_weak_label_gives_way_to_a_person_s_and_to_a_more_confident_one(tmp_path):
    workshop, feed = Workshop(tmp_path, [*CATEGORIES, "new", "newer"]), shop_feed()
    evaluation, _ = workshop.evaluation_set(feed)
    for_all = weak_for({day: [{**row, "category_id": None} for row in rows] for day, rows in feed.items()})
    surer = [{**row, "category_id": "newer", "confidence": 0.85} for row in weak_for(feed)]
    gone = [{**row, "category_id": "gone", "confidence": 0.99} for row in weak_for(feed)]
    training, metrics = workshop.training_sample(feed, evaluation, weak=[*for_all, *surer, *gone])
    rows = rows_of(training / "labelled.parquet")
    assert {row["category_id"] for row in rows if row["label_source"] == "weak"} == {"newer"}
    assert all(row["labelled_as"] is None for row in rows if row["label_source"] == "weak")
    labelled = {row["offer_id"] for row in feed["2026-01-01"] if row["category_id"]}
    assert {row["offer_id"] for row in rows if row["label_source"] == "human"} <= labelled
    assert metrics["categories_without_training"] == 0


def test_labels_moved_by_evidence_are_trained_on_and_have_no_say_in_who_validates(tmp_path):
    feed = shop_feed()
    split = [row for row in feed["2026-01-01"] if row["category_id"] == "d"]
    for row in split:
        row["category_id"] = "former"
    moved = [
        {
            "offer_id": row["offer_id"],
            "delivered_on": "2026-01-01",
            "labelled_as": "former",
            "category_id": "d",
            "decision": "by_evidence",
            "confidence": 0.85,
        }
        for row in split
    ]
    workshop = Workshop(tmp_path)
    evaluation, _ = workshop.evaluation_set(feed, labels=moved)
    training, metrics = workshop.training_sample(feed, evaluation, labels=moved, validation_share=0.5)
    rows = rows_of(training / "labelled.parquet")
    by_evidence = [row for row in rows if row["category_id"] == "d"]
    assert len(by_evidence) == metrics["by_evidence"] > 0
    assert {(row["split"], row["label_source"], row["label_confidence"]) for row in by_evidence} == {
        ("train", "by_evidence", 0.85)
    }
    assert metrics["migrated"] == 0
    without, _ = workshop.training_sample(
        feed, evaluation, labels=[{**row, "category_id": None} for row in moved], validation_share=0.5
    )
    assert [row for row in rows if row["category_id"] != "d"] == rows_of(without / "labelled.parquet")


def test_guesses_alone_are_nothing_to_learn_from(tmp_path):
    workshop = Workshop(tmp_path, ["a", "b"])
    feed = {"2026-01-01": [offer(n, category_id="a") for n in range(40)]}
    feed["2026-01-01"] += [offer(n, category_id="former") for n in range(40, 60)]
    moved = [
        {
            "offer_id": f"o{n}",
            "delivered_on": "2026-01-01",
            "labelled_as": "former",
            "category_id": "b",
            "decision": "by_evidence",
            "confidence": 0.85,
        }
        for n in range(40, 60)
    ]
    evaluation, _ = workshop.evaluation_set(feed, labels=moved)
    with pytest.raises(InputError, match="labelled offers of 1 categories"):
        workshop.training_sample(feed, evaluation, labels=moved)


@pytest.mark.parametrize("stale", ["migrated_labels", "taxonomy_change"])
def test_labels_migrated_to_another_taxonomy_are_refused_and_the_asset_is_named(tmp_path, stale):
    workshop, feed = Workshop(tmp_path), shop_feed()
    context = workshop.context(feed)
    describe(context.input(stale), catalog_taxonomy="v0")
    message = f"{stale} leads to version v0 of the taxonomy, the one given is v1; materialize {stale} anew"
    with pytest.raises(InputError, match=message):
        write_evaluation_set(context, EvaluationSetParameters())


def test_a_training_sample_refuses_labels_migrated_to_another_taxonomy(tmp_path):
    workshop, feed = Workshop(tmp_path), shop_feed()
    evaluation, _ = workshop.evaluation_set(feed)
    context = workshop.context(feed, evaluation_set=evaluation)
    describe(context.input("migrated_labels"), catalog_taxonomy="v0")
    with pytest.raises(InputError, match="materialize migrated_labels anew"):
        write_training_sample(context, TrainingSampleParameters())
