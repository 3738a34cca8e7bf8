"""The first tokens of a text, without reading the rest of it.

A tokenizer reads a whole text before it cuts it to the tokens that a model takes. Of a student that takes 32,
most offers have twice as many words, and reading them was a fifth of all its time. Tokenizers that take words
apart at spaces give the words at the start the same tokens whatever follows, and a word mostly gives a token
at least: so as many words as tokens are wanted will mostly do. Where they do not, the whole text is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer

_APART = {"BertPreTokenizer", "WhitespaceSplit", "Whitespace"}
"""Ways of taking a text apart after which no token has a space in it."""


def first_tokens(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[list[int]]:
    """Token ids of each text, at most ``count``.

    Args:
        tokenizer: That takes words apart (:func:`takes_words_apart`), does not pad, and cuts at ``count``.
        texts: Of any length.
        count: Tokens, with those that mark start and end.

    Returns:
        What the tokenizer gives for the whole texts.
    """
    starts = [" ".join(text.split(" ", count)[:count]) for text in texts]
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(starts)]
    doubtful = [
        row for row, ids in enumerate(found) if len(ids) < count and len(starts[row]) < len(texts[row])
    ]
    for row, encoding in zip(
        doubtful, tokenizer.encode_batch_fast([texts[row] for row in doubtful]), strict=True
    ):
        found[row] = encoding.ids
    return found


def takes_words_apart(tokenizer: Tokenizer) -> bool:
    """Whether a text's first words have the same tokens whatever follows behind a space."""
    described = msgspec.json.decode(tokenizer.to_str().encode())
    return any(map(_is_apart, _parts(described.get("pre_tokenizer"))))


def _parts(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    if described is None:
        return []
    return list(described["pretokenizers"]) if described["type"] == "Sequence" else [described]


def _is_apart(part: dict[str, Any]) -> bool:
    return part["type"] in _APART or (part["type"] == "Metaspace" and bool(part.get("split", True)))
