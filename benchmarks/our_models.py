"""This project's models in a benchmark: the stages that make them, and how each answers offers.

The stages run as the pipeline runs them. Where they change, this is what has to follow in the benchmarks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.processes import NotHereError, Offers, in_processes, shared_out
from ml.artifacts import MANIFEST, artifact_key, read_manifest, write_manifest
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, offer_text, offer_texts
from ml.progress import Progress
from ml.runner import StageSpec, code_revision, key_of, parameters_of, run_stage
from ml.sampling.label_sources import HUMAN
from ml.sampling.split import SPLIT_FILE, Split
from ml.stages import FastModelParameters, TrainingSampleParameters, stage_named

if TYPE_CHECKING:
    from benchmarks.labelled_offers import SplitBy
    from ml.serving.fast_model import FastModel

Parameters = Mapping[str, Mapping[str, Any]]
"""Changes of parameters, by stage."""

STAGES = ("teacher_checkpoint", "teacher_labels", "fast_checkpoint", "student_checkpoint", "compiled_student")
"""In the order in which each needs those before it."""

THOROUGH: Parameters = {
    "teacher_checkpoint": {"epochs": 4, "max_tokens": 96, "learning_rate": 1.5e-4},
}
"""How a benchmark trains: what the settings' defaults spare, so that a demo takes minutes, and README.md
recommends for labelled offers that matter."""

QUICK: Parameters = {
    "teacher_checkpoint": {"epochs": 1, "max_tokens": 16},
    "student_checkpoint": {"epochs": 1, "max_tokens": 16, "layers": 1},
    "compiled_student": {"parity_offers": 50},
}
"""What --quick changes: whether everything runs, not how good it is."""

_BATCH_OFFERS = 256
_TEXTS_AT_ONCE = 2_048
_TRIED_OFFERS = 64
_REQUESTS_PER_WORKER = 2
"""Under way at once: one that is computed and one that waits."""


class Answerer(Protocol):
    """A model at work."""

    def answer(self, offers: Offers) -> list[str]:
        """The category of every offer, in their order."""


@dataclass(frozen=True)
class OurModel:
    """One row of the tables."""

    name: str
    title: str
    stage: str
    """Whose artifact is loaded."""
    open: Callable[[Path, int], AbstractContextManager[Answerer]]
    """The model in a folder, with that many cores."""


def changes_of(quick: bool, given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Changes of parameters by stage: how a benchmark trains, and what its ``--set`` says.

    Args:
        quick: As :data:`QUICK` says instead of :data:`THOROUGH`.
        given: ``STAGE.PARAMETER=VALUE`` each; a value is JSON, or else text.

    Raises:
        InputError: one of these names no parameter of a stage.
    """
    changes: dict[str, dict[str, Any]] = {
        stage: dict(values) for stage, values in (QUICK if quick else THOROUGH).items()
    }
    for one in given:
        place, equals, value = one.partition("=")
        stage, dot, parameter = place.partition(".")
        if not equals or not dot or stage not in STAGES:
            raise InputError(f"--set {one}: expected STAGE.PARAMETER=VALUE, a stage of {', '.join(STAGES)}")
        try:
            changes.setdefault(stage, {})[parameter] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            changes.setdefault(stage, {})[parameter] = value
    return changes


