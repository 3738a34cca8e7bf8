"""An artifact is a folder written once, made visible by its manifest.

``manifest.json`` names what the folder was made from (inputs by digest, code version, parameters),
its metrics, and the SHA-256 of every file. It is written last, so a folder without one does not
exist. The *key* is derived from what goes in, so the same inputs, code and parameters lead to the
same folder; the *digest* is derived from what came out, and is what downstream keys are made of.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_HASH_BLOCK_BYTES = 1 << 20

JsonValue = Any
"""What JSON can hold; metrics and parameters are made of it."""


class FileEntry(msgspec.Struct, frozen=True):
    """Digest and size of one file of an artifact."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to find, trust and reproduce an artifact."""

    kind: str
    key: str
    digest: str
    inputs: dict[str, str]
    """Digest of each input artifact, by the name under which the stage knows it."""
    code_version: str
    code_revision: str | None
    parameters: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    files: dict[str, FileEntry]
    created_at: str
    seconds: float
    format: int = MANIFEST_FORMAT


class ArtifactRef(msgspec.Struct, frozen=True, kw_only=True):
    """The small reference that is passed around instead of the artifact itself."""

    kind: str
    key: str
    digest: str
    uri: str
    metrics: dict[str, JsonValue] = {}

    @property
    def version(self) -> str:
        """The short form of the digest, for people and for predictions."""
        return short_version(self.digest)


def short_version(digest: str) -> str:
    """First 12 hexadecimal digits of a digest: unique enough to name a version, short enough to read."""
    return digest[:12]


def artifact_key(
    kind: str, code_version: str, parameters: Mapping[str, JsonValue], inputs: Mapping[str, str]
) -> str:
    """Name of the artifact that these inputs, this code and these parameters lead to (32 hex digits)."""
    recipe = {
        "kind": kind,
        "code_version": code_version,
        "parameters": dict(parameters),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(msgspec.json.encode(recipe, order="deterministic")).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(
    folder: Path,
    *,
    kind: str,
    key: str,
    inputs: Mapping[str, str],
    code_version: str,
    code_revision: str | None,
    parameters: Mapping[str, JsonValue],
    metrics: Mapping[str, JsonValue],
    seconds: float,
) -> Manifest:
    """Describe the files of ``folder`` and seal it; the manifest appears in one step, or not at all."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(
        kind=kind,
        key=key,
        digest=_content_digest(files),
        inputs=dict(inputs),
        code_version=code_version,
        code_revision=code_revision,
        parameters=dict(parameters),
        metrics=dict(metrics),
        files=files,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    partial = folder / (MANIFEST + ".partial")
    with partial.open("wb") as file:
        file.write(encoded)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder.

    Raises:
        InputError: the folder has no manifest, or one that this version cannot read.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST} (unfinished or a wrong path)"
        ) from None


def parse_manifest(encoded: bytes, place: str) -> Manifest:
    """The manifest that ``place`` holds.

    Raises:
        InputError: it is one that this version cannot read; the line names the place.
    """
    try:
        manifest = msgspec.json.decode(encoded, type=Manifest)
    except msgspec.DecodeError as error:
        raise InputError(f"{place} cannot be read: {error}; delete the folder and run again") from None
    if manifest.format != MANIFEST_FORMAT:
        raise InputError(
            f"{place} has format {manifest.format}, this version reads {MANIFEST_FORMAT}; make it anew"
        )
    return manifest


def verify(folder: Path, *, kinds: Collection[str] = (), digest: str | None = None) -> Manifest:
    """Read the manifest and hold every file against it.

    Args:
        folder: The artifact.
        kinds: The kinds it may be, if that matters to the caller.
        digest: The content digest it has to have, if known.

    Raises:
        InputError: a file is missing, changed or unknown, or kind or digest differ.
    """
    manifest = read_manifest(folder)
    if kinds and manifest.kind not in kinds:
        raise InputError(f"{folder} is a {manifest.kind}, expected a {' or a '.join(kinds)}")
    if digest is not None and manifest.digest != digest:
        raise InputError(f"{folder} has digest {manifest.digest}, expected {digest}; it was replaced")
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"{path} is missing though the manifest lists it; delete the folder and run again"
            )
        if path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            raise InputError(
                f"{path} differs from its digest in the manifest; delete the folder and run again"
            )
    if _content_digest(manifest.files) != manifest.digest:
        raise InputError(f"{folder / MANIFEST} contradicts itself: its digest is not that of its files")
    return manifest


def reference(folder: Path, uri: str | None = None) -> ArtifactRef:
    """The reference to the artifact in ``folder`` (stored at ``uri``, if that is elsewhere)."""
    return reference_to(read_manifest(folder), uri if uri is not None else str(folder))


def reference_to(manifest: Manifest, uri: str) -> ArtifactRef:
    """The reference to the artifact that the manifest describes, stored at ``uri``."""
    return ArtifactRef(
        kind=manifest.kind,
        key=manifest.key,
        digest=manifest.digest,
        uri=uri,
        metrics=manifest.metrics,
    )


def _content_digest(files: Mapping[str, FileEntry]) -> str:
    listing = [[name, files[name].sha256] for name in sorted(files)]
    return hashlib.sha256(msgspec.json.encode(listing)).hexdigest()
