"""From a trained student to the form that serves: one file that a runtime without torch executes.

For the target ``cpu`` that is an int8 ONNX graph for ONNX Runtime, weights quantised per output
channel beforehand, activations per text as it runs. The graph takes one text (see
:mod:`ml.serving.predictor` for why), so its mask is all ones and there is nothing to pad.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.evaluation.metrics import scores
from ml.learning.encoder import Classifier
from ml.runner import StageContext
from ml.serving.predictor import (
    INPUT_NAME,
    LABELS_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    SETTINGS_FILE,
    TAXONOMY_FILE,
    TOKENIZER_FILE,
    CompiledModel,
    ModelSettings,
)
from ml.stages import CompileParameters

_NEURON_RELEASE = "2.9."
"""Release line of torch-neuronx that still has ``trace`` and compiles for inf2."""

Probabilities = NDArray[np.float32]


def compile_student(context: StageContext, parameters: CompileParameters) -> dict[str, Any]:
    """Stage ``compiled_student``: compile, then hold the result against the original.

    Returns:
        ``same_category``: share of offers that both models give the same category;
        ``weighted_f1_compiled`` and ``weighted_f1_original`` on the same offers of the evaluation
        set; mean and largest difference of the probability that the original's choice has;
        ``offers_per_second`` and ``original_offers_per_second`` per CPU-second of one thread, from
        text to probabilities; sizes in bytes of both folders.

    Raises:
        InputError: the target cannot be compiled for here, or the inputs do not belong together.
    """
    if parameters.target == "neuron":
        raise InputError(_neuron_needs())
    student = context.input("student_checkpoint")
    classifier = Classifier.load(student).to("cpu").eval()
    _check_taxonomy(context, classifier)
    sample = _evaluation_sample(context.input("evaluation_set"), parameters.parity_offers)

    context.progress.say(f"exporting {classifier.parameter_count:,} weights to ONNX")
    export_int8(classifier, context.output / MODEL_FILE)
    (context.output / TOKENIZER_FILE).write_text(classifier.tokenizer.to_str(), encoding="utf-8")
    (context.output / LABELS_FILE).write_bytes(msgspec.json.encode(list(classifier.labels)))
    (context.output / SETTINGS_FILE).write_bytes(
        msgspec.json.format(msgspec.json.encode(_settings_of(classifier, parameters.target)), indent=2)
    )
    shutil.copyfile(student / TAXONOMY_FILE, context.output / TAXONOMY_FILE)

    context.progress.say(f"comparing it with the original on {len(sample):,} offers")
    metrics = _compare(classifier, CompiledModel(context.output), sample)
    metrics |= {"size_bytes": _size(context.output), "original_size_bytes": _size(student)}
    context.progress.say(
        f"same category on {metrics['same_category']:.1%}, {metrics['offers_per_second']:,.0f} offers/s "
        f"and core instead of {metrics['original_offers_per_second']:,.0f}, "
        f"{metrics['size_bytes'] / 1e6:.1f} MB instead of {metrics['original_size_bytes'] / 1e6:.1f}"
    )
    return metrics


class _OneText(nn.Module):
    """The classifier on a single text: ids (1, length) in, logits (1, classes) out."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._classifier(input_ids, torch.ones_like(input_ids))


def export_int8(classifier: Classifier, path: Path) -> None:
    """Write the classifier as an int8 ONNX graph: token ids (1, length) in, logits (1, classes) out.

    Weights keep all 8 bits: products add up exactly on CPUs with VNNI instructions (Intel since
    2019, AMD since 2022), older ones may saturate now and then.

    Args:
        classifier: On the CPU, in evaluation mode.
        path: The file to write; nothing is written beside it.
    """
    ids = torch.full((1, 8), classifier.pad_id, dtype=torch.int64)
    length = torch.export.Dim("length", min=2, max=classifier.settings.max_tokens)
    with _quiet(), tempfile.TemporaryDirectory(prefix="export-") as folder:
        program = torch.onnx.export(
            _OneText(classifier),
            (ids,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"input_ids": {1: length}},
            dynamo=True,
            verbose=False,
        )
        raw = program.model_proto
        _strip(raw)
        onnx.save(raw, Path(folder) / MODEL_FILE)
        # The raw export: ONNX Runtime's transformer optimiser finds nothing to fuse in it, and what
        # it writes cannot be quantised.
        quantize_dynamic(Path(folder) / MODEL_FILE, path, per_channel=True, weight_type=QuantType.QInt8)