class Workshop:
    """Stages run in a folder of its own; what is there is not made again."""

    def __init__(self, home: Path, changes: Parameters) -> None:
        self.home, self.changes = home, changes

    def taxonomy(self, path: Path) -> Path:
        """The ``catalog_taxonomy`` in a file of any format that the product reads."""
        release = {"uri": str(path.resolve()), "role": "tree"}
        return self.make("catalog_taxonomy", {}, source=path.name, files=[release])

    def training_sample(
        self,
        offers: pa.Table,
        by: SplitBy,
        validation_share: float,
        seed: int,
        unlabelled: pa.Table | None = None,
    ) -> Path:
        """All of ``offers`` as a ``training_sample``, without caps, a share of it to validate on.

        Args:
            offers: Labelled.
            by: What validation offers are drawn by.
            validation_share: Of ``offers``.
            seed: Of the draw.
            unlabelled: Further offers; their labels, if they have any, are left out.
        """

        def write(folder: Path) -> dict[str, Any]:
            from ml.sampling.validation_split import write_splits

            path = folder / "labelled.parquet"
            pq.write_table(_labelled(offers).sort_by("offer_id"), path)
            parameters = TrainingSampleParameters(
                split_by="shop" if by == "shop" else "product", validation_share=validation_share, seed=seed
            )
            counts = write_splits(path, parameters)
            others = offers.slice(0, 0) if unlabelled is None else unlabelled
            pq.write_table(_without_labels(others), folder / "unlabelled.parquet")
            return dict(counts)

        return self._keep("training_sample", write)

    def evaluation_set(self, offers: pa.Table, by: SplitBy, share: float, seed: int) -> Path:
        """The held-out ``offers`` as an ``evaluation_set``."""

        def write(folder: Path) -> dict[str, Any]:
            table = _labelled(offers).drop_columns(["label_confidence"])
            pq.write_table(table.sort_by("offer_id"), folder / "offers.parquet")
            split = Split(
                split_by="shop" if by == "shop" else "product", share=share, seed=seed, training_only=[]
            )
            (folder / SPLIT_FILE).write_bytes(msgspec.json.encode(split))
            return {"offers": offers.num_rows}

        return self._keep("evaluation_set", write)

    def train(self, inputs: Mapping[str, Path], last: str = STAGES[-1]) -> Iterator[tuple[str, Path]]:
        """Run the stages up to ``last``, yielding the name and folder of each.

        Args:
            inputs: ``catalog_taxonomy``, ``training_sample`` and ``evaluation_set``.
            last: The last stage that is wanted.
        """
        made = dict(inputs)
        for name in STAGES[: STAGES.index(last) + 1]:
            needed = {of: made[of] for of in stage_named(name).inputs}
            made[name] = self.make(name, needed)
            yield name, made[name]

    def make(self, name: str, inputs: Mapping[str, Path], **parameters: Any) -> Path:
        """Folder of the artifact that the stage makes of this, with this workshop's changes of parameters."""
        stage, parameters = stage_named(name), {**parameters, **self.changes.get(name, {})}
        digests = {of: read_manifest(folder).digest for of, folder in inputs.items()}
        key = key_of(stage, parameters_of(stage, parameters), digests)[:16]
        output = self.home / name / key
        run_stage(
            StageSpec(
                stage=name,
                inputs={of: str(folder) for of, folder in inputs.items()},
                parameters=parameters,
                output=str(output),
                workspace=str(self.home / "unfinished" / name / key),
            )
        )
        return output

    def _keep(self, kind: str, write: Callable[[Path], dict[str, Any]]) -> Path:
        """An artifact that no stage makes, named by what is in it: the same content is the same folder."""
        (self.home / kind).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home) as temporary:
            folder = Path(temporary) / kind
            folder.mkdir()
            metrics = write(folder)
            manifest = write_manifest(
                folder,
                kind=kind,
                key=artifact_key(kind, "benchmark", {}, {}),
                inputs={},
                code_version="benchmark",
                code_revision=code_revision(),
                parameters={},
                metrics=metrics,
                seconds=0.0,
            )
            place = self.home / kind / manifest.digest[:16]
            if not (place / MANIFEST).exists():
                shutil.move(folder, place)
        return place


def _labelled(offers: pa.Table) -> pa.Table:
    """``offers`` with the columns that sampling adds, and their text."""
    rows = offers.num_rows
    return (
        offers.append_column("labelled_as", offers["category_id"])
        .append_column("label_source", pa.array([HUMAN] * rows, pa.string()))
        .append_column("label_confidence", pa.array([1.0] * rows, pa.float64()))
        .append_column("text", pa.array(offer_texts(offers), pa.string()))
    )


def _without_labels(offers: pa.Table) -> pa.Table:
    """``offers`` as sampling writes those that nobody labelled."""
    place = offers.schema.get_field_index("category_id")
    empty = offers.set_column(place, CLEAN_SCHEMA.field("category_id"), pa.nulls(len(offers), pa.string()))
    return _labelled(empty).select([*CLEAN_SCHEMA.names, "text"]).sort_by("offer_id")


