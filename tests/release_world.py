"""A small world to release models in: real registry, store, server processes and jobs; models are stand-ins.

The stand-in servers answer with the version of their artifact (see ``tests.resources.stand_in_server``).
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import MANIFEST, ArtifactRef, reference, write_manifest
from ml.offers import TEXT_VERSION
from ml.runner import StageContext
from ml.stages import STAGES, Parameters
from ml.taxonomy import Taxonomy
from offer_assets import release
from offer_assets.jobs import START_ENDPOINT
from offer_assets.partitions import COMPILE_TARGETS, CPU
from offer_assets.promotion import PROMOTION_JOBS, ReleasePolicy
from offer_assets.traffic import TRAFFIC_JOBS
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.io_manager import ArtifactRefIOManager
from resources.local_endpoints import LocalEndpoints
from resources.tracking import MlflowTracking, RegisteredVersion

REGISTER = "register"
"""Job that registers and does not serve."""

RELEASE = "release"
"""Job that registers and serves, as the last steps of a training do."""

TAXONOMY_1 = "category_id,parent_id,name\n1,,Toys\n2,1,Dolls\n"
TAXONOMY_2 = "category_id,parent_id,name\n1,,Toys\n2,1,Dolls\n3,1,Cars\n"
RENAMED_1 = "category_id,parent_id,name\n1,,Toys\n2,1,Dolls and figures\n"

GOOD = {
    "student_weighted_f1": 0.9,
    "teacher_weighted_f1": 0.92,
    "student_share_of_teacher": 0.978,
    "student_minus_teacher_high": -0.01,
}
BAD = {
    "student_weighted_f1": 0.5,
    "teacher_weighted_f1": 0.92,
    "student_share_of_teacher": 0.543,
    "student_minus_teacher_high": -0.4,
}
COMPILED = {
    "same_category": 1.0,
    "offers": 100,
    "weighted_f1_original": 0.9,
    "weighted_f1_compiled": 0.9,
    "cascade_offers": 100,
    "cascade_share_fast": 0.5,
    "cascade_share_review": 0.1,
    "cascade_loss": 0.0,
    "cascade_max_loss": 0.01,
    "cascade_loss_p_value": 1.0,
}


def renamed_stand_in(context: StageContext, _parameters: Parameters) -> dict[str, Any]:
    """Stage ``renamed_student`` for stand-ins: the files as they are, and the new taxonomy."""
    for file in context.input("compiled_student").iterdir():
        if file.name not in (MANIFEST, "taxonomy.parquet"):
            shutil.copyfile(file, context.output / file.name)
    taxonomy = context.input("catalog_taxonomy") / "taxonomy.parquet"
    shutil.copyfile(taxonomy, context.output / taxonomy.name)
    return {}


RENAMED_STUDENT = replace(STAGES["renamed_student"], entry_point=f"{__name__}:renamed_stand_in")
"""To be put into ``STAGES`` where names change."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """What is needed to make, release and judge versions."""

    folder: Path
    tracking: MlflowTracking
    instance: dg.DagsterInstance
    port: int

    def __post_init__(self) -> None:
        self.store = FolderArtifactStore(root=str(self.folder / "artifacts"), feed="feed")
        self.compute = LocalCompute(store=self.store)
        self.endpoints = LocalEndpoints(
            home=str(self.folder), port=self.port, workers=1, program="tests.resources.stand_in_server"
        )

    def artifact(
        self,
        kind: str,
        name: str,
        files: dict[str, str],
        inputs: dict[str, str],
        parameters: dict[str, Any] | None = None,
        **metrics: Any,
    ) -> ArtifactRef:
        folder = self.store.destination(kind, name)
        folder.mkdir(parents=True)
        for file, text in {"name": name, **files}.items():
            if file == "taxonomy.csv":
                Taxonomy.parse_csv(text.encode(), file).write(folder / "taxonomy.parquet")
            else:
                (folder / file).write_text(text)
        write_manifest(
            folder,
            kind=kind,
            key=name,
            inputs=inputs,
            code_version="1",
            code_revision=f"code of {name}",
            parameters=parameters or {},
            metrics=metrics,
            seconds=0.1,
        )
        return reference(folder)

    def adopt(self, csv: str) -> ArtifactRef:
        """Take a taxonomy; returns it."""
        name = f"taxonomy-{hashlib.sha256(csv.encode()).hexdigest()[:8]}"
        found = self.store.find("catalog_taxonomy", name)
        taxonomy = found or self.artifact("catalog_taxonomy", name, {"taxonomy.csv": csv}, {})
        change = self.store.find("taxonomy_change", name) or self.artifact(
            "taxonomy_change", name, {}, {"catalog_taxonomy": taxonomy.digest}
        )
        self.store.write_pointer("catalog_taxonomy", taxonomy)
        self.store.write_pointer("taxonomy_change", change)
        return taxonomy

    def train(
        self,
        name: str,
        *,
        taxonomy: str = TAXONOMY_1,
        metrics: dict[str, float] | None = None,
        behaviour: str = "answer",
        text_version: str = TEXT_VERSION,
    ) -> ArtifactRef:
        """Make a compiled student and its evaluation; it waits to be registered."""
        tree = self.adopt(taxonomy)
        sample = self.artifact("training_sample", name, {}, {})
        student = self.artifact(
            "student_checkpoint",
            name,
            {"taxonomy.csv": taxonomy},
            {"training_sample": sample.digest, "catalog_taxonomy": tree.digest},
        )
        files = {
            "behaviour": behaviour,
            "taxonomy.csv": taxonomy,
            "model.json": msgspec.json.encode({"text_version": text_version}).decode(),
        }
        inputs = {"student_checkpoint": student.digest, "catalog_taxonomy": tree.digest}
        compiled = self.artifact("compiled_student", name, files, inputs, **COMPILED)
        self.evaluate(compiled, name, **(metrics or GOOD))
        return compiled

    def evaluate(self, compiled: ArtifactRef, name: str, **metrics: float) -> None:
        """Hold a compiled student against what is in production; it waits to be registered."""
        production = self.tracking.production()
        compared = {"production_model": production.ref.digest} if production else {}
        inputs = {"student_checkpoint": self.compute.manifest(compiled).inputs["student_checkpoint"]}
        evaluation = self.artifact("student_evaluation", name, {}, inputs | compared, **metrics)
        self.store.write_pointer("student_evaluation", evaluation)
        self.store.write_pointer(f"compiled_student/{CPU}", compiled)

    def definitions(self, approval: str) -> dg.Definitions:
        register_job = dg.define_asset_job(REGISTER, selection=dg.AssetSelection.assets("model_version"))
        release_job = dg.define_asset_job(
            RELEASE, selection=dg.AssetSelection.assets("model_version", "offer_endpoint", "after")
        )
        start_job = dg.define_asset_job(START_ENDPOINT, selection=dg.AssetSelection.assets("offer_endpoint"))

        @dg.asset
        def after(offer_endpoint: ArtifactRef) -> ArtifactRef:
            return offer_endpoint

        return dg.Definitions(
            assets=[
                dg.AssetSpec("student_evaluation"),
                dg.AssetSpec("taxonomy_change"),
                dg.AssetSpec("compiled_student", partitions_def=COMPILE_TARGETS),
                release.model_version,
                release.offer_endpoint,
                after,
            ],
            asset_checks=[release.endpoint_answers],
            jobs=[register_job, release_job, start_job, *PROMOTION_JOBS, *TRAFFIC_JOBS],
            resources={
                "io_manager": ArtifactRefIOManager(store=self.store),
                "artifact_store": self.store,
                "compute": self.compute,
                "tracking": self.tracking,
                "endpoints": self.endpoints,
                "release_policy": ReleasePolicy(approval=approval),
            },
            executor=dg.in_process_executor,
        )

    def run(
        self,
        job: str,
        *,
        approval: str = "automatic",
        op: str = "",
        config: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> dg.ExecuteInProcessResult:
        return (
            self.definitions(approval)
            .resolve_job_def(job)
            .execute_in_process(
                instance=self.instance,
                run_config={"ops": {op: {"config": config}}} if op else None,
                tags=tags,
                raise_on_error=False,
            )
        )

    def release(self, name: str, *, approval: str = "automatic", **training: Any) -> ArtifactRef:
        """Train, register and serve (if it may be); returns the compiled student."""
        compiled = self.train(name, **training)
        self.run(RELEASE, approval=approval)
        return compiled

    def rename(self, csv: str) -> dg.ExecuteInProcessResult:
        """Take a taxonomy with other names and serve the version in production under them."""
        self.adopt(csv)
        return self.run(RELEASE, op="model_version", config={"model": "production"})

    def decide(self, version: ArtifactRef | str, decision: str, **config: Any) -> dg.ExecuteInProcessResult:
        wanted = version if isinstance(version, str) else version.version
        config = {"version": wanted, "decision": decision, "by": "anna", "reason": "because", **config}
        return self.run("decide_version", op="decide", config=config)

    def roll_back(self, version: str = "", **config: Any) -> dg.ExecuteInProcessResult:
        return self.run(
            "rollback",
            op="roll_back",
            config={"version": version, "by": "anna", "reason": "toys are wrong", **config},
        )

    def registered(self, ref: ArtifactRef) -> RegisteredVersion:
        version = self.tracking.version_of(ref)
        assert version is not None
        return version

    @property
    def serving(self) -> str | None:
        """Model version that answers."""
        status = self.endpoints.status()
        return status.model_version if status else None

    @property
    def in_production(self) -> ArtifactRef | None:
        version = self.tracking.production()
        return msgspec.structs.replace(version.ref, metrics={}) if version else None

    @property
    def pointers(self) -> list[str | None]:
        """Digests of what the assets ``model_version`` and ``offer_endpoint`` name."""
        refs = [self.store.read_pointer(name) for name in ("model_version", "offer_endpoint")]
        return [ref.digest if ref else None for ref in refs]


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    """The line that a run failed with."""
    assert not result.success
    (event,) = [event for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_FAILURE]
    data = event.step_failure_data
    assert data.user_failure_data is not None, data.error
    assert data.user_failure_data.description is not None
    return data.user_failure_data.description
