"""Loads a pretrained encoder and its tokenizer from a folder in transformers format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from ml.errors import InputError
from ml.learning.encoder_files import one_line

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_encoder(folder: Path) -> Any:
    """The encoder in full precision, without the pooler that some architectures add and nothing uses.

    Raises:
        InputError: the folder cannot be read, or weights are missing.
    """
    try:
        encoder, info = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise InputError(f"encoder in {folder} cannot be read: {one_line(error)}") from error
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise InputError(
            f"encoder in {folder} is incomplete: no weights for {missing[0]} ({len(missing)} in all)"
        )
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    return encoder


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer, and the files that go beside it so that other libraries can load it as well.

    Raises:
        InputError: ``tokenizer.json`` is missing or cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{folder / 'tokenizer.json'} cannot be read: {one_line(error)}") from error
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return tokenizer, files
