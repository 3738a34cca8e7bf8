"""The same job on real offers: a subset of web-shop offers under a real taxonomy, split by shop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import environment, free_port, run

pytestmark = [pytest.mark.real_data, pytest.mark.xdist_group("real"), pytest.mark.timeout(4000)]

SUBSET_OFFERS = 800


@pytest.fixture(scope="module")
def finished(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("real")
    feed = folder / "gpc.parquet"
    pq.write_table(pq.read_table(real_data / "offers" / "gpc.parquet").slice(0, SUBSET_OFFERS), feed)
    env = environment(
        folder / "home",
        OFFER_FEED=str(feed),
        CATALOG_TAXONOMY=str(real_data / "taxonomy" / "gpc" / "2018.csv"),
        OFFER_ASSETS_SPLIT_BY="shop",
        OFFER_ASSETS_TEACHER_EPOCHS="1",
        OFFER_ASSETS_STUDENT_EPOCHS="2",
        OFFER_ASSETS_MAX_TOKENS="24",
        OFFER_ASSETS_ENDPOINT_PORT=str(free_port()),
        OFFER_ASSETS_ENDPOINT_WORKERS="1",
    )
    answer = run(["offer_assets", "demo"], env)
    try:
        assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
        yield answer.stdout
    finally:
        run(["offer_assets", "stop"], env)


def test_real_offers_end_at_a_live_endpoint(finished: str) -> None:
    assert re.search(r"offers in\s+800", finished)
    assert re.search(r"endpoint\s+http://127\.0\.0\.1:\d+", finished)


def test_every_real_offer_is_clean(finished: str) -> None:
    assert re.search(r"clean\s+800", finished)
    assert re.search(r"quarantined\s+0\b", finished)


def test_the_models_beat_guessing_by_far(finished: str) -> None:
    """The largest of about 200 categories has a tenth of these offers."""
    for model in ("teacher", "student", "fast"):
        weighted_f1 = float(re.search(rf"{model}\s+(0\.\d+)", finished).group(1))
        assert weighted_f1 > 0.3, f"{model}: {weighted_f1}"
