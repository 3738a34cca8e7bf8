"""What is sent to a fresh endpoint to see whether it answers like its artifact."""

from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.serving.predictor import TEXT_COLUMNS
from offer_assets import policies
from offer_assets.release import endpoint_sample


def table_of(folder: Path, offers: int, text: str) -> Path:
    file = folder / "offers.parquet"
    columns = {name: [text] * offers for name in TEXT_COLUMNS} | {"brand": [None] * offers}
    ids = [str(number) for number in range(offers)]
    pq.write_table(pa.table({"offer_id": ids, **columns, "url": ids, "price": [1.0] * offers}), file)
    return file


def test_only_what_the_model_reads_is_sent(tmp_path: Path) -> None:
    sample = endpoint_sample(table_of(tmp_path, policies.ENDPOINT_SAMPLE_OFFERS + 5, "a title"))
    assert [offer["offer_id"] for offer in sample] == [
        str(number) for number in range(policies.ENDPOINT_SAMPLE_OFFERS)
    ]
    assert sample[0].keys() == {"offer_id", *TEXT_COLUMNS} - {"brand"}


def test_the_longest_texts_stay_below_the_size_of_a_request(tmp_path: Path) -> None:
    sample = endpoint_sample(table_of(tmp_path, policies.ENDPOINT_SAMPLE_OFFERS, "語" * 20_000))
    assert 1 < len(sample) < policies.ENDPOINT_SAMPLE_OFFERS
    assert len(msgspec.json.encode({"offers": sample})) < 6 << 20
