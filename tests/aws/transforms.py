"""Days catalogued by batch transforms of the stand-in, as tests set them up."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from typing_extensions import override

from ml.artifacts import ArtifactRef, read_manifest
from ml.progress import Progress
from ml.runner import run_stage
from ml.stages import Stage
from resources.cataloguing import Cataloguing
from resources.compute import AnyContext, LocalCompute, StageResult, StageWork
from resources.endpoints import EndpointStatus, VariantStatus
from resources.s3_artifact_store import S3ArtifactStore
from resources.transform_cataloguing import TransformCataloguing
from tests.aws.conftest import BUCKET, access
from tests.offer_assets.test_operation import DeadEndpoints

LOCATION = f"s3://{BUCKET}/offer-assets"
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets-serving:1"
DAY = "2026-11-02"

ASKED: list[list[dict[str, Any]]] = []
"""What :class:`ScriptedEndpoints` was asked, request by request. Dagster copies resources: kept outside."""


class OneProcess(LocalCompute):
    """Heavy stages here, too: a process for each would be most of a test's time."""

    @override
    def _make(self, context: AnyContext, stage: Stage, key: str, work: StageWork) -> None:
        progress = Progress(stage.name, context.log.info)
        self._run_here(stage, key, work, lambda spec: run_stage(spec, progress))


class ScriptedEndpoints(DeadEndpoints):
    """Serves ``version``, or nothing, and knows one answer."""

    version: str = ""
    is_shadow: bool = False

    def status(self) -> EndpointStatus | None:
        if not self.version:
            return None
        variant = VariantStatus(
            name=f"model-{self.version}",
            model_version=self.version,
            weight=1.0,
            is_shadow=self.is_shadow,
        )
        return EndpointStatus(
            url="", model_version=self.version, taxonomy_version="t", started="", variants=[variant]
        )

    def invoke(self, offers: Sequence[Mapping[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        assert variant == f"model-{self.version}"
        ASKED.append([dict(offer) for offer in offers])
        return [prediction(offer, self.version, "by-endpoint") for offer in offers]


def prediction(offer: Mapping[str, Any], version: str, category: str) -> dict[str, Any]:
    return {
        "offer_id": offer["offer_id"],
        "category_id": category,
        "category_path": f"All > {category}",
        "confidence": 0.5,
        "model_version": version,
        "taxonomy_version": "t",
    }


def store_of(home: Path) -> S3ArtifactStore:
    return S3ArtifactStore(aws=access(), location=LOCATION, feed="feed", home=str(home))


def publish(store: S3ArtifactStore, folder: Path) -> ArtifactRef:
    """Put an artifact that lies in a local folder into S3."""
    manifest = read_manifest(folder)
    place = store.destination(manifest.kind, manifest.key)
    shutil.copytree(folder, place, dirs_exist_ok=True)
    return store.adopt(manifest.kind, manifest.key)


def cataloguing_of(home: Path, **settings: Any) -> TransformCataloguing:
    """As of one orchestrator, with its own local folder and short pauses."""
    store = store_of(home)
    defaults = {
        "aws": access(),
        "store": store,
        "compute": OneProcess(store=store),
        "endpoints": ScriptedEndpoints(),
        "name": "offer-assets",
        "serving_image": IMAGE,
        "instance_type": "ml.c7i.xlarge",
        "poll_seconds": 0.05,
        "bulk_from": 0,
    }
    return TransformCataloguing(**(defaults | settings))


def catalogue(
    cataloguing: Cataloguing,
    instance: dg.DagsterInstance,
    offers: ArtifactRef,
    model: ArtifactRef,
    day: str = DAY,
) -> StageResult:
    """From within an asset of a Dagster run, as the graph does."""
    results = []

    @dg.asset
    def catalogued(context: dg.AssetExecutionContext, cataloguing: Cataloguing) -> dg.MaterializeResult:
        results.append(cataloguing.catalogue(context, day, offers, model))
        return dg.MaterializeResult()

    dg.materialize([catalogued], resources={"cataloguing": cataloguing}, instance=instance)
    return results[0]
