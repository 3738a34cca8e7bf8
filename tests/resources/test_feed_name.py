"""Two feeds share a home, but never their days, samples and models."""

from __future__ import annotations

from ml.artifacts import ArtifactRef
from resources.environment import resources_for
from resources.feed_name import feed_name
from resources.settings import Settings

REF = ArtifactRef(kind="offers", key="k", digest="d", uri="u")


def of_feed(home, feed: str, taxonomy: str = "s3://b/taxonomy.csv") -> Settings:
    return Settings(home=home, offer_feed=feed, catalog_taxonomy=taxonomy)


def test_a_feed_keeps_its_name_whatever_else_changes(tmp_path):
    name = feed_name(of_feed(tmp_path, "s3://b/offers.csv"))
    assert name == feed_name(of_feed(tmp_path, "s3://b/offers.csv", "s3://b/newer_taxonomy.csv"))
    assert name.startswith("offers-csv-")
    assert feed_name(Settings(home=tmp_path, demo_days=2)) == feed_name(Settings(home=tmp_path, demo_days=5))


def test_feeds_of_the_same_file_name_have_different_names(tmp_path):
    assert feed_name(of_feed(tmp_path, "s3://a/offers.csv")) != feed_name(
        of_feed(tmp_path, "s3://b/offers.csv")
    )


def test_a_glob_and_a_password_make_a_harmless_name(tmp_path):
    assert "hunter2" not in feed_name(of_feed(tmp_path, "https://me:hunter2@host/*.csv"))
    assert feed_name(of_feed(tmp_path, "https://me:hunter2@host/*.csv")) == feed_name(
        of_feed(tmp_path, "https://me:changed@host/*.csv")
    )
    assert "/" not in feed_name(of_feed(tmp_path, "s3://b/**/*"))


def test_what_one_feed_made_is_not_seen_by_another(tmp_path):
    demo = resources_for(Settings(home=tmp_path))["artifact_store"]
    other = resources_for(of_feed(tmp_path, "s3://b/offers.csv"))["artifact_store"]
    demo.write_pointer("offers/2026-11-01", REF)
    assert other.list_pointers("offers") == {}
    assert list(demo.list_pointers("offers")) == ["2026-11-01"]
