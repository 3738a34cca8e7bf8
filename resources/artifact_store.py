"""The door to artifacts: where they lie, and which one an asset points to right now.

The store keeps two things. *Artifacts* are folders written once, found by kind and key. *Pointers*
are small named references ("the offers of 2026-11-02 are this artifact"); they are the only thing
that ever changes, and they change in one step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import MANIFEST, ArtifactRef, Manifest, read_manifest, reference, verify
from ml.errors import InputError
from resources.atomic_files import write_atomically


class ArtifactStore(dg.ConfigurableResource[Any], ABC):
    """Where artifacts are kept."""

    feed: str
    """Whose pointers these are; artifacts are shared, see :mod:`resources.feed_name`."""

    @abstractmethod
    def find(self, kind: str, key: str) -> ArtifactRef | None:
        """The artifact of this kind and key, or None where it was not made yet.

        Raises:
            InputError: something else lies in its place.
        """

    @abstractmethod
    def find_by_digest(self, kind: str, digest: str) -> ArtifactRef | None:
        """An artifact of this kind and content, or None; looks through all of the kind."""

    @abstractmethod
    def fetch(self, ref: ArtifactRef, *, check: bool = True) -> Path:
        """A local folder that holds the artifact.

        Args:
            ref: The artifact.
            check: Hold every file against its digest. Only who verifies the folder anyway (as the
                runner of a stage does) passes False, to read the files once and not twice.

        Raises:
            InputError: the artifact is gone, was replaced, or differs from its digests.
        """

    @abstractmethod
    def manifest(self, ref: ArtifactRef) -> Manifest:
        """What the artifact says of itself, at the cost of one small file.

        Raises:
            InputError: the artifact is gone or was replaced.
        """

    @abstractmethod
    def destination(self, kind: str, key: str) -> Path:
        """The local folder where the runner is to publish the artifact."""

    @abstractmethod
    def workspace(self, kind: str, key: str) -> Path:
        """The local folder for work in progress, on the same file system as the destination."""

    @abstractmethod
    def adopt(self, kind: str, key: str) -> ArtifactRef:
        """Take over what the runner published at :meth:`destination`.

        Raises:
            InputError: there is no artifact of this kind and key.
        """

    @abstractmethod
    def read_pointer(self, name: str) -> ArtifactRef | None:
        """What ``name`` (``asset`` or ``asset/partition``) points to, or None.

        Raises:
            InputError: the pointer cannot be read.
        """

    @abstractmethod
    def write_pointer(self, name: str, ref: ArtifactRef) -> None:
        """Let ``name`` point to ``ref``; a reader sees the old reference or the new one, never half."""

    @abstractmethod
    def list_pointers(self, prefix: str) -> dict[str, ArtifactRef]:
        """Pointers named ``prefix/<rest>``, by ``<rest>`` and in its order (partitions of an asset)."""


class FolderArtifactStore(ArtifactStore):
    """Artifacts in a folder of this machine.

    ``root/<kind>/<key>`` are artifacts, ``root/../pointers/<feed>`` pointers, ``root/../work`` work in
    progress. References are resolved by kind and key, so that the whole home can be moved.
    """

    root: str

    @override
    def find(self, kind: str, key: str) -> ArtifactRef | None:
        folder = self.destination(kind, key)
        if not (folder / MANIFEST).exists():
            return None
        found = reference(folder)
        if (found.kind, found.key) != (kind, key):
            raise InputError(
                f"{folder} holds {found.kind} {found.key}; expected {kind} {key}: "
                "delete the folder and run again"
            )
        return found

    @override
    def find_by_digest(self, kind: str, digest: str) -> ArtifactRef | None:
        for manifest in sorted((self._root / segment(kind)).glob(f"*/{MANIFEST}")):
            try:
                found = reference(manifest.parent)
            except InputError:
                continue  # another one, damaged: not the one that was asked for
            if found.digest == digest:
                return found
        return None

    @override
    def fetch(self, ref: ArtifactRef, *, check: bool = True) -> Path:
        folder = self.destination(ref.kind, ref.key)
        if check:
            verify(folder, kinds=[ref.kind], digest=ref.digest)
        else:
            self.manifest(ref)
        return folder

    @override
    def manifest(self, ref: ArtifactRef) -> Manifest:
        folder = self.destination(ref.kind, ref.key)
        found = read_manifest(folder)
        if found.digest != ref.digest:
            raise InputError(f"{folder} has digest {found.digest}, expected {ref.digest}; it was replaced")
        return found

    @override
    def destination(self, kind: str, key: str) -> Path:
        return self._root / segment(kind) / segment(key)

    @override
    def workspace(self, kind: str, key: str) -> Path:
        return self._root.parent / "work" / segment(kind) / segment(key)

    @override
    def adopt(self, kind: str, key: str) -> ArtifactRef:
        found = self.find(kind, key)
        if found is None:
            raise InputError(f"{self.destination(kind, key)} is not an artifact: nothing was published there")
        return found

    @override
    def read_pointer(self, name: str) -> ArtifactRef | None:
        return self._read(self._pointer_file(name))

    @override
    def write_pointer(self, name: str, ref: ArtifactRef) -> None:
        file = self._pointer_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, msgspec.json.encode(ref))

    @override
    def list_pointers(self, prefix: str) -> dict[str, ArtifactRef]:
        folder = self._pointer_file(prefix).with_suffix("")
        pointers = {}
        for file in folder.rglob("*.json"):
            if file.name.startswith("."):
                continue
            ref = self._read(file)
            if ref is not None:
                rest = file.relative_to(folder).as_posix().removesuffix(POINTER_SUFFIX)
                pointers[name_in(rest)] = ref
        return dict(sorted(pointers.items()))

    @property
    def _root(self) -> Path:
        return Path(self.root).absolute()

    def _pointer_file(self, name: str) -> Path:
        return self._root.parent / "pointers" / segment(self.feed) / (path_of(name) + POINTER_SUFFIX)

    def _read(self, file: Path) -> ArtifactRef | None:
        try:
            ref = msgspec.json.decode(file.read_bytes(), type=ArtifactRef)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise InputError(f"{file} is not a reference: {error}; delete it and materialize again") from None
        return msgspec.structs.replace(ref, uri=str(self.destination(ref.kind, ref.key)))


POINTER_SUFFIX = ".json"


def path_of(name: str) -> str:
    """The name of a pointer as a relative path, whatever characters it is made of."""
    return "/".join(segment(part) for part in name.split("/"))


def name_in(path: str) -> str:
    """The name that :func:`path_of`, or :func:`segment`, made ``path`` of."""
    return unquote(path)


def segment(name: str) -> str:
    """``name`` as one path segment that stays inside its folder."""
    if not name:
        raise ValueError("an artifact or pointer name has an empty part")
    encoded = quote(name, safe=" @:=+,")
    return "%2E" + encoded[1:] if encoded.startswith(".") else encoded
