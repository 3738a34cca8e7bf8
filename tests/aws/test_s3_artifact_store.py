"""What only the store in S3 has: parts, encryption, races between machines, and all that S3 does wrong."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import dagster as dg
import msgspec
import pytest
from werkzeug.wrappers import Request, Response

from ml import stages
from ml.artifacts import MANIFEST, ArtifactRef, read_manifest, verify
from ml.errors import InputError
from resources.compute import LocalCompute, StageResult
from resources.io_manager import ArtifactRefIOManager
from resources.s3_artifact_store import S3ArtifactStore
from resources.s3_lease import lease
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn, environment
from tests.resources.artifact_worlds import KEY, KIND, S3World, make, make_folder
from tests.resources.stand_in import STAND_INS, StandInParameters

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
PART = 5 * MIB
BIG = os.urandom(2 * PART + MIB)
"""Three parts."""
KMS_KEY = "arn:aws:kms:eu-central-1:123456789012:key/offers"
LARGE_FILE = "big.bin"


@pytest.fixture
def world(stand_in: StandIn, tmp_path: Path) -> S3World:
    return S3World(tmp_path)


@pytest.fixture
def store(world: S3World) -> S3ArtifactStore:
    return world.elsewhere(part_bytes=PART)


def place_of(folder: Path, name: str) -> str:
    """Path of an artifact's file in requests to the stand-in."""
    manifest = read_manifest(folder)
    return f"/{BUCKET}/production/artifacts/{manifest.kind}/{manifest.key}/{manifest.digest[:16]}/{name}"


def stored(world: S3World) -> list[str]:
    return sorted(
        item["Key"].removeprefix("production/")
        for item in world.s3.list_objects_v2(Bucket=BUCKET).get("Contents", ())
    )


def test_a_stored_artifact_is_a_complete_folder_with_its_manifest_on_top(world):
    ref = world.publish(files=("part/ü 1.txt",))
    folder = f"artifacts/{KIND}/{KEY}"
    assert stored(world) == sorted(
        [
            f"{folder}/{MANIFEST}",
            f"{folder}/{ref.digest[:16]}/data.txt",
            f"{folder}/{ref.digest[:16]}/{MANIFEST}",
            f"{folder}/{ref.digest[:16]}/part/ü 1.txt",
            f"digests/{KIND}/{ref.digest}/{KEY}",
        ]
    )
    assert ref.uri == world.store.uri(ref) == f"s3://{BUCKET}/production/{folder}/{ref.digest[:16]}"


def test_a_bucket_of_its_own_needs_no_prefix(world, tmp_path):
    store = S3ArtifactStore(aws=access(), location=f"s3://{BUCKET}", feed="feed", home=str(tmp_path / "home"))
    folder = make_folder(tmp_path / "job", KIND, KEY, {"data.txt": "content"})
    for file in folder.iterdir():
        world.s3.put_object(Bucket=BUCKET, Key=file.name, Body=file.read_bytes())
    ref = store.adopt_from(f"s3://{BUCKET}/", KIND, KEY)
    assert ref.uri == f"s3://{BUCKET}/artifacts/{KIND}/{KEY}/{ref.digest[:16]}"
    assert (store.fetch(ref) / "data.txt").read_text() == "content"


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_a_stage_run_on_one_machine_is_found_by_a_run_on_another(world, monkeypatch, stage):
    for name, stand_in_stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stand_in_stage)
    results: list[StageResult] = []

    @dg.asset
    def made(context: dg.AssetExecutionContext, compute: LocalCompute) -> dg.MaterializeResult[ArtifactRef]:
        first = compute.run(context, "light", {}, StandInParameters(text="abc"))
        second = compute.run(context, stage, {"upstream": first.ref}, StandInParameters(text="def"))
        results.append(second)
        return dg.MaterializeResult(value=second.ref)

    for store in (world.store, world.elsewhere()):
        compute = LocalCompute(store=store, program="tests.resources.stand_in")
        resources = {"compute": compute, "io_manager": ArtifactRefIOManager(store=store)}
        dg.materialize([made], resources=resources)
        assert world.store.read_pointer("made") == results[-1].ref
    assert [result.reused for result in results] == [False, True]
    assert results[0].ref == results[1].ref


