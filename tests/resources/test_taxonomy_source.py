"""The newest release of the taxonomy, and the demo's versions of it."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from ml.demo.catalog import categories
from ml.errors import InputError
from ml.taxonomy_change import places
from ml.taxonomy_change.releases import read_release
from resources import taxonomy_source
from resources.failures import InputFailure
from resources.offer_feed import DemoOfferFeed
from resources.taxonomy_source import DemoTaxonomySource, TaxonomySource

CSV = "category_id,parent_id,name\n1,,Home\n"


def test_the_newest_release_is_found_with_its_files_and_fingerprint(tmp_path):
    source = TaxonomySource(location=str(tmp_path))
    (tmp_path / "2024-7.csv").write_text(CSV)
    first = source.newest()
    (tmp_path / "2024-10.csv").write_text(CSV + "2,1,Kitchen\n")
    second = source.newest()
    assert (first.name, second.name) == ("2024-7", "2024-10")
    assert first.fingerprint != second.fingerprint
    assert second.source == str(tmp_path)
    assert [(Path(file.uri).name, file.role) for file in second.files] == [("2024-10.csv", "tree")]
    assert source.newest() == second


def test_what_cannot_be_read_fails_plainly_and_is_not_retried(tmp_path):
    with pytest.raises(dg.Failure) as failure:
        TaxonomySource(location=str(tmp_path / "absent.csv")).newest()
    assert not failure.value.allow_retries
    assert isinstance(failure.value, InputError)
    assert str(failure.value).startswith(f"CATALOG_TAXONOMY={tmp_path}/absent.csv: no such file")


def test_no_secret_of_the_location_is_told(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    source = TaxonomySource(location="http://user:hidden@127.0.0.1:9/tree.csv?token=hidden")
    with pytest.raises(InputFailure, match=r"CATALOG_TAXONOMY=http://\*\*\*@127") as failure:
        source.newest()
    assert "hidden" not in str(failure.value)


def test_a_look_at_all_files_has_one_deadline(tmp_path, monkeypatch):
    (tmp_path / "v1.csv").write_text(CSV)
    (tmp_path / "v1.de.csv").write_text("category_id,name\n1,Haus\n")
    monkeypatch.setattr(taxonomy_source, "_SECONDS_TO_LOOK", 0.3)
    read_file = places._read_file
    monkeypatch.setattr(places, "_read_file", lambda uri: (time.sleep(0.2), read_file(uri))[1])
    with pytest.raises(InputFailure, match=r"v1\.de\.csv is too slow"):
        TaxonomySource(location=str(tmp_path)).newest()


class TestDemo:
    """The versions beside the embedded feed."""

    @staticmethod
    def demo(home: Path) -> DemoTaxonomySource:
        return DemoTaxonomySource.of(
            DemoOfferFeed.in_home(
                home, first_day=datetime.date(2026, 11, 1), days=1, offers_per_day=40, seed=17
            )
        )

    def test_its_first_version_appears_when_it_is_asked_for(self, tmp_path):
        found = self.demo(tmp_path).newest()
        assert found.name == "v1"
        assert found.source == str(tmp_path / "demo_feed" / "taxonomy")
        tree, mapping = read_release(found.files, found.source)
        assert (len(tree), mapping) == (len(categories(1)), [])

    def test_the_next_version_comes_with_the_official_mapping(self, tmp_path):
        source = self.demo(tmp_path)
        before = source.newest()
        assert source.add_next_version() == str(tmp_path / "demo_feed" / "taxonomy" / "v2.csv")
        found = source.newest()
        tree, mapping = read_release(found.files, found.source)
        assert found.name == "v2"
        assert found.fingerprint != before.fingerprint
        assert len(tree) == len(categories(2))
        assert {("160301", "160307"), ("100401", "100408"), ("100801", "100801")} < set(mapping)

    def test_after_the_last_version_there_is_none(self, tmp_path):
        source = self.demo(tmp_path)
        source.add_next_version()
        with pytest.raises(InputFailure, match="no taxonomy after version 2"):
            source.add_next_version()

    def test_whoever_looks_while_it_is_written_sees_all_of_a_version_or_none(self, tmp_path, monkeypatch):
        source = self.demo(tmp_path)
        seen = [source.newest()]
        replace = Path.replace

        def look_around(path: Path, target: Path) -> Path:
            seen.append(TaxonomySource(location=source.location).newest())
            replaced = replace(path, target)
            seen.append(TaxonomySource(location=source.location).newest())
            return replaced

        monkeypatch.setattr(Path, "replace", look_around)
        source.add_next_version()
        monkeypatch.undo()
        assert [release.name for release in seen] == ["v1", "v1", "v1", "v1", "v2"]
        assert seen[-1] == source.newest()
        assert not list(Path(source.location).glob(".*"))

    def test_of_many_that_add_the_next_version_one_does(self, tmp_path):
        source = self.demo(tmp_path)
        source.prepare()

        def add(_: int) -> bool:
            try:
                self.demo(tmp_path).add_next_version()
            except InputFailure:
                return False
            return True

        with ThreadPoolExecutor(max_workers=4) as pool:
            assert sum(pool.map(add, range(4))) == 1
        assert source.newest().name == "v2"

    def test_dagster_hands_the_feed_to_it(self, tmp_path):
        source = self.demo(tmp_path)

        @dg.asset
        def version(taxonomy_source: TaxonomySource) -> str:
            return taxonomy_source.newest().name

        result = dg.materialize([version], resources={"taxonomy_source": source})
        assert result.output_for_node("version") == "v1"
