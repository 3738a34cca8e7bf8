"""The door to people: what is told is kept at home and reaches the channels of the routes, come what may."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import dagster as dg
import pytest

from ml.errors import InputError
from resources.alert_routes import Routes
from resources.alerting import OutboxAlerts, deliver
from resources.alerts import Moved, News
from resources.channels import ChannelError, Message
from resources.outbox import Outbox
from tests.resources.alert_channels import Heard, Receiver

ROOT = Path(__file__).resolve().parents[2]
FAILING = News(id="1", incident="check:a", state="failing", title="a is red", run="1", group="g")
RESOLVED = News(id="2", incident="check:a", state="resolved")


@pytest.fixture
def alerts(tmp_path: Path) -> OutboxAlerts:
    return OutboxAlerts(home=str(tmp_path / "home"))


def routes_file(folder: Path, url: str) -> str:
    file = folder / "alerts.toml"
    file.write_text(
        f'gather_seconds = 0\n[channels.hook]\ntype = "webhook"\nurl = "{url}"\nsecret = "${{HOOK_SECRET}}"\n'
        '[[routes]]\nchannels = ["hook"]\n'
    )
    return str(file)


def test_without_routes_the_outbox_keeps_what_happens(alerts: OutboxAlerts, tmp_path: Path) -> None:
    assert [news.id for news in alerts.tell([FAILING], {"checks": "7"})] == ["1"]
    assert alerts.tell([FAILING]) == []
    again = OutboxAlerts(home=str(tmp_path / "home"))
    assert [incident.title for incident in again.incidents()] == ["a is red"]
    assert again.bookmark("checks") == "7"
    assert (again.deliver(1).sent, again.channels()) == ((), [])
    again.tell([RESOLVED])
    assert (again.incidents(), len(again.incidents(all_of_them=True))) == ([], 1)


def test_who_reads_from_a_bookmark_that_moved_is_told(alerts: OutboxAlerts) -> None:
    alerts.tell([FAILING], {"checks": "7"}, {"checks": None})
    with pytest.raises(Moved):
        alerts.tell([RESOLVED], {"checks": "8"}, {"checks": None})
    assert (len(alerts.incidents()), alerts.bookmark("checks")) == (1, "7")


def test_what_the_routes_refer_to_is_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", "correct horse")
    alerts = OutboxAlerts(home=str(tmp_path), routes=routes_file(tmp_path, "http://127.0.0.1:9/"))
    alerts.tell([News(id="1", incident="a", state="failing", title="signed with correct horse")])
    assert [incident.title for incident in alerts.incidents()] == ["signed with ***"]
    assert not any(b"correct horse" in file.read_bytes() for file in tmp_path.glob("outbox.db*"))


def test_it_is_a_resource_like_any_other(alerts: OutboxAlerts) -> None:
    @dg.asset
    def told(alerts: dg.ResourceParam[OutboxAlerts]) -> None:
        alerts.tell([FAILING])

    assert dg.materialize([told], resources={"alerts": alerts}).success
    assert len(alerts.incidents()) == 1


def test_news_reaches_a_receiver_with_links_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    receiver = Receiver(seed=0)
    receiver.chance.choices = lambda fates, weights: ["answer"]  # type: ignore[method-assign, assignment]
    with receiver.running():
        alerts = OutboxAlerts(
            home=str(tmp_path),
            routes=routes_file(tmp_path, receiver.url),
            ui_url="https://dagster.example.com",
        )
        alerts.check()
        alerts.tell([FAILING])
        delivery = alerts.deliver(20)
        assert (delivery.failed, delivery.waiting, len(delivery.sent)) == ((), 0, 1)
        assert alerts.deliver(20).sent == ()
    (body,) = receiver.messages.values()
    assert "https://dagster.example.com/runs/1" in repr(body)
    (state,) = alerts.channels()
    assert (state.channel, state.sent, state.waiting, state.last_error) == ("hook", 1, 0, "")


def test_wrong_routes_are_one_line_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    alerts = OutboxAlerts(home=str(tmp_path), routes=routes_file(tmp_path, "http://127.0.0.1:9/"))
    for attempt in (alerts.check, lambda: alerts.tell([FAILING], {"checks": "7"}), lambda: alerts.deliver(1)):
        with pytest.raises(InputError, match="HOOK_SECRET") as caught:
            attempt()
        assert isinstance(caught.value, dg.Failure)
    assert (alerts.bookmark("checks"), alerts.incidents()) == (None, [])
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    assert len(alerts.tell([FAILING], {"checks": "7"})) == 1


def test_looking_whether_all_is_well_makes_no_outbox_and_finds_a_damaged_one(tmp_path: Path) -> None:
    OutboxAlerts(home=str(tmp_path / "new")).check()
    assert not (tmp_path / "new").exists()
    (tmp_path / "outbox.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"outbox\.db is damaged"):
        OutboxAlerts(home=str(tmp_path)).check()


def test_who_may_not_write_is_told_which_file(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        OutboxAlerts(home=home).tell([FAILING])
        for file in Path(home).iterdir():
            file.chmod(0o444)
        Path(home).chmod(0o555)
        code = (
            "import os, sys\nfrom resources.alerting import OutboxAlerts\nfrom resources.alerts import News\n"
            "OutboxAlerts(home=sys.argv[2]).tell([])  # now all is imported\n"
            "os.geteuid() or os.setuid(65534)  # root may write everywhere\n"
            "try: OutboxAlerts(home=sys.argv[1]).tell([News(id='2', incident='b', state='failing')])\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code, home, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
        )
        Path(home).chmod(0o755)
    assert answer.stdout.startswith("InputFailure the outbox ")
    assert f"{home}/outbox.db" in answer.stdout
    assert answer.stdout.count("\n") == 1


def test_the_definitions_do_not_load_the_database(tmp_path: Path) -> None:
    code = "import sys, resources.alerting; print('resources.outbox' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_one_bad_channel_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.alerting._GRACE", 0.1)
    released = threading.Event()

    def hang(_: Message) -> None:
        released.wait(60)

    def fall_over(_: Message) -> None:
        raise RuntimeError("https://hooks.example.com/hidden refused")

    def refuse(_: Message) -> None:
        raise ChannelError("bad recipient https://me:hidden@example.com/", permanent=True)

    names = {"hangs": hang, "falls over": fall_over, "refuses": refuse, "works": None}
    channels = {name: Heard(name, trouble) for name, trouble in names.items()}
    routes = Routes(channels, default=list(channels), gather_seconds=0)
    outbox = Outbox(f"sqlite:///{tmp_path}/outbox.db")
    outbox.tell([FAILING], {}, routes)
    delivery = deliver(outbox, routes, seconds=1.5)
    assert delivery.sent == ("works: opened: a is red",)
    assert sorted(delivery.failed) == [
        "falls over: RuntimeError in the channel",
        "hangs: it did not answer in time",
        "refuses: bad recipient https://***@example.com/",
    ]
    assert delivery.waiting == 3
    assert "hidden" not in repr(outbox.channels(channels))

    # The one that hung has taken the message after all, so it does not get it again.
    released.set()
    for thread in threading.enumerate():
        if thread.name == "alerts to hangs":
            thread.join()
    states = {state.channel: state for state in outbox.channels(channels)}
    assert (states["hangs"].sent, states["hangs"].waiting) == (1, 0)
