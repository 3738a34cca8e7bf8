"""What a user would pick instead, each in its recommended form.

Every peer learns from all training rows (this project's models keep a tenth of them to validate on), reads
either the title or the whole text that this project's models read, and is written in a form that loads
without pickle. Libraries are imported where they are used: one that is missing is a row with its reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.our_models import Answerer
from benchmarks.processes import NotHereError, Offers, in_processes
from ml.cores import available_cores
from ml.learning.encoder_files import PACKAGED_ENCODER, encoder_folder
from ml.offers import offer_text

Texts = list[str]


@dataclass(frozen=True)
class Lesson:
    """What a peer learns from; lists in the order of the rows."""

    titles: Texts
    texts: Texts
    """``ml.offers.offer_text`` of the offers: all fields."""
    categories: list[str]
    parts: dict[str, Path]
    """Folders of the peers that this one is made of."""
    quick: bool
    """Learn as little as it takes to run."""


@dataclass(frozen=True)
class Peer:
    """One row of the tables."""

    name: str
    title: str
    train: Callable[[Lesson, Path], None]
    """Learn, and write a model into an empty folder."""
    open: Callable[[Path, int], AbstractContextManager[Answerer]]
    """The model in a folder, with that many cores, used in the way that is best for it."""
    seconds: Callable[[int, int], float]
    """About how long training takes on two cores, for that many rows and categories."""
    version: str = "1"
    """Raised whenever the meaning of what it writes changes."""
    parts: tuple[str, ...] = ()
    own_packages: bool = False
    """Needs versions of packages that this project cannot have: those of ``--onnx-packages``."""


# Linear support vector machines


def _train_linear(texts: Texts, categories: list[str], folder: Path, max_iterations: int) -> None:
    from scipy import sparse
    from sklearn.svm import LinearSVC

    vectorisers = _vectorisers()
    features = sparse.hstack([vectoriser.fit_transform(texts) for vectoriser in vectorisers], format="csr")
    machine = LinearSVC(max_iter=max_iterations).fit(features, categories)
    words, characters = vectorisers
    vocabulary = [list(words.get_feature_names_out()), list(characters.get_feature_names_out())]
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    for name, idf in zip(("words", "characters"), (words.idf_, characters.idf_), strict=True):
        np.save(folder / f"idf_{name}.npy", idf)
    _write_head(folder, machine)


class _Linear:
    """TF-IDF and a linear support vector machine, read from a folder."""

    def __init__(self, folder: Path, read: Callable[[Offers], Texts]) -> None:
        vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self._vectorisers = _vectorisers(vocabulary)
        for vectoriser, name in zip(self._vectorisers, ("words", "characters"), strict=True):
            vectoriser.idf_ = np.load(folder / f"idf_{name}.npy")
        self._head = _Head(folder)
        self._read = read

    def margins(self, offers: Offers) -> NDArray[np.float64]:
        from scipy import sparse

        texts = self._read(offers)
        features = sparse.hstack([each.transform(texts) for each in self._vectorisers], format="csr")
        return self._head.margins(features)

    def answer(self, offers: Offers) -> list[str]:
        return self._head.categories(self.margins(offers))


class _Averaged:
    """Several linear models whose margins are averaged."""

    def __init__(self, models: Sequence[_Linear]) -> None:
        self._models = models

    def answer(self, offers: Offers) -> list[str]:
        return self._models[0]._head.categories(sum(model.margins(offers) for model in self._models))


def _vectorisers(vocabulary: Sequence[list[str] | None] = (None, None)) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return (
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=vocabulary[0]),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, vocabulary=vocabulary[1]),
    )


def _linear_title(lesson: Lesson, folder: Path) -> None:
    _train_linear(lesson.titles, lesson.categories, folder, 20 if lesson.quick else 1_000)


def _linear_fields(lesson: Lesson, folder: Path) -> None:
    _train_linear(lesson.texts, lesson.categories, folder, 20 if lesson.quick else 1_000)


def _linear_averaged(lesson: Lesson, folder: Path) -> None:
    for name, part in lesson.parts.items():
        shutil.copytree(part, folder / name, copy_function=os.link)


def load_linear_title(folder: Path) -> _Linear:
    """On titles."""
    return _Linear(folder, titles_of)


def load_linear_fields(folder: Path) -> _Linear:
    """On all fields."""
    return _Linear(folder, texts_of)


def load_linear_averaged(folder: Path) -> _Averaged:
    """Both."""
    return _Averaged(
        [load_linear_title(folder / "linear_title"), load_linear_fields(folder / "linear_fields")]
    )


# fastText

_LABEL = "__label__"
_PUNCTUATION = re.compile(r"([.\!?,'/()|:;+&\-])")


def _fasttext(lesson: Lesson, folder: Path) -> None:
    fasttext = _imported("fasttext")
    path = folder / "rows.txt"
    labels = sorted(set(lesson.categories))
    number = {label: place for place, label in enumerate(labels)}
    rows = zip(lesson.texts, lesson.categories, strict=True)
    path.write_text(
        "\n".join(f"{_LABEL}{number[category]} {_spaced(text)}" for text, category in rows), encoding="utf-8"
    )
    model = fasttext.train_supervised(
        str(path),
        epoch=2 if lesson.quick else 50,
        lr=1.0,
        wordNgrams=2,
        minn=3,
        maxn=5,
        dim=100,
        bucket=20_000 if lesson.quick else 500_000,
        thread=available_cores(),
        verbose=0,
    )
    path.unlink()
    model.save_model(str(folder / "model.bin"))
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")


class _FastText:
    """Of one process: its predict uses one thread."""

    def __init__(self, folder: Path) -> None:
        self._model = _imported("fasttext").load_model(str(folder / "model.bin"))
        self._labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))

    def answer(self, offers: Offers) -> list[str]:
        found, _ = self._model.predict([_spaced(text) for text in texts_of(offers)])
        return [self._labels[int(labels[0].removeprefix(_LABEL))] if labels else "" for labels in found]


def load_fasttext(folder: Path) -> _FastText:
    """On all fields."""
    return _FastText(folder)


def _spaced(text: str) -> str:
    """As its tutorial says: lower case, punctuation apart."""
    return _PUNCTUATION.sub(r" \1 ", text.lower())


# Embeddings and logistic regression

_INVERSE_REGULARISATION = 100.0
"""C of the logistic regression on embeddings of length one; its default of 1 is far too strong for them."""


def _train_head(embeddings: NDArray[np.float32], categories: list[str], folder: Path, quick: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    steps = 10 if quick else 300
    _write_head(
        folder, LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=steps).fit(embeddings, categories)
    )


class _Embedded:
    """Embeddings under a linear layer."""

    def __init__(self, folder: Path, encode: Callable[[Texts], NDArray[np.float32]]) -> None:
        self._head, self._encode = _Head(folder), encode

    def answer(self, offers: Offers) -> list[str]:
        return self._head.categories(self._head.margins(self._encode(texts_of(offers))))


def _sentence_transformers(lesson: Lesson, folder: Path) -> None:
    model = _sentence_encoder()
    _train_head(model.encode(lesson.texts), lesson.categories, folder, lesson.quick)
    model.save(str(folder / "encoder"))


@contextmanager
def _open_sentence_transformers(folder: Path, cores: int) -> Iterator[Answerer]:
    import torch

    torch.set_num_threads(cores)
    transformers = _imported("sentence_transformers")
    model = transformers.SentenceTransformer(str(folder / "encoder"), device="cpu")
    yield _Embedded(folder, model.encode)


_SETFIT_ROWS_PER_CATEGORY = 8
_SETFIT_STEPS = 300


def _setfit(lesson: Lesson, folder: Path) -> None:
    """Contrastive on a few offers of each category, as the method asks; then the head on all offers."""
    setfit = _imported("setfit")
    datasets = _imported("datasets")
    chosen: list[int] = []
    seen: dict[str, int] = {}
    for row in np.random.default_rng(0).permutation(len(lesson.texts)).tolist():
        category = lesson.categories[row]
        seen[category] = seen.get(category, 0) + 1
        if seen[category] <= _SETFIT_ROWS_PER_CATEGORY:
            chosen.append(row)
    with encoder_folder(PACKAGED_ENCODER) as encoder:
        model = setfit.SetFitModel.from_pretrained(str(encoder), device="cpu")
    few = datasets.Dataset.from_dict(
        {
            "text": [lesson.texts[row] for row in chosen],
            "label": [lesson.categories[row] for row in chosen],
        }
    )
    arguments = setfit.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        batch_size=16,
        num_epochs=1,
        max_steps=2 if lesson.quick else _SETFIT_STEPS,
        save_strategy="no",
        report_to="none",
        show_progress_bar=False,
    )
    trainer = setfit.Trainer(model=model, args=arguments, train_dataset=few)
    trainer.train_embeddings(*trainer.dataset_to_parameters(few), args=arguments)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    _train_head(model.model_body.encode(lesson.texts), lesson.categories, folder, lesson.quick)
    model.model_body.save(str(folder / "encoder"))


_ONNX_FILES = {True: "avx512_vnni", False: "avx2"}
"""What is quantised for, by whether the processor has AVX-512 VNNI."""


def _onnx(lesson: Lesson, folder: Path) -> None:
    transformers = _imported("sentence_transformers")
    _imported(
        "optimum.onnxruntime", "needs optimum-onnx, which wants transformers below 4.58: --onnx-packages"
    )
    with encoder_folder(PACKAGED_ENCODER) as encoder:
        model = transformers.SentenceTransformer(
            str(encoder), backend="onnx", model_kwargs={"export": True}, device="cpu"
        )
        model.save_pretrained(str(folder / "encoder"))
        target = _ONNX_FILES["avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")]
        transformers.export_dynamic_quantized_onnx_model(model, target, str(folder / "encoder"))
    (folder / "encoder" / "onnx" / "model.onnx").unlink()
    with _open_onnx_encoder(folder) as quantised:
        _train_head(quantised.encode(lesson.texts), lesson.categories, folder, lesson.quick)


@contextmanager
def _open_onnx_encoder(folder: Path) -> Iterator[Any]:
    file = next((folder / "encoder" / "onnx").glob("*.onnx")).name
    yield _imported("sentence_transformers").SentenceTransformer(
        str(folder / "encoder"),
        backend="onnx",
        model_kwargs={"file_name": f"onnx/{file}", "provider": "CPUExecutionProvider"},
        device="cpu",
    )


def load_onnx(folder: Path) -> Answerer:
    """On all fields."""
    with _open_onnx_encoder(folder) as model:
        return _Embedded(folder, model.encode)


def _model2vec(lesson: Lesson, folder: Path) -> None:
    distill = _imported("model2vec.distill")
    with encoder_folder(PACKAGED_ENCODER) as encoder:
        distill.distill(model_name=str(encoder), pca_dims=256, device="cpu").save_pretrained(
            str(folder / "encoder")
        )
    # What is read back embeds otherwise than what was written, so the head learns from the former.
    _train_head(_static_model(folder).encode(lesson.texts), lesson.categories, folder, lesson.quick)


def load_model2vec(folder: Path) -> Answerer:
    """On all fields."""
    return _Embedded(folder, _static_model(folder).encode)


def _static_model(folder: Path) -> Any:
    return _imported("model2vec").StaticModel.from_pretrained(str(folder / "encoder"))


def _sentence_encoder() -> Any:
    transformers = _imported("sentence_transformers")
    with encoder_folder(PACKAGED_ENCODER) as encoder:
        return transformers.SentenceTransformer(str(encoder), device="cpu")


# A fine-tuned sequence classifier

_TITLE_TOKENS = 48
_FINE_TUNING_RATE = 5e-4
"""So small an encoder wants more than BERT's usual rates: GPC by shop ends at 0.62 with 1e-4."""


