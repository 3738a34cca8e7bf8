"""Where the tests of artifact stores run: a store, another machine's view of it, and ways to do it harm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

from ml.artifacts import MANIFEST, ArtifactRef, write_manifest
from resources.artifact_store import ArtifactStore, FolderArtifactStore
from resources.s3_artifact_store import S3ArtifactStore
from tests.aws.conftest import BUCKET, access

Publish = Callable[..., ArtifactRef]

KIND, KEY = "offers", "0123456789abcdef" * 2


class World(ABC):
    """One kind of store; ``store`` is the one under test."""

    store: ArtifactStore

    @abstractmethod
    def elsewhere(self) -> ArtifactStore:
        """The store as a machine sees it that made none of the artifacts."""

    @abstractmethod
    def change(self, ref: ArtifactRef, name: str, content: bytes | None) -> None:
        """Overwrite a file of a stored artifact behind the store's back, or remove it."""

    @abstractmethod
    def move(self, ref: ArtifactRef, key: str) -> None:
        """Put a stored artifact into the place of another."""

    @abstractmethod
    def change_pointer(self, name: str, content: bytes) -> None:
        """Overwrite a pointer behind the store's back."""

    def publish(
        self, kind: str = KIND, key: str = KEY, content: str = "some content", files: tuple[str, ...] = ()
    ) -> ArtifactRef:
        """Make an artifact as the runner does, and have the store adopt it."""
        make(self.store, kind, key, {"data.txt": content} | dict.fromkeys(files, content))
        return self.store.adopt(kind, key)


class FolderWorld(World):
    """A folder of this machine; another process sees the very same."""

    def __init__(self, folder: Path) -> None:
        self._artifacts = folder / "home" / "artifacts"
        self.store = self.elsewhere()

    @override
    def elsewhere(self) -> ArtifactStore:
        return FolderArtifactStore(root=str(self._artifacts), feed="feed")

    @override
    def change(self, ref: ArtifactRef, name: str, content: bytes | None) -> None:
        file = Path(ref.uri, name)
        file.unlink() if content is None else file.write_bytes(content)

    @override
    def move(self, ref: ArtifactRef, key: str) -> None:
        Path(ref.uri).rename(Path(ref.uri).with_name(key))

    @override
    def change_pointer(self, name: str, content: bytes) -> None:
        (self._artifacts.parent / "pointers" / "feed" / f"{name}.json").write_bytes(content)


class S3World(World):
    """A bucket of the stand-in; another machine has another home."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._homes = 0
        self.s3 = access().client("s3")
        self.store = self.elsewhere()

    @override
    def elsewhere(self, **settings: object) -> S3ArtifactStore:
        self._homes += 1
        return S3ArtifactStore(
            aws=access(),
            location=f"s3://{BUCKET}/production",
            feed="feed",
            home=str(self._folder / f"home-{self._homes}"),
            **settings,
        )

    @override
    def change(self, ref: ArtifactRef, name: str, content: bytes | None) -> None:
        within = "" if name == MANIFEST else f"{ref.digest[:16]}/"
        key = f"production/artifacts/{ref.kind}/{ref.key}/{within}{name}"
        if content is None:
            self.s3.delete_object(Bucket=BUCKET, Key=key)
        else:
            self.s3.put_object(Bucket=BUCKET, Key=key, Body=content)

    @override
    def move(self, ref: ArtifactRef, key: str) -> None:
        place = f"production/artifacts/{ref.kind}"
        self.s3.copy_object(
            CopySource={"Bucket": BUCKET, "Key": f"{place}/{ref.key}/{MANIFEST}"},
            Bucket=BUCKET,
            Key=f"{place}/{key}/{MANIFEST}",
        )

    @override
    def change_pointer(self, name: str, content: bytes) -> None:
        self.s3.put_object(Bucket=BUCKET, Key=f"production/pointers/feed/{name}.json", Body=content)


def make(store: ArtifactStore, kind: str, key: str, files: dict[str, str | bytes]) -> Path:
    """What a finished stage leaves at the store's destination."""
    return make_folder(store.destination(kind, key), kind, key, files)


def make_folder(folder: Path, kind: str, key: str, files: dict[str, str | bytes]) -> Path:
    """A sealed artifact in ``folder``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_manifest(
        folder,
        kind=kind,
        key=key,
        inputs={},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={"rows": 3},
        seconds=0.1,
    )
    return folder