class TestTransfers:
    """Parts, encryption, interruptions."""

    def test_large_files_travel_in_parts(self, stand_in, world, store):
        folder = make(store, KIND, KEY, {LARGE_FILE: BIG, "small.txt": b"small"})
        place = place_of(folder, LARGE_FILE)
        ref = store.adopt(KIND, KEY)
        assert stand_in.calls.count(("s3", f"PUT {place}")) == 3
        assert stand_in.calls.count(("s3", f"POST {place}")) == 2
        fetched = world.elsewhere(part_bytes=PART).fetch(ref)
        assert stand_in.calls.count(("s3", f"GET {place}")) == 3
        assert (fetched / LARGE_FILE).read_bytes() == BIG

    def test_every_object_is_encrypted_with_the_key(self, stand_in, world, tmp_path):
        unencrypted: list[str] = []

        def look(request: Request) -> None:
            is_part = "partNumber" in request.args
            creates = (request.method == "PUT" and not is_part) or "uploads" in request.args
            given = request.headers.get("x-amz-server-side-encryption-aws-kms-key-id")
            if creates and given != KMS_KEY:
                unencrypted.append(f"{request.method} {request.full_path}")
            assert not creates or request.headers["x-amz-server-side-encryption"] == "aws:kms"

        stand_in.raw_handlers.append(look)
        store = S3ArtifactStore(
            aws=access(kms_key=KMS_KEY),
            location=f"s3://{BUCKET}/encrypted",
            feed="feed",
            home=str(tmp_path / "home"),
            part_bytes=PART,
            copy_bytes=PART,
        )
        make(store, KIND, KEY, {LARGE_FILE: BIG, "small.txt": b"small"})
        ref = store.adopt(KIND, KEY)
        other = S3ArtifactStore(**dict(store) | {"location": f"s3://{BUCKET}/encrypted_too"})
        other.adopt_from(store.uri(ref), KIND, KEY)
        store.write_pointer("offers", ref)
        with lease(store.aws, store.location, "release"):
            pass
        assert not unencrypted
        assert stand_in.calls.count(("s3", f"POST /{BUCKET}/encrypted_too/{place_in(other, ref)}")) == 2
        for item in world.s3.list_objects_v2(Bucket=BUCKET)["Contents"]:
            kept = world.s3.head_object(Bucket=BUCKET, Key=item["Key"])
            assert (kept["ServerSideEncryption"], kept["SSEKMSKeyId"]) == ("aws:kms", KMS_KEY)

    def test_an_interrupted_upload_leaves_no_artifact_and_a_repeat_goes_on(
        self, stand_in, world, store, no_pauses
    ):
        folder = make(store, KIND, KEY, {LARGE_FILE: BIG, "small.txt": b"small"})
        place, small = place_of(folder, LARGE_FILE), place_of(folder, "small.txt")
        broken = refuse_parts_after_the_first(stand_in, place)
        with pytest.raises(dg.Failure, match=rf"uploading s3:/{place}: InternalError.*run again"):
            store.adopt(KIND, KEY)
        assert ("s3", f"DELETE {place}") in stand_in.calls  # the parts that arrived are given up
        assert not world.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
        assert store.find(KIND, KEY) is None
        assert world.elsewhere().find(KIND, KEY) is None

        stand_in.raw_handlers.remove(broken)
        assert store.adopt(KIND, KEY) == store.find(KIND, KEY)
        assert stand_in.calls.count(("s3", f"PUT {small}")) == 1

    def test_a_process_killed_while_it_uploads_leaves_no_artifact_and_another_finishes(
        self, stand_in, world, store
    ):
        folder = make(store, KIND, KEY, {LARGE_FILE: BIG, "small.txt": b"small"})
        arrived, killed = threading.Event(), threading.Event()

        def hold(request: Request) -> None:
            if request.args.get("partNumber") == "2" and not killed.is_set():
                arrived.set()
                killed.wait(60)

        stand_in.raw_handlers.append(hold)
        program = (
            "import msgspec, sys\n"
            "from resources.aws import AwsAccess\n"
            "from resources.s3_artifact_store import S3ArtifactStore\n"
            "given = msgspec.json.decode(sys.argv[1])\n"
            f"S3ArtifactStore(aws=AwsAccess(region='eu-central-1'), **given).adopt('{KIND}', '{KEY}')\n"
        )
        settings = {name: value for name, value in dict(store).items() if name != "aws"}
        process = subprocess.Popen(
            [sys.executable, "-c", program, msgspec.json.encode(settings).decode()],
            cwd=ROOT,
            env={**os.environ, **environment(stand_in.url)},
        )
        assert arrived.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.set()

        assert world.elsewhere().find(KIND, KEY) is None
        digest = read_manifest(folder).digest
        assert store.adopt(KIND, KEY).digest == digest
        verify(world.elsewhere().fetch(store.adopt(KIND, KEY)), digest=digest)

    @pytest.mark.parametrize("name", ["data.txt", MANIFEST])
    def test_a_download_whose_connection_breaks_is_repeated(self, stand_in, world, name):
        ref = world.publish(content="some content " * 1000)
        cuts = cut_off(stand_in, name, times=3)
        verify(world.elsewhere().fetch(ref), digest=ref.digest)
        assert len(cuts) == 3

    @pytest.mark.parametrize("name", ["data.txt", MANIFEST])
    def test_a_download_that_breaks_again_and_again_is_one_clear_error(self, stand_in, world, name):
        ref = world.publish(content="some content " * 1000)
        cut_off(stand_in, name, times=1000)
        reader = world.elsewhere()
        with pytest.raises(dg.Failure, match=rf"^(downloading|reading) s3://.*{name}.*\(run again\)$"):
            reader.fetch(ref)
        stand_in.raw_handlers.clear()
        verify(reader.fetch(ref), digest=ref.digest)

    def test_what_arrived_before_an_interruption_is_not_fetched_again(self, stand_in, world):
        ref = world.publish(files=("another.txt",))
        cut_off(stand_in, "data.txt", times=1000)
        reader = world.elsewhere()
        with pytest.raises(dg.Failure):
            reader.fetch(ref)
        (partial,) = Path(reader.home, "cache", "partial", KIND, KEY).iterdir()
        (partial / "data.txt.0123abcd").write_text("half of what a killed process downloaded")
        stand_in.raw_handlers.clear()
        assert {file.name for file in reader.fetch(ref).iterdir()} == {"data.txt", "another.txt", MANIFEST}
        fetched = [call for _, call in stand_in.calls if call.startswith("GET") and "another.txt" in call]
        assert len(fetched) == 1