class _OfTexts:
    """A model that gives texts probabilities."""

    def __init__(self, model: Any, predict: Callable[[list[str]], Any] | None = None) -> None:
        self._labels, self._predict = model.labels, predict or model.predict_probabilities

    def answer(self, offers: Offers) -> list[str]:
        best: list[str] = []
        for start in range(0, len(offers), _TEXTS_AT_ONCE):  # bounds the probabilities held at a time
            texts = [offer_text(offer) for offer in offers[start : start + _TEXTS_AT_ONCE]]
            best += [self._labels[place] for place in self._predict(texts).argmax(axis=1).tolist()]
        return best


class _OfOffers:
    """Something that makes predictions of offers.

    An answer for review, which stops above the leaves, counts by the leaf that is most likely: the others
    never say "I do not know".
    """

    def __init__(self, predict: Callable[[Offers], Sequence[Any]]) -> None:
        self._predict = predict

    def answer(self, offers: Offers) -> list[str]:
        return [
            prediction.alternatives[0].category_id if prediction.needs_review else prediction.category_id
            for prediction in self._predict(offers)
        ]


@contextmanager
def _teacher(folder: Path, cores: int) -> Iterator[Answerer]:
    import torch

    from ml.learning.ensemble import Teacher

    torch.set_num_threads(cores)
    yield _OfTexts(Teacher.load(folder))


@contextmanager
def _student(folder: Path, cores: int) -> Iterator[Answerer]:
    import torch

    from ml.learning.encoder import Classifier

    torch.set_num_threads(cores)
    yield _OfTexts(Classifier.load(folder))


def _fast_model(folder: Path, cores: int) -> AbstractContextManager[Answerer]:
    return in_processes(load_fast_model, folder, cores)


def load_fast_model(folder: Path) -> Answerer:
    """The fast model, in this process."""
    from ml.serving.fast_model import FastModel

    return _OfTexts(FastModel.load(folder))


def _compiled_student(folder: Path, cores: int) -> AbstractContextManager[Answerer]:
    return in_processes(load_compiled_student, folder, cores)


def load_compiled_student(folder: Path) -> Answerer:
    """The compiled student alone, in this process."""
    from ml.serving.compiled_model import CompiledModel

    return _OfTexts(CompiledModel.open(folder))


def _served_student(folder: Path, cores: int) -> AbstractContextManager[Answerer]:
    return in_processes(load_served_student, folder, cores)


def load_served_student(folder: Path) -> Answerer:
    """Both models asked about every offer and weighed, in this process: what the cascade is held against."""
    from ml.serving.predictor import Predictor

    predictor = Predictor.load(folder)
    return _OfTexts(predictor, predictor.deep_probabilities)


@contextmanager
def _cascade(folder: Path, cores: int) -> Iterator[Answerer]:
    """What catalogues offers in production: the predictor, or a pool of them."""
    if cores == 1:
        from ml.serving.predictor import Predictor

        yield _OfOffers(Predictor.load(folder).predict)
        return
    from ml.serving.pool import PredictorPool

    with PredictorPool(folder, cores) as pool:

        def predict(offers: Offers) -> list[Any]:
            return [
                prediction
                for batch in pool.predict(shared_out(offers, cores, _BATCH_OFFERS))
                for prediction in batch
            ]

        yield _OfOffers(predict)


@contextmanager
def _endpoint(folder: Path, cores: int) -> Iterator[Answerer]:
    """A server of that many worker processes on this machine, asked over HTTP by a few clients at once."""
    import httpx

    from ml.serving.workers import single_thread_environment

    with tempfile.TemporaryDirectory() as temporary:
        state_file = Path(temporary) / "state.json"
        command = [sys.executable, "-m", "ml", "serve", "--model", str(folder), "--host", "127.0.0.1"]
        command += ["--port", "0", "--workers", str(cores), "--state-file", str(state_file)]
        process = subprocess.Popen(command, env=single_thread_environment())
        try:
            while not state_file.exists():
                if process.poll() is not None:
                    raise NotHereError(f"the server ended with status {process.returncode}")
                time.sleep(0.05)
            url = msgspec.json.decode(state_file.read_bytes())["url"]
            with (
                httpx.Client(base_url=url, timeout=60.0) as client,
                ThreadPoolExecutor(_REQUESTS_PER_WORKER * cores) as threads,
            ):

                def ask(batch: Offers) -> list[str]:
                    answer = client.post("/invocations", content=msgspec.json.encode({"offers": batch}))
                    answer.raise_for_status()
                    predictions = msgspec.json.decode(answer.content)["predictions"]
                    return [prediction["category_id"] for prediction in predictions]

                yield _Asked(lambda offers: threads.map(ask, shared_out(offers, cores, _BATCH_OFFERS)))
        finally:
            process.terminate()
            process.wait()


