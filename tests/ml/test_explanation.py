"""Explanations: what words and similar offers have to be, whatever the model."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml import __main__ as command_line
from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.explanation.explaining import Explainer, Explanation
from ml.explanation.neighbours import LabelledOffers
from ml.explanation.rendering import as_markdown, as_page, as_text
from ml.explanation.words import read_words
from ml.offers import offer_text
from ml.serving.compiled_model import CompiledModel
from tests.ml.compiled_models import PRODUCTS, TITLES, seal

LABELS = [category for category in PRODUCTS for _ in range(5)]
KETTLE = {"offer_id": "new", "title": "Bosch kettle 1.2 l red", "shop_category": "Kitchen"}


class Bag:
    """The log-odds of its first label are the sum of weights of words: what a word does is known exactly."""

    labels = ("first", "second")

    def __init__(self, weights):
        self.weights = weights

    def predict_probabilities(self, texts):
        sums = [sum(self.weights.get(word, 0.0) for word in text.split()) for text in texts]
        odds = np.exp(np.array(sums, dtype=np.float64))
        return np.stack([odds / (1 + odds), 1 / (1 + odds)], axis=1).astype(np.float32)


_WORDS = st.sampled_from(["a", "bb", "c-c", "1.7", "é", "dd"])


@settings(max_examples=50, deadline=None)
@given(
    fields=st.lists(st.lists(_WORDS, min_size=1, max_size=4), min_size=1, max_size=4),
    weights=st.dictionaries(_WORDS, st.floats(-4.0, 4.0)),
)
def test_effects_are_what_the_words_did(fields, weights):
    text = " | ".join(" ".join(field) for field in fields)
    reading = read_words(Bag(weights), text, "first")
    assert [word.word for word in reading.words] == [word for field in fields for word in field]
    for word in reading.words:
        assert text[word.start : word.start + len(word.word)] == word.word
        assert word.effect == pytest.approx(weights.get(word.word, 0.0), abs=1e-5)
    total = sum(weights.get(word.word, 0.0) for word in reading.words)
    assert sum(word.effect for word in reading.words) == pytest.approx(total, abs=1e-4)


def test_signs_between_words_are_no_words():
    assert [word.word for word in read_words(Bag({}), "a-b > 1.7 & | - x", "first").words] == [
        "a-b",
        "1.7",
        "x",
    ]


def test_a_word_counts_however_sure_the_model_is():
    (sure, _) = read_words(Bag({"sure": 40.0}), "sure thing", "first").words
    assert sure.effect == pytest.approx(40.0, abs=1e-3)


def test_a_word_is_left_out_as_if_it_had_never_been_written():
    seen = []

    class Listening(Bag):
        def predict_probabilities(self, texts):
            seen.extend(texts)
            return super().predict_probabilities(texts)

    read_words(Listening({}), "one two | brand | end", "first")
    assert seen == [
        "one two | brand | end",
        "two | brand | end",
        "one | brand | end",
        "one two | end",
        "one two | brand",
    ]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A training sample of the products' offers, 12 of them for validation."""
    return _sample(tmp_path_factory.mktemp("sample"), list(range(len(TITLES))))


def _sample(folder: Path, order: list[int]) -> Path:
    table = pa.table(
        {
            "offer_id": [f"o{row}" for row in range(len(TITLES))],
            "shop_id": [f"s{row % 3}" for row in range(len(TITLES))],
            "category_id": LABELS,
            "text": [offer_text({"title": title}) for title in TITLES],
            "split": ["validation" if row % 5 == 4 else "train" for row in range(len(TITLES))],
        }
    )
    folder.mkdir(exist_ok=True)
    pq.write_table(table.take(order), folder / "labelled.parquet")
    return seal(folder, "training_sample")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def explainer(compiled_root, sample, index):
    return Explainer.load(compiled_root / "student", sample, index)


def test_a_labelled_offer_is_most_like_itself(explainer):
    for row in (0, 17, 58):
        found = explainer.explain({"title": TITLES[row]}, similar=3).similar
        assert found[0].offer_id == f"o{row}"
        assert found[0].category_id == LABELS[row]
        assert found[0].similarity == pytest.approx(1.0, abs=2e-3)
        assert [offer.similarity for offer in found] == sorted(
            (offer.similarity for offer in found), reverse=True
        )


