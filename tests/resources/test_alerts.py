"""An alert is told once, whatever is repeated or killed, and tells no secrets."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import InputError
from resources.alerts import Alert, OutboxAlerts


def alert(id: str = "taxonomy-refused:abc", **changes: str) -> Alert:
    return Alert(id=id, severity="ERROR", title="refused", **{"text": "see the file", **changes})


@pytest.fixture
def outbox(tmp_path: Path) -> OutboxAlerts:
    return OutboxAlerts(home=str(tmp_path))


def test_an_alert_is_raised_once(outbox: OutboxAlerts) -> None:
    assert outbox.alerts() == []
    assert outbox.raise_alert(alert())
    assert not outbox.raise_alert(alert(text="another text under the same id"))
    (found,) = outbox.alerts()
    assert (found.id, found.text) == ("taxonomy-refused:abc", "see the file")
    assert found.raised_at.endswith("+00:00")


def test_of_many_at_once_one_is_raised(outbox: OutboxAlerts) -> None:
    with ThreadPoolExecutor(8) as threads:
        raised = list(threads.map(lambda _: outbox.raise_alert(alert()), range(32)))
    assert raised.count(True) == 1
    assert len(outbox.alerts()) == 1


def test_the_oldest_alert_comes_first(outbox: OutboxAlerts) -> None:
    for number, day in enumerate((3, 1, 2)):
        outbox.raise_alert(alert(f"id-{number}", raised_at=f"2026-11-0{day}T00:00:00+00:00"))
    assert [found.id for found in outbox.alerts()] == ["id-1", "id-2", "id-0"]


def test_secrets_stay_out(outbox: OutboxAlerts) -> None:
    outbox.raise_alert(alert(text="https://me:secret@example.com/t.csv?token=hidden cannot be read"))
    (found,) = outbox.alerts()
    assert found.text == "https://***@example.com/t.csv?token=*** cannot be read"


@given(ids=st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_every_id_is_kept_apart(ids: list[str]) -> None:
    ids = [id.encode("utf-8", "ignore").decode() or "x" for id in ids]
    with tempfile.TemporaryDirectory() as home:
        outbox = OutboxAlerts(home=home)
        raised = [outbox.raise_alert(alert(id)) for id in ids]
        assert raised == [id not in ids[:place] for place, id in enumerate(ids)]
        assert sorted(found.id for found in outbox.alerts()) == sorted(set(ids))
        assert {file.parent for file in Path(home).rglob("*.json")} <= {Path(home) / "outbox"}


def test_an_id_without_a_name_is_an_error(outbox: OutboxAlerts) -> None:
    for id in ("", "x" * 201):
        with pytest.raises(ValueError, match="1 to 200 characters"):
            outbox.raise_alert(alert(id))


def test_a_damaged_alert_is_named(outbox: OutboxAlerts, tmp_path: Path) -> None:
    outbox.raise_alert(alert("damaged"))
    (tmp_path / "outbox" / "damaged.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged\.json is not an alert"):
        outbox.alerts()
