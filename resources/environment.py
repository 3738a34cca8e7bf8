"""Which implementation stands behind each door: the only place that chooses by environment."""

from __future__ import annotations

from typing import Any

from resources.alerting import OutboxAlerts
from resources.artifact_store import FolderArtifactStore
from resources.aws import AwsAccess
from resources.cataloguing import EndpointCataloguing
from resources.compute import LocalCompute
from resources.corrections_feed import CorrectionsFeed, DemoCorrectionsFeed
from resources.feed_name import feed_name
from resources.io_manager import ArtifactRefIOManager
from resources.local_endpoints import LocalEndpoints
from resources.offer_feed import DemoOfferFeed, OfferFeed
from resources.s3_artifact_store import S3ArtifactStore
from resources.sagemaker_compute import SageMakerCompute
from resources.sagemaker_endpoints import SageMakerEndpoints
from resources.sagemaker_registry import SageMakerRegistry
from resources.settings import Settings
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import DemoTaxonomySource, TaxonomySource
from resources.tracking import MlflowTracking
from resources.transform_cataloguing import TransformCataloguing


def resources_for(settings: Settings) -> dict[str, Any]:
    """Dagster resources by the name under which assets ask for them."""
    feed = _offer_feed(settings)
    return {
        **(_in_aws(settings) if settings.environment == "aws" else _here(settings)),
        "offer_feed": feed,
        "corrections_feed": _corrections_feed(settings, feed),
        "taxonomy_source": _taxonomy_source(settings, feed),
        "taxonomy_policy": TaxonomyPolicy(
            settle_seconds=settings.taxonomy_settle_seconds,
            max_removed_share=settings.taxonomy_max_removed_share,
        ),
        "alerts": OutboxAlerts(
            home=str(settings.home),
            database=settings.postgres_url,
            routes=settings.alert_routes,
            ui_url=settings.ui_url,
        ),
    }


def _here(settings: Settings) -> dict[str, Any]:
    """Folders, processes and files of this machine."""
    store = FolderArtifactStore(root=str(settings.home / "artifacts"), feed=feed_name(settings))
    compute = LocalCompute(store=store)
    endpoints = LocalEndpoints(
        home=str(settings.home),
        port=settings.endpoint_port,
        workers=settings.endpoint_workers,
        **_rollout(settings),
    )
    return {
        "artifact_store": store,
        "io_manager": ArtifactRefIOManager(store=store),
        "compute": compute,
        "tracking": MlflowTracking(tracking_uri=settings.tracking_uri, model_name=settings.model_name),
        "endpoints": endpoints,
        "cataloguing": EndpointCataloguing(compute=compute, endpoints=endpoints),
    }


def _in_aws(settings: Settings) -> dict[str, Any]:
    """S3, SageMaker and CloudWatch."""
    aws = AwsAccess(
        region=settings.region,
        role=settings.aws_role,
        kms_key=settings.aws_kms_key,
        subnets=settings.aws_subnets,
        security_groups=settings.aws_security_groups,
    )
    images: dict[str, Any] = {
        "serving_image": settings.aws_serving_image,
        "neuron_image": settings.aws_neuron_image,
    }
    name = settings.aws_endpoint_name
    store = S3ArtifactStore(
        aws=aws, location=settings.aws_store, feed=feed_name(settings), home=str(settings.home)
    )
    compute = SageMakerCompute(
        aws=aws,
        store=store,
        training_image=settings.aws_training_image,
        neuron_image=settings.aws_neuron_image,
        name=name,
        jobs=settings.aws_jobs,
    )
    endpoints = SageMakerEndpoints(
        aws=aws,
        location=settings.aws_store,
        name=name,
        **images,
        instance_type=settings.aws_endpoint_instance_type,
        min_instances=settings.aws_endpoint_min_instances,
        max_instances=settings.aws_endpoint_max_instances,
        capture_percent=settings.aws_capture_percent,
        **_rollout(settings),
    )
    return {
        "artifact_store": store,
        "io_manager": ArtifactRefIOManager(store=store),
        "compute": compute,
        "tracking": SageMakerRegistry(
            inner=MlflowTracking(tracking_uri=settings.tracking_uri, model_name=settings.model_name),
            aws=aws,
            group=name,
            store=settings.aws_store,
            **images,
        ),
        "endpoints": endpoints,
        "cataloguing": TransformCataloguing(
            aws=aws,
            store=store,
            compute=compute,
            endpoints=endpoints,
            name=name,
            **images,
            instance_type=settings.aws_bulk_instance_type or settings.aws_endpoint_instance_type,
            instances=settings.aws_bulk_instances,
            bulk_from=settings.aws_bulk_from,
        ),
    }


def _rollout(settings: Settings) -> dict[str, Any]:
    """How a new version gets its requests, and what brings the one before back."""
    return {
        "canary_percent": settings.canary_percent,
        "canary_seconds": settings.canary_seconds,
        "alarm_error_percent": settings.alarm_error_percent,
        "alarm_p99_milliseconds": settings.alarm_p99_milliseconds,
        "alarm_low_confidence_percent": settings.alarm_low_confidence_percent,
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