class TestFaults:
    """What S3 answers when it is busy, broken, or not for us."""

    ACTIONS: ClassVar[dict[str, Callable[[S3World, ArtifactRef], object]]] = {
        "find": lambda world, _: world.store.find(KIND, KEY),
        "find by digest": lambda world, ref: world.store.find_by_digest(KIND, ref.digest),
        "fetch": lambda world, ref: world.elsewhere().fetch(ref),
        "adopt": lambda world, _: world.publish(key="a" * 32, content="other"),
        "adopt from": lambda world, ref: world.elsewhere().adopt_from(world.store.uri(ref), KIND, "b" * 32),
        "read": lambda world, _: world.store.read_pointer("sample"),
        "write": lambda world, ref: world.store.write_pointer("sample", ref),
        "list": lambda world, _: world.store.list_pointers("offers"),
    }

    @pytest.fixture(params=ACTIONS)
    def act(self, request, world) -> Callable[[], object]:
        ref = world.publish()
        if request.param == "adopt from":
            ref = world.publish(key="b" * 32)
            world.change(ref, MANIFEST, None)
        world.store.write_pointer("offers/2026-11-02", ref)
        return lambda: self.ACTIONS[request.param](world, ref)

    @pytest.mark.parametrize("fault", [("SlowDown", 503), ("InternalError", 500)])
    def test_throttling_and_errors_that_pass_end_in_success(self, stand_in, act, no_pauses, fault):
        stand_in.fail_next("s3:", times=5, code=fault[0], status=fault[1])
        act()
        assert all(fault.times == 0 for fault in stand_in.faults)

    def test_lost_answers_end_in_success(self, stand_in, act, no_pauses):
        for method in ("PUT", "POST"):
            stand_in.fail_next(f"s3:{method}", times=6, code="InternalError", status=500, after=True)
        act()

    def test_errors_that_stay_are_one_line_that_names_the_object(self, stand_in, act, no_pauses):
        stand_in.fail_next("s3:", times=10_000, code="ServiceUnavailable", status=503)
        with pytest.raises(dg.Failure, match=rf"^\w+ s3://{BUCKET}/production/.*: \w+: .*run again.*$"):
            act()

    def test_a_denied_bucket_is_the_readers_to_mend(self, stand_in, act):
        stand_in.fail_next("s3:", times=10_000, code="AccessDenied", status=403)
        with pytest.raises(
            InputError, match=rf"^\w+ s3://{BUCKET}/production/.*(AccessDenied|403).*deploy/iam"
        ):
            act()
        assert len(stand_in.calls) < 100  # never tried twice

    def test_a_missing_bucket_is_named(self, world, tmp_path):
        store = S3ArtifactStore(
            aws=access(), location="s3://no-such-bucket/production", feed="feed", home=str(tmp_path)
        )
        make(store, KIND, KEY, {"data.txt": b"content"})
        for ask in (
            lambda: store.find(KIND, KEY),
            lambda: store.adopt(KIND, KEY),
            lambda: store.list_pointers("offers"),
            lambda: store.write_pointer("offers", ArtifactRef(kind=KIND, key=KEY, digest="d", uri="")),
        ):
            with pytest.raises(InputError, match=r"s3://no-such-bucket/production.*NoSuchBucket"):
                ask()


