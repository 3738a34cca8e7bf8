"""A student of static shapes: each text goes to the smallest bucket that holds it.

For ``neuron`` the modules run on an accelerator, for ``torchscript`` in torch on this machine; padding,
routing and order are the same code. A batch always has the shape of its bucket, so the arithmetic for a
text is the same whatever its neighbours are, and so is its answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from ml.errors import InputError
from ml.serving import neuron
from ml.serving.compiled_model import (
    NEURON,
    Bucket,
    CompiledModel,
    ModelSettings,
    one_line,
    traced_form,
)
from ml.serving.quiet import quiet


class BucketedModel(CompiledModel):
    """See the module; opened by :meth:`ml.serving.compiled_model.CompiledModel.open`."""

    def __init__(
        self,
        folder: Path,
        settings: ModelSettings,
        threads: int = 1,
        host: neuron.NeuronHost | None = None,
    ) -> None:
        """Load every bucket's module and run each once.

        Args:
            folder: The model; its files are trusted, see
                :meth:`ml.serving.compiled_model.CompiledModel.open`.
            settings: Of the model.
            threads: Of arithmetic, where torch does it.
            host: Whose devices run a model for ``neuron``; None: this machine's.

        Raises:
            InputError: the model cannot run on this machine or with this SDK, or a file is damaged.
        """
        super().__init__(folder, settings)
        traced = traced_form(folder, settings)
        if settings.target == NEURON:
            neuron.load_runtime(folder, traced.versions, traced.device_family, host or neuron.NeuronHost())
        self._threads = threads
        self._pad_id = traced.pad_id
        self._buckets = traced.buckets
        self._modules = {bucket.tokens: _load(folder / bucket.file) for bucket in traced.buckets}
        for bucket in self._buckets:
            self._check_classes(folder, bucket.file, self._run(bucket, [[self._pad_id]]).shape[-1])

    @override
    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        logits = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        ids = self._token_ids(texts)
        for bucket, rows in self._batches([len(row) for row in ids]):
            logits[rows] = self._run(bucket, [ids[row] for row in rows])
        return logits

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[Bucket, list[int]]]:
        """Rows that are computed together, each row once."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(lengths):
            rows_of[smallest_bucket(self._buckets, length)].append(row)
        for number, rows in sorted(rows_of.items()):
            bucket = self._buckets[number]
            for start in range(0, len(rows), bucket.offers):
                yield bucket, rows[start : start + bucket.offers]

    def _run(self, bucket: Bucket, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Logits, float32 (rows, classes), of at most ``bucket.offers`` rows of token ids."""
        ids = np.full((bucket.offers, bucket.tokens), self._pad_id, dtype=np.int32)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        # Unoptimised: after some runs the optimiser would fuse operations, and change the last digits.
        with torch.inference_mode(), torch.jit.optimized_execution(False), torch_threads(self._threads):
            logits = self._modules[bucket.tokens](torch.from_numpy(ids), torch.from_numpy(mask))
        answers: NDArray[np.float32] = logits[: len(rows)].float().numpy()
        return answers


def smallest_bucket(buckets: Sequence[Bucket], tokens: int) -> int:
    """Number of the first bucket (they are sorted) that holds a text of so many tokens."""
    return next(number for number, bucket in enumerate(buckets) if tokens <= bucket.tokens)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads of arithmetic; afterwards as many as before."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(path: Path) -> Any:
    try:
        with quiet():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} cannot be opened: {one_line(error)}; compile the student again") from None
