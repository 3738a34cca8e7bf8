"""From a trained student to the form that serves: files that the runtime of a target executes.

For ``cpu`` that is the graph of whichever backend does best here (:mod:`ml.serving.backends`), for
``neuron`` and ``torchscript`` one traced module per bucket of lengths (:mod:`ml.serving.tracing`). Before it
stands the fast model, and what decides between the two (:mod:`ml.serving.cascade`), chosen on what the
compiled student answers.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa

from ml.artifacts import MANIFEST, read_manifest, short_version
from ml.errors import InputError
from ml.evaluation.cascade import cascade_answers, cascade_curves, cascade_figures
from ml.learning.cascade import TierOutput, choose_cascade, validation_offers
from ml.learning.encoder import Classifier
from ml.learning.training_data import read_labelled, strings
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving import neuron
from ml.serving.cascade import FAST_FOLDER, OTHER_COUNTRIES, Cascade
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
from ml.serving.fast_model import FastModel
from ml.serving.parity import compare, evaluation_sample
from ml.stages import CompileParameters
from ml.taxonomy import TAXONOMY_FILE, Taxonomy

if TYPE_CHECKING:
    from ml.serving.backends import Compiled


def compile_student(context: StageContext, parameters: CompileParameters) -> dict[str, Any]:
    """Stage ``compiled_student``: compile, choose the cascade, hold the result against the original.

    A model for ``neuron`` cannot run where it is compiled. What is compared then, and what the cascade is
    chosen on, is its reference, the same module traced for torch in full precision: padding and routing are
    shown to be right, the compiler is not. That is up to a report from a device
    (:mod:`ml.serving.device_report`), so none of the metrics that the gate reads is there.

    Returns:
        What :func:`ml.serving.parity.compare` found; :func:`ml.evaluation.cascade.cascade_figures` of the
        evaluation offers with ``cascade_`` before each name, and of the validation offers that the cascade
        was chosen on with ``validation_``; for ``neuron`` all of these with ``reference_`` before each name
        and ``device_parity`` "not measured"; for ``cpu`` the backend and all candidates
        (:attr:`ml.serving.backends.Compiled.metrics`); what was chosen (``fast_from``, ``review_below``,
        ``fast_weight``, ``own_thresholds``, ``review_certified``); sizes in bytes of both folders.

    Raises:
        InputError: the target cannot be compiled for here, or the inputs do not belong together.
    """
    target = parameters.target
    if target == NEURON:
        neuron.load_compiler(parameters.sdk)  # before anything is read: without it there is nothing to do
    elif parameters.sdk:
        raise InputError(f"sdk {parameters.sdk}: only target {NEURON} has one, not {target}; leave it empty")
    student, fast = context.input("student_checkpoint"), context.input("fast_checkpoint")
    classifier = Classifier.load(student).to("cpu").eval()
    fast_model = FastModel.load(fast)
    _check_taxonomy(context, classifier, fast_model)
    sample = evaluation_sample(context.input("evaluation_set"), parameters.parity_offers)

    context.progress.say(f"compiling {classifier.parameter_count:,} weights for {target}")
    graph = _compile_for_cpu(context, classifier, sample, parameters)
    form = graph.form if graph else None
    _write(context.output, classifier, target, context.checkpoints, context.progress, form)
    shutil.copyfile(student / TAXONOMY_FILE, context.output / TAXONOMY_FILE)
    shutil.copytree(
        fast, context.output / FAST_FOLDER, ignore=shutil.ignore_patterns(MANIFEST, TAXONOMY_FILE)
    )
    context.progress.say(f"comparing it with the original on {len(sample):,} offers")
    if target == NEURON:
        with tempfile.TemporaryDirectory(prefix="reference-") as folder:
            reference = Path(folder)
            _write(reference, classifier, TORCHSCRIPT, reference / "checkpoints", context.progress)
            compiled = CompiledModel.open(reference)
            found = compare(classifier, compiled, sample)
            chosen, figures = _add_cascade(context, parameters, fast_model, compiled, sample)
    else:
        compiled = CompiledModel.open(context.output)
        found = compare(classifier, compiled, sample)
        chosen, figures = _add_cascade(context, parameters, fast_model, compiled, sample)
    sizes = {"size_bytes": _size(context.output), "original_size_bytes": _size(student)}
    megabytes = f"{sizes['size_bytes'] / 1e6:.1f} MB instead of {sizes['original_size_bytes'] / 1e6:.1f}"
    measured = found | figures
    if target == NEURON:
        context.progress.say(
            f"in full precision it gives the same category on {found['same_category']:.1%}; what an "
            f"{neuron.DEVICE_FAMILY} host computes is not known here: run python -m ml device-report there, "
            f"{megabytes}"
        )
        of_reference = {neuron.REFERENCE + name: measured[name] for name in measured}
        return {"device_parity": "not measured", **of_reference, **chosen, **sizes}
    context.progress.say(
        f"same category on {found['same_category']:.1%}, {found['offers_per_second']:,.0f} offers/s "
        f"and core instead of {found['original_offers_per_second']:,.0f}, {megabytes}"
    )
    return measured | chosen | sizes | (graph.metrics if graph else {})


def _add_cascade(
    context: StageContext,
    parameters: CompileParameters,
    fast: FastModel,
    student: CompiledModel,
    sample: pa.Table,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose the cascade, write and measure it.

    Returns:
        What was chosen, and what was measured.
    """
    offers = validation_offers(context.input("training_sample"))
    context.progress.say(f"choosing thresholds on {len(offers.texts):,} validation offers")
    outputs = [
        TierOutput(labels=model.labels, probabilities=model.predict_probabilities(offers.texts))
        for model in (fast, student)
    ]
    settings = choose_cascade(
        offers,
        *outputs,
        max_loss=parameters.max_loss,
        min_precision=parameters.min_precision,
        country_offers=parameters.country_offers,
    )
    settings.write(context.output)
    taxonomy = Taxonomy.load(context.output / TAXONOMY_FILE)
    cascade = Cascade(settings, fast.labels, student.labels, taxonomy)
    fast_from = settings.fast_from(OTHER_COUNTRIES)
    figures: dict[str, Any] = {}
    if offers.texts:
        of_fast, of_student = (output.probabilities for output in outputs)
        validated = cascade_answers(
            cascade, fast.labels, of_fast, of_student, offers.category_ids, offers.countries
        )
        of_validation = cascade_figures(validated, taxonomy, settings)
        figures |= {f"validation_{name}": value for name, value in of_validation.items()}

    texts = [str(text) for text in sample["text"].to_pylist()]
    answers = cascade_answers(
        cascade,
        fast.labels,
        fast.predict_probabilities(texts),
        student.predict_probabilities(texts),
        strings(sample["category_id"]),
        [country or OTHER_COUNTRIES for country in sample["country"].to_pylist()],
    )
    measured = cascade_figures(answers, taxonomy, settings)
    certified = "nothing could be certified" if math.isinf(fast_from) else f"from {fast_from:.3f} on"
    context.progress.say(
        f"the fast model answers {measured['share_fast']:.1%} of the evaluation offers ({certified}), "
        f"which costs {measured['loss']:+.2%} accuracy; {measured['share_review']:.1%} are for review"
    )
    chosen = {
        "fast_from": None if math.isinf(fast_from) else fast_from,
        "own_thresholds": len(settings.thresholds) - 1,
        "review_below": settings.review.confidence,
        "review_certified": settings.review.certified,
        "fast_weight": settings.fast_weight,
    }
    measured["curves"] = msgspec.to_builtins(cascade_curves(answers))
    return chosen, figures | {f"cascade_{name}": value for name, value in measured.items()}


def _compile_for_cpu(
    context: StageContext, classifier: Classifier, sample: pa.Table, parameters: CompileParameters
) -> Compiled | None:
    """The graph of the best backend; None: the target is another."""
    if parameters.target != CPU:
        return None
    from ml.serving.backends import compile_for_cpu

    return compile_for_cpu(
        classifier,
        sample,
        context.output,
        calibration=read_labelled(context.input("training_sample"), "train").texts,
        backend=parameters.backend,
        progress=context.progress,
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


def _check_taxonomy(context: StageContext, classifier: Classifier, fast_model: FastModel) -> None:
    given = short_version(read_manifest(context.input("catalog_taxonomy")).digest)
    for name, version in (
        ("student_checkpoint", classifier.taxonomy_version),
        ("fast_checkpoint", fast_model.settings.taxonomy_version),
    ):
        if given != version:
            raise InputError(
                f"{context.input(name)} was trained on taxonomy {version}, catalog_taxonomy is {given}; "
                "train it on this one, or give the one it was trained on"
            )


def _size(folder: Path) -> int:
    """Bytes of the files of an artifact, its manifest aside."""
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