class TestListing:
    """S3 lists in pages, and the order is nobody's promise."""

    @pytest.fixture(autouse=True)
    def small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")

    def test_every_page_is_read(self, stand_in, world):
        ref = world.publish()
        days = [f"2026-11-{day:02}" for day in range(1, 11)]
        for day in reversed(days):
            world.store.write_pointer(f"offers/{day}", ref)
        stand_in.calls.clear()
        assert list(world.store.list_pointers("offers")) == days
        assert stand_in.calls.count(("s3", f"GET /{BUCKET}")) == 4

    def test_pages_in_any_order_come_out_in_ours(self, stand_in, world):
        ref = world.publish()
        for day in ("2026-11-02", "2026-11-01", "2026-11-03"):
            world.store.write_pointer(f"offers/{day}", ref)
        stand_in.raw_handlers.append(lambda request: reversed_listing(stand_in, request))
        assert list(world.store.list_pointers("offers")) == ["2026-11-01", "2026-11-02", "2026-11-03"]


class TestRaces:
    """Several machines, several processes."""

    def test_many_that_adopt_the_same_content_all_have_it(self, world):
        stores = [world.elsewhere() for _ in range(6)]
        for store in stores:
            make(store, KIND, KEY, {"data.txt": "the same"})
        with ThreadPoolExecutor(max_workers=6) as pool:
            refs = list(pool.map(lambda store: store.adopt(KIND, KEY), stores))
        assert refs == [world.store.find(KIND, KEY)] * 6
        for store in stores:
            verify(store.fetch(refs[0]), digest=refs[0].digest)

    def test_of_many_that_made_something_different_the_first_counts_for_all(self, world):
        stores = [world.elsewhere() for _ in range(6)]
        for number, store in enumerate(stores):
            make(store, KIND, KEY, {"data.txt": f"made by {number}"})
        with ThreadPoolExecutor(max_workers=6) as pool:
            refs = list(pool.map(lambda store: store.adopt(KIND, KEY), stores))
        assert refs == [world.store.find(KIND, KEY)] * 6
        contents = {(store.fetch(refs[0]) / "data.txt").read_text() for store in stores}
        assert len(contents) == 1
        assert [world.store.find_by_digest(KIND, refs[0].digest)] == [refs[0]]

    def test_a_manifest_that_another_is_just_writing_is_a_failure_to_retry(self, stand_in, world):
        stand_in.fail_next(
            f"s3:PUT /{BUCKET}/production/artifacts/{KIND}/{KEY}/{MANIFEST}",
            code="ConditionalRequestConflict",
            status=409,
        )
        with pytest.raises(dg.Failure, match=r"is being written by another at this moment: run again"):
            world.publish()
        assert world.store.adopt(KIND, KEY) == world.store.find(KIND, KEY)

    def test_many_that_fetch_at_once_download_once(self, stand_in, world):
        ref = world.publish()
        reader = world.elsewhere()
        stand_in.calls.clear()
        with ThreadPoolExecutor(max_workers=6) as pool:
            folders = list(pool.map(lambda _: reader.fetch(ref), range(6)))
        assert len({*folders}) == 1
        assert len([call for _, call in stand_in.calls if call.startswith("GET") and "data.txt" in call]) == 1


