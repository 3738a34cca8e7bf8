from pathlib import Path

import fsspec
import msgspec
import pytest

from resources.device_reports import DeviceReports
from resources.failures import InputFailure
from resources.settings import Settings
from tests.device_reports import device_report

MODEL, OTHER = "a" * 64, "b" * 64


def write(folder: Path, name: str, **fields) -> None:
    (folder / name).write_bytes(msgspec.json.encode(device_report(**fields)))


def test_the_newest_report_of_the_very_model_is_found(tmp_path):
    write(tmp_path, "a.json", model_digest=MODEL, measured_at="2026-11-03T10:00:00+00:00")
    write(tmp_path, "b.json", model_digest=MODEL, measured_at="2026-11-02T10:00:00+00:00")
    write(tmp_path, "c.json", model_digest=OTHER, measured_at="2026-11-04T10:00:00+00:00")
    found = DeviceReports(location=str(tmp_path)).of(MODEL)
    assert found.newest.measured_at == "2026-11-03T10:00:00+00:00"
    assert found.unreadable == []


def test_a_file_that_is_no_report_is_named_and_left_out(tmp_path):
    write(tmp_path, "good.json", model_digest=MODEL)
    (tmp_path / "half.json").write_text('{"format": 1')
    write(tmp_path, "newer.json", model_digest=MODEL, format=9)
    (tmp_path / "notes.txt").write_text("not looked at")
    found = DeviceReports(location=str(tmp_path)).of(MODEL)
    assert found.newest.model_digest == MODEL
    half, newer = found.unreadable
    assert "half.json is no device report" in half
    assert "newer.json has format 9, this version reads 1" in newer


def test_where_nothing_was_measured_there_is_no_report(tmp_path):
    for location in (tmp_path, tmp_path / "nowhere"):
        found = DeviceReports(location=str(location)).of(MODEL)
        assert (found.newest, found.unreadable) == (None, [])


def test_any_file_system_will_do_and_a_new_report_is_seen_at_once():
    reports = DeviceReports(location="memory://device-reports-test")
    assert reports.of(MODEL).newest is None
    with fsspec.open("memory://device-reports-test/one.json", "wb") as file:
        file.write(msgspec.json.encode(device_report(model_digest=MODEL)))
    assert reports.of(MODEL).newest.model_digest == MODEL


def test_a_location_that_cannot_be_read_is_one_line():
    with pytest.raises(InputFailure, match="OFFER_ASSETS_DEVICE_REPORTS=nosuch://reports cannot be read"):
        DeviceReports(location="nosuch://reports").of(MODEL)


def test_a_report_that_vanishes_as_it_is_read_does_not_pass_for_none(tmp_path):
    (tmp_path / "one.json").symlink_to(tmp_path / "gone")
    with pytest.raises(InputFailure, match="cannot be read"):
        DeviceReports(location=str(tmp_path)).of(MODEL)


def test_the_location_is_in_the_home_unless_it_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFER_ASSETS_HOME", "home")
    assert Settings.from_environment().device_reports_location == str(tmp_path / "home" / "device-reports")
    monkeypatch.setenv("OFFER_ASSETS_DEVICE_REPORTS", "s3://bucket/reports")
    assert Settings.from_environment().device_reports_location == "s3://bucket/reports"
    monkeypatch.setenv("OFFER_ASSETS_DEVICE_REPORTS", "measured")
    assert Settings.from_environment().device_reports_location == str(tmp_path / "measured")
