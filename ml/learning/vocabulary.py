"""A vocabulary trimmed to what a feed's texts use.

A multilingual encoder has a row for every token of a hundred languages; most of a small one's weights are
such rows. The tokens that occur in the given texts stay, with those that spell any other word letter by
letter. A tokenizer takes the longest token that fits (WordPiece) or the likeliest way through the text
(Unigram), so a text whose tokens all stay is tokenized as before, and the model answers it as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from ml.learning.encoder import Classifier

_WORD_START = "\u2581"
"""What SentencePiece puts where a word begins."""


def trim_vocabulary(model: Classifier, texts: Sequence[str]) -> Classifier:
    """A copy of ``model`` whose tokens are those that ``texts`` use, and single characters.

    A tokenizer of another kind than WordPiece or Unigram stays as it is: merges of byte pairs hang
    together, and none of the encoders meant for this project has one.

    Args:
        model: With its whole vocabulary.
        texts: All that the model will learn from; the more, the better it keeps.

    Returns:
        The trimmed copy; logits of ``texts`` are those of ``model``.
    """
    described = msgspec.json.decode(model.tokenizer.to_str().encode())
    if described["model"]["type"] not in ("WordPiece", "Unigram"):
        return copy.deepcopy(model)
    used = np.unique(model.tokenize(texts).ids)
    names = _names(described["model"])
    kept = _kept(described, names, used.tolist())
    trimmed = copy.deepcopy(model)
    _renumber(described, kept, names)
    trimmed.with_tokenizer(Tokenizer.from_str(msgspec.json.encode(described).decode()))
    _keep_rows(trimmed.encoder, kept)
    return trimmed


def _names(model: dict[str, Any]) -> dict[int, str]:
    """Token by id."""
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        return {number: token for number, (token, _) in enumerate(vocabulary)}
    return {number: token for token, number in vocabulary.items()}


def _kept(described: dict[str, Any], names: dict[int, str], used: Iterable[int]) -> NDArray[np.int64]:
    """Ids that stay, ascending: what is used, what spells other words, and what the tokenizer itself adds."""
    model = described["model"]
    prefix = _WORD_START if model["type"] == "Unigram" else model["continuing_subword_prefix"]
    characters = {number for number, token in names.items() if len(token.removeprefix(prefix)) <= 1}
    added = {int(token["id"]) for token in described["added_tokens"]}
    unknown = {number for number, token in names.items() if token == model.get("unk_token")}
    if model.get("unk_id") is not None:
        unknown.add(int(model["unk_id"]))
    return np.array(sorted({*used, *characters, *added, *unknown}), dtype=np.int64)


def _renumber(described: dict[str, Any], kept: NDArray[np.int64], names: dict[int, str]) -> None:
    """Give the kept tokens of a tokenizer's description their new ids, in place."""
    new_id = {int(old): new for new, old in enumerate(kept)}
    model = described["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {names[int(old)]: new for new, old in enumerate(kept) if int(old) in names}
    for token in described["added_tokens"]:
        token["id"] = new_id[int(token["id"])]
    post_processor = described.get("post_processor") or {}
    for token in post_processor.get("special_tokens", {}).values():
        token["ids"] = [new_id[int(number)] for number in token["ids"]]
    for place in ("cls", "sep"):  # of processors that name their tokens as pairs
        if place in post_processor:
            text, number = post_processor[place]
            post_processor[place] = [text, new_id[int(number)]]
    if described.get("padding"):
        described["padding"]["pad_id"] = new_id[int(described["padding"]["pad_id"])]


def _keep_rows(encoder: Any, kept: NDArray[np.int64]) -> None:
    """Cut the embeddings of tokens down to the rows that stay, in place."""
    old = encoder.get_input_embeddings()
    pad_id = encoder.config.pad_token_id
    new_pad = int(np.flatnonzero(kept == pad_id)[0]) if pad_id is not None and pad_id in kept else None
    new = nn.Embedding(len(kept), old.embedding_dim, padding_idx=new_pad, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight[torch.from_numpy(kept).to(old.weight.device)])
    encoder.set_input_embeddings(new)
    encoder.config.vocab_size = len(kept)
    encoder.config.pad_token_id = new_pad
