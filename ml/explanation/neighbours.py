"""Labelled offers that a student finds most like an offer: nearest by the cosine of its text vectors.

The vectors of a training sample are computed once per student and kept as a file, half precision and
memory-mapped. They are compared one by one, chunk by chunk: a million offers take a fraction of a second, and
the answer is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.learning.training_data import strings
from ml.progress import Progress

LABELLED_FILE = "labelled.parquet"

_EMBEDDED_AT_ONCE = 4_096
_COMPARED_AT_ONCE = 65_536
_COLUMNS = ["offer_id", "shop_id", "category_id", "text"]
_TRAINED_ON = pc.field("split") == "train"


class SimilarOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A labelled offer that the student learned from."""

    offer_id: str
    shop_id: str
    category_id: str
    text: str
    similarity: float
    """Cosine of the two text vectors, in [-1, 1]."""


class LabelledOffers:
    """The labelled training offers of a sample, searchable by what a student makes of their texts."""

    def __init__(self, offers: pa.Table, vectors: NDArray[np.float16]) -> None:
        """Put an index together; see :meth:`open`.

        Args:
            offers: ``offer_id``, ``shop_id``, ``category_id`` and ``text``, (n,).
            vectors: Text vectors of length one, (n, hidden); may be memory-mapped.
        """
        self._offers = offers
        self._vectors = vectors

    @classmethod
    def open(
        cls,
        student_folder: Path,
        student: Classifier,
        sample: Path,
        folder: Path,
        progress: Progress | None = None,
    ) -> LabelledOffers:
        """The index of the training sample in ``sample``; its vectors are computed if ``folder`` lacks them.

        Args:
            student_folder: Artifact of the student.
            student: The same, loaded.
            sample: A ``training_sample`` artifact.
            folder: Keeps the vectors, under the versions of both; made if it does not exist.
            progress: Where to report.

        Raises:
            InputError: the sample cannot be used.
        """
        student_version = short_version(read_manifest(student_folder).digest)
        sample_version = short_version(read_manifest(sample).digest)
        path = sample / LABELLED_FILE
        try:
            offers = pq.read_table(path, columns=_COLUMNS, filters=_TRAINED_ON)
        except (FileNotFoundError, pa.ArrowException) as error:
            raise InputError(
                f"{path} cannot be read: {str(error).splitlines()[0]}; give a training_sample artifact"
            ) from None
        if not offers.num_rows:
            raise InputError(f"{path} has no offers in split 'train'; make the training sample anew")
        vectors_path = folder / f"{student_version}-{sample_version}.npy"
        if not vectors_path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_vectors(student, strings(offers["text"]), vectors_path, progress or Progress("explain"))
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        if len(vectors) != offers.num_rows:
            raise InputError(
                f"{vectors_path} has vectors of {len(vectors):,} offers, {path} has {offers.num_rows:,}; "
                "delete it and run again"
            )
        return cls(offers, vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def most_similar(self, vector: NDArray[np.float32], count: int) -> list[SimilarOffer]:
        """The ``count`` offers nearest to a text vector (hidden,), best first; of equals by their ids."""
        similarities = np.concatenate(
            [
                self._vectors[start : start + _COMPARED_AT_ONCE].astype(np.float32) @ vector
                for start in range(0, len(self), _COMPARED_AT_ONCE)
            ]
        )
        count = min(count, len(self))
        least = np.partition(similarities, -count)[-count] if count else np.inf
        rows = np.flatnonzero(similarities >= least)  # with all that are equal to the last
        found = [
            SimilarOffer(**offer, similarity=float(similarity))
            for offer, similarity in zip(self._offers.take(rows).to_pylist(), similarities[rows], strict=True)
        ]
        return sorted(found, key=lambda offer: (-offer.similarity, offer.offer_id, offer.shop_id))[:count]


def _write_vectors(student: Classifier, texts: Sequence[str], path: Path, progress: Progress) -> None:
    """Embed all texts; the file appears when it is complete."""
    partial = path.with_suffix(".partial")
    hidden = student.head.in_features
    vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(len(texts), hidden))
    with progress.bar("embedding labelled offers", len(texts), "offers") as bar:
        for start in range(0, len(texts), _EMBEDDED_AT_ONCE):
            chunk = texts[start : start + _EMBEDDED_AT_ONCE]
            vectors[start : start + len(chunk)] = student.predict_embeddings(chunk)
            bar.update(len(chunk))
    vectors.flush()
    del vectors
    partial.rename(path)
