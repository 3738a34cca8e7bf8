"""The doors of each environment, and what opening them costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resources.alerts import Alerts
from resources.artifact_store import ArtifactStore
from resources.cataloguing import Cataloguing
from resources.compute import Compute
from resources.corrections_feed import CorrectionsFeed, DemoCorrectionsFeed
from resources.endpoints import Endpoints
from resources.environment import resources_for
from resources.io_manager import ArtifactRefIOManager
from resources.offer_feed import DemoOfferFeed, OfferFeed
from resources.settings import Settings, SettingsError
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import TaxonomySource
from resources.tracking import Tracking

HEAVY = {
    "torch",
    "transformers",
    "mlflow",
    "evidently",
    "boto3",
    "botocore",
    "onnxruntime",
    "sklearn",
    "pandas",
}


def test_the_local_environment_has_every_door(tmp_path):
    doors = resources_for(Settings(home=tmp_path))
    interfaces = {
        "artifact_store": ArtifactStore,
        "io_manager": ArtifactRefIOManager,
        "compute": Compute,
        "tracking": Tracking,
        "endpoints": Endpoints,
        "cataloguing": Cataloguing,
        "offer_feed": OfferFeed,
        "taxonomy_source": TaxonomySource,
        "taxonomy_policy": TaxonomyPolicy,
        "alerts": Alerts,
        "corrections_feed": CorrectionsFeed,
    }
    assert doors.keys() == interfaces.keys()
    assert all(isinstance(doors[name], interface) for name, interface in interfaces.items())
    # Doors are opened by who goes through.
    assert list(tmp_path.iterdir()) == []


def test_the_feed_is_the_demo_feed_unless_one_is_set(tmp_path):
    assert isinstance(resources_for(Settings(home=tmp_path))["offer_feed"], DemoOfferFeed)
    given = Settings(
        home=tmp_path / "other", offer_feed="s3://b/offers.csv", catalog_taxonomy="s3://b/taxonomy.csv"
    )
    doors = resources_for(given)
    assert not isinstance(doors["offer_feed"], DemoOfferFeed)
    assert (doors["offer_feed"].feed, doors["taxonomy_source"].location) == (
        "s3://b/offers.csv",
        "s3://b/taxonomy.csv",
    )


def test_corrections_are_those_of_the_feed(tmp_path):
    assert isinstance(resources_for(Settings(home=tmp_path))["corrections_feed"], DemoCorrectionsFeed)
    of_the_feed = {"offer_feed": "s3://b/offers.csv", "catalog_taxonomy": "s3://b/taxonomy.csv"}
    for given in ("", "s3://b/corrections.csv"):
        door = resources_for(Settings(home=tmp_path, **of_the_feed, corrections_feed=given))[
            "corrections_feed"
        ]
        assert not isinstance(door, DemoCorrectionsFeed)
        assert door.feed == given


def test_alerts_go_where_the_settings_say(tmp_path):
    (tmp_path / "alerts.toml").touch()
    settings = Settings(
        home=tmp_path, alert_routes=str(tmp_path / "alerts.toml"), ui_url="https://dagster.example.com/"
    )
    door = resources_for(settings)["alerts"]
    assert (door.routes, door.ui_url) == (str(tmp_path / "alerts.toml"), "https://dagster.example.com")


def test_an_environment_without_doors_says_so_in_one_line(tmp_path):
    with pytest.raises(SettingsError, match=r"^OFFER_ASSETS_ENV=aws.*use local$"):
        resources_for(Settings(home=tmp_path, environment="aws"))


def test_loading_every_door_imports_nothing_heavy():
    root = Path(__file__).resolve().parents[2]
    modules = sorted(f"resources.{file.stem}" for file in (root / "resources").glob("[a-z]*.py"))
    program = f"import sys, {', '.join(modules)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.split() == []
