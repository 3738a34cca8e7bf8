"""An encoder with an output layer: what it computes, how it is stored.

:class:`Classifier` is both teacher and student. Text goes in, one logit per category comes out:
tokens, transformer, one vector (:mod:`ml.learning.pooling`), length one, linear layer. Where the
encoder comes from is in :mod:`ml.learning.encoder_files`, training in :mod:`ml.learning.training`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from ml.errors import InputError
from ml.learning.calibration import softmax
from ml.learning.devices import autocast, best_device
from ml.learning.distributed import add_up, own_share
from ml.learning.encoder_files import encoder_folder
from ml.learning.pooling import MEAN, POOLINGS, QUERY, layer_stack, pool_before_last_layer, pooled
from ml.learning.pretrained import load_encoder, load_tokenizer
from ml.offers import check_text_version
from ml.stages import Pooling

_WIDTH_MULTIPLE = 8
"""Batches are padded to a multiple of this: few different shapes, and what bf16 kernels want."""

INITIAL_SCALE = 20.0
"""Length of the rows of a fresh output layer; logits start as this times a cosine similarity."""


class ClassifierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``classifier.json``: everything beside the weights that a prediction depends on."""

    text_version: str
    taxonomy_version: str
    max_tokens: int
    instruction: str = ""
    pooling: str = MEAN
    """How the vectors of tokens become one; of :data:`ml.learning.pooling.POOLINGS`."""
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts, end to end; text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, shape (texts,)."""
        return np.diff(self.offsets)

    def padded(self, rows: NDArray[np.int64], pad_id: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of ``rows``, int64, both (rows, width); width is a multiple of 8."""
        lengths = self.lengths[rows]
        width = max(1, math.ceil(lengths.max() / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE
        columns = np.arange(width)
        mask = columns < lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        ids[mask] = self.ids[(self.offsets[rows][:, None] + columns)[mask]]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class Classifier(nn.Module):
    """Encoder, pooling and linear layer, with the tokenizer and labels that belong to them."""

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        settings: ClassifierSettings,
        tokenizer_files: dict[str, bytes] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.labels = list(labels)
        self.settings = settings
        if settings.pooling == QUERY:
            pool_before_last_layer(encoder)
        self._tokenizer_files = dict(tokenizer_files or {})
        self.with_tokenizer(tokenizer)

    @classmethod
    def from_encoder(
        cls, choice: str, labels: Sequence[str], settings: ClassifierSettings, *, digest: str = ""
    ) -> Classifier:
        """A pretrained encoder under a fresh output layer (see :meth:`initialise_head`).

        Args:
            choice: ``packaged-minilm``, a local folder or URI in transformers format, or a hub id.
            labels: Category ids, in the order of the output.
            settings: What to store beside the weights.
            digest: What the encoder's weights have to be (see
                :func:`ml.learning.encoder_files.encoder_digest`); empty: whatever they are.

        Raises:
            InputError: the encoder cannot be had or read, has other weights, or cannot take that many
                tokens.
        """
        with encoder_folder(choice, digest) as folder:
            encoder = load_encoder(folder)
            tokenizer, tokenizer_files = load_tokenizer(folder)
        head = nn.Linear(encoder.config.hidden_size, len(labels))
        classifier = cls(encoder, head, tokenizer, labels, settings, tokenizer_files)
        classifier.check_max_tokens(settings.max_tokens)
        return classifier

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read a classifier from the folder that :meth:`save` wrote.

        Raises:
            InputError: a file is missing or damaged, or the model was trained on offer texts that
                this version makes differently.
        """
        weights_path = folder / "head.safetensors"
        try:
            settings = msgspec.json.decode((folder / "classifier.json").read_bytes(), type=ClassifierSettings)
            labels = msgspec.json.decode((folder / "labels.json").read_bytes(), type=list[str])
            head_tensors = load_file(weights_path)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a classifier: {error.filename or weights_path} is missing"
            ) from None
        except (msgspec.DecodeError, SafetensorError) as error:
            raise InputError(f"{folder} is damaged: {error}; delete the folder and make it again") from None
        check_text_version(folder, settings.text_version)
        if settings.pooling not in POOLINGS:
            raise InputError(
                f"{folder / 'classifier.json'}: pooling {settings.pooling!r}, expected one of "
                f"{', '.join(POOLINGS)}"
            )
        encoder = load_encoder(folder / "encoder")
        tokenizer, tokenizer_files = load_tokenizer(folder / "encoder")
        head = nn.Linear(encoder.config.hidden_size, len(labels))
        try:
            head.load_state_dict(head_tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{weights_path} does not fit labels.json: {reason}") from None
        classifier = cls(encoder, head, tokenizer, labels, settings, tokenizer_files)
        classifier.to(best_device()).eval()
        return classifier

    def save(self, folder: Path) -> None:
        """Write ``encoder/`` (transformers format), head, labels and settings into ``folder``."""
        encoder_path = folder / "encoder"
        encoder_path.mkdir(parents=True, exist_ok=True)
        self.encoder.save_pretrained(encoder_path)
        (encoder_path / "tokenizer.json").write_text(self.tokenizer.to_str(), encoding="utf-8")
        for name, content in self._tokenizer_files.items():
            (encoder_path / name).write_bytes(content)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()},
            folder / "head.safetensors",
        )
        (folder / "labels.json").write_bytes(msgspec.json.encode(self.labels))
        (folder / "classifier.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(self.settings), indent=2)
        )

    @property
    def taxonomy_version(self) -> str:
        """Version of the taxonomy that the labels come from."""
        return self.settings.taxonomy_version

    @property
    def text_version(self) -> str:
        """Version of the offer text that the model was trained on."""
        return self.settings.text_version

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows (masked, so any valid id would do)."""
        return int(getattr(self.encoder.config, "pad_token_id", None) or 0)

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the encoder knows."""
        return int(self.encoder.config.vocab_size)

    @property
    def parameter_count(self) -> int:
        """Weights of encoder and output layer together."""
        return sum(parameter.numel() for parameter in self.parameters())

    def with_settings(self, **changes: Any) -> Classifier:
        """This classifier, in place, with some of its settings replaced."""
        self.settings = msgspec.structs.replace(self.settings, **changes)
        self.tokenizer.enable_truncation(self.settings.max_tokens)
        return self

    def with_pooling(self, pooling: Pooling) -> Classifier:
        """This classifier, in place, with another way from tokens to one vector; ``query`` is for good.

        Raises:
            InputError: the encoder cannot do that, or pools in its last layer and is to stop.
        """
        if pooling == QUERY:
            pool_before_last_layer(self.encoder)
        elif self.settings.pooling == QUERY:
            raise InputError(f"pooling {pooling!r}: the encoder was trained with {QUERY!r} and keeps it")
        return self.with_settings(pooling=pooling)

    def with_head(self, head: nn.Linear, labels: Sequence[str]) -> Classifier:
        """This classifier, in place, with another output layer; row ``i`` belongs to ``labels[i]``."""
        self.head = head
        self.labels = list(labels)
        return self

    def with_tokenizer(self, tokenizer: Tokenizer) -> Classifier:
        """This classifier, in place, with another tokenizer, whose ids are rows of the encoder."""
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.settings.max_tokens)
        self.tokenizer = tokenizer
        return self

    def check_max_tokens(self, max_tokens: int) -> None:
        """Raises :class:`InputError` if the encoder cannot take that many tokens."""
        if max_tokens > (limit := _position_limit(self.encoder.config)):
            raise InputError(f"max_tokens {max_tokens}: the encoder takes at most {limit}; lower max_tokens")

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of ``texts``, with instruction and special tokens, cut to ``max_tokens``."""
        prompts = [self.settings.instruction + text for text in texts]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(prompts)]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        ids = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
        return TokenizedTexts(ids, offsets)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text vectors of length one, (rows, hidden), of ids and mask (rows, width).

        ``token_type_ids`` are not passed: every encoder takes them as zeros, or has none.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        vectors = pooled(hidden, attention_mask, self.settings.pooling)
        return functional.normalize(vectors.float(), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (rows, classes) of token ids and attention mask, both (rows, width)."""
        vectors = self.embed(input_ids, attention_mask)
        with torch.autocast(vectors.device.type, enabled=False):  # bfloat16 has but 8 bits for a logit
            logits: Tensor = self.head(vectors)
        return logits

    def predict_logits(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Logits, float32 (texts, classes), in the order of ``texts``."""
        return self._map_batches(self.tokenize(texts), batch_size, self.forward, len(self.labels))

    def predict_probabilities(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes), in the order of ``texts``."""
        return softmax(self.predict_logits(texts, batch_size) / self.settings.temperature)

    def predict_embeddings(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Text vectors of length one, float32 (texts, hidden), in the order of ``texts``."""
        return self._map_batches(
            self.tokenize(texts), batch_size, self.embed, self.encoder.config.hidden_size
        )

    def initialise_head(
        self, texts: Sequence[str], categories: Sequence[str], category_names: Sequence[str]
    ) -> None:
        """Set the output layer to the centroids of the categories' embedded texts.

        Each category's name counts as one more text: it steadies small categories, and stands alone
        where there is no text. Starting from centroids instead of noise spares the first epochs.

        Args:
            texts: Offer texts, (n,).
            categories: Category id of each text, (n,); all in ``labels``.
            category_names: Name or path of each label, (classes,).
        """
        centroids = self.category_sums(self.predict_embeddings(texts), categories, category_names)
        centroids *= INITIAL_SCALE / np.linalg.norm(centroids, axis=1, keepdims=True).clip(min=1e-12)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(centroids))
            self.head.bias.zero_()

    def category_sums(
        self,
        embeddings: NDArray[np.float32],
        categories: Sequence[str],
        category_names: Sequence[str],
    ) -> NDArray[np.float32]:
        """Sum of the text vectors of each label and of its name's, float32 (classes, hidden).

        Args:
            embeddings: Text vectors, (n, hidden).
            categories: Category id of each text, (n,); all in ``labels``.
            category_names: Name or path of each label, (classes,).
        """
        row_of = {label: row for row, label in enumerate(self.labels)}
        rows = np.fromiter((row_of[category] for category in categories), np.int64, count=len(categories))
        sums = self.predict_embeddings(category_names)
        np.add.at(sums, rows, embeddings)
        return sums

    def keep_layers(self, count: int) -> Classifier:
        """A copy with ``count`` transformer layers, spread evenly from the first to the last.

        Raises:
            InputError: the encoder has fewer layers.
        """
        reduced = copy.deepcopy(self)
        config = reduced.encoder.config
        total = int(config.num_hidden_layers)
        if count > total:
            raise InputError(f"layers {count}: the encoder has only {total}; lower layers")
        kept = np.linspace(0, total - 1, count).round().astype(int) if count > 1 else [total - 1]
        stack = layer_stack(reduced.encoder)
        chosen = [stack[int(layer)] for layer in kept]
        del stack[count:]
        for place, layer in enumerate(chosen):
            stack[place] = layer
        config.num_hidden_layers = count
        return reduced

    def _map_batches(
        self, tokens: TokenizedTexts, batch_size: int, function: Any, width: int
    ) -> NDArray[np.float32]:
        """Rows of ``function``, in order. Processes that share the work of a stage all call this, alike."""
        result = np.zeros((len(tokens), width), dtype=np.float32)
        by_length = np.argsort(-tokens.lengths, kind="stable")
        was_training = self.training
        self.eval()
        with torch.inference_mode(), autocast(self.device):
            for start in own_share(range(0, len(tokens), batch_size)):
                rows = by_length[start : start + batch_size]
                ids, mask = tokens.padded(rows, self.pad_id)
                result[rows] = function(ids.to(self.device), mask.to(self.device)).float().cpu().numpy()
        add_up(result, self.device)
        self.train(was_training)
        return result


@contextmanager
def plain_attention(encoder: Any) -> Iterator[None]:
    """Attention as matrix products and a softmax, which compilers know, and not as one call of torch."""
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


def _position_limit(config: Any) -> int:
    """Tokens that the encoder has positions for; RoBERTa's count starts behind the padding id."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
