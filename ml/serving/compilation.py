"""From a trained student to the form that serves: files that the runtime of a target executes.

For ``cpu`` that is the graph of whichever backend does best here (:mod:`ml.serving.backends`), for
``neuron`` and ``torchscript`` one traced module per bucket of lengths (:mod:`ml.serving.tracing`).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving import neuron
from ml.serving.compiled_model import (
    CPU,
    LABELS_FILE,
    NEURON,
    TOKENIZER_FILE,
    TORCHSCRIPT,
    CompiledModel,
    CpuForm,
    ModelSettings,
    TracedForm,
)
from ml.serving.parity import compare, evaluation_sample
from ml.stages import CompileParameters
from ml.taxonomy import TAXONOMY_FILE

if TYPE_CHECKING:
    from ml.serving.backends import Compiled

REFERENCE = "reference_"
"""Before the metrics of a model that cannot run where it was compiled: they are its reference's."""


def compile_student(context: StageContext, parameters: CompileParameters) -> dict[str, Any]:
    """Stage ``compiled_student``: compile, then hold the result against the original.

    A model for ``neuron`` cannot run where it is compiled. What is compared then is its reference, the
    same module traced for torch in full precision: padding and routing are shown to be right, the
    compiler is not. That is up to a report from a device (:mod:`ml.serving.device_report`), so none of the
    metrics that the gate reads is there.

    Returns:
        What :func:`ml.serving.parity.compare` found; for ``cpu`` the backend and all candidates
        (:attr:`ml.serving.backends.Compiled.metrics`); for ``neuron`` with ``reference_`` before each name
        and ``device_parity`` "not measured"; sizes in bytes of both folders.

    Raises:
        InputError: the target cannot be compiled for here, or the inputs do not belong together.
    """
    target = parameters.target
    if target == NEURON:
        neuron.load_compiler(parameters.sdk)  # before anything is read: without it there is nothing to do
    elif parameters.sdk:
        raise InputError(f"sdk {parameters.sdk}: only target {NEURON} has one, not {target}; leave it empty")
    student = context.input("student_checkpoint")
    classifier = Classifier.load(student).to("cpu").eval()
    _check_taxonomy(context, classifier)
    sample = evaluation_sample(context.input("evaluation_set"), parameters.parity_offers)

    context.progress.say(f"compiling {classifier.parameter_count:,} weights for {target}")
    compiled = _compile_for_cpu(context, classifier, sample, parameters)
    form = compiled.form if compiled else None
    _write(context.output, classifier, target, context.checkpoints, context.progress, form)
    shutil.copyfile(student / TAXONOMY_FILE, context.output / TAXONOMY_FILE)
    sizes = {"size_bytes": _size(context.output), "original_size_bytes": _size(student)}
    megabytes = f"{sizes['size_bytes'] / 1e6:.1f} MB instead of {sizes['original_size_bytes'] / 1e6:.1f}"

    context.progress.say(f"comparing it with the original on {len(sample):,} offers")
    if target == NEURON:
        with tempfile.TemporaryDirectory(prefix="reference-") as folder:
            reference = Path(folder)
            _write(reference, classifier, TORCHSCRIPT, reference / "checkpoints", context.progress)
            found = compare(classifier, CompiledModel.open(reference), sample)
        context.progress.say(
            f"in full precision it gives the same category on {found['same_category']:.1%}; what an "
            f"{neuron.DEVICE_FAMILY} host computes is not known here: run python -m ml device-report there, "
            f"{megabytes}"
        )
        return {"device_parity": "not measured", **{REFERENCE + name: found[name] for name in found}, **sizes}
    found = compare(classifier, CompiledModel.open(context.output), sample)
    context.progress.say(
        f"same category on {found['same_category']:.1%}, {found['offers_per_second']:,.0f} offers/s "
        f"and core instead of {found['original_offers_per_second']:,.0f}, {megabytes}"
    )
    return found | sizes | (compiled.metrics if compiled else {})


def _compile_for_cpu(
    context: StageContext, classifier: Classifier, sample: pa.Table, parameters: CompileParameters
) -> Compiled | None:
    """The graph of the best backend; None: the target is another."""
    if parameters.target != CPU:
        return None
    from ml.serving.backends import compile_for_cpu

    return compile_for_cpu(
        classifier, sample, context.output, backend=parameters.backend, progress=context.progress
    )


def _write(
    folder: Path,
    classifier: Classifier,
    target: str,
    checkpoints: Path,
    progress: Progress,
    cpu: CpuForm | None = None,
) -> None:
    """Compile into ``folder`` all that a model of this target has but its taxonomy, and a CPU's graph."""
    traced = _compile(folder, classifier, target, checkpoints, progress)
    (folder / TOKENIZER_FILE).write_text(classifier.tokenizer.to_str(), encoding="utf-8")
    (folder / LABELS_FILE).write_bytes(msgspec.json.encode(list(classifier.labels)))
    settings = classifier.settings
    ModelSettings(
        target=target,
        text_version=settings.text_version,
        taxonomy_version=settings.taxonomy_version,
        max_tokens=settings.max_tokens,
        instruction=settings.instruction,
        temperature=settings.temperature,
        traced=traced,
        cpu=cpu,
    ).write(folder)


def _compile(
    folder: Path, classifier: Classifier, target: str, checkpoints: Path, progress: Progress
) -> TracedForm | None:
    if target == CPU:
        return None
    from ml.serving.tracing import trace_for_neuron, trace_for_torch, trace_student

    tracer = trace_for_neuron if target == NEURON else trace_for_torch
    return trace_student(classifier, folder, target, tracer, checkpoints, progress)


def _check_taxonomy(context: StageContext, classifier: Classifier) -> None:
    given = short_version(read_manifest(context.input("catalog_taxonomy")).digest)
    if given != classifier.taxonomy_version:
        raise InputError(
            f"{context.input('student_checkpoint')} was trained on taxonomy {classifier.taxonomy_version}, "
            f"catalog_taxonomy is {given}; train the student on this one, or give the one it was trained on"
        )


def _size(folder: Path) -> int:
    """Bytes of the files of an artifact, its manifest aside."""
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
