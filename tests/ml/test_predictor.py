import itertools
import os
import random
import shutil
import signal

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.offers import offer_text
from ml.serving import pool as pool_module
from ml.serving.cascade import CascadeSettings
from ml.serving.compiled_model import CompiledModel
from ml.serving.fast_model import FastModel
from ml.serving.pool import PredictorPool, WorkerError
from ml.serving.predictor import PREDICTION_SCHEMA, Predictor, prediction_table
from tests.ml.compiled_models import PRODUCTS, TITLES, seal, with_cascade

MIXED = [
    {"offer_id": f"{number} {further}", "title": f"{title} {further}"}
    for number, (title, other) in enumerate(itertools.pairwise([*PRODUCTS.values(), "Bosch kettle"]))
    for further in ("new", f"or {other}", "")
]
"""Offers of which the fast model is more and less sure."""
MIXED_TEXTS = [offer_text(offer) for offer in MIXED]
OFFERS = [{"offer_id": str(number), "title": title} for number, title in enumerate(TITLES)]


@pytest.fixture(scope="module")
def predictor(compiled_student):
    return Predictor.load(compiled_student)


def test_a_prediction_says_which_model_and_taxonomy_it_comes_from(predictor, compiled_student, compiled_root):
    prediction = predictor.predict([{"offer_id": "1", "title": "Bosch kettle 1 l"}])[0]
    assert prediction.offer_id == "1"
    assert prediction.category_id == "kettle"
    assert prediction.category_path == "Everything > Kettle"
    assert prediction.problem is None
    assert prediction.model_version == short_version(read_manifest(compiled_student).digest)
    assert prediction.taxonomy_version == short_version(read_manifest(compiled_root / "taxonomy").digest)


def test_alternatives_are_the_next_most_likely_categories(predictor):
    prediction = predictor.predict(OFFERS[:1])[0]
    probabilities = predictor.predict_probabilities([offer_text(OFFERS[0])])[0]
    best = np.argsort(-probabilities)[:4]
    assert [prediction.category_id, *(a.category_id for a in prediction.alternatives)] == [
        predictor.labels[label] for label in best
    ]
    assert [prediction.confidence, *(a.confidence for a in prediction.alternatives)] == pytest.approx(
        probabilities[best], abs=1e-6
    )


def test_probabilities_are_the_calibrated_ones_of_the_original(predictor, compiled_root):
    texts = [offer_text(offer) for offer in OFFERS]
    expected = Classifier.load(compiled_root / "student").predict_probabilities(texts)
    found = predictor.student.predict_probabilities(texts)
    assert found.dtype == np.float32
    assert found.sum(axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)
    assert np.abs(found - expected).mean() < 0.01


def test_no_offers_give_no_predictions(predictor):
    assert predictor.predict([]) == []
    assert predictor.predict_probabilities([]).shape == (0, len(PRODUCTS))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(24)),
    cuts=st.lists(st.integers(1, 23), max_size=6),
    long_text=st.text(min_size=1, max_size=300),
)
def test_a_text_has_one_answer_in_any_order_and_any_batch(compiled_student, order, cuts, long_text):
    alone = _alone(compiled_student)
    texts = [offer_text(offer) for offer in OFFERS[:24]]
    model = _model(compiled_student)
    bounds = [0, *sorted(set(cuts)), 24]
    for start, end in itertools.pairwise(bounds):
        rows = order[start:end]
        found = model.predict_probabilities([*(texts[row] for row in rows), long_text])
        assert found[:-1].tobytes() == alone[rows].tobytes()


def test_a_fresh_process_and_more_threads_give_the_same_bits(compiled_student):
    texts = [offer_text(offer) for offer in OFFERS]
    one = Predictor.load(compiled_student).predict_probabilities(texts)
    two = Predictor.load(compiled_student, threads=2).predict_probabilities(texts[::-1])
    assert one.tobytes() == two[::-1].tobytes()


def test_equal_texts_are_computed_once_within_a_call_and_across_calls(compiled_student, monkeypatch):
    predictor = Predictor.load(compiled_student)
    computed = []
    original = predictor.student.predict_probabilities

    def counting(texts):
        computed.extend(texts)
        return original(texts)

    monkeypatch.setattr(predictor.student, "predict_probabilities", counting)
    first = predictor.predict([*OFFERS[:3], *OFFERS[:3]])
    again = predictor.predict(OFFERS[:4])
    assert first[:3] == first[3:] == again[:3]
    assert len(computed) == 4


