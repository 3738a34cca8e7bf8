"""What every artifact store promises; a further implementation joins by one more ``params`` entry."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from ml.artifacts import MANIFEST, ArtifactRef, reference, write_manifest
from ml.errors import InputError
from resources.artifact_store import ArtifactStore, FolderArtifactStore

KIND, KEY = "offers", "0123456789abcdef" * 2


@pytest.fixture(params=[FolderArtifactStore])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return request.param(root=str(tmp_path / "home" / "artifacts"), feed="feed")


@pytest.fixture
def publish(store: ArtifactStore) -> Callable[..., ArtifactRef]:
    def publish(kind: str = KIND, key: str = KEY, content: str = "some content") -> ArtifactRef:
        folder = store.destination(kind, key)
        folder.mkdir(parents=True)
        (folder / "data.txt").write_text(content)
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
        return store.adopt(kind, key)

    return publish


def test_an_artifact_that_was_not_made_is_not_found(store):
    assert store.find(KIND, KEY) is None


def test_a_published_artifact_is_found_with_its_digest_and_metrics(store, publish):
    ref = publish()
    assert store.find(KIND, KEY) == ref
    assert (ref.kind, ref.key, ref.metrics) == (KIND, KEY, {"rows": 3})


def test_an_artifact_is_found_by_its_content_past_a_damaged_one(store, publish):
    damaged = publish(key="0" * 32, content="damaged")
    Path(damaged.uri, MANIFEST).write_text("{")
    ref = publish()
    assert store.find_by_digest(KIND, ref.digest) == ref
    assert store.find_by_digest(KIND, "0" * 64) is None
    assert store.find_by_digest("another_kind", ref.digest) is None


def test_a_folder_without_manifest_is_no_artifact(store):
    folder = store.destination(KIND, KEY)
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("half")
    assert store.find(KIND, KEY) is None
    with pytest.raises(InputError, match="not an artifact"):
        store.adopt(KIND, KEY)


def test_an_artifact_in_the_place_of_another_is_refused(store, publish):
    ref = publish()
    other = store.destination(KIND, "f" * 32)
    Path(ref.uri).rename(other)
    with pytest.raises(InputError, match=f"expected {KIND} {'f' * 32}"):
        store.find(KIND, "f" * 32)


def test_a_fetched_artifact_is_a_verified_local_folder(store, publish):
    folder = store.fetch(publish(content="true content"))
    assert (folder / "data.txt").read_text() == "true content"


@pytest.mark.parametrize("damage", ["other content", None])
def test_a_damaged_artifact_is_not_handed_out(store, publish, damage):
    ref = publish()
    file = store.destination(KIND, KEY) / "data.txt"
    file.unlink() if damage is None else file.write_text(damage)
    with pytest.raises(InputError, match=r"data\.txt"):
        store.fetch(ref)


@pytest.mark.parametrize("check", [True, False])
def test_an_artifact_with_another_digest_is_not_handed_out(store, publish, check):
    ref = msgspec.structs.replace(publish(), digest="0" * 64)
    with pytest.raises(InputError, match="replaced"):
        store.fetch(ref, check=check)


@pytest.mark.parametrize("check", [True, False])
def test_an_artifact_that_is_gone_is_an_input_error(store, publish, check):
    ref = publish()
    (store.destination(KIND, KEY) / MANIFEST).unlink()
    with pytest.raises(InputError, match="not an artifact"):
        store.fetch(ref, check=check)


def test_workspace_and_destination_lie_on_one_file_system(store):
    destination, workspace = store.destination(KIND, KEY), store.workspace(KIND, KEY)
    for folder in (destination, workspace):
        folder.mkdir(parents=True)
    assert destination.stat().st_dev == workspace.stat().st_dev
    assert destination not in workspace.parents


def test_a_pointer_leads_to_what_it_was_written_with(store, publish):
    ref = publish()
    assert store.read_pointer("offers/2026-11-02") is None
    store.write_pointer("offers/2026-11-02", ref)
    assert store.read_pointer("offers/2026-11-02") == ref


def test_a_pointer_written_again_leads_to_the_newer_artifact(store, publish):
    store.write_pointer("sample", publish(key="1" * 32))
    newer = publish(key="2" * 32)
    store.write_pointer("sample", newer)
    assert store.read_pointer("sample") == newer


def test_partitions_are_listed_in_order_and_apart_from_other_assets(store, publish):
    ref = publish()
    for name in ("offers/2026-11-03", "offers/2026-11-01", "offers", "offers_2/2026-11-02", "sample"):
        store.write_pointer(name, ref)
    assert list(store.list_pointers("offers")) == ["2026-11-01", "2026-11-03"]
    assert store.list_pointers("nothing") == {}


@pytest.mark.parametrize("partition", ["a.b", ".hidden", "50%", "ü ö", "a:b=c", "..", "x.json"])
def test_any_partition_name_survives_the_round_trip(store, publish, partition):
    ref = publish()
    store.write_pointer(f"asset/{partition}", ref)
    assert store.read_pointer(f"asset/{partition}") == ref
    assert store.list_pointers("asset") == {partition: ref}


def test_a_reader_never_sees_half_a_pointer_while_many_write(store, publish):
    refs = [publish(key=f"{number:032x}") for number in range(8)]

    def write(ref: ArtifactRef) -> None:
        for _ in range(10):
            store.write_pointer("busy", ref)

    with ThreadPoolExecutor(max_workers=len(refs)) as pool:
        writers = [pool.submit(write, ref) for ref in refs]
        seen = []
        while not all(writer.done() for writer in writers):
            seen.append(store.read_pointer("busy"))
    for writer in writers:
        writer.result()
    assert all(ref is None or ref in refs for ref in seen)
    assert store.read_pointer("busy") in refs


class TestFolder:
    """What only the folder store has."""

    def test_references_hold_after_the_home_was_moved(self, tmp_path, publish, store):
        ref = publish()
        store.write_pointer("offers/2026-11-02", ref)
        (tmp_path / "home").rename(tmp_path / "moved")
        moved = FolderArtifactStore(root=str(tmp_path / "moved" / "artifacts"), feed="feed")
        pointed = moved.read_pointer("offers/2026-11-02")
        assert pointed is not None
        assert pointed.digest == ref.digest
        assert moved.fetch(pointed) == tmp_path / "moved" / "artifacts" / KIND / KEY
        assert pointed == reference(moved.fetch(pointed))

    def test_a_pointer_that_a_crash_left_unfinished_is_not_listed(self, tmp_path, publish, store):
        ref = publish()
        store.write_pointer("offers/2026-11-02", ref)
        folder = tmp_path / "home" / "pointers" / "feed" / "offers"
        (folder / ".2026-11-03.json.0123.partial").write_bytes(b'{"kind"')
        assert list(store.list_pointers("offers")) == ["2026-11-02"]

    def test_a_pointer_that_somebody_edited_wrongly_is_named(self, tmp_path, publish, store):
        store.write_pointer("sample", publish())
        (tmp_path / "home" / "pointers" / "feed" / "sample.json").write_text("not json")
        with pytest.raises(InputError, match=r"sample\.json is not a reference"):
            store.read_pointer("sample")
