import numpy as np
import pytest

from ml.artifacts import read_manifest
from ml.learning.encoder import Classifier
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change import judge as judge_module
from ml.taxonomy_change.judge import Judge, folded, names_of
from ml.taxonomy_change.transitions import Successor, Transition, Transitions
from tests.ml.tiny_models import TINY_TEACHER, make, offer_rows, tiny_encoder, tiny_inputs, tiny_taxonomy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    inputs = tiny_inputs(folder)
    encoder = tiny_encoder(folder / "encoder")
    teacher, _ = make(
        "teacher_checkpoint", inputs, TINY_TEACHER | {"encoder": str(encoder)}, folder / "teacher"
    )
    return {"teacher": teacher, "encoder": encoder, "taxonomy": inputs["catalog_taxonomy"]}


def moved(former, *to, since="v2", lives_on=False):
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind="split" if len(to) > 1 else "replaced",
        to=[Successor(category_id=category, share=1 / len(to)) for category in to],
        origin="official",
        confidence=1.0,
        certain=len(to) == 1,
        since=since,
        reason="",
        lives_on=lives_on,
    )


def known_toasters():
    return Transitions(history=["v1", "v2"], transitions=[moved("toasters", "grills")])


def newer_tree():
    """Kettles are divided into two; toasters have another id."""
    return Taxonomy(
        [
            Category("home", None, "home"),
            Category("books", None, "books"),
            Category("spouts", "home", "spout", {"de": "Tülle"}),
            Category("boilers", "home", "boil"),
            Category("grills", "home", "slot"),
            Category("novels", "books", "novels"),
            Category("atlases", "books", "atlases"),
        ],
        locales=["de"],
    )


def test_the_teacher_decides_among_what_it_knows(folders):
    judge = Judge.load(newer_tree(), teacher=folders["teacher"], transitions=known_toasters())
    texts = [row["text"] for row in offer_rows(40, 9, "x")]
    classifier = Classifier.load(folders["teacher"])
    columns = [classifier.labels.index(label) for label in ("novels", "atlases", "toasters")]
    expected = classifier.predict_probabilities(texts)[:, columns]
    decided = judge.decide(texts, [["novels", "atlases", "grills"]] * len(texts))
    np.testing.assert_allclose(decided, expected / expected.sum(axis=1, keepdims=True), atol=1e-4)
    best = [("novels", "atlases", "grills")[column] for column in expected.argmax(axis=1)]
    assert [answers[0] for answers in judge.answers(texts)] == best


@pytest.mark.parametrize("taught", ["before", "since"])
def test_a_row_that_learned_more_than_the_category_is_now_has_no_say(folders, taught):
    version = read_manifest(folders["taxonomy"]).digest
    history = [version, "later"] if taught == "before" else ["earlier", version]
    divided = moved("kettles", "kettles", "toasters", since=history[1], lives_on=True)
    judge = Judge.load(
        tiny_taxonomy(),
        teacher=folders["teacher"],
        transitions=Transitions(history=history, transitions=[divided]),
    )
    # Words of kettles, and the name of toasters: what was learned and what names say disagree.
    (decided,) = judge.decide(["boil spout boil toasters"], [["kettles", "toasters"]])
    answers = judge.answers(["boil spout boil"], 1)
    assert (decided.argmax(), answers == [["kettles"]]) == ((1, False) if taught == "before" else (0, True))


@pytest.mark.parametrize("taught", ["before", "since"])
def test_a_row_moves_only_by_what_happened_since_it_was_learned(folders, taught):
    version = read_manifest(folders["taxonomy"]).digest
    history = [version, "later"] if taught == "before" else ["earlier", version]
    used_again = moved("toasters", "novels", since=history[1], lives_on=True)
    judge = Judge.load(
        tiny_taxonomy(),
        teacher=folders["teacher"],
        transitions=Transitions(history=history, transitions=[used_again]),
    )
    expected = "novels" if taught == "before" else "toasters"
    assert judge.answers(["toaster slot crumb"], 1) == [[expected]]


def test_no_row_speaks_for_a_category_that_is_being_divided(folders):
    judge = Judge.load(tiny_taxonomy(), teacher=folders["teacher"], divided={"kettles"})
    assert "kettles" not in judge.answers(["boil spout boil"], 4)[0]


@pytest.mark.parametrize("model", ["teacher", "encoder"])
def test_words_of_the_name_decide_between_new_categories(folders, model):
    given = {"teacher": folders["teacher"]} if model == "teacher" else {"encoder": str(folders["encoder"])}
    judge = Judge.load(newer_tree(), background=["new red kettle", "cheap offer"], **given)
    decided = judge.decide(["Tulle fur alle", "boil boil"], [["spouts", "boilers"]] * 2)
    assert decided[0].argmax() == 0
    assert decided[1].argmax() == 1


def test_an_offer_that_fits_no_name_belongs_nowhere(folders):
    judge = Judge.load(newer_tree(), encoder=str(folders["encoder"]))
    verdict = judge.decide_among_rivals(
        ["boil boil", "zzz qqq"], [(0, "boilers"), (1, "boilers"), (0, "spouts")]
    )
    assert verdict.is_best.tolist() == [True, False, False]
    assert verdict.confidence[0] > 0.5 > verdict.confidence[1]
    assert judge.answers(["boil"]) == [[]]


def test_a_category_that_the_teacher_knows_needs_its_consent(folders):
    judge = Judge.load(newer_tree(), teacher=folders["teacher"], transitions=known_toasters())
    verdict = judge.decide_among_rivals(
        ["atlases map globe", "atlases novel chapter paperback novel"], [(0, "atlases"), (1, "atlases")]
    )
    assert verdict.confidence[0] > verdict.confidence[1]
    assert not verdict.is_best[1]


def test_answers_do_not_depend_on_chunks_and_repeat(folders, monkeypatch):
    texts = [row["text"] for row in offer_rows(30, 4, "c")]
    options = [["spouts", "boilers", "novels"]] * len(texts)
    questions = [(row, category) for row in range(len(texts)) for category in ("boilers", "novels")]
    results = []
    for size in (1_024, 7, 7):
        monkeypatch.setattr(judge_module, "_TEXTS_AT_ONCE", size)
        judge = Judge.load(newer_tree(), teacher=folders["teacher"], background=texts[:10])
        verdict = judge.decide_among_rivals(texts, questions)
        results.append((np.stack(judge.decide(texts, options)), verdict.confidence, verdict.is_best))
    for one, other in zip(results[0], results[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for one, other in zip(results[1], results[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_wording_counts_as_much_as_labelled_offers_say(folders):
    def judge():
        return Judge.load(newer_tree(), encoder=str(folders["encoder"]))

    in_words = judge()
    in_words.learn_wording(["boil", "spout", "slot"] * 20, ["boilers", "spouts", "grills"] * 20)
    misleading = judge()
    misleading.learn_wording(["boil", "spout", "slot"] * 20, ["spouts", "grills", "boilers"] * 20)
    few = judge()
    few.learn_wording(["boil"] * 10, ["spouts"] * 10)
    assert in_words.wording_weight == 8.0
    assert misleading.wording_weight == 0.0
    assert few.wording_weight == judge_module.WORDING_WEIGHT


def test_names_are_compared_without_case_and_accents():
    assert folded("Kühl-GEFRIER Ação") == "kuhl-gefrier acao"
    assert names_of(newer_tree(), "spouts") == ["spout", "Tülle"]
    assert names_of(newer_tree(), "boilers") == ["boil"]