def test_the_fast_model_answers_what_it_is_sure_of_and_the_student_is_asked_the_rest(
    cascading_student, monkeypatch
):
    predictor = Predictor.load(cascading_student)
    asked = []
    original = predictor.student.predict_probabilities
    monkeypatch.setattr(
        predictor.student, "predict_probabilities", lambda texts: asked.extend(texts) or original(texts)
    )
    predictions = predictor.predict([*MIXED, {"offer_id": "x"}])
    fast = FastModel.load(cascading_student / "fast").predict_probabilities(MIXED_TEXTS)
    sure = fast.max(axis=1) >= 0.95
    assert 0 < sure.sum() < len(MIXED)
    assert [p.tier for p in predictions] == [*("fast" if is_sure else "student" for is_sure in sure), None]
    assert asked == [text for text, is_sure in zip(MIXED_TEXTS, sure, strict=True) if not is_sure]
    for prediction, row in zip(predictions, fast, strict=False):
        if prediction.tier == "fast":
            assert prediction.confidence == pytest.approx(float(row.max()), abs=1e-6)
            assert not prediction.needs_review
    probabilities = predictor.predict_probabilities(MIXED_TEXTS)
    assert probabilities[sure].max(axis=1) == pytest.approx(fast[sure].max(axis=1))


def test_each_model_is_asked_about_everything_by_itself(cascading_student):
    fast, student = Predictor.load(cascading_student).each_alone(MIXED_TEXTS)
    for said, model in (
        (fast, FastModel.load(cascading_student / "fast")),
        (student, CompiledModel.open(cascading_student)),
    ):
        best = model.predict_probabilities(MIXED_TEXTS).argmax(axis=1)
        assert said == [model.labels[place] for place in best]
    assert fast != student


def test_what_neither_is_sure_of_goes_up_and_to_review(compiled_student, tmp_path):
    predictor = Predictor.load(
        with_cascade(compiled_student, tmp_path / "strict", fast_from=None, review_below=0.999_999)
    )
    offers = [{"title": "something quite different"}, {"title": "kettle and toaster and tent"}]
    for prediction in predictor.predict(offers):
        assert (prediction.needs_review, prediction.tier) == (True, "student")
        assert (prediction.category_id, prediction.category_path) == ("all", "Everything")
        assert prediction.confidence == pytest.approx(1.0)
        assert len(prediction.alternatives) == 3
        assert prediction.alternatives[0].confidence < 0.999_999
    table = prediction_table(predictor.predict(offers))
    assert table["needs_review"].to_pylist() == [True, True]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(36)), cuts=st.lists(st.integers(1, 35), max_size=6))
def test_in_a_cascade_too_an_offer_has_one_answer_in_any_batch(cascading_model, order, cuts):
    predictor, alone = cascading_model
    for start, end in itertools.pairwise([0, *sorted(set(cuts)), 36]):
        rows = order[start:end]
        predictor._answers.clear()
        found = predictor.predict([MIXED[row] for row in rows])
        assert found == [alone[row] for row in rows]


def test_the_country_decides_where_it_has_a_threshold_of_its_own(compiled_student, tmp_path):
    folder = with_cascade(compiled_student, tmp_path / "countries", fast_from=None, review_below=0.5)
    stored = CascadeSettings.read(folder)
    certified = msgspec.structs.replace(stored.thresholds[""], confidence=0.5)
    msgspec.structs.replace(stored, thresholds=stored.thresholds | {"DE": certified}).write(folder)
    predictor = Predictor.load(seal(folder, "compiled_student"))
    offers = [OFFERS[0] | {"country": country} for country in ("DE", "de", "FR", None)]
    assert [p.tier for p in predictor.predict(offers)] == ["fast", "fast", "student", "student"]
    with PredictorPool(folder, workers=1) as pool:
        assert list(pool.predict([offers])) == [predictor.predict(offers)]


