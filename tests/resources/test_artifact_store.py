"""What every artifact store promises; a further implementation joins by one more world."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.artifacts import MANIFEST, ArtifactRef, reference, verify
from ml.errors import InputError
from resources.artifact_store import ArtifactStore, FolderArtifactStore
from tests.resources.artifact_worlds import KEY, KIND, FolderWorld, Publish, S3World, World


@pytest.fixture(params=["folder", "s3"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "folder":
        return FolderWorld(tmp_path)
    request.getfixturevalue("stand_in")
    return S3World(tmp_path)


@pytest.fixture
def store(world: World) -> ArtifactStore:
    return world.store


@pytest.fixture
def publish(world: World) -> Publish:
    return world.publish


def test_an_artifact_that_was_not_made_is_not_found(store):
    assert store.find(KIND, KEY) is None


def test_a_published_artifact_is_found_with_its_digest_and_metrics(store, publish):
    ref = publish()
    assert store.find(KIND, KEY) == ref
    assert (ref.kind, ref.key, ref.metrics) == (KIND, KEY, {"rows": 3})


def test_an_artifact_is_found_by_its_content_past_a_damaged_one(world, store, publish):
    ref = publish()
    world.change(publish(key="0" * 32), MANIFEST, b"{")
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


def test_an_artifact_in_the_place_of_another_is_refused(world, store, publish):
    world.move(publish(), "f" * 32)
    with pytest.raises(InputError, match=f"expected {KIND} {'f' * 32}"):
        store.find(KIND, "f" * 32)


@pytest.mark.parametrize("check", [True, False])
def test_a_fetched_artifact_is_a_complete_local_folder(world, store, publish, check):
    ref = publish(content="true content", files=("part/ü 1.txt",))
    for reader in (store, world.elsewhere()):
        folder = reader.fetch(ref, check=check)
        assert (folder / "data.txt").read_text() == "true content"
        assert verify(folder, kinds=[KIND], digest=ref.digest) == reader.manifest(ref)
        assert sorted(verify(folder).files) == ["data.txt", "part/ü 1.txt"]


@pytest.mark.parametrize("damage", [b"other content", b"SOME CONTENT", None])
def test_a_damaged_artifact_is_not_handed_out(world, publish, damage):
    ref = publish()
    world.change(ref, "data.txt", damage)
    with pytest.raises(InputError, match=r"data\.txt"):
        world.elsewhere().fetch(ref)


@pytest.mark.parametrize("check", [True, False])
def test_an_artifact_with_another_digest_is_not_handed_out(store, publish, check):
    ref = msgspec.structs.replace(publish(), digest="0" * 64)
    with pytest.raises(InputError, match="replaced"):
        store.fetch(ref, check=check)


@pytest.mark.parametrize("check", [True, False])
def test_an_artifact_that_is_gone_is_an_input_error(world, store, publish, check):
    ref = publish()
    world.change(ref, MANIFEST, None)
    for reader in (store, world.elsewhere()):
        with pytest.raises(InputError, match="not an artifact"):
            reader.fetch(ref, check=check)
        with pytest.raises(InputError, match="not an artifact"):
            reader.manifest(ref)


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


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(names=st.sets(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), max_size=6))
def test_partitions_of_any_characters_are_listed_in_their_order(store, names):
    ref = ArtifactRef(kind=KIND, key=KEY, digest="d" * 64, uri="")
    asset = f"asset {len(_LISTED)}"
    _LISTED.append(asset)
    wanted = {name.replace("/", "-") for name in names}
    for name in sorted(wanted, reverse=True):
        store.write_pointer(f"{asset}/{name}", ref)
    assert list(store.list_pointers(asset)) == sorted(wanted)


_LISTED: list[str] = []
"""Each example gets an asset of its own."""


def test_a_pointer_that_somebody_edited_wrongly_is_named(world, store, publish):
    store.write_pointer("sample", publish())
    world.change_pointer("sample", b"not json")
    with pytest.raises(InputError, match=r"sample\.json is not a reference"):
        store.read_pointer("sample")


class TestFolder:
    """What only the folder store has."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        return FolderWorld(tmp_path)

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
