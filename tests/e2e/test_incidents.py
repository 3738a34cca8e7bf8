"""A hundred incidents, a daemon that is killed at random points, and receivers that count.

The checks are reported to Dagster's event log as a run would report them; sensors, daemon, code server,
outbox, HTTP and SMTP are the real ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from resources.alerting import OutboxAlerts
from tests.receivers import HttpReceiver, SmtpReceiver

from .conftest import ROOT, environment, free_port, wait_for

pytestmark = [pytest.mark.xdist_group("incidents"), pytest.mark.timeout(4000)]

INCIDENTS = 100
KILLS = 8
SECRET = "a-secret-of-the-receiver"
LOCATION = Path(__file__).with_name("incident_location.py")
ROUTES = """
seconds_between_messages = 1
gather_seconds = 0

[channels.hook]
type = "webhook"
url = "{hook}"
secret = "${{HOOK_SECRET}}"

[channels.mail]
type = "email"
host = "127.0.0.1"
port = {port}
tls = "none"
from = "alerts@example.com"
to = ["on-call@example.com"]

[[routes]]
channels = ["hook", "mail"]
"""


@dataclass
class Told:
    """What there was at the end."""

    home: Path
    hook: HttpReceiver
    mails: SmtpReceiver
    log: str
    kills: Counter[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Fail a hundred checks and pass every other of them again, while the daemon dies eight times."""
    folder = tmp_path_factory.mktemp("incidents")
    home, log = folder / "home", folder / "daemon.log"
    with HttpReceiver(honours_keys=True) as hook, SmtpReceiver() as mails:
        routes = folder / "routes.toml"
        routes.write_text(ROUTES.format(hook=hook.url, port=mails.port))
        env = environment(
            home,
            OFFER_ASSETS_ALERT_ROUTES=str(routes),
            OFFER_ASSETS_ENDPOINT_PORT=str(free_port()),
            DAGSTER_HOME=str(home / "dagster"),
            HOOK_SECRET=SECRET,
        )
        outbox = OutboxAlerts(home=str(home))
        chance, kills = random.Random(4), Counter[str]()
        with instance_at(home, env) as instance:
            for portion in portions():
                with daemon(env, log) as process:
                    looks = turns(log)
                    report(instance, portion)
                    wait_for(lambda looks=looks: turns(log) > looks, "a turn of the sensors")
                    # At any point of looking, keeping, sending and marking; a turn takes about 5 s.
                    die_at = time.monotonic() + chance.uniform(0, 6)
                    wait_for(lambda die_at=die_at: time.monotonic() >= die_at, "the kill")
                    kills[kill(process, chance)] += 1
            with daemon(env, log):
                wait_for(lambda: everything_is_told(outbox), "the last message")
        yield Told(home, hook, mails, log.read_text(), kills)


def portions() -> list[list[tuple[int, bool]]]:
    """What is reported before each kill: checks by number, and whether they passed."""
    events = [(number, False) for number in range(INCIDENTS)]
    events += [(number, True) for number in range(0, INCIDENTS, 2)]
    bounds = [len(events) * k // KILLS for k in range(KILLS + 1)]
    return [events[start:end] for start, end in itertools.pairwise(bounds)]


@contextlib.contextmanager
def instance_at(home: Path, env: dict[str, str]) -> Iterator[dg.DagsterInstance]:
    """The instance of ``home``, made as every command of the product makes it."""
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "from offer_assets.instance import prepare_dagster_home\n"
            "from resources.settings import Settings\n"
            "prepare_dagster_home(Settings.from_environment())",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        yield instance


@contextlib.contextmanager
def daemon(env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon with its code server."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", "-f", str(LOCATION), "-d", str(ROOT)],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Kill -9: everything, or the daemon alone, whose code server goes on for a while."""
    if chance.random() < 0.5:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return "daemon"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "group"


def report(instance: dg.DagsterInstance, portion: list[tuple[int, bool]]) -> None:
    for number, passed in portion:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey("watched"),
                check_name=check(number),
                passed=passed,
                severity=dg.AssetCheckSeverity.ERROR,
                description=f"number {number}",
                metadata={},
            )
        )


def turns(log: Path) -> int:
    """How often a daemon has turned to its sensors."""
    return log.read_text().count("Checking for new runs")


def check(number: int) -> str:
    return f"check_{number:03d}"


def everything_is_told(outbox: OutboxAlerts) -> bool:
    incidents = outbox.incidents(all_of_them=True)
    resolved = sum(incident.state == "resolved" for incident in incidents)
    return (
        len(incidents) == INCIDENTS
        and resolved == INCIDENTS // 2
        and all(not state.waiting for state in outbox.channels())
    )


def lines_of(told: Told) -> list[dict[str, str]]:
    """What people read who get each message of the webhook once."""
    return [line for effect in told.hook.effects for line in json.loads(effect.body)["lines"]]


def test_the_daemon_was_killed_in_both_ways(told: Told) -> None:
    assert sum(told.kills.values()) == KILLS
    assert min(told.kills["daemon"], told.kills["group"]) >= 2


def test_every_incident_is_told_exactly_once_however_often_the_daemon_dies(told: Told) -> None:
    opened = Counter(line["incident"] for line in lines_of(told) if line["kind"] == "opened")
    assert opened == {f"check:watched:{check(number)}": 1 for number in range(INCIDENTS)}


def test_every_end_is_told_exactly_once(told: Told) -> None:
    resolved = Counter(line["incident"] for line in lines_of(told) if line["kind"] == "resolved")
    assert resolved == {f"check:watched:{check(number)}": 1 for number in range(0, INCIDENTS, 2)}


def test_nothing_else_is_told(told: Told) -> None:
    assert {line["kind"] for line in lines_of(told)} == {"opened", "resolved"}
    assert {line["incident"].rpartition(":")[0] for line in lines_of(told)} == {"check:watched"}


def test_every_incident_is_in_one_mail(told: Told) -> None:
    """By Message-ID, as a mail program shows them."""
    by_id = {mail.message["Message-ID"]: mail.message for mail in told.mails.mails}
    texts = [message.get_body(("plain",)).get_content() for message in by_id.values()]
    for number in range(INCIDENTS):
        told_as_failing = sum(
            line.startswith("ERROR") and check(number) in line for text in texts for line in text.splitlines()
        )
        assert told_as_failing == 1, check(number)


def test_a_message_holds_many_incidents(told: Told) -> None:
    assert len(told.hook.effects) <= 3 * (KILLS + 1)


def test_the_secret_is_nowhere(told: Told) -> None:
    assert SECRET not in told.log
    for file in told.home.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