class TestCopies:
    """Verified copies on this machine."""

    def test_a_copy_is_downloaded_once(self, stand_in, world):
        ref = world.publish()
        reader = world.elsewhere()
        reader.fetch(ref)
        stand_in.calls.clear()
        for check in (True, False):
            reader.fetch(ref, check=check)
        assert all(call.endswith(f"/{MANIFEST}") for _, call in stand_in.calls)

    def test_what_was_made_here_is_not_downloaded(self, stand_in, world):
        ref = world.publish()
        world.store.fetch(ref)
        assert not [call for _, call in stand_in.calls if call.startswith("GET") and "data.txt" in call]

    @pytest.mark.parametrize("damage", ["other content", None])
    def test_a_damaged_copy_is_replaced(self, world, damage):
        ref = world.publish()
        file = world.store.fetch(ref) / "data.txt"
        file.unlink() if damage is None else file.write_text(damage)
        assert (world.store.fetch(ref) / "data.txt").read_text() == "some content"

    def test_a_damaged_artifact_is_named_with_its_place(self, world):
        ref = world.publish()
        world.change(ref, "data.txt", b"SOME CONTENT")
        with pytest.raises(InputError, match=rf"^{ref.uri} is damaged: .*data\.txt differs from its digest"):
            world.elsewhere().fetch(ref)

    def test_a_manifest_cannot_lead_out_of_the_folder(self, world):
        ref = world.publish()
        manifest = world.store.manifest(ref)
        files = {"../../outside.txt": manifest.files["data.txt"]}
        world.change(ref, MANIFEST, msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
        with pytest.raises(InputError, match=r"outside\.txt, which lies outside of the artifact"):
            world.elsewhere().fetch(ref)

    def test_copies_beyond_the_limit_make_room_unless_they_are_in_use(self, world):
        refs = [world.publish(key=f"{number:032x}", content=f"{number}" * 1000) for number in range(4)]
        reader = world.elsewhere(cache_bytes=2500)
        folders = [reader.fetch(ref) for ref in refs[:2]]
        forget_users(reader)
        folders += [reader.fetch(ref) for ref in refs[2:]]
        assert [folder.exists() for folder in folders] == [False, False, True, True]
        reader.fetch(refs[0])  # this process may be reading the last two
        assert [folder.exists() for folder in folders] == [True, False, True, True]


class TestWhatJobsWrote:
    """An artifact that lies elsewhere in S3, taken over there."""

    @pytest.fixture
    def written(self, world, tmp_path) -> Callable[..., str]:
        def written(**changes: bytes | None) -> str:
            """A job's output; files as in ``changes`` replaced or removed afterwards."""
            files = {"big": BIG, "part/ü 1.txt": "text", "+ %": "odd"}
            folder = make_folder(tmp_path / "job", KIND, KEY, files)
            for path in sorted(file for file in folder.rglob("*") if file.is_file()):
                content = changes.get(path.name, path.read_bytes())
                if content is not None:
                    key = f"production/jobs/1/output/{path.relative_to(folder)}"
                    world.s3.put_object(Bucket=BUCKET, Key=key, Body=content)
            return f"s3://{BUCKET}/production/jobs/1/output"

        return written

    @pytest.mark.parametrize("copy_bytes", [PART, 1024**3])
    def test_it_is_adopted_within_s3(self, stand_in, world, written, copy_bytes):
        store = world.elsewhere(part_bytes=PART, copy_bytes=copy_bytes)
        uri = written()
        stand_in.calls.clear()
        ref = store.adopt_from(uri, KIND, KEY)
        read = [call for _, call in stand_in.calls if call.startswith("GET") and not call.endswith(MANIFEST)]
        assert set(read) == {f"GET /{BUCKET}"}  # it is listed, and not read
        assert ref == world.store.find(KIND, KEY) == world.store.find_by_digest(KIND, ref.digest)
        assert (world.elsewhere().fetch(ref) / "big").read_bytes() == BIG
        assert store.adopt_from(uri, KIND, KEY) == ref

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"big": None}, r"output/big is missing .*delete the manifest and run again"),
            ({"big": b"too short"}, r"output/big has 9 bytes, its manifest says 11534336"),
            ({"+ %": b"ODD"}, r"output/\+ % differs from its digest"),
            ({MANIFEST: None}, r"jobs/1/output is not an artifact"),
            ({MANIFEST: b"{"}, r"manifest\.json cannot be read"),
        ],
    )
    def test_what_is_incomplete_or_differs_is_refused(self, world, written, changes, said):
        with pytest.raises(InputError, match=said):
            world.store.adopt_from(written(**changes), KIND, KEY)
        assert world.store.find(KIND, KEY) is None

    def test_a_file_that_arrived_wrong_is_copied_again(self, world, written):
        with pytest.raises(InputError, match="differs"):
            world.store.adopt_from(written(**{"+ %": b"ODD"}), KIND, KEY)
        ref = world.store.adopt_from(written(), KIND, KEY)
        assert (world.store.fetch(ref) / "+ %").read_text() == "odd"

    def test_an_artifact_of_another_key_is_refused(self, world, written):
        with pytest.raises(InputError, match=f"holds {KIND} {KEY}; expected {KIND} {'f' * 32}"):
            world.store.adopt_from(written(), KIND, "f" * 32)


