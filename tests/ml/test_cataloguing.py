import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, offer_text
from ml.progress import Progress
from ml.runner import StageSpec, run_stage
from ml.serving import cataloguing
from ml.serving import sent as sent_offers
from ml.serving.cataloguing import EndpointUnavailableError
from ml.serving.predictor import PREDICTION_SCHEMA, Prediction, Predictor, prediction_table
from ml.serving.sent import sent
from tests.ml.compiled_models import TITLES, seal
from tests.ml.test_serving import serving

Answer = Callable[[int, list[dict]], tuple[int, bytes]]


@pytest.fixture
def impatient(monkeypatch):
    """Retries without the waiting."""
    monkeypatch.setattr(cataloguing, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(cataloguing, "_LONGEST_PAUSE_SECONDS", 0.001)


def test_every_offer_comes_back_once_in_its_order_as_the_predictor_would_have_it(compiled_student, tmp_path):
    offers = _offers(tmp_path, 700)
    with serving(compiled_student, tmp_path / "state.json", "--workers", "1") as server:
        variant = f"model-{_version(compiled_student)}"
        spec = _spec(tmp_path, offers, compiled_student, server.url, batch_offers=64, variant=variant)
        artifact = run_stage(spec)
        spec = _spec(tmp_path / "other", offers, compiled_student, server.url, variant="model-other")
        with pytest.raises(InputError, match=r"refused offers: 400 .*there is no variant model-other here"):
            run_stage(spec)
    table = pq.read_table(tmp_path / "out" / "catalogued.parquet")
    expected = Predictor.load(compiled_student).predict(pq.read_table(offers / "offers.parquet").to_pylist())
    assert table.schema == PREDICTION_SCHEMA
    assert table.equals(prediction_table(expected))
    assert artifact.metrics["offers"] == 700
    assert artifact.metrics["uncatalogued"] == 0
    assert artifact.metrics["mean_confidence"] == pytest.approx(
        sum(prediction.confidence for prediction in expected) / 700
    )
    assert artifact.metrics["offers_per_second"] > 0


def test_a_day_without_offers_gives_an_empty_table(compiled_student, tmp_path):
    with _endpoint(_answering(compiled_student)) as url:
        artifact = run_stage(_spec(tmp_path, _offers(tmp_path, 0), compiled_student, url))
    assert artifact.metrics["offers"] == 0
    assert pq.read_table(tmp_path / "out" / "catalogued.parquet").schema == PREDICTION_SCHEMA


def test_an_endpoint_with_another_version_is_refused_naming_both(compiled_student, tmp_path):
    with (
        _endpoint(_answering(compiled_student, model_version="older")) as url,
        pytest.raises(
            InputError, match=f"serves model version older, expected {_version(compiled_student)}; deploy"
        ),
    ):
        run_stage(_spec(tmp_path, _offers(tmp_path, 10), compiled_student, url))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("impatient")
def test_a_busy_endpoint_is_asked_again_until_it_answers(compiled_student, tmp_path):
    answer = _answering(compiled_student)

    def busy(number, offers):
        return answer(number, offers) if number % 3 == 2 else (503, b'{"error": "busy"}')

    with _endpoint(busy) as url:
        artifact = run_stage(_spec(tmp_path, _offers(tmp_path, 100), compiled_student, url, batch_offers=10))
    assert artifact.metrics["offers"] == 100
    assert _offer_ids(tmp_path / "out") == [str(number) for number in range(100)]


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_that_stays_busy_is_given_up(compiled_student, tmp_path):
    with (
        _endpoint(lambda number, offers: (503, b'{"error": "busy"}')) as url,
        pytest.raises(EndpointUnavailableError, match=r"failed 8 times in a row .*busy"),
    ):
        run_stage(_spec(tmp_path, _offers(tmp_path, 10), compiled_student, url))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1", "does not answer"),
        ("localhost:80", "expected http://"),
        ("nonsense", "expected"),
    ],
)
def test_a_url_that_leads_nowhere_is_named(compiled_student, tmp_path, url, said):
    with pytest.raises(InputError, match=f"endpoint_url {url}.*{said}"):
        run_stage(_spec(tmp_path, _offers(tmp_path, 10), compiled_student, url))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"no such page", "refused offers: 404 no such page"),
        (200, b"<html>", "not an answer of this project's endpoint"),
        (200, b'{"predictions": []}', "0 predictions for 10 offers"),
    ],
)
def test_a_stranger_at_the_url_is_recognised(compiled_student, tmp_path, status, body, said):
    with _endpoint(lambda number, offers: (status, body)) as url, pytest.raises(InputError, match=said):
        run_stage(_spec(tmp_path, _offers(tmp_path, 10), compiled_student, url))


def test_answers_for_other_offers_are_refused(compiled_student, tmp_path):
    answer = _answering(compiled_student)
    with (
        _endpoint(lambda number, offers: answer(number, offers[::-1])) as url,
        pytest.raises(InputError, match="for others than were sent"),
    ):
        run_stage(_spec(tmp_path, _offers(tmp_path, 10), compiled_student, url))