def _strip(model: onnx.ModelProto) -> None:
    """Drop shapes, which quantisation would contradict, and stack traces, which name this machine."""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""


def _settings_of(classifier: Classifier, target: str) -> ModelSettings:
    settings = classifier.settings
    return ModelSettings(
        target=target,
        text_version=settings.text_version,
        taxonomy_version=settings.taxonomy_version,
        max_tokens=settings.max_tokens,
        instruction=settings.instruction,
        temperature=settings.temperature,
    )


def _check_taxonomy(context: StageContext, classifier: Classifier) -> None:
    given = short_version(read_manifest(context.input("catalog_taxonomy")).digest)
    if given != classifier.taxonomy_version:
        raise InputError(
            f"{context.input('student_checkpoint')} was trained on taxonomy {classifier.taxonomy_version}, "
            f"catalog_taxonomy is {given}; train the student on this one, or give the one it was trained on"
        )


def _evaluation_sample(folder: Path, offers: int) -> pa.Table:
    """At most ``offers`` rows (text, category_id), evenly spread over the evaluation set."""
    table = pq.read_table(folder / "offers.parquet", columns=["text", "category_id"])
    if table.num_rows == 0:
        raise InputError(f"{folder / 'offers.parquet'} has no offers; the compiled model is compared on them")
    rows = np.linspace(0, table.num_rows - 1, min(offers, table.num_rows)).round().astype(np.int64)
    return table.take(rows)


def _compare(classifier: Classifier, compiled: CompiledModel, sample: pa.Table) -> dict[str, Any]:
    texts = [str(text) for text in sample["text"].to_pylist()]
    truth = np.array(sample["category_id"].to_pylist(), dtype=str)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        original, original_rate = _timed(classifier.predict_probabilities, texts)
    finally:
        torch.set_num_threads(threads)
    probabilities, rate = _timed(compiled.predict_probabilities, texts)

    labels = np.array(classifier.labels, dtype=str)
    before, after = original.argmax(axis=1), probabilities.argmax(axis=1)
    rows = np.arange(len(texts))
    difference = np.abs(probabilities[rows, before] - original[rows, before])
    return {
        "offers": len(texts),
        "same_category": float(np.mean(before == after)),
        "weighted_f1_compiled": scores(truth, labels[after]).weighted_f1,
        "weighted_f1_original": scores(truth, labels[before]).weighted_f1,
        "mean_probability_difference": float(difference.mean()),
        "max_probability_difference": float(difference.max()),
        "offers_per_second": round(rate, 1),
        "original_offers_per_second": round(original_rate, 1),
    }


def _timed(
    predict: Callable[[Sequence[str]], Probabilities], texts: Sequence[str]
) -> tuple[Probabilities, float]:
    """Probabilities, and texts per second of this process's CPU time, which other load leaves alone."""
    predict(texts[:1])
    started_at = time.process_time()
    probabilities = predict(texts)
    return probabilities, len(texts) / max(time.process_time() - started_at, 1e-9)


def _size(folder: Path) -> int:
    """Bytes of the files of an artifact, its manifest aside."""
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.name != "manifest.json" and path.is_file()
    )


def _neuron_needs() -> str:
    """What compiling for AWS Inferentia 2 takes, and what of it this machine has."""
    return (
        f"target neuron needs the AWS Neuron SDK, torch_neuronx {_NEURON_RELEASE}x with neuronx-cc, as in "
        "the image pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.31.1-ubuntu24.04 (the packages of "
        f"these names on the public index are empty placeholders); here {_neuron_found()}. Use target cpu"
    )


def _neuron_found() -> str:
    """Importable and able to trace, or not: the placeholder installs, and can even be found."""
    if importlib.util.find_spec("torch_neuronx") is None:
        return "torch_neuronx is not installed"
    try:
        version = importlib.metadata.version("torch-neuronx")
        module = importlib.import_module("torch_neuronx")
    except Exception as error:  # an SDK that does not fit the machine fails in ways of its own
        return f"torch_neuronx cannot be imported ({' '.join(str(error).split())[:200]})"
    if not hasattr(module, "trace") or not version.startswith(_NEURON_RELEASE):
        return f"torch_neuronx {version} cannot trace (a placeholder or another release)"
    return f"torch_neuronx {version} is there, but this version of the project compiles for cpu only"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that nothing here uses."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
