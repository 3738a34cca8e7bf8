"""Which implementation stands behind each door: the only place that chooses by environment."""

from __future__ import annotations

from typing import Any

from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.endpoints import LocalEndpoints
from resources.feed_name import feed_name
from resources.io_manager import ArtifactRefIOManager
from resources.offer_feed import DemoOfferFeed, OfferFeed
from resources.settings import Settings, SettingsError
from resources.tracking import MlflowTracking


def resources_for(settings: Settings) -> dict[str, Any]:
    """Dagster resources by the name under which assets ask for them.

    Raises:
        SettingsError: there are none for this environment.
    """
    if settings.environment == "aws":
        raise SettingsError(
            "OFFER_ASSETS_ENV=aws: its artifact store, compute and endpoints are not built yet; use local"
        )
    home = str(settings.home)
    store = FolderArtifactStore(root=str(settings.home / "artifacts"), feed=feed_name(settings))
    return {
        "artifact_store": store,
        "io_manager": ArtifactRefIOManager(store=store),
        "compute": LocalCompute(store=store),
        "tracking": MlflowTracking(tracking_uri=settings.tracking_uri, model_name=settings.model_name),
        "endpoints": LocalEndpoints(
            home=home, port=settings.endpoint_port, workers=settings.endpoint_workers
        ),
        "offer_feed": _offer_feed(settings),
    }


def _offer_feed(settings: Settings) -> OfferFeed:
    if settings.is_demo:
        return DemoOfferFeed.in_home(
            settings.home,
            first_day=settings.first_day,
            days=settings.demo_days,
            offers_per_day=settings.demo_offers_per_day,
            seed=settings.demo_seed,
        )
    return OfferFeed(
        feed=settings.offer_feed,
        taxonomy=settings.catalog_taxonomy,
        first_day=settings.first_day.isoformat(),
        home=str(settings.home),
    )
