"""Which implementation stands behind each door: the only place that chooses by environment."""

from __future__ import annotations

from typing import Any

from resources.alerting import OutboxAlerts
from resources.artifact_store import FolderArtifactStore
from resources.cataloguing import EndpointCataloguing
from resources.compute import LocalCompute
from resources.corrections_feed import CorrectionsFeed, DemoCorrectionsFeed
from resources.feed_name import feed_name
from resources.io_manager import ArtifactRefIOManager
from resources.local_endpoints import LocalEndpoints
from resources.offer_feed import DemoOfferFeed, OfferFeed
from resources.settings import Settings, SettingsError
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import DemoTaxonomySource, TaxonomySource
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
    compute = LocalCompute(store=store)
    endpoints = LocalEndpoints(home=home, port=settings.endpoint_port, workers=settings.endpoint_workers)
    return {
        "artifact_store": store,
        "io_manager": ArtifactRefIOManager(store=store),
        "compute": compute,
        "tracking": MlflowTracking(tracking_uri=settings.tracking_uri, model_name=settings.model_name),
        "endpoints": endpoints,
        "cataloguing": EndpointCataloguing(compute=compute, endpoints=endpoints),
        "offer_feed": (feed := _offer_feed(settings)),
        "corrections_feed": _corrections_feed(settings, feed),
        "taxonomy_source": _taxonomy_source(settings, feed),
        "taxonomy_policy": TaxonomyPolicy(
            settle_seconds=settings.taxonomy_settle_seconds,
            max_removed_share=settings.taxonomy_max_removed_share,
        ),
        "alerts": OutboxAlerts(
            home=home, database=settings.postgres_url, routes=settings.alert_routes, ui_url=settings.ui_url
        ),
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
        first_day=settings.first_day.isoformat(),
        home=str(settings.home),
    )


def _corrections_feed(settings: Settings, feed: OfferFeed) -> CorrectionsFeed:
    if isinstance(feed, DemoOfferFeed):
        return DemoCorrectionsFeed.of(feed)
    return CorrectionsFeed(feed=settings.corrections_feed, home=str(settings.home))


def _taxonomy_source(settings: Settings, feed: OfferFeed) -> TaxonomySource:
    if isinstance(feed, DemoOfferFeed):
        return DemoTaxonomySource.of(feed)
    return TaxonomySource(location=settings.catalog_taxonomy)
