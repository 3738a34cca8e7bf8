from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.learning import training
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.warm_start import WarmStart, row_sources
from ml.offers import TEXT_VERSION
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Successor, Transition, Transitions
from tests.ml.tiny_models import (
    TINY_TEACHER,
    distillation_inputs,
    make,
    offer_rows,
    seal,
    tiny_encoder,
    write_labelled,
)

EARLIER = ["atlases", "kettles", "novels", "toasters"]
LATER = ["books", "kettles", "lamps", "toasters"]
"""Novels and atlases became books, lamps are new."""
LATER_OF = {"novels": "books", "atlases": "books", "kettles": "kettles", "toasters": "toasters"}
NOTHING_LEARNED = {"epochs": 1, "learning_rate": 1e-12, "head_learning_rate": 1e-12}


def transition(former: str, to: dict[str, float], since: str = "v2") -> Transition:
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind="split" if len(to) > 1 else "merged",
        to=[Successor(category_id=category, share=share) for category, share in to.items()],
        origin="official",
        confidence=1.0,
        certain=len(to) == 1,
        since=since,
        reason="as the test has it",
    )


def by_former(*transitions: Transition) -> dict[str, Transition]:
    return {t.from_id: t for t in transitions}


def test_rows_come_from_the_category_itself_or_from_its_predecessors() -> None:
    known = by_former(
        transition("atlases", {"books": 1.0}),
        transition("novels", {"books": 0.25, "stories": 0.75}),
        transition("toasters", {"toasters": 0.6, "grills": 0.4}),
        transition("radios", {"stories": 1.0}),
    )
    labels = ["books", "grills", "kettles", "lamps", "stories", "toasters"]
    assert row_sources(EARLIER, labels, known) == [
        [(0, 0.8), (2, 0.2)],
        [(3, 1.0)],
        [(1, 1.0)],
        [],  # nobody's successor
        [(2, 1.0)],  # the earlier model did not know radios
        [(3, 1.0)],  # gave up a part, and is its own predecessor
    ]


@given(
    earlier=st.sets(st.sampled_from("abcdef"), min_size=1),
    later=st.sets(st.sampled_from("abcdefghi"), min_size=1),
    moves=st.dictionaries(
        st.sampled_from("abcdef"),
        st.dictionaries(st.sampled_from("abcdefghi"), st.floats(0.01, 1.0), max_size=3),
    ),
)
def test_weights_add_up_to_one_and_unchanged_labels_are_their_own_source(
    earlier: set[str], later: set[str], moves: dict[str, dict[str, float]]
) -> None:
    earlier_labels, labels = sorted(earlier), sorted(later)
    known = by_former(*(transition(former, to) for former, to in moves.items()))
    for label, sources in zip(labels, row_sources(earlier_labels, labels, known), strict=True):
        if label in earlier and label not in moves:
            assert sources == [(earlier_labels.index(label), 1.0)]
        elif sources:
            assert sum(share for _, share in sources) == pytest.approx(1.0)
            assert all(label in moves[earlier_labels[row]] for row, _ in sources)
        else:
            assert not any(label in moves.get(former, {}) for former in earlier)


@pytest.fixture
def earlier_model(tmp_path: Path) -> Classifier:
    settings = ClassifierSettings(
        text_version=TEXT_VERSION, taxonomy_version="v1", max_tokens=16, temperature=0.5
    )
    model = Classifier.from_encoder(str(tiny_encoder(tmp_path / "encoder")), EARLIER, settings).eval()
    rows = offer_rows(40, 1, "x")
    model.initialise_head([row["text"] for row in rows], [row["category_id"] for row in rows], EARLIER)
    return model


def embedded(model: Classifier, rows: list[dict[str, Any]]) -> np.ndarray:
    return model.predict_embeddings([row["text"] for row in rows])


