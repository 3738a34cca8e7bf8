"""The benchmark of bulk classification finds what it is there to find."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.bulk import Run, growth, verify
from ml.progress import Silence
from ml.serving.classify import classify
from tests.ml.compiled_models import TITLES


@pytest.fixture(scope="module")
def classified(compiled_student, tmp_path_factory):
    """A feed of two files and its result."""
    folder = tmp_path_factory.mktemp("bulk")
    (folder / "feed").mkdir()
    for number in range(2):
        ids = [f"{number}-{row}" for row in range(600)]
        titles = [f"{TITLES[row % len(TITLES)]} {row}" for row in range(600)]
        table = pa.table({"offer_id": ids, "shop_id": ["s"] * 600, "title": titles})
        pq.write_table(table, folder / "feed" / f"{number}.parquet")
    classify(compiled_student, str(folder / "feed"), folder / "out.parquet", workers=1)
    return folder


def _verified(compiled_student, folder, output):
    return verify(compiled_student, folder / "feed", output, [500], random.Random(1), Silence("bulk"))


def test_a_right_result_passes(compiled_student, classified):
    found = _verified(compiled_student, classified, classified / "out.parquet")
    assert found["offers_once_and_in_order"] == 1200
    assert found["answers_compared"] >= 256
    assert found["answers_that_differ"] == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row for row in range(1200) if row != 700], "behind row 600, the result has other offers"),
        ([*range(700), 700, *range(700, 1200)], "behind row 600, the result has other offers"),
        ([*range(1200), 1199], "more offers than the feed"),
        ([*range(1199)], "other offers than the feed"),
        ([1, 0, *range(2, 1200)], "behind row 0, the result has other offers"),
    ],
)
def test_a_lost_doubled_or_moved_offer_is_found(rows, said, compiled_student, classified, tmp_path):
    pq.write_table(pq.read_table(classified / "out.parquet").take(rows), tmp_path / "out.parquet")
    with pytest.raises(SystemExit, match=said):
        _verified(compiled_student, classified, tmp_path / "out.parquet")


def test_another_answer_is_found(compiled_student, classified, tmp_path):
    table = pq.read_table(classified / "out.parquet")
    place = table.schema.get_field_index("confidence")
    table = table.set_column(place, "confidence", pc.multiply(table["confidence"], 0.5))
    pq.write_table(table, tmp_path / "out.parquet")
    with pytest.raises(SystemExit, match="sampled offers have other answers"):
        _verified(compiled_student, classified, tmp_path / "out.parquet")


def test_growth_is_in_megabytes_per_million_offers():
    run = Run(0, offers=2_000_000)
    run.samples = [(0.1 * n, 10_000 * n, 400 + 0.03 * n) for n in range(201)]
    assert growth(run) == pytest.approx(3.0)
    assert growth(Run(0, offers=10)) is None
