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
from resources.settings import Settings
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


IN_AWS = {
    "environment": "aws",
    "aws_store": "s3://shop-data/offers",
    "aws_region": "eu-central-1",
    "aws_role": "arn:aws:iam::123456789012:role/offer-assets-jobs",
    "aws_training_image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets/training:1",
    "aws_serving_image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets/serving:1",
    "aws_endpoint_max_instances": 7,
    "canary_seconds": 600,
    "postgres_url": "postgresql+psycopg2://offers@db/dagster",
    "mlflow_tracking_uri": "https://mlflow.example.com",
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


def test_aws_has_the_same_doors_with_everything_that_the_settings_say(tmp_path):
    doors = resources_for(Settings(home=tmp_path, **IN_AWS))
    assert doors.keys() == resources_for(Settings(home=tmp_path)).keys()
    store, endpoints = doors["artifact_store"], doors["endpoints"]
    assert (store.location, store.aws.region) == ("s3://shop-data/offers", "eu-central-1")
    assert doors["compute"].store is store or doors["compute"].store == store
    assert (endpoints.max_instances, endpoints.canary_seconds) == (7, 600)
    assert doors["alerts"].database == IN_AWS["postgres_url"]
    assert doors["tracking"].inner.tracking_uri == IN_AWS["mlflow_tracking_uri"]
    assert list(tmp_path.iterdir()) == []


def test_aws_names_all_settings_that_it_misses_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"OFFER_ASSETS_AWS_STORE, .*MLFLOW_TRACKING_URI are missing"
    ) as error:
        Settings(home=tmp_path, environment="aws")
    assert "OFFER_ASSETS_AWS_NEURON_IMAGE" not in str(error.value)


def test_loading_every_door_imports_nothing_heavy():
    root = Path(__file__).resolve().parents[2]
    modules = sorted(f"resources.{file.stem}" for file in (root / "resources").glob("[a-z]*.py"))
    program = f"import sys, {', '.join(modules)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.split() == []
