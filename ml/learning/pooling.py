"""Where the vectors of a text's tokens become one: behind an encoder's last layer, or before it.

Behind it (``mean``) is how sentence encoders are trained. Before it (``query``), the last layer computes one
vector per text instead of one per token: the mean of the tokens asks, all tokens answer ("pool-query-only"
attention of Funnel-Transformer, Dai, Lai, Yang and Le, 2020, down to a length of one). What is left of that
layer for each token are its key and value, a sixth of the work: a student of two layers has six tenths of
the work that it had. Weights are those of the layer as it was, and are stored as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ml.errors import InputError
from ml.stages import Pooling

MEAN: Pooling = "mean"
QUERY: Pooling = "query"
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class PooledLayer(nn.Module):
    """A layer built like BERT's that takes one vector per token and gives one per text.

    Its parts keep their names, so an encoder with it is stored like any other.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention = layer.attention
        self.intermediate = layer.intermediate
        self.output = layer.output
        self.has_company = False
        """Whether a text's vector is never multiplied alone; see :func:`in_company`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """One vector per text, (texts, 1, hidden).

        Args:
            hidden_states: (texts, tokens, hidden).
            attention_mask: (texts, 1, any, tokens), the same in each row of a text: true for a token, or what
                is added to attention, 0 for a token and very negative for padding; None: all are tokens.
            *_: What transformers passes to layers of decoders; so does ``__``.

        Raises:
            ValueError: the mask has another form, as some kernels of attention want it.
        """
        added = _added(attention_mask)
        own = self.attention.self
        counted = torch.ones_like(hidden_states[:, :, :1]).transpose(1, 2)
        if added is not None:
            counted = counted * added[:, 0].exp().to(counted.dtype)
        mean = torch.matmul(counted, hidden_states) / counted.sum(dim=2, keepdim=True).clamp(min=1.0)

        def by_head(vectors: Tensor) -> Tensor:
            return vectors.unflatten(2, (-1, own.attention_head_size)).transpose(1, 2)

        query = by_head(self._of_texts(own.query, mean))
        key, value = by_head(own.key(hidden_states)), by_head(own.value(hidden_states))
        scores = torch.matmul(query, key.transpose(2, 3)) * own.scaling
        if added is not None:
            scores = scores + added
        answered = torch.matmul(own.dropout(torch.softmax(scores, dim=3)), value)
        return self._of_texts(self._fed_forward, answered.transpose(1, 2).flatten(2), mean)

    def _fed_forward(self, answered: Tensor, mean: Tensor) -> Tensor:
        attended = self.attention.output(answered, mean)
        result: Tensor = self.output(self.intermediate(attended), attended)
        return result

    def _of_texts(self, function: Any, *vectors: Tensor) -> Tensor:
        """``function`` of one vector per text."""
        if not self.has_company:
            result: Tensor = function(*vectors)
            return result
        with_first = (torch.cat([each, each[:1]]) for each in vectors)
        result = function(*with_first)
        return result[:-1]


def pool_before_last_layer(encoder: Any) -> None:
    """Make the last layer of the encoder a :class:`PooledLayer`, in place, unless it is one.

    Raises:
        InputError: its layers are built otherwise.
    """
    stack = layer_stack(encoder)
    last = stack[-1]
    if isinstance(last, PooledLayer):
        return
    if not _is_like_berts(last):
        raise InputError(
            f"pooling {QUERY!r} needs layers built like BERT's, and those of a {type(encoder).__name__} are "
            f"not; set pooling to {MEAN!r}"
        )
    stack[-1] = PooledLayer(last).train(last.training)


def _is_like_berts(layer: Any) -> bool:
    attention = getattr(getattr(layer, "attention", None), "self", None)
    parts = [(layer, name) for name in ("attention", "intermediate", "output")]
    parts += [(attention, name) for name in ("query", "key", "value")]
    return all(hasattr(owner, name) for owner, name in parts)


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Vectors of the texts, (texts, hidden).

    Args:
        hidden: What the encoder returned: (texts, tokens, hidden), or (texts, 1, hidden) if it pools itself.
        mask: 1 for a token and 0 for padding, (texts, tokens).
        pooling: Which of the two it is.
    """
    if pooling == QUERY:
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def layer_stack(encoder: Any) -> nn.ModuleList:
    """The transformer layers of an encoder, from the first to the last.

    Raises:
        InputError: there is no such list, as where all layers share their weights.
    """
    total = int(encoder.config.num_hidden_layers)
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return module
    raise InputError(f"{type(encoder).__name__} has no list of {total} layers of which some could be taken")


@contextmanager
def in_company(encoder: Any) -> Iterator[None]:
    """A text's vector is multiplied beside another one, always.

    Compiled kernels multiply a single row in another way than several, and round it otherwise: with company,
    a text has the same bits alone and in any batch.
    """
    layers = [module for module in encoder.modules() if isinstance(module, PooledLayer)]
    for layer in layers:
        layer.has_company = True
    try:
        yield
    finally:
        for layer in layers:
            layer.has_company = False


def _added(mask: Tensor | None) -> Tensor | None:
    """What is added to the attention of each text's tokens, (texts, 1, 1, tokens): 0, or very negative."""
    if mask is None:
        return None
    if mask.ndim != 4:
        raise ValueError(f"attention mask of shape {tuple(mask.shape)}: use attention 'sdpa' or 'eager'")
    row = mask[:, :, :1]
    if row.dtype == torch.bool:
        return torch.zeros(row.shape, device=row.device).masked_fill(~row, torch.finfo(torch.float32).min)
    return row