@pytest.fixture(scope="module")
def cascading_model(compiled_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "model"
    predictor = Predictor.load(with_cascade(compiled_student, folder, fast_from=0.95, review_below=0.7))
    return predictor, [predictor.predict([offer])[0] for offer in MIXED]


def test_the_memory_of_answers_is_bounded(compiled_student, monkeypatch):
    monkeypatch.setattr("ml.serving.predictor._CACHED_TEXTS", 5)
    predictor = Predictor.load(compiled_student)
    fresh = predictor.predict(OFFERS[:12])
    assert len(predictor._answers) == 5
    assert predictor.predict(OFFERS[:12]) == fresh


@pytest.mark.parametrize(
    ("offer", "problem"),
    [
        ({"offer_id": "x"}, "title is missing"),
        ({"offer_id": "x", "title": " \t\u200b"}, "title is empty"),
        ({"offer_id": "x", "title": "<b></b>", "brand": "Bosch"}, "title is empty"),
        ({"offer_id": "x", "title": ["kettle"]}, "title is list, expected text or null"),
        (
            {"offer_id": "x", "title": "kettle", "brand": float("nan")},
            "brand is float, expected text or null",
        ),
        ({"offer_id": "x", "title": "kettle \ud800"}, "title is not valid Unicode"),
        ({"offer_id": "x", "title": "kettle", "problem": "malformed_row"}, "malformed_row"),
    ],
)
def test_a_bad_offer_has_no_category_and_leaves_its_neighbours_alone(predictor, offer, problem):
    before, bad, after = predictor.predict([OFFERS[0], offer, OFFERS[1]])
    assert (bad.offer_id, bad.category_id, bad.category_path, bad.confidence) == ("x", None, None, None)
    assert bad.problem == problem
    assert [before, after] == predictor.predict(OFFERS[:2])


def test_a_huge_title_is_cut_and_classified(predictor):
    prediction = predictor.predict([{"title": "Bosch kettle " + "very " * 50_000}])[0]
    assert prediction.category_id is not None
    assert prediction.offer_id is None


def test_predictions_make_a_table_in_their_order(predictor):
    table = prediction_table(predictor.predict([*OFFERS[:2], {"offer_id": "x"}]))
    assert table.schema == PREDICTION_SCHEMA
    assert table["offer_id"].to_pylist() == ["0", "1", "x"]
    assert table["category_id"].to_pylist()[2] is None


def test_a_changed_file_is_not_loaded(compiled_student, tmp_path):
    folder = shutil.copytree(compiled_student, tmp_path / "compiled")
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"model\.onnx differs from its digest"):
        Predictor.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_version": "0"}, "offer text version 0"),
        ({"target": "neuron"}, "compiled for neuron"),
        ({"max_tokens": "many"}, "is damaged"),
    ],
)
def test_a_model_made_for_something_else_is_not_loaded(compiled_student, tmp_path, change, said):
    folder = shutil.copytree(compiled_student, tmp_path / "compiled")
    content = msgspec.json.decode((folder / "model.json").read_bytes())
    (folder / "model.json").write_bytes(msgspec.json.encode(content | change))
    seal(folder, "compiled_student")
    with pytest.raises(InputError, match=said):
        Predictor.load(folder)


def test_labels_that_do_not_belong_to_the_model_are_refused(compiled_student, tmp_path):
    folder = shutil.copytree(compiled_student, tmp_path / "compiled")
    (folder / "labels.json").write_bytes(msgspec.json.encode([*PRODUCTS, "one too many"]))
    with pytest.raises(InputError, match="13 labels"):
        Predictor.load(seal(folder, "compiled_student"))
    (folder / "labels.json").write_bytes(msgspec.json.encode([*list(PRODUCTS)[:-1], "elsewhere"]))
    with pytest.raises(InputError, match="'elsewhere' of the model"):
        Predictor.load(seal(folder, "compiled_student"))


def test_a_pool_answers_in_order_as_one_predictor_does(compiled_student, predictor):
    shuffled = random.Random(1).sample(OFFERS, len(OFFERS))
    batches = [shuffled[start : start + 7] for start in range(0, len(shuffled), 7)]
    with PredictorPool(compiled_student, workers=2) as pool:
        assert pool.model_version == predictor.model_version
        answers = list(pool.predict(batches))
    assert answers == [predictor.predict(batch) for batch in batches]


def test_a_pool_reads_only_as_far_ahead_as_it_works(compiled_student):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield OFFERS[:1]

    with PredictorPool(compiled_student, workers=1) as pool:
        answers = pool.predict(endless())
        for _ in range(10):
            next(answers)
        assert read <= 12


def test_another_takes_the_place_of_a_killed_worker(compiled_student, predictor):
    with PredictorPool(compiled_student, workers=2) as pool:
        answers = pool.predict(iter([OFFERS[:5]] * 200))
        first = next(answers)
        before = pool.process_ids
        os.kill(before[0], signal.SIGKILL)
        rest = list(answers)
        assert len(set(before) & set(pool.process_ids)) == 1
    assert [first, *rest] == [predictor.predict(OFFERS[:5])] * 200


def test_offers_that_kill_every_worker_are_a_clear_error(compiled_student, monkeypatch):
    starts = []

    class Mortal(pool_module._Worker):
        def wait_until_ready(self):
            starts.append(super().wait_until_ready())
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return starts[-1]

    monkeypatch.setattr(pool_module, "_Worker", Mortal)
    with (
        PredictorPool(compiled_student, workers=1) as pool,
        pytest.raises(WorkerError, match="killed by signal 9"),
    ):
        list(pool.predict(iter([OFFERS[:5]] * 1000)))
    assert 2 <= len(starts) <= 2 * 2  # the batch behind was under way, too


def test_a_pool_over_nothing_says_so_once(tmp_path):
    with pytest.raises(InputError, match="is not an artifact"):
        PredictorPool(tmp_path, workers=2)


_models = {}


def _model(folder):
    if folder not in _models:
        _models[folder] = Predictor.load(folder)
    return _models[folder]


def _alone(folder):
    key = (folder, "alone")
    if key not in _models:
        _models[key] = np.concatenate(
            [_model(folder).predict_probabilities([offer_text(offer)]) for offer in OFFERS[:24]]
        )
    return _models[key]
