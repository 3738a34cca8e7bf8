"""Artifacts and pointers in S3.

Under ``location``:

- ``artifacts/<kind>/<key>/manifest.json`` makes an artifact exist. It is created once, last, on the condition
  that there is none: of several that make the same artifact the first one counts for all.
- ``artifacts/<kind>/<key>/<digest>/`` holds its files and the manifest again, so that the folder is complete
  for whoever mounts it. As its name comes from the content, two that differ never write over each other.
- ``digests/<kind>/<digest>/<key>`` are empty, and lead from a content to its key.
- ``pointers/<feed>/<name>.json`` are the pointers.

What was begun and never finished has no manifest; nobody sees it, and a repeat goes on with it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import (
    MANIFEST,
    ArtifactRef,
    FileEntry,
    Manifest,
    parse_manifest,
    read_manifest,
    reference_to,
    sha256_of,
    verify,
)
from ml.errors import InputError
from resources.artifact_cache import ArtifactCache
from resources.artifact_store import POINTER_SUFFIX, ArtifactStore, name_in, path_of, segment
from resources.aws import AwsAccess
from resources.s3_objects import COPY_BYTES, PART_BYTES, ConflictError, S3Objects

_DIGITS = 16
"""Of the digest, in the name of an artifact's folder."""


class S3ArtifactStore(ArtifactStore):
    """Artifacts in S3, with verified copies of those in use on this machine."""

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    aws: dg.ResourceDependency[AwsAccess]
    location: str
    """``s3://bucket/prefix``."""
    home: str
    """Local folder: copies below ``cache``, work in progress below ``work``."""
    part_bytes: int = PART_BYTES
    copy_bytes: int = COPY_BYTES
    cache_bytes: int = 50 * 1024**3
    """Copies beyond it are removed, the longest unused first, unless a living process uses them."""

    @override
    def find(self, kind: str, key: str) -> ArtifactRef | None:
        found = self._stored(kind, key)
        return None if found is None else self._reference(found)

    @override
    def find_by_digest(self, kind: str, digest: str) -> ArtifactRef | None:
        for key in self._objects.sizes(f"digests/{segment(kind)}/{digest}"):
            encoded = self._objects.read(self._manifest_of(kind, name_in(key)))
            if encoded is None:
                continue
            try:
                found = parse_manifest(encoded, key)
            except InputError:
                continue  # another one, damaged: not the one that was asked for
            if (found.kind, found.digest) == (kind, digest):
                return self._reference(found)
        return None

    @override
    def fetch(self, ref: ArtifactRef, *, check: bool = True) -> Path:
        manifest = self.manifest(ref)
        if not self._cache.is_copy_of(ref):
            self._cache.make_room(sum(entry.bytes for entry in manifest.files.values()))
        with self._cache.held(ref.kind, ref.key) as folder:
            if not self._cache.is_copy_of(ref) or (check and not _is_sound(folder, ref)):
                self._cache.put(ref, lambda partial: self._download(ref, manifest, partial))
            self._cache.mark_stored(manifest)
        return folder

    @override
    def manifest(self, ref: ArtifactRef) -> Manifest:
        found = self._stored(ref.kind, ref.key)
        if found is None:
            place = self._objects.uri(self._manifest_of(ref.kind, ref.key))
            raise InputError(f"{place} is missing: {ref.kind} {ref.key} is not an artifact (any more)")
        if found.digest != ref.digest:
            place = self._objects.uri(self._manifest_of(ref.kind, ref.key))
            raise InputError(f"{place} has digest {found.digest}, expected {ref.digest}; it was replaced")
        return found

    @override
    def destination(self, kind: str, key: str) -> Path:
        return self._cache.folder(kind, key)

    @override
    def workspace(self, kind: str, key: str) -> Path:
        return self._home / "work" / segment(kind) / segment(key)

    @override
    def adopt(self, kind: str, key: str) -> ArtifactRef:
        """Upload what the runner published; see the base class.

        If another machine was faster, its artifact is the one: ours goes where the content differs.

        Raises:
            InputError: there is no artifact of this kind and key, or it is damaged.
        """
        with self._cache.held(kind, key) as folder:
            ref = self.find(kind, key) or self._upload(kind, key, folder)
            if self._cache.is_copy_of(ref):
                self._cache.mark_stored(read_manifest(folder))
            else:
                self._cache.discard(kind, key)
        self._cache.make_room()
        return ref

    def adopt_from(self, uri: str, kind: str, key: str) -> ArtifactRef:
        """Take over an artifact that a job wrote elsewhere in S3, without its passing through this machine.

        Args:
            uri: The folder with its manifest, ``s3://bucket/prefix``.
            kind: What the artifact has to be.
            key: And of which key.

        Raises:
            InputError: there is no such artifact, or a file is missing or differs from the manifest.
        """
        if found := self.find(kind, key):
            return found
        source = S3Objects(self.aws, uri)
        encoded = source.read(MANIFEST)
        if encoded is None:
            raise InputError(f"{uri} is not an artifact: it has no {MANIFEST} (unfinished or a wrong path)")
        manifest = _expected(parse_manifest(encoded, source.uri(MANIFEST)), source.uri(MANIFEST), kind, key)
        folder = _folder_of(manifest)
        self._objects.copy(uri, folder, self._absent(folder, manifest.files))
        return self._publish(manifest, encoded)

    def uri(self, ref: ArtifactRef) -> str:
        """Where all files of the artifact lie, with its manifest: ``s3://…`` without a slash at its end."""
        return self._objects.uri(_folder_of(ref))

    @override
    def read_pointer(self, name: str) -> ArtifactRef | None:
        place = self._pointer(name)
        encoded = self._objects.read(place)
        return None if encoded is None else self._pointed_to(encoded, place)

    @override
    def write_pointer(self, name: str, ref: ArtifactRef) -> None:
        self._objects.write(self._pointer(name), msgspec.json.encode(ref))

    @override
    def list_pointers(self, prefix: str) -> dict[str, ArtifactRef]:
        folder = self._pointer(prefix).removesuffix(POINTER_SUFFIX)
        names = [name for name in self._objects.sizes(folder) if name.endswith(POINTER_SUFFIX)]
        contents = self._objects.read_all([f"{folder}/{name}" for name in names])
        pointers = {
            name_in(name.removesuffix(POINTER_SUFFIX)): self._pointed_to(encoded, f"{folder}/{name}")
            for name, encoded in zip(names, contents, strict=True)
            if encoded is not None
        }
        return dict(sorted(pointers.items()))

    @property
    def _home(self) -> Path:
        return Path(self.home).absolute()

    @property
    def _cache(self) -> ArtifactCache:
        return ArtifactCache(self._home / "cache", self.cache_bytes)

    @property
    def _objects(self) -> S3Objects:
        return S3Objects(self.aws, self.location, part_bytes=self.part_bytes, copy_bytes=self.copy_bytes)

    def _stored(self, kind: str, key: str) -> Manifest | None:
        name = self._manifest_of(kind, key)
        encoded = self._objects.read(name)
        if encoded is None:
            return None
        place = self._objects.uri(name)
        return _expected(parse_manifest(encoded, place), place, kind, key)

    def _reference(self, manifest: Manifest) -> ArtifactRef:
        return reference_to(manifest, self._objects.uri(_folder_of(manifest)))

    def _manifest_of(self, kind: str, key: str) -> str:
        return f"artifacts/{segment(kind)}/{segment(key)}/{MANIFEST}"

    def _upload(self, kind: str, key: str, folder: Path) -> ArtifactRef:
        manifest = _expected(verify(folder), str(folder), kind, key)
        place = _folder_of(manifest)
        self._objects.upload(place, self._absent(place, manifest.files), folder)
        return self._publish(manifest, (folder / MANIFEST).read_bytes())

    def _absent(self, folder: str, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        """What an interrupted attempt did not get to."""
        there = self._objects.sizes(folder)
        return {
            name: entry
            for name, entry in files.items()
            if there.get(name) != entry.bytes or not self._objects.has(f"{folder}/{name}", entry)
        }

    def _publish(self, manifest: Manifest, encoded: bytes) -> ArtifactRef:
        """Let the artifact, whose files are all there, be found; or find the one of who was faster."""
        self._objects.write(f"{_folder_of(manifest)}/{MANIFEST}", encoded)
        kind, key = segment(manifest.kind), segment(manifest.key)
        self._objects.write(f"digests/{kind}/{manifest.digest}/{key}", b"")
        try:
            self._objects.write(self._manifest_of(manifest.kind, manifest.key), encoded, new=True)
        except ConflictError:
            faster = self.find(manifest.kind, manifest.key)
            if faster is None:
                place = self._objects.uri(self._manifest_of(manifest.kind, manifest.key))
                raise dg.Failure(f"{place} is being written by another at this moment: run again") from None
            return faster
        return self._reference(manifest)

    def _download(self, ref: ArtifactRef, manifest: Manifest, partial: Path) -> None:
        """Fill a local folder, and hold it against the digests."""
        for name in manifest.files:
            if not (partial / name).resolve().is_relative_to(partial.resolve()):
                self._refuse(ref, f"its manifest lists {name}, which lies outside of the artifact")
        for path in partial.rglob("*"):  # halves of files that a killed process left
            if path.is_file() and path.relative_to(partial).as_posix() not in manifest.files:
                path.unlink()
        missing = [name for name, entry in manifest.files.items() if not _is_file(partial / name, entry)]
        self._objects.download(_folder_of(ref), missing, partial)
        (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        try:
            verify(partial, kinds=[ref.kind], digest=ref.digest)
        except InputError as error:
            self._refuse(ref, str(error))

    def _refuse(self, ref: ArtifactRef, reason: str) -> NoReturn:
        raise InputError(f"{self.uri(ref)} is damaged: {reason}")

    def _pointer(self, name: str) -> str:
        return f"pointers/{segment(self.feed)}/{path_of(name)}{POINTER_SUFFIX}"

    def _pointed_to(self, encoded: bytes, place: str) -> ArtifactRef:
        try:
            ref = msgspec.json.decode(encoded, type=ArtifactRef)
        except msgspec.DecodeError as error:
            raise InputError(
                f"{self._objects.uri(place)} is not a reference: {error}; delete it and materialize again"
            ) from None
        return msgspec.structs.replace(ref, uri=self.uri(ref))


def _folder_of(artifact: ArtifactRef | Manifest) -> str:
    return f"artifacts/{segment(artifact.kind)}/{segment(artifact.key)}/{artifact.digest[:_DIGITS]}"


def _expected(found: Manifest, place: str, kind: str, key: str) -> Manifest:
    if (found.kind, found.key) != (kind, key):
        raise InputError(
            f"{place} holds {found.kind} {found.key}; expected {kind} {key}: delete the folder and run again"
        )
    return found


def _is_file(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256


def _is_sound(folder: Path, ref: ArtifactRef) -> bool:
    try:
        verify(folder, kinds=[ref.kind], digest=ref.digest)
    except InputError:
        return False
    return True
