"""Propositions over finished artifacts catch what they promise to catch."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.evaluation.verification import conservation, same_offers, shared_groups, unknown_labels


def write(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), path)
    return path.parent


@pytest.mark.parametrize(
    ("clean", "quarantined", "lost", "invented", "holds"),
    [
        (["a", "b"], ["a", None], 0, 0, True),
        (["a", "b"], ["a"], 1, 0, False),
        (["a", "b"], ["a", None, "z"], 0, 1, False),
        (["a", "a"], ["a", None], 1, 1, False),
    ],
)
def test_a_lost_doubled_or_invented_offer_is_seen(
    tmp_path, clean, quarantined, lost, invented, holds
) -> None:
    raw = write(tmp_path / "raw" / "offers.parquet", offer_id=[" a", "b", "a", None])
    offers = write(tmp_path / "offers" / "offers.parquet", offer_id=clean)
    write(tmp_path / "offers" / "quarantine.parquet", offer_id=quarantined)
    found = conservation(raw, offers)
    assert (found.lost, found.invented, found.holds) == (lost, invented, holds)


def test_labels_that_the_taxonomy_lacks_are_counted(tmp_path) -> None:
    taxonomy = write(tmp_path / "t" / "taxonomy.parquet", category_id=["1", "2"])
    offers = write(tmp_path / "o" / "offers.parquet", category_id=["1", "9", "9", None])
    assert unknown_labels([offers / "offers.parquet"], taxonomy) == {"9": 2}


def sample(folder: Path, train: dict, evaluation: dict) -> tuple[Path, Path]:
    base = {"product_id": [None], "gtin": [None], "title": ["train title"], "shop_id": ["s1"]}
    write(folder / "sample" / "labelled.parquet", **{**base, **train}, split=["train"])
    write(folder / "sample" / "unlabelled.parquet", **{**base, "title": ["another"]})
    held_out = {"product_id": ["p9"], "gtin": ["g9"], "title": ["held out"], "shop_id": ["s2"]}
    return folder / "sample", write(folder / "evaluation" / "offers.parquet", **{**held_out, **evaluation})


def test_a_clean_split_shares_nothing(tmp_path) -> None:
    assert not any(shared_groups(*sample(tmp_path, {}, {}), "shop").values())


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"product_id": ["p9"]}, "evaluation_product"),
        ({"gtin": ["g9"]}, "evaluation_gtin"),
        ({"title": ["Held   OUT "]}, "evaluation_title"),
        ({"shop_id": ["s2"]}, "evaluation_shop_id"),
    ],
)
def test_each_way_to_share_a_group_is_seen(tmp_path, train, found) -> None:
    assert shared_groups(*sample(tmp_path, train, {}), "shop")[found] == 1


def test_a_placeholder_is_no_product_and_leading_zeros_make_no_other(tmp_path) -> None:
    nothing = sample(tmp_path / "zeros", {"gtin": ["0000"], "product_id": [" "]}, {"gtin": ["00000000"]})
    assert not any(shared_groups(*nothing, "product").values())
    same = sample(tmp_path / "same", {"gtin": ["0042"]}, {"gtin": ["42"]})
    assert shared_groups(*same, "product")["evaluation_gtin"] == 1


def test_a_shop_on_both_sides_is_fine_when_products_are_split(tmp_path) -> None:
    assert not any(shared_groups(*sample(tmp_path, {"shop_id": ["s2"]}, {}), "product").values())


def test_a_missing_and_a_doubled_catalogued_offer_are_seen(tmp_path) -> None:
    offers = write(tmp_path / "o" / "offers.parquet", offer_id=["a", "b"])

    def compared(name: str, ids: list[str], categories: list[str | None]) -> tuple[int, int, int]:
        path = tmp_path / name / "catalogued.parquet"
        return same_offers(offers, write(path, offer_id=ids, category_id=categories))

    assert compared("same", ["b", "a"], ["1", "2"]) == (2, 2, 0)
    assert compared("doubled", ["a", "a"], ["1", "1"]) == (2, 2, 2)
    assert compared("refused", ["a", "b"], ["1", None]) == (2, 1, 1)