class _Asked:
    """Answers that come in batches."""

    def __init__(self, ask: Callable[[Offers], Iterable[list[str]]]) -> None:
        self._ask = ask

    def answer(self, offers: Offers) -> list[str]:
        return [category for batch in self._ask(offers) for category in batch]


@contextmanager
def with_categories(name: str, folder: Path, categories: int, offers: Offers) -> Iterator[Answerer]:
    """A model with a synthetic output layer of so many categories, on one core.

    Args:
        name: ``compiled`` or ``fast``.
        folder: Of the student in torch, which is compiled with the layer, or of the fast model.
        categories: Number of outputs.
        offers: Some that it will be asked about: how it computes is chosen on them.
    """
    labels = [str(number) for number in range(categories)]
    if name == "fast":
        from ml.serving.fast_model import FastModel

        yield _OfTexts(_with_outputs(FastModel.load(folder), labels))
        return
    import torch

    from ml.learning.encoder import Classifier
    from ml.serving.backends import BACKENDS, compile_for_cpu
    from ml.serving.compilation import _write
    from ml.serving.compiled_model import CPU, CompiledModel

    student = Classifier.load(folder).to("cpu").eval()
    hidden = student.head.in_features
    student = student.with_head(torch.nn.Linear(hidden, categories), labels).eval()
    with tempfile.TemporaryDirectory() as temporary:
        compiled = Path(temporary) / "compiled"
        compiled.mkdir()
        texts = [offer_text(offer) for offer in offers[:_TRIED_OFFERS]]
        sample = pa.table({"text": texts, "category_id": labels[:1] * len(texts)})
        progress = Progress("synthetic")
        form = compile_for_cpu(
            student, sample, compiled, calibration=texts, backend=BACKENDS[0].name, progress=progress
        ).form
        _write(compiled, student, CPU, Path(temporary) / "checkpoints", progress, form)
        yield _OfTexts(CompiledModel.open(compiled))


def _with_outputs(model: FastModel, labels: list[str]) -> FastModel:
    """The n-grams of a fast model under other outputs, in the form that training gives so many of them."""
    from ml.serving.fast_model import FastModel

    classes, rank = len(labels), FastModelParameters().rank
    is_projected = 0 < rank < classes
    width = rank if is_projected else classes
    readings = {
        name: msgspec.structs.replace(reading, vectors=_columns(reading.vectors, width))
        for name, reading in model.readings.items()
    }
    random = np.random.default_rng(0)
    directions = random.standard_normal((rank, classes), dtype=np.float32) if is_projected else None
    return FastModel(readings, np.resize(model.bias, classes), directions, labels, model.settings)


def _columns(vectors: NDArray[np.float16], width: int) -> NDArray[np.float16]:
    """So many columns of ``vectors``, each as often as it takes."""
    return np.ascontiguousarray(vectors[:, np.arange(width) % vectors.shape[1]])


COMPILED = "compiled_student"

MODELS = (
    OurModel("teacher", "teacher, torch fp32", "teacher_checkpoint", _teacher),
    OurModel("student", "student, torch fp32", "student_checkpoint", _student),
    OurModel("compiled", "student alone, compiled", COMPILED, _compiled_student),
    OurModel("served", "student as served", COMPILED, _served_student),
    OurModel("fast", "fast model", "fast_checkpoint", _fast_model),
    OurModel("cascade", "cascade", COMPILED, _cascade),
)

ENDPOINT = OurModel("endpoint", "endpoint over HTTP", COMPILED, _endpoint)
"""Serves whatever :data:`COMPILED` holds; the two benchmarks' tables of quality have it already."""