def initialised(earlier: Classifier, labels: list[str], *moves: Transition) -> WarmStart:
    """Goes on from ``earlier``; offers of former categories carry the label of their first successor."""
    label_of = {move.from_id: move.to[0].category_id for move in moves}
    rows = [
        r | {"category_id": label_of.get(r["category_id"], r["category_id"])} for r in offer_rows(40, 1, "x")
    ]
    rows += lamp_rows(6, 1, "x")
    rows = [row for row in rows if row["category_id"] in labels]
    started = WarmStart.of(earlier, labels, by_former(*moves))
    started.initialise_head([r["text"] for r in rows], [r["category_id"] for r in rows], labels)
    return started


def test_rows_follow_their_category_and_the_temperature_is_divided_out(earlier_model: Classifier) -> None:
    weight, bias = earlier_model.head.weight.detach().clone(), earlier_model.head.bias.detach().clone()
    texts = [row["text"] for row in offer_rows(20, 2, "y")]
    before = earlier_model.predict_logits(texts)
    moves = [transition("atlases", {"books": 0.75}), transition("novels", {"books": 0.25})]
    later = initialised(earlier_model, LATER, *moves)
    assert later.model.labels == LATER
    assert later.model.settings.temperature == 1.0
    assert later.counts == {"rows_kept": 2, "rows_merged": 1, "rows_new": 1}
    for label, row in (("kettles", 1), ("toasters", 3)):
        assert torch.equal(later.model.head.weight[LATER.index(label)], weight[row] / 0.5)
        assert torch.equal(later.model.head.bias[LATER.index(label)], bias[row] / 0.5)
    np.testing.assert_array_equal(
        later.model.predict_logits(texts)[:, [1, 3]].argmax(axis=1), before[:, [1, 3]].argmax(axis=1)
    )


def test_a_row_made_anew_is_half_its_predecessors_mean_and_half_its_texts(earlier_model: Classifier) -> None:
    weight = earlier_model.head.weight.detach().numpy() / 0.5
    bias = earlier_model.head.bias.detach().numpy() / 0.5
    books = [row for row in offer_rows(40, 1, "x") if row["category_id"] in ("atlases", "novels")]
    everything = embedded(earlier_model, [*offer_rows(40, 1, "x"), *lamp_rows(6, 1, "x")])
    own = np.concatenate([embedded(earlier_model, books), earlier_model.predict_embeddings(["books"])])
    moves = [transition("atlases", {"books": 0.75}), transition("novels", {"books": 0.25})]
    head = initialised(earlier_model, LATER, *moves).model.head
    row, row_bias = head.weight.detach().numpy()[0], head.bias[0].item()

    middle, mean_text = weight.mean(axis=0), everything.mean(axis=0)
    from_predecessors = 0.75 * weight[0] + 0.25 * weight[2] - middle
    from_texts = own.mean(axis=0) - mean_text
    expected = from_predecessors / np.linalg.norm(from_predecessors)
    expected = expected + from_texts / np.linalg.norm(from_texts)
    length = np.median(np.linalg.norm(weight - middle, axis=1))
    np.testing.assert_allclose(
        row - middle, length * expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-3
    )
    assert row @ mean_text + row_bias == pytest.approx(np.median(weight @ mean_text + bias), abs=1e-3)


