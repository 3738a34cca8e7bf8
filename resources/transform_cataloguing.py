"""A day catalogued by a SageMaker batch transform, but for what the endpoint has answered already.

What is to be asked is prepared once (stage ``transform_input``) and lies in the artifact store; the job that
asks is named by it, so that whoever wants the same day finds the job that is at it. Its answers lie below
``transform/<job>``. The endpoint's captured requests lie below ``capture/<endpoint>/<variant>/<hour>``.
"""

import datetime
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import ArtifactRef
from ml.serving.sent import SHARDS_FOLDER
from ml.serving.variants import variant_of
from ml.stages import CataloguedOffersParameters, TransformInputParameters
from resources.atomic_files import only_one
from resources.aws import AwsAccess
from resources.cataloguing import Cataloguing
from resources.compute import AnyContext, StageResult
from resources.endpoints import variant_name
from resources.failures import InputFailure, input_errors_fail_plainly
from resources.few_offers import ask_endpoint
from resources.s3_artifact_store import S3ArtifactStore
from resources.s3_objects import S3Objects
from resources.sagemaker_fleet import MAIN, FleetRequests, Naming
from resources.sagemaker_service import EndpointService
from resources.transform_jobs import TransformJobs
from resources.transform_requests import TransformRequest, transform_name

_LATE_HOURS = 6
"""So far into the next day offers of a day may have been answered."""


class TransformCataloguing(Cataloguing):
    """Captured answers first; then the endpoint for what little is left, or a batch transform for more."""

    # Dagster reads these annotations as they stand: no postponed annotations in this module.
    aws: dg.ResourceDependency[AwsAccess]
    store: dg.ResourceDependency[S3ArtifactStore]
    name: str
    """Of the endpoint; begins the names of jobs and models."""
    serving_image: str
    neuron_image: str = ""
    instance_type: str
    instances: int = 2
    concurrent: int = 8
    """Requests that an instance gets at once."""
    bulk_from: int = 5_000
    """Fewer offers go to the endpoint, if it serves the model; 0: never."""
    shard_offers: int = 5_000
    """Offers per file; so few that instances end at about the same time."""
    poll_seconds: float = 15.0
    """Time between two looks at a job, on average."""

    @override
    @input_errors_fail_plainly()
    def catalogue(
        self, context: AnyContext, day: str, offers: ArtifactRef, model: ArtifactRef
    ) -> StageResult:
        inputs = {"offers": offers, "compiled_student": model}
        with self._work_folder(context, f"{offers.version}-{model.version}") as work:
            if found := self.compute.find(context, "catalogued_offers", inputs, CataloguedOffersParameters()):
                return found
            plan = self._plan(context, day, offers, model, work / "captured")
            prepared, answers = self.compute.folder(plan.ref), work / "answers"
            answers.mkdir()
            origin = self._have_answered(context, plan, model, prepared, answers)
            given = CataloguedOffersParameters(prepared=str(prepared), answers=str(answers))
            try:
                return self.compute.run(context, "catalogued_offers", inputs, given)
            except InputFailure as error:
                raise InputFailure(f"{error.description} (the job's answers: {origin})") from None

    def _plan(
        self, context: AnyContext, day: str, offers: ArtifactRef, model: ArtifactRef, captured: Path
    ) -> StageResult:
        """What is to be asked; made once, with the captured answers of that moment."""
        inputs = {"offers": offers, "compiled_student": model}
        given = TransformInputParameters(shard_offers=self.shard_offers, captured=str(captured))
        if found := self.compute.find(context, "transform_input", inputs, given):
            return found
        self._fetch_captured(context, day, model, captured)
        return self.compute.run(context, "transform_input", inputs, given)

    def _fetch_captured(self, context: AnyContext, day: str, model: ArtifactRef, folder: Path) -> None:
        """Download what was captured on a day and shortly after, where this model may have served."""
        files = 0
        for variant in (MAIN, variant_of(model.version)):
            for hours in _hours(day):
                place = f"capture/{self.name}/{variant}/{hours}"
                sizes = self._objects.sizes(place)
                self._objects.download(place, sizes, folder / variant / hours)
                files += len(sizes)
        context.log.info(f"{files:,} files of requests were captured by the endpoint on {day}")

    def _have_answered(
        self, context: AnyContext, plan: StageResult, model: ArtifactRef, prepared: Path, answers: Path
    ) -> str:
        """Bring an answer for each offer that has none into the folder ``answers``; returns where from."""
        asked, shards = plan.manifest.metrics["asked"], plan.manifest.metrics["shards"]
        if not asked:
            context.log.info("every offer was answered already: nothing is asked")
            return "none"
        if asked < self.bulk_from and self._serves(model):
            context.log.info(f"{asked:,} offers go through the endpoint: too few for a job")
            ask_endpoint(self.endpoints, variant_name(model), prepared, answers)
            return "none, the endpoint was asked"
        jobs = TransformJobs(self.aws, self._location, context.log, self.poll_seconds)

        def request(name: str) -> TransformRequest:
            return TransformRequest(
                name=name,
                model=self._made_model(model),
                source=f"{self.store.uri(plan.ref)}/{SHARDS_FOLDER}",
                target=jobs.target(name),
                instance_type=self.instance_type,
                instances=self.instances,
                concurrent=self.concurrent,
                run_id=context.op_execution_context.run_id,
            )

        names = (transform_name(self.name, plan.ref.version, model.version, attempt) for attempt in count(1))
        job = jobs.answered(names, shards, request, f"{asked:,} offers in {shards:,} files")
        jobs.fetch(job, answers)
        return jobs.target(job)

    def _made_model(self, model: ArtifactRef) -> str:
        """Name of the SageMaker model: the one that the endpoint serves, unless settings differ."""
        naming = Naming(self.name)
        requests = FleetRequests(
            naming=naming,
            role=self.aws.role,
            vpc=self.aws.vpc,
            kms_key=self.aws.kms_key,
            images={"cpu": self.serving_image, "neuron": self.neuron_image},
            instance_type=self.instance_type,
            instances=self.instances,
            instance_setting="OFFER_ASSETS_AWS_BULK_INSTANCE_TYPE",
        )
        placed = msgspec.structs.replace(model, uri=self.store.uri(model))
        made = requests.model(self.compute.folder(model), placed)
        EndpointService(self.aws, naming, self.poll_seconds).make_model(made)
        return made.name

    def _serves(self, model: ArtifactRef) -> bool:
        """Whether the endpoint has a variant with this model that answers."""
        status = self.endpoints.status()
        return status is not None and any(
            variant.model_version == model.version and not variant.is_shadow for variant in status.variants
        )

    @contextmanager
    def _work_folder(self, context: AnyContext, name: str) -> Iterator[Path]:
        """An empty local folder, for one process of this machine at a time."""
        folder = Path(self.store.home).absolute() / "work" / "bulk" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock")
        with only_one(lock, lambda: context.log.info("the day is being catalogued by another run: waiting")):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _location(self) -> str:
        return self.store.location.rstrip("/")

    @property
    def _objects(self) -> S3Objects:
        return S3Objects(self.aws, self._location)


def _hours(day: str) -> Iterator[str]:
    """Folders of captured requests in which the offers of a day may be, in UTC."""
    date = datetime.date.fromisoformat(day)
    yield f"{date:%Y/%m/%d}"
    for hour in range(_LATE_HOURS):
        yield f"{date + datetime.timedelta(days=1):%Y/%m/%d}/{hour:02}"