def _fine_tuned(lesson: Lesson, folder: Path) -> None:
    import transformers
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    labels = sorted(set(lesson.categories))
    number = {label: place for place, label in enumerate(labels)}
    with encoder_folder(PACKAGED_ENCODER) as encoder:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=number
        )
    encoded = tokenizer(lesson.titles, truncation=True, max_length=_TITLE_TOKENS)
    rows = [
        {**{name: values[row] for name, values in encoded.items()}, "label": number[category]}
        for row, category in enumerate(lesson.categories)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=5,
        max_steps=2 if lesson.quick else -1,
        per_device_train_batch_size=32,
        learning_rate=_FINE_TUNING_RATE,
        warmup_steps=0.1,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Pipeline:
    """``transformers.pipeline`` on titles."""

    def __init__(self, folder: Path) -> None:
        from transformers import pipeline

        self._pipeline = pipeline("text-classification", model=str(folder), device="cpu", batch_size=32)

    def answer(self, offers: Offers) -> list[str]:
        answers = self._pipeline(titles_of(offers), truncation=True, max_length=_TITLE_TOKENS)
        return [answer["label"] for answer in answers]


@contextmanager
def _open_pipeline(folder: Path, cores: int) -> Iterator[Answerer]:
    import torch

    torch.set_num_threads(cores)
    yield _Pipeline(folder)


# What several have in common


class _Head:
    """A linear layer of scikit-learn, read from the files of :func:`_write_head`."""

    def __init__(self, folder: Path) -> None:
        self._coefficients = np.load(folder / "coefficients.npy")
        self._intercepts = np.load(folder / "intercepts.npy")
        self._classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))

    def margins(self, features: Any) -> NDArray[np.float64]:
        """(offers, classes) of (offers, features)."""
        return np.asarray(features @ self._coefficients.T + self._intercepts)

    def categories(self, margins: NDArray[np.float64]) -> list[str]:
        """The class of the largest margin in each row."""
        if margins.shape[1] == 1:  # scikit-learn has one margin for two classes
            return [self._classes[int(margin > 0)] for margin in margins[:, 0]]
        return [self._classes[place] for place in margins.argmax(axis=1).tolist()]


