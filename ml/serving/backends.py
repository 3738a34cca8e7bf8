"""The ways to compile a student for a CPU, and the choice among them by what they do on this one.

:func:`compile_for_cpu` builds every candidate, holds each against the original, and takes the fastest that
keeps the limits of the gate. Speed is CPU time, of all candidates in turns, so that other load on the machine
touches them alike. None is believed to be anything: that a candidate gives a text the same bits in every
batch is tried too, and one that does not takes one text at a time.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pyarrow as pa
from numpy.typing import NDArray

from ml.errors import InputError
from ml.evaluation.gate import GateLimits, wilson_upper
from ml.evaluation.metrics import scores
from ml.learning.encoder import Classifier
from ml.progress import Progress
from ml.serving.bucketed import torch_threads
from ml.serving.calibrated_quantisation import quantise_calibrated
from ml.serving.compiled_model import CpuForm
from ml.serving.graphs import (
    MODEL_FILE,
    ONNX_RUNTIME,
    OPENVINO,
    Graph,
    logits_of,
    open_graph,
    openvino_is_installed,
)
from ml.serving.machine import cpu_features
from ml.serving.onnx_export import export
from ml.serving.quantisation import quantise_blocks, quantise_rows, quantise_tensors, quantise_weights
from ml.stages import AUTO, AUTO_WITH_EXTRAS

_CALIBRATION_TEXTS = 512
_TIMED_TEXTS = 192
_ROUNDS = 3
"""Each candidate's best round counts: the one that other load disturbed least."""

_TIE = 1.05
"""A candidate has to be faster by this factor than one before it in the catalogue, or chance would choose."""


TokenIds = Sequence[Sequence[int]]
"""Of texts."""
Converter = Callable[[onnx.ModelProto, TokenIds], onnx.ModelProto]


@dataclass(frozen=True)
class Backend:
    """One way to compile a student for a CPU."""

    name: str
    summary: str
    convert: Converter
    """Of the graph in full precision and texts of the feed."""
    runtime: str = ONNX_RUNTIME
    is_reference: bool = False
    """In full precision: taken where no other keeps the limits."""