def forget_users(store: S3ArtifactStore) -> None:
    """As if this process had been another one so far."""
    for file in Path(store.home, "cache", "users").iterdir():
        file.write_text("")


def place_in(store: S3ArtifactStore, ref: ArtifactRef) -> str:
    return store.uri(ref).removeprefix(store.location + "/") + f"/{LARGE_FILE}"


def refuse_parts_after_the_first(stand_in: StandIn, place: str) -> Callable[[Request], Response | None]:
    def refuse(request: Request) -> Response | None:
        if request.path == place and request.args.get("partNumber", "1") != "1":
            return Response("<Error><Code>InternalError</Code></Error>", 500, content_type="application/xml")
        return None

    stand_in.raw_handlers.append(refuse)
    return refuse


def cut_off(stand_in: StandIn, name: str, times: int) -> list[str]:
    """Close the connection in the middle of the next answers that carry the file; returns those done."""
    done: list[str] = []

    def cut(request: Request) -> Response | None:
        if request.method != "GET" or not request.path.endswith(f"/{name}") or len(done) >= times:
            return None
        done.append(request.path)
        whole = stand_in.by_moto(request)
        half = whole.get_data()[: len(whole.get_data()) // 2]
        answer = Response(half, whole.status_code, dict(whole.headers))
        answer.automatically_set_content_length = False
        answer.headers["Content-Length"] = str(len(whole.get_data()))
        return answer

    stand_in.raw_handlers.append(cut)
    return done


def reversed_listing(stand_in: StandIn, request: Request) -> Response | None:
    if "list-type" not in request.args:
        return None
    answer = stand_in.by_moto(request)
    text = answer.get_data(as_text=True)
    entries = re.findall(r"<Contents>.*?</Contents>", text, re.DOTALL)
    start, end = text.index(entries[0]), text.rindex("</Contents>") + len("</Contents>")
    return Response(text[:start] + "".join(reversed(entries)) + text[end:], content_type="application/xml")