def _write_head(folder: Path, model: Any) -> None:
    np.save(folder / "coefficients.npy", model.coef_)
    np.save(folder / "intercepts.npy", model.intercept_)
    (folder / "classes.json").write_text(json.dumps([str(name) for name in model.classes_]), encoding="utf-8")


def titles_of(offers: Offers) -> Texts:
    """The title as the whole text has it."""
    return [offer_text({"title": offer["title"]}) for offer in offers]


def texts_of(offers: Offers) -> Texts:
    """All fields."""
    return [offer_text(offer) for offer in offers]


def _imported(name: str, otherwise: str = "") -> Any:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotHereError(otherwise or f"package {package} is not installed (extra benchmarks)")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHereError(otherwise or f"{name}: {error}") from error


def _in_processes(load: Callable[[Path], Any]) -> Callable[[Path, int], AbstractContextManager[Answerer]]:
    """For models that use one thread: on all cores, a process on each."""

    def open_model(folder: Path, cores: int) -> AbstractContextManager[Answerer]:
        return in_processes(load, folder, cores)

    return open_model


PEERS = (
    Peer(
        "linear_title",
        "TF-IDF + LinearSVC, title",
        _linear_title,
        _in_processes(load_linear_title),
        lambda rows, categories: rows * categories * 3e-5,
    ),
    Peer(
        "linear_fields",
        "TF-IDF + LinearSVC, all fields",
        _linear_fields,
        _in_processes(load_linear_fields),
        lambda rows, categories: rows * categories * 1e-4,
    ),
    Peer(
        "linear_averaged",
        "the two LinearSVC averaged",
        _linear_averaged,
        _in_processes(load_linear_averaged),
        lambda rows, categories: 1,
        parts=("linear_title", "linear_fields"),
    ),
    Peer(
        "fasttext",
        "fastText, all fields",
        _fasttext,
        _in_processes(load_fasttext),
        lambda rows, categories: rows * 0.01,
    ),
    Peer(
        "model2vec",
        "model2vec (distilled here) + logistic regression",
        _model2vec,
        _in_processes(load_model2vec),
        lambda rows, categories: 80 + rows * categories * 5e-6,
        version="2",
    ),
    Peer(
        "sentence_transformers",
        "sentence-transformers + logistic regression",
        _sentence_transformers,
        _open_sentence_transformers,
        lambda rows, categories: rows / 120 + rows * categories * 1e-5,
    ),
    Peer(
        "onnx",
        "sentence-transformers ONNX int8 + logistic regression",
        _onnx,
        _in_processes(load_onnx),
        lambda rows, categories: 30 + rows / 200 + rows * categories * 1e-5,
        own_packages=True,
    ),
    Peer(
        "setfit",
        "SetFit, 8 offers of each category",
        _setfit,
        _open_sentence_transformers,
        lambda rows, categories: _SETFIT_STEPS * 2.0 + rows / 120 + rows * categories * 1e-5,
    ),
    Peer(
        "pipeline",
        "transformers pipeline fp32, fine-tuned on titles",
        _fine_tuned,
        _open_pipeline,
        lambda rows, categories: rows * 5 / 60,
        version="2",
    ),
)
