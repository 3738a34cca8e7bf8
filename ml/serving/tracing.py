"""From a trained student to static shapes: one traced module per bucket of lengths.

Accelerators compile for fixed shapes, so every text is padded to the smallest bucket that holds it, and
every batch to the bucket's number of offers. The tracer is a parameter: :func:`trace_for_neuron` compiles
for AWS Inferentia 2, :func:`trace_for_torch` for torch on this machine, and everything else is the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml.learning.encoder import Classifier, plain_attention
from ml.learning.pooling import pooled
from ml.progress import Progress
from ml.serving import neuron
from ml.serving.compiled_model import NEURON, Bucket, TracedForm
from ml.serving.quiet import quiet

Tracer = Callable[[nn.Module, tuple[Tensor, Tensor]], Any]
"""``(module, example inputs) -> ScriptModule``; the shapes of the example are the only ones it will take."""

_LENGTHS = (16, 32, 64, 128, 256, 512)
"""Tokens of the buckets; titles of offers have about 27."""

_TOKENS_AT_ONCE = 1_024
"""Of a batch, padding included: enough to keep the matrix units busy, few enough for a single request."""

_MASKED = -1e4
"""Added to the attention of padding: exp of it is 0 in float32, and unlike -inf it survives bfloat16."""


class StaticClassifier(nn.Module):
    """The classifier on a padded batch: ids and mask int32 (offers, tokens) in, logits (offers, classes) out.

    As :meth:`ml.learning.encoder.Classifier.forward`, with the mask made by arithmetic alone. A row of
    nothing but padding gives some logits, and touches no other row.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.encoder = classifier.encoder
        self.head = classifier.head
        self._pooling = classifier.settings.pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32."""
        mask = attention_mask.to(self.head.weight.dtype)
        additive = (1.0 - mask)[:, None, None, :] * _MASKED
        hidden = self.encoder(input_ids=input_ids, attention_mask=additive).last_hidden_state
        vectors = pooled(hidden, mask, self._pooling)
        logits: Tensor = self.head(functional.normalize(vectors.float(), dim=-1))
        return logits.float()


def buckets_for(max_tokens: int) -> list[Bucket]:
    """Shapes for texts of up to ``max_tokens`` tokens; the last bucket is just as long."""
    lengths = [*takewhile(lambda length: length < max_tokens, _LENGTHS), max_tokens]
    return [
        Bucket(tokens=length, offers=max(1, _TOKENS_AT_ONCE // length), file=f"model-{length}.pt")
        for length in lengths
    ]


def trace_student(
    classifier: Classifier,
    folder: Path,
    target: str,
    tracer: Tracer,
    checkpoints: Path,
    progress: Progress,
) -> TracedForm:
    """Write one TorchScript file per bucket into ``folder``.

    Args:
        classifier: On the CPU, in evaluation mode.
        folder: Where the files go.
        target: What ``tracer`` compiles for, ``neuron`` or ``torchscript``.
        tracer: See :data:`Tracer`.
        checkpoints: Where finished buckets wait for the others: a compiler takes minutes for each, and
            who starts again goes on with those that are missing.
        progress: Where to report.

    Returns:
        What the model's settings say of it.
    """
    module = StaticClassifier(classifier).eval()
    buckets = buckets_for(classifier.settings.max_tokens)
    checkpoints.mkdir(parents=True, exist_ok=True)
    with progress.bar("compiling", total=len(buckets), unit="buckets") as bar:
        for bucket in buckets:
            finished = checkpoints / bucket.file
            if not finished.exists():
                unfinished = finished.with_suffix(".partial")
                with quiet(), torch.no_grad(), plain_attention(classifier.encoder):
                    ids = torch.full((bucket.offers, bucket.tokens), classifier.pad_id, dtype=torch.int32)
                    torch.jit.save(tracer(module, (ids, torch.ones_like(ids))), str(unfinished))
                unfinished.rename(finished)
            bar.update(1, tokens=bucket.tokens)
    for bucket in buckets:
        shutil.move(checkpoints / bucket.file, folder / bucket.file)
    if target == NEURON:
        return TracedForm(
            buckets=buckets,
            pad_id=classifier.pad_id,
            compiler=" ".join(["neuronx-cc", *neuron.COMPILER_ARGUMENTS]),
            versions=neuron.sdk_versions(),
            device_family=neuron.DEVICE_FAMILY,
        )
    return TracedForm(
        buckets=buckets,
        pad_id=classifier.pad_id,
        compiler="torch.jit.trace",
        versions={"torch": str(torch.__version__)},
    )


def trace_for_torch(module: nn.Module, example: tuple[Tensor, Tensor]) -> Any:
    """Trace for torch on this machine, in full precision."""
    return torch.jit.trace(module, example, check_trace=False)


def trace_for_neuron(module: nn.Module, example: tuple[Tensor, Tensor]) -> Any:
    """Compile for AWS Inferentia 2; no device is needed for that.

    Raises:
        InputError: the SDK is not here.
    """
    sdk = neuron.load_compiler()
    traced = sdk.trace(module, example, compiler_args=neuron.COMPILER_ARGUMENTS, cpu_backend=True)
    return sdk.dynamic_batch(traced)