def test_only_offers_that_were_learned_from_are_similar(explainer):
    found = explainer.explain({"title": TITLES[4]}, similar=1000).similar
    assert len(found) == len(TITLES) * 4 // 5
    assert "o4" not in {offer.offer_id for offer in found}


def test_the_order_of_the_labelled_offers_changes_nothing(compiled_root, explainer, tmp_path):
    order = random.Random(3).sample(range(len(TITLES)), len(TITLES))
    shuffled = _sample(tmp_path / "shuffled", order)
    other = Explainer.load(compiled_root / "student", shuffled, tmp_path / "index")
    for title in ("steel kettle", TITLES[33]):
        ours, theirs = (one.explain({"title": title}, similar=10) for one in (explainer, other))
        assert [offer.offer_id for offer in theirs.similar] == [offer.offer_id for offer in ours.similar]
        assert [offer.similarity for offer in theirs.similar] == pytest.approx(
            [offer.similarity for offer in ours.similar], abs=1e-3
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 30), count=st.integers(1, 40), chunk=st.integers(1, 40))
def test_the_nearest_are_those_of_a_full_sort(seed, rows, count, chunk):
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-1, 2, (rows, 3)).astype(np.float16)  # with many that are equal
    query = generator.integers(-1, 2, 3).astype(np.float32)
    ids = [f"{number:02}" for number in generator.permutation(rows)]
    blank = ["x"] * rows
    table = pa.table({"offer_id": ids, "shop_id": blank, "category_id": blank, "text": blank})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml.explanation.neighbours._COMPARED_AT_ONCE", chunk)
        found = LabelledOffers(table, vectors).most_similar(query, count)
    expected = sorted(zip((-vectors.astype(np.float32) @ query).tolist(), ids, strict=True))[:count]
    assert [(-offer.similarity, offer.offer_id) for offer in found] == expected


def test_vectors_are_computed_once(compiled_root, sample, index, explainer, monkeypatch):
    (kept,) = index.iterdir()
    assert kept.suffix == ".npy"
    monkeypatch.setattr("ml.explanation.neighbours._write_vectors", None)
    Explainer.load(compiled_root / "student", sample, index)


def test_the_compiled_student_is_explained_as_it_answers(compiled_root, compiled_student, sample, index):
    explainer = Explainer.load(compiled_root / "student", sample, index, model=compiled_student)
    explanation = explainer.explain(KETTLE)
    compiled = CompiledModel.open(compiled_student)
    full, without = (
        compiled.predict_probabilities([offer_text({**KETTLE, "title": title})])[0]
        for title in (KETTLE["title"], "Bosch 1.2 l red")
    )
    best = np.argsort(-full, kind="stable")[:4].tolist()
    assert explanation.category_id == compiled.labels[best[0]]
    assert explanation.confidence == pytest.approx(full[best[0]], abs=1e-6)
    assert explanation.model_version == short_version(read_manifest(compiled_student).digest)
    assert [other.category_id for other in explanation.alternatives] == [
        compiled.labels[place] for place in best[1:]
    ]
    expected = _log_odds(full, best[0]) - _log_odds(without, best[0])
    assert {word.word: word.effect for word in explanation.words}["kettle"] == pytest.approx(
        expected, abs=1e-3
    )


def _log_odds(probabilities, place):
    return math.log(probabilities[place]) - math.log(sum(np.delete(probabilities, place)))


def test_another_category_can_be_explained(explainer):
    explanation = explainer.explain(KETTLE, category_id="tent")
    assert explanation.category_id == "tent"
    assert explanation.confidence < 0.5
    assert explanation.alternatives[0].category_id == explainer.explain(KETTLE).category_id
    assert len(explanation.alternatives) == 3


@pytest.mark.parametrize(
    ("offer", "category", "said"),
    [
        ({"brand": "Bosch"}, None, "cannot be classified: title is missing"),
        ({"title": 1.5}, None, "cannot be classified: title is float"),
        (KETTLE, "boat", "category 'boat' is none of the 12 that the model knows"),
    ],
)
def test_what_cannot_be_explained_says_why(offer, category, said, explainer):
    with pytest.raises(InputError, match=said):
        explainer.explain(offer, category_id=category)