def _without_texts(convert: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Converter:
    return lambda model, _: convert(model)


BACKENDS = (
    Backend(
        "onnx-int8-calibrated", "int8, activations scaled as training offers had them", quantise_calibrated
    ),
    Backend("onnx-int8-rows", "int8, activations scaled per token", _without_texts(quantise_rows)),
    Backend(
        "onnx-int8-blocks",
        "int8, activations and weights scaled per 32 inputs",
        _without_texts(quantise_blocks),
    ),
    Backend("onnx-int8-tensor", "int8, activations scaled per tensor", _without_texts(quantise_tensors)),
    Backend(
        "openvino-int8",
        "int8 weights, activations quantised by OpenVINO",
        _without_texts(quantise_weights),
        OPENVINO,
    ),
    Backend("onnx-fp32", "full precision", _without_texts(lambda model: model), is_reference=True),
)
"""Of equals the first is taken. OpenVINO is an extra: who serves has to install it as well."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend does on this machine; ``problem`` says why nothing was measured."""

    backend: str
    summary: str
    offers: int = 0
    """Size of the sample."""
    same_category: float = 0.0
    """Share of the sample that it gives the original's category."""
    f1_loss: float = 0.0
    """Weighted F1 that it costs, on the sample's labels."""
    offers_per_second: float = 0.0
    """Per CPU-second of one thread, from token ids to logits, in the way that it would serve."""
    one_by_one: float = 0.0
    """The same, a text at a time."""
    batched: bool = False
    """Whether it would compute texts together: their logits had the same bits, and it was faster."""
    same_bits: bool = False
    """Whether a text's logits did not depend on its batch."""
    size_bytes: int = 0
    problem: str = ""

    def keeps(self, limits: GateLimits) -> bool:
        """Whether it was measured and keeps the limits on the sample itself."""
        return (
            not self.problem
            and self.same_category >= limits.min_same_category_compiled
            and self.f1_loss <= limits.max_f1_loss_compiled
        )

    def may_keep(self, limits: GateLimits) -> bool:
        """Whether it was measured and the gate lets it through: few offers say little about a share."""
        return (
            not self.problem
            and wilson_upper(self.same_category, self.offers) >= limits.min_same_category_compiled
            and self.f1_loss <= limits.max_f1_loss_compiled
        )


@dataclass(frozen=True)
class Compiled:
    """What was chosen, and all that was looked at."""

    form: CpuForm
    candidates: list[Candidate]

    @property
    def metrics(self) -> dict[str, object]:
        """For the manifest; figures are kept out of the files, whose digest must not change with them."""
        return {
            "backend": self.form.backend,
            "backend_reason": self.form.reason,
            "backend_candidates": [msgspec.to_builtins(candidate) for candidate in self.candidates],
        }


def compile_for_cpu(
    classifier: Classifier,
    sample: pa.Table,
    output: Path,
    *,
    calibration: Sequence[str],
    backend: str = AUTO,
    progress: Progress,
    backends: Sequence[Backend] = BACKENDS,
    limits: GateLimits | None = None,
) -> Compiled:
    """Write the graph of the best backend, ``model.onnx``, into ``output``.

    Args:
        classifier: On the CPU, in evaluation mode.
        sample: Offers (text, category_id) that candidates are compared on.
        output: The folder.
        calibration: Texts that the student learned from; constant scales are chosen on some of them.
        backend: ``auto``: the fastest of those that run in ONNX Runtime and keep the limits;
            ``auto-with-extras``: OpenVINO is a candidate too, if it is installed; or a backend's name, which
            is then taken whatever it does: the gate judges it.
        progress: Where to say what is found.
        backends: The catalogue.
        limits: What a candidate has to keep; None: the gate's own.

    Raises:
        InputError: there is no backend of that name, its runtime is not installed, or it cannot be built.
    """
    candidates = _candidates(backend, backends)
    texts = [str(text) for text in sample["text"].to_pylist()]
    truth = np.array(sample["category_id"].to_pylist(), dtype=str)
    rows = _token_ids(classifier, texts)
    calibrated_on = _token_ids(classifier, calibration[:: max(1, len(calibration) // _CALIBRATION_TEXTS)])
    with torch_threads(1):
        original = classifier.predict_logits(texts)
    labels = np.array(classifier.labels, dtype=str)
    exported = export(classifier)
    with tempfile.TemporaryDirectory(prefix="backends-") as scratch:
        graphs: dict[str, Graph] = {}
        found: list[Candidate] = []
        for each in candidates:
            path = Path(scratch) / each.name / MODEL_FILE
            path.parent.mkdir()
            candidate = Candidate(backend=each.name, summary=each.summary)
            try:
                onnx.save(each.convert(exported, calibrated_on), path)
                graphs[each.name] = graph = open_graph(each.runtime, path)
                candidate = _compared(candidate, graph, rows, original, truth, labels)
                candidate = msgspec.structs.replace(candidate, size_bytes=path.stat().st_size)
            except Exception as error:  # whatever one library does not like, the others may
                graphs.pop(each.name, None)
                candidate = msgspec.structs.replace(candidate, problem=" ".join(str(error).split())[:300])
            found.append(candidate)
        found = _timed(found, graphs, rows)
        for candidate in found:
            progress.say(_in_words(candidate))
        chosen, reason = choose(found, backend, backends, limits or GateLimits())
        progress.say(f"backend {chosen.backend}: {reason}")
        shutil.copyfile(Path(scratch) / chosen.backend / MODEL_FILE, output / MODEL_FILE)
    runtime = next(each.runtime for each in backends if each.name == chosen.backend)
    return Compiled(
        CpuForm(
            backend=chosen.backend,
            runtime=runtime,
            batched=chosen.batched,
            cpu_features=cpu_features(),
            reason=reason,
        ),
        found,
    )


def choose(
    candidates: Sequence[Candidate],
    asked_for: str,
    backends: Sequence[Backend] = BACKENDS,
    limits: GateLimits | None = None,
) -> tuple[Candidate, str]:
    """The candidate to take, and why, in words without figures: they differ from run to run.

    Raises:
        InputError: what was asked for, or all there is, could not be built.
    """
    limits = limits or GateLimits()
    if asked_for not in (AUTO, AUTO_WITH_EXTRAS):
        (only,) = candidates
        if only.problem:
            raise InputError(f"backend {asked_for} cannot be built: {only.problem}; use backend {AUTO}")
        return only, "it was asked for"
    reference = {each.name for each in backends if each.is_reference}
    best = _fastest([each for each in candidates if each.keeps(limits)])
    if best is not None and best.backend not in reference:
        return best, "the fastest that keeps the gate's limits of same categories and weighted F1"
    perhaps = _fastest([each for each in candidates if each.may_keep(limits)])
    if perhaps is not None and perhaps.backend not in reference:
        return perhaps, "the fastest that may keep the gate's limits: more by chance than by this sample"
    last = next((each for each in candidates if each.backend in reference and not each.problem), None)
    if last is None:
        problems = "; ".join(f"{each.backend}: {each.problem or 'too inexact'}" for each in candidates)
        raise InputError(f"no backend can compile this student here ({problems}); name one as backend")
    if best is last:
        refused = [each.backend for each in candidates if each is not last and not each.may_keep(limits)]
        if len(refused) < len(candidates) - 1:
            return last, "no other that keeps the gate's limits is faster"
    return last, "the last resort: nothing else keeps the gate's limits of same categories and weighted F1"


def _fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Of those in the order of the catalogue; None if there are none."""
    best: Candidate | None = None
    for candidate in candidates:
        if best is None or candidate.offers_per_second > _TIE * best.offers_per_second:
            best = candidate
    return best


def _candidates(asked_for: str, backends: Sequence[Backend]) -> list[Backend]:
    """The backends that are tried for this parameter."""
    if asked_for in (AUTO, AUTO_WITH_EXTRAS):
        extras = asked_for == AUTO_WITH_EXTRAS and openvino_is_installed()
        return [each for each in backends if each.runtime == ONNX_RUNTIME or extras]
    named = [each for each in backends if each.name == asked_for]
    if not named:
        raise InputError(
            f"backend {asked_for!r} does not exist; there are {AUTO}, {AUTO_WITH_EXTRAS}, "
            f"{', '.join(each.name for each in backends)}"
        )
    if named[0].runtime == OPENVINO and not openvino_is_installed():
        raise InputError(
            f"backend {asked_for} needs OpenVINO, which is not installed; install the extra openvino "
            f"(pip install 'offer-assets[openvino]'), or use backend {AUTO}"
        )
    return named


def _token_ids(classifier: Classifier, texts: Sequence[str]) -> list[list[int]]:
    tokens = classifier.tokenize(texts)
    return [
        tokens.ids[start:end].tolist()
        for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ]


def _compared(
    candidate: Candidate,
    graph: Graph,
    rows: TokenIds,
    original: NDArray[np.float32],
    truth: NDArray[np.str_],
    labels: NDArray[np.str_],
) -> Candidate:
    """With what it answers to the sample, held against the original's logits."""
    logits = logits_of(graph, rows, batched=True)
    # Alone, and in batches of other texts: every second one, the last first.
    alone = logits_of(graph, few := rows[:_TIMED_TEXTS], batched=False)
    mixed = logits_of(graph, few[::-2], batched=True)
    same_bits = np.array_equal(logits[: len(few)], alone) and np.array_equal(mixed, alone[::-2])
    if not same_bits:
        logits = logits_of(graph, rows, batched=False)
    before, after = original.argmax(axis=1), logits.argmax(axis=1)
    loss = scores(truth, labels[before]).weighted_f1 - scores(truth, labels[after]).weighted_f1
    return msgspec.structs.replace(
        candidate,
        offers=len(rows),
        same_category=float(np.mean(before == after)),
        f1_loss=float(loss),
        same_bits=same_bits,
    )


def _timed(candidates: Sequence[Candidate], graphs: Mapping[str, Graph], rows: TokenIds) -> list[Candidate]:
    """With their speed, and the way of computing that is faster; whole rounds, all candidates in turns."""
    few = rows[:_TIMED_TEXTS]
    best: dict[tuple[str, bool], float] = {}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            for batched in (False, True):
                started_at = time.process_time()
                logits_of(graph, few, batched)
                seconds = max(time.process_time() - started_at, 1e-9)
                best[name, batched] = min(best.get((name, batched), seconds), seconds)
    timed = []
    for candidate in candidates:
        if candidate.backend not in graphs:
            timed.append(candidate)
            continue
        alone, together = (len(few) / best[candidate.backend, batched] for batched in (False, True))
        batched = candidate.same_bits and together > alone
        figures = {
            "batched": batched,
            "one_by_one": round(alone, 1),
            "offers_per_second": round(together if batched else alone, 1),
        }
        timed.append(msgspec.structs.replace(candidate, **figures))
    return timed


def _in_words(candidate: Candidate) -> str:
    if candidate.problem:
        return f"{candidate.backend}: {candidate.problem}"
    return (
        f"{candidate.backend}: {candidate.offers_per_second:,.0f} offers/s and core, same category on "
        f"{candidate.same_category:.2%}, weighted F1 {-candidate.f1_loss:+.4f}, "
        f"{candidate.size_bytes / 1e6:.1f} MB{'' if candidate.same_bits else ', depends on the batch'}"
    )