def test_requests_stay_below_the_limit_of_the_endpoint(compiled_student, tmp_path, monkeypatch):
    monkeypatch.setattr(sent_offers, "_REQUEST_BYTES", 30_000)
    sizes = []
    answer = _answering(compiled_student)

    def measured(number, offers):
        sizes.append(len(msgspec.json.encode(offers)))
        return answer(number, offers)

    with _endpoint(measured) as url:
        run_stage(_spec(tmp_path, _offers(tmp_path, 50, description="word " * 5000), compiled_student, url))
    assert len(sizes) > 5
    assert max(sizes) < 31_000
    assert _offer_ids(tmp_path / "out") == [str(number) for number in range(50)]


def test_cutting_what_is_sent_does_not_change_the_text_that_a_model_reads():
    offer = {"title": "word " * 9000, "brand": "Bosch", "description": "tag <b>" * 9000}
    assert offer_text(sent(offer)) == offer_text(offer)


def test_after_a_kill_finished_shards_are_not_sent_again(compiled_student, tmp_path):
    offers = _offers(tmp_path, 25_000)
    answer = _answering(compiled_student)
    reached, go_on = threading.Event(), threading.Event()
    first_ids = []

    def stopping(number, batch):
        if int(batch[0]["offer_id"]) >= 15_000 and not go_on.is_set():
            reached.set()
            go_on.wait()
        if go_on.is_set():
            first_ids.append(int(batch[0]["offer_id"]))
        return answer(number, batch)

    with _endpoint(stopping) as url:
        spec = _spec(tmp_path, offers, compiled_student, url, batch_offers=500)
        spec_file = tmp_path / "spec.json"
        spec_file.write_bytes(msgspec.json.encode(spec))
        process = subprocess.Popen(
            [sys.executable, "-m", "ml", "catalogued_offers", "--spec", str(spec_file)]
        )
        try:
            assert reached.wait(120)
            shards = tmp_path / "out.work" / "checkpoints"
            _wait_for((shards / "shard-000000.parquet").exists)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        go_on.set()
        first_ids.clear()
        said = []
        artifact = run_stage(spec, Progress("catalogued_offers", said.append))
    assert "going on after 10,000 offers" in said
    assert min(first_ids) == 10_000
    assert artifact.metrics["offers"] == 25_000
    assert _offer_ids(tmp_path / "out") == [str(number) for number in range(25_000)]


def test_shards_of_another_model_are_not_taken_over(compiled_student, other_compiled_student, tmp_path):
    offers = _offers(tmp_path, 30)
    spec = _spec(tmp_path, offers, compiled_student, "http://127.0.0.1:1")
    checkpoints = Path(spec.workspace) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "origin.txt").write_text(f"{_version(other_compiled_student)} whatever")
    left = prediction_table(
        Predictor.load(other_compiled_student).predict([{"offer_id": "0", "title": "tent"}])
    )
    pq.write_table(left, checkpoints / "shard-000000.parquet")
    with _endpoint(_answering(compiled_student)) as url:
        run_stage(_spec(tmp_path, offers, compiled_student, url))
    versions = pq.read_table(tmp_path / "out" / "catalogued.parquet")["model_version"].unique().to_pylist()
    assert versions == [_version(compiled_student)]


def _offers(tmp_path: Path, count: int, **columns) -> Path:
    folder = tmp_path / "offers"
    folder.mkdir()
    rows = [
        {"offer_id": str(number), "shop_id": "s", "title": TITLES[number % len(TITLES)], **columns}
        for number in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=CLEAN_SCHEMA), folder / "offers.parquet")
    return seal(folder, "offers")


def _spec(tmp_path: Path, offers: Path, compiled: Path, url: str, **parameters) -> StageSpec:
    return StageSpec(
        stage="catalogued_offers",
        inputs={"offers": str(offers), "compiled_student": str(compiled)},
        parameters={"endpoint_url": url, **parameters},
        output=str(tmp_path / "out"),
        workspace=str(tmp_path / "out.work"),
    )


def _version(folder: Path) -> str:
    return short_version(read_manifest(folder).digest)


def _offer_ids(folder: Path) -> list[str]:
    return pq.read_table(folder / "catalogued.parquet")["offer_id"].to_pylist()


def _answering(compiled: Path, **changes) -> Answer:
    """An endpoint that knows one answer, of the version of ``compiled``."""
    known = Prediction(
        offer_id=None,
        category_id="tent",
        category_path="Everything > Tent",
        confidence=0.5,
        model_version=_version(compiled),
        taxonomy_version="t",
    )

    def answer(_number: int, offers: list[dict]) -> tuple[int, bytes]:
        predictions = [
            msgspec.structs.replace(known, offer_id=offer["offer_id"], **changes) for offer in offers
        ]
        return 200, msgspec.json.encode({"predictions": predictions})

    return answer


@contextmanager
def _endpoint(answer: Answer) -> Iterator[str]:
    """A scripted endpoint; ``answer`` gets the number of the request and its offers."""
    numbers = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            status, content = answer(next(numbers), msgspec.json.decode(body)["offers"])
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_arguments):
            """A client that was killed is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail("it did not happen")