def test_contributions_of_a_linear_model_are_shown_beside(explainer):
    class Linear:
        labels = tuple(PRODUCTS)

        def word_contributions(self, text, label):
            return [(word.lower(), len(word) / 10) for word in text.split()]

    explainer = Explainer(
        explainer._model, "m", explainer._student, explainer._offers, explainer._taxonomy, Linear()
    )
    explanation = explainer.explain(KETTLE)
    assert ("kettle", 0.6) in explanation.fast_words
    assert "  kettle  +0.600" in as_text(explanation)
    Linear.labels = ("tent",)
    assert explainer.explain(KETTLE).fast_words == []


def test_the_text_has_every_word_and_every_similar_offer(explainer):
    explanation = explainer.explain(KETTLE, similar=4)
    text = as_text(explanation)
    assert text.splitlines()[0] == "Bosch kettle 1.2 l red | Kitchen"
    assert f"category: {explanation.category_path} (" in text
    for word in explanation.words:
        assert re.search(
            rf"^  {re.escape(word.word)} +{re.escape(f'{word.effect:+.3f}')}", text, re.MULTILINE
        )
    assert f"{explanation.agreeing} of 4 have this category" in text
    assert all(offer.offer_id in text for offer in explanation.similar)


def test_pages_show_offers_as_text_whatever_is_in_them(explainer):
    explanation = explainer.explain({"title": "kettle a<5 & 5>3 *x* `y`"})
    page = as_page([explanation])
    assert "a&lt;5" in page
    assert "a<5" not in page
    assert page.count("<mark ") == len(explanation.words)
    shown = re.sub(r"<[^>]*>", "", page.split("<section><p>")[1].split("</p>")[0])
    assert shown == "kettle a&lt;5 &amp; 5&gt;3 *x* `y`"
    markdown = as_markdown(explanation, true_path="Everything > Tent")
    assert r"a\<5" in markdown
    assert "taken for **" in markdown
    assert r"labelled **Everything \> Tent**" in markdown


@pytest.fixture
def command(compiled_root, sample, index):
    return [
        "explain",
        *("--student", str(compiled_root / "student"), "--sample", str(sample), "--index", str(index)),
    ]


def test_the_command_explains_an_offer_of_a_feed(command, tmp_path, capsys):
    feed = tmp_path / "feed.csv"
    feed.write_text("offer_id,shop_id,title\n1,s,tent\n2,s,red kettle\n")
    page = tmp_path / "page.html"
    arguments = [*command, "--offer-id", "2", "--feed", str(feed), "--json", "--html", str(page)]
    assert command_line.main(arguments) == 0
    explanation = msgspec.json.decode(capsys.readouterr().out, type=Explanation)
    assert (explanation.offer_id, explanation.text) == ("2", "red kettle")
    assert len(explanation.similar) == 5
    assert "red" in page.read_text()


def test_the_command_explains_an_offer_that_is_given(command, capsys):
    assert (
        command_line.main([*command, "--offer", json.dumps({"title": "red kettle"}), "--similar", "2"]) == 0
    )
    assert capsys.readouterr().out.startswith("red kettle\ncategory: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give an offer: --offer JSON, or --offer-id ID with --feed FILE"),
        (["--offer-id", "1"], "give an offer"),
        (["--offer", "{"], "--offer {: .*give a JSON object"),
        (["--offer", "[]"], "--offer .*give a JSON object"),
        (
            ["--offer-id", "9", "--feed", "FEED"],
            "--offer-id 9: none of the 1 offers in .*feed.csv has this id",
        ),
        (["--offer-id", "9", "--feed", "nowhere.csv"], "--feed nowhere.csv points nowhere"),
        (["--offer", '{"title": "x"}', "--student", "nowhere"], "nowhere is not an artifact"),
        (["--offer", '{"title": "x"}', "--sample", "nowhere"], "nowhere is not an artifact"),
        (["--offer", '{"title": "x"}', "--sample", "STUDENT"], "labelled.parquet cannot be read"),
        (["--offer", '{"title": "x"}', "--model", "nowhere"], "nowhere is not an artifact"),
        (["--offer", '{"title": "x"}', "--fast", "nowhere"], "nowhere"),
        (["--offer", '{"title": "x"}', "--similar", "0"], "--similar 0: expected at least 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(options, said, command, compiled_root, tmp_path, capsys):
    feed = tmp_path / "feed.csv"
    feed.write_text("offer_id,shop_id,title\n1,s,tent\n")
    places = {"FEED": str(feed), "STUDENT": str(compiled_root / "student")}
    assert command_line.main([*command, *(places.get(option, option) for option in options)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line)
