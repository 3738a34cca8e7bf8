import random
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, TEXT_VERSION, offer_texts
from ml.progress import Progress
from ml.runner import StageContext
from ml.sampling.split import Split
from ml.sampling.stages import write_evaluation_set, write_training_sample
from ml.stages import EvaluationSetParameters, TrainingSampleParameters

CATEGORIES = ["a", "b", "c", "d"]


def offer(number, **columns):
    return {"offer_id": f"o{number}", "shop_id": "s0", "title": f"title {number}", **columns}


class Workshop:
    """Runs the two stages over days of offers, in a folder of its own."""

    def __init__(self, folder: Path, categories=CATEGORIES):
        self.folder = folder
        self.runs = 0
        taxonomy = folder / "taxonomy"
        taxonomy.mkdir(parents=True)
        self.set_taxonomy(categories)

    def set_taxonomy(self, categories):
        pq.write_table(pa.table({"category_id": categories}), self.folder / "taxonomy" / "taxonomy.parquet")

    def context(self, days, **inputs):
        self.runs += 1
        place = self.folder / f"run{self.runs}"
        folders = {"catalog_taxonomy": self.folder / "taxonomy", **inputs}
        for day, offers in days.items():
            folders[f"offers/{day}"] = place / day
            (place / day).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(offers, CLEAN_SCHEMA), place / day / "offers.parquet")
        for name in ("output", "checkpoints"):
            (place / name).mkdir(parents=True)
        return StageContext(folders, place / "output", place / "checkpoints", Progress("test"))

    def evaluation_set(self, days, previous=None, **parameters):
        context = self.context(days, **({"previous": previous} if previous else {}))
        metrics = write_evaluation_set(context, EvaluationSetParameters(**parameters))
        return context.output, metrics

    def training_sample(self, days, evaluation_set, **parameters):
        context = self.context(days, evaluation_set=evaluation_set)
        metrics = write_training_sample(context, TrainingSampleParameters(**parameters))
        return context.output, metrics


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
        reference=7,
        validation_share=0.3,
        seed=seed,
    )
    measured = rows_of(evaluation / "offers.parquet")
    labelled = rows_of(training / "labelled.parquet")
    unlabelled = rows_of(training / "unlabelled.parquet")
    reference = rows_of(training / "reference.parquet")
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
    assert len(reference) == min(7, len(delivered))
    assert len(train) + len(validation) == len(labelled)
    assert metrics["labelled"] == len(labelled)
    assert metrics["train"] == len(train)
    assert metrics["unlabelled"] == len(unlabelled)
    assert evaluation_metrics["offers"] == len(measured)
    assert {row["category_id"] for row in measured + labelled} <= set(CATEGORIES)
    assert {row["category_id"] for row in unlabelled} <= {None}
    for rows in (measured, labelled, unlabelled, reference):
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
        paths = sorted([*evaluation.iterdir(), *training.iterdir()])
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
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in evaluation.iterdir()
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
        *rows_of(training / "reference.parquet"),
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
