"""What must not be on both sides of a split, and which side a hash gives it to."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ml.errors import InputError

SPLIT_FILE = "split.json"

_NORMALISED_TITLE = r"lower(trim(regexp_replace(nfc_normalize(title), '[\s\p{Z}\p{Cc}]+', ' ', 'g')))"
PRODUCT_KEYS = {
    "product_key": "nullif(trim(product_id), '')",
    "gtin_key": "nullif(ltrim(trim(gtin), '0'), '')",
    "title_key": f"md5({_NORMALISED_TITLE})",
}
"""Two offers that share one of these are taken for the same product. Nulls share nothing."""


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """How evaluation and training are kept apart; travels with the evaluation set as ``split.json``."""

    split_by: str
    share: float
    seed: int
    training_only: list[str]
    """Groups that are trained on whatever their hash says, because a category has no other offers."""

    @classmethod
    def read(cls, evaluation_set: Path) -> Split:
        """The split of an evaluation set folder.

        Raises:
            InputError: the folder holds none that can be read.
        """
        path = evaluation_set / SPLIT_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); make the evaluation set anew") from None

    @property
    def shared_columns(self) -> list[str]:
        """What must not be on both sides."""
        return [*PRODUCT_KEYS, "shop_id"] if self.split_by == "shop" else list(PRODUCT_KEYS)

    def keyed(self, source: str) -> str:
        """A query that adds to ``source`` the keys, ``product``, ``group_key``, ``held_out`` and ``draw``."""
        keys = ", ".join(f"{sql} AS {name}" for name, sql in PRODUCT_KEYS.items())
        # An MD5 is a uniform number written in hexadecimal, so comparing text compares numbers.
        limit = "g" if self.share >= 1 else format(int(self.share * 2**64), "016x")
        group = "'shop:' || shop_id" if self.split_by == "shop" else "product"
        return f"""
            SELECT *,
                md5('{self.seed}:held out:' || group_key) < '{limit}' AS held_out,
                md5('{self.seed}:offer:' || offer_id) AS draw
            FROM (SELECT *, {group} AS group_key FROM (SELECT *,
                coalesce('product:' || product_key, 'gtin:' || gtin_key, 'title:' || title_key) AS product
                FROM (SELECT *, {keys} FROM {source})))"""