def lamp_rows(count: int, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Offers of a category that has one word of each of the others."""
    rng = np.random.default_rng(seed)
    words = ["large globe", "spout globe", "globe slot", "globe chapter slot spout"]
    return [
        {
            "offer_id": f"{prefix}lamp{number}",
            "category_id": "lamps",
            "text": f"{rng.choice(words)} large spout",
        }
        for number in range(count)
    ]


def test_a_category_that_gave_up_a_part_is_made_anew_from_itself(earlier_model: Classifier) -> None:
    before = earlier_model.head.weight.detach().clone() / 0.5
    move = transition("toasters", {"toasters": 0.6, "lamps": 0.4})
    started = initialised(earlier_model, sorted([*EARLIER, "lamps"]), move)
    assert started.counts == {"rows_kept": 3, "rows_merged": 2, "rows_new": 0}
    lamps, toasters = started.model.head.weight.detach()[[2, 4]]
    assert not torch.equal(toasters, before[3])
    assert torch.cosine_similarity(toasters, before[3], dim=0) > 0.7
    assert not torch.equal(toasters, lamps)


def test_a_new_row_is_reached_by_its_own_offers_and_leaves_others_theirs(earlier_model: Classifier) -> None:
    texts = [row["text"] for row in offer_rows(60, 2, "y")]
    before = np.array(EARLIER)[earlier_model.predict_logits(texts).argmax(axis=1)]
    labels = sorted([*EARLIER, "lamps"])
    model = initialised(earlier_model, labels).model
    after = np.array(labels)[model.predict_logits(texts).argmax(axis=1)]
    assert np.mean(after == before) > 0.9
    held_out = [row["text"] for row in lamp_rows(12, 2, "y")]
    assert np.mean(np.array(labels)[model.predict_logits(held_out).argmax(axis=1)] == "lamps") > 0.8


def test_a_split_category_gives_its_offers_to_the_successor_they_belong_to(tmp_path: Path) -> None:
    """One row becomes two that know their own."""
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="v1", max_tokens=16)
    coarse = Classifier.from_encoder(str(tiny_encoder(tmp_path / "encoder")), ["books", "home"], settings)
    root_of = {"kettles": "home", "toasters": "home", "novels": "books", "atlases": "books"}
    rows = offer_rows(80, 1, "x")
    texts, fine = [r["text"] for r in rows], [r["category_id"] for r in rows]
    coarse.initialise_head(texts, [root_of[category] for category in fine], ["books", "home"])
    started = WarmStart.of(
        coarse,
        EARLIER,
        by_former(
            transition("books", {"atlases": 0.5, "novels": 0.5}),
            transition("home", {"kettles": 0.5, "toasters": 0.5}),
        ),
    )
    started.initialise_head(texts, fine, EARLIER)
    held_out = offer_rows(80, 2, "y")
    chosen = started.model.predict_logits([row["text"] for row in held_out]).argmax(axis=1)
    right = [EARLIER[c] == row["category_id"] for c, row in zip(chosen, held_out, strict=True)]
    assert np.mean(right) > 0.6  # chance is 0.25, and 0.5 if only the root were known


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher and a student of the first taxonomy."""
    folder = tmp_path_factory.mktemp("earlier")
    inputs = distillation_inputs(folder)
    student, _ = make("student_checkpoint", inputs, TINY_STUDENT, folder / "student")
    return inputs | {"student_checkpoint": student}


TINY_STUDENT: dict[str, Any] = {
    "layers": 2,
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "max_tokens": 12,
}


@pytest.fixture(scope="module")
def later(earlier: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The next taxonomy, what changed, and a sample labelled under it."""
    folder = tmp_path_factory.mktemp("later")
    taxonomy, sample, change = (folder / name for name in ("taxonomy", "sample", "change"))
    for path in (taxonomy, sample, change):
        path.mkdir()
    leaves = [Category(label, "home" if label != "books" else None, label) for label in LATER]
    Taxonomy([Category("home", None, "home"), *leaves]).write(taxonomy / "taxonomy.parquet")
    rows = [
        row | {"split": split, "category_id": LATER_OF.get(row["category_id"], row["category_id"])}
        for split, rows in (
            ("train", offer_rows(40, 4, "t") + lamp_rows(8, 4, "t")),
            ("validation", offer_rows(16, 5, "v") + lamp_rows(4, 5, "v")),
        )
        for row in rows
    ]
    write_labelled(sample, rows)
    unlabelled = pq.read_table(earlier["training_sample"] / "unlabelled.parquet")
    pq.write_table(unlabelled, sample / "unlabelled.parquet")
    seal(taxonomy, "catalog_taxonomy")
    seal(sample, "training_sample")
    history = [read_manifest(path).digest for path in (earlier["catalog_taxonomy"], taxonomy)]
    moves = [transition(former, {"books": 1.0}, since=history[1]) for former in ("atlases", "novels")]
    Transitions(history=history, transitions=moves).write(change)
    seal(change, "taxonomy_change")
    return {"catalog_taxonomy": taxonomy, "training_sample": sample, "taxonomy_change": change}


def teacher_parameters(earlier: dict[str, Path], **changes: Any) -> dict[str, Any]:
    before = read_manifest(earlier["teacher_checkpoint"]).parameters
    return TINY_TEACHER | {"encoder": before["encoder"]} | changes


def test_a_warm_teacher_that_learned_nothing_answers_as_before(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    inputs = later | {"warm_start": earlier["teacher_checkpoint"]}
    folder, reference = make(
        "teacher_checkpoint", inputs, teacher_parameters(earlier, **NOTHING_LEARNED), tmp_path / "teacher"
    )
    counts = {
        name: reference.metrics[name] for name in ("warm_start", "rows_kept", "rows_merged", "rows_new")
    }
    assert counts == {"warm_start": True, "rows_kept": 2, "rows_merged": 1, "rows_new": 1}
    before, after = Classifier.load(earlier["teacher_checkpoint"]), Classifier.load(folder)
    assert after.labels == LATER
    texts = [row["text"] for row in offer_rows(60, 9, "y")]
    was = [LATER_OF[EARLIER[row]] for row in before.predict_logits(texts).argmax(axis=1)]
    now = [LATER[row] for row in after.predict_logits(texts).argmax(axis=1)]
    assert np.mean([a == b for a, b in zip(was, now, strict=True)]) > 0.9
    home = [LATER.index("kettles"), LATER.index("toasters")]
    np.testing.assert_array_equal(
        after.predict_logits(texts)[:, home].argmax(axis=1),
        before.predict_logits(texts)[:, [1, 3]].argmax(axis=1),
    )


def test_one_warm_epoch_learns_the_new_categories(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    teacher, reference = make(
        "teacher_checkpoint",
        later | {"warm_start": earlier["teacher_checkpoint"]},
        teacher_parameters(earlier, epochs=1),
        tmp_path / "teacher",
    )
    assert reference.metrics["validation_accuracy"] >= 0.9
    labels, _ = make(
        "teacher_labels",
        {"teacher_checkpoint": teacher, "training_sample": later["training_sample"]},
        {"top_k": 2},
        tmp_path / "labels",
    )
    inputs = later | {
        "warm_start": earlier["student_checkpoint"],
        "teacher_checkpoint": teacher,
        "teacher_labels": labels,
    }
    student, reference = make(
        "student_checkpoint", inputs, TINY_STUDENT | {"epochs": 1}, tmp_path / "student"
    )
    assert reference.metrics["rows_merged"] == reference.metrics["rows_new"] == 1
    model = Classifier.load(student)
    assert model.encoder.config.num_hidden_layers == 2
    fresh = lamp_rows(40, 9, "y") + [
        r for r in offer_rows(80, 9, "y") if LATER_OF[r["category_id"]] == "books"
    ]
    said = model.predict_logits([row["text"] for row in fresh]).argmax(axis=1)
    for category, numbers in (("lamps", said[:40]), ("books", said[40:])):
        assert np.mean(numbers == LATER.index(category)) > 0.6, category  # chance is 0.25


def test_a_cold_start_counts_every_row_as_new(earlier: dict[str, Path]) -> None:
    for name in ("teacher_checkpoint", "student_checkpoint"):
        metrics = read_manifest(earlier[name]).metrics
        assert (metrics["warm_start"], metrics["rows_new"], metrics["rows_kept"]) == (False, 4, 0)


class Killed(BaseException):
    pass


def test_a_killed_warm_start_ends_like_one_that_was_not(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = later | {"warm_start": earlier["teacher_checkpoint"]}
    parameters = teacher_parameters(earlier, checkpoint_seconds=1e-9)
    whole, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "whole")
    steps = 0
    take = training._Step.take

    def killed_in_the_middle(*arguments: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise Killed
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training._Step, "take", killed_in_the_middle)
        with pytest.raises(Killed):
            make("teacher_checkpoint", inputs, parameters, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(WarmStart, "initialise_head", None)  # a resumed run does not start over
        resumed, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "killed")
    assert read_manifest(resumed).digest == read_manifest(whole).digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": "packaged-minilm"}, "encoder 'packaged-minilm' instead of"),
        ({"instruction": "classify: "}, "instruction 'classify: ' instead of ''"),
        ({"max_tokens": 41}, "max_tokens 41: the encoder takes at most 40"),
    ],
)
def test_a_teacher_of_other_parameters_is_refused(
    changes: dict[str, Any], said: str, earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    inputs = later | {"warm_start": earlier["teacher_checkpoint"]}
    with pytest.raises(InputError, match=said):
        make("teacher_checkpoint", inputs, teacher_parameters(earlier, **changes), tmp_path / "teacher")


def test_the_weights_of_the_encoder_may_have_moved_to_another_folder(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    folder = earlier["teacher_checkpoint"]
    manifest = read_manifest(folder)
    pinned = manifest.parameters | {"encoder_digest": "a" * 64}
    copy = tmp_path / "earlier"
    copy.mkdir()
    for name in manifest.files:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes((folder / name).read_bytes())
    encoded = msgspec.json.encode(msgspec.structs.replace(manifest, parameters=pinned))
    (copy / "manifest.json").write_bytes(encoded)
    parameters = teacher_parameters(earlier, encoder="elsewhere", encoder_digest="a" * 64, **NOTHING_LEARNED)
    _, reference = make("teacher_checkpoint", later | {"warm_start": copy}, parameters, tmp_path / "teacher")
    assert reference.metrics["warm_start"]
    with pytest.raises(InputError, match="retrain fully"):
        make(
            "teacher_checkpoint",
            later | {"warm_start": copy},
            parameters | {"encoder_digest": "b" * 64},
            tmp_path / "other",
        )


def test_one_of_the_two_inputs_alone_is_refused(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    parameters = teacher_parameters(earlier)
    with pytest.raises(InputError, match="lacks the input warm_start"):
        make("teacher_checkpoint", later, parameters, tmp_path / "teacher")
    alone = {name: path for name, path in later.items() if name != "taxonomy_change"}
    with pytest.raises(InputError, match="lacks the input taxonomy_change"):
        make(
            "teacher_checkpoint",
            alone | {"warm_start": earlier["teacher_checkpoint"]},
            parameters,
            tmp_path / "teacher",
        )


def test_a_student_is_no_start_for_a_teacher_and_keeps_its_layers(
    earlier: dict[str, Path], later: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a student_checkpoint, expected a teacher_checkpoint"):
        make(
            "teacher_checkpoint",
            later | {"warm_start": earlier["student_checkpoint"]},
            teacher_parameters(earlier),
            tmp_path / "teacher",
        )
    inputs = earlier | {
        "warm_start": earlier["student_checkpoint"],
        "taxonomy_change": later["taxonomy_change"],
    }
    del inputs["student_checkpoint"]
    with pytest.raises(InputError, match="now 3 layers instead of 2; retrain fully"):
        make("student_checkpoint", inputs, TINY_STUDENT | {"layers": 3}, tmp_path / "student")
    with pytest.raises(InputError, match="now pooling mean instead of query; retrain fully"):
        make("student_checkpoint", inputs, TINY_STUDENT | {"pooling": "mean"}, tmp_path / "student")
