"""Comparison and search in the graph: what the UI shows, what the tracker keeps, what is to be set."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest

from ml.artifacts import ArtifactRef, write_manifest
from ml.learning.search_space import SPACES
from ml.stages import STAGES
from offer_assets.experiments import encoder_comparison, hyperparameter_search
from offer_assets.plan import SETTING_OF, TrainingPlan, setting_lines
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.io_manager import ArtifactRefIOManager
from resources.settings import Settings
from resources.tracking import MlflowTracking
from tests.ml.tiny_models import tiny_encoder, tiny_inputs
from tests.registry import registry_in


class Laboratory:
    """A store with a training sample and its taxonomy, and a tracker."""

    def __init__(self, folder: Path, tracking: MlflowTracking) -> None:
        self.store = FolderArtifactStore(root=str(folder / "artifacts"), feed="feed")
        self.tracking = tracking
        self.encoder = str(tiny_encoder(folder / "encoder"))
        made = tiny_inputs(folder)
        taxonomy = self.adopt("catalog_taxonomy", made["catalog_taxonomy"], {})
        sample = self.adopt("training_sample", made["training_sample"], {"catalog_taxonomy": taxonomy.digest})
        self.store.write_pointer("training_sample", sample)

    def adopt(self, kind: str, source: Path, inputs: dict[str, str]) -> ArtifactRef:
        key = kind.encode().hex()[:32]
        folder = self.store.destination(kind, key)
        shutil.copytree(source, folder)
        (folder / "manifest.json").unlink()
        write_manifest(
            folder,
            kind=kind,
            key=key,
            inputs=inputs,
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.0,
        )
        found = self.store.find(kind, key)
        assert found is not None
        return found

    def materialize(
        self, asset: dg.AssetsDefinition, config: dict[str, Any], partition: str | None = None, **plan: Any
    ) -> dg.ExecuteInProcessResult:
        settings = Settings.from_environment()
        fields = {name: getattr(settings, name) for name in TrainingPlan.model_fields}
        short = {"encoder": self.encoder, "max_tokens": 16, "teacher_epochs": 1}
        return dg.materialize(
            [dg.AssetSpec("training_sample"), dg.AssetSpec("teacher_labels"), asset],
            selection=dg.AssetSelection.assets(asset),
            partition_key=partition,
            resources={
                "io_manager": ArtifactRefIOManager(store=self.store),
                "artifact_store": self.store,
                "compute": LocalCompute(store=self.store),
                "tracking": self.tracking,
                "plan": TrainingPlan(**fields | short | plan),
            },
            run_config={"ops": {asset.key.path[-1]: {"config": config}}},
            raise_on_error=False,
        )

    def runs(self) -> dict[str, Any]:
        """What the tracker has below another run, by name."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking.tracking_uri)
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}


@pytest.fixture
def laboratory(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Laboratory:
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path / "home"))
    for name in ("encoder_comparison", "hyperparameter_search"):
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], heavy=False))
    return Laboratory(tmp_path, registry_in(tmp_path / "registry", tmp_path_factory))


def shown(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    (event,) = result.get_step_failure_events()
    return str(event.step_failure_data.error_display_string)


def test_a_comparison_is_shown_with_its_front_and_every_encoder_is_a_run(laboratory):
    encoders = [laboratory.encoder, f"{laboratory.encoder}:1", "./nowhere"]
    metadata = shown(laboratory.materialize(encoder_comparison, {"encoders": encoders}), "encoder_comparison")
    assert metadata["quality_over_throughput"].startswith("![plot](data:image/png;base64,")
    assert metadata["verdict"].startswith("on the front, best first: ")
    rows = {record.data["name"]: record.data for record in metadata["table"].records}
    assert list(rows) == encoders
    assert rows[encoders[1]]["texts_per_second"] > 0
    assert "neither a folder nor a hub id" in rows["./nowhere"]["reason"]
    runs = laboratory.runs()
    assert set(runs) == set(encoders)
    assert runs[encoders[0]].data.params["epochs"] == "1"
    assert runs[encoders[0]].data.metrics["mean_weighted_f1"] == pytest.approx(
        rows[encoders[0]]["mean_weighted_f1"], abs=1e-4
    )
    assert runs["./nowhere"].info.status == "FAILED"


def test_without_a_list_the_encoders_of_the_settings_are_compared(laboratory):
    result = laboratory.materialize(encoder_comparison, {}, encoders_compared=f"{laboratory.encoder}:2")
    (row,) = shown(result, "encoder_comparison")["table"].records
    assert row.data["name"] == f"{laboratory.encoder}:2"


def test_nothing_to_compare_is_told_in_one_line(laboratory):
    result = laboratory.materialize(encoder_comparison, {}, encoders_compared="")
    assert "name some in encoders or OFFER_ASSETS_ENCODERS_COMPARED" in failure(result)


def test_a_search_shows_the_lines_to_set_and_every_trial_is_a_run(laboratory):
    config = {"trials": 2, "searched": ["learning_rate", "head_learning_rate"]}
    result = laboratory.materialize(hyperparameter_search, config, "teacher", teacher_learning_rate=3e-4)
    metadata = shown(result, "hyperparameter_search")
    for plot in ("history", "parameters"):
        assert metadata[plot].startswith("![plot](data:image/png;base64,")
    best = metadata["best/learning_rate"]
    assert f"OFFER_ASSETS_TEACHER_LEARNING_RATE={best}" in metadata["settings"]
    assert "Without a setting" in metadata["settings"]
    assert "head_learning_rate = " in metadata["settings"]
    trials = [record.data for record in metadata["trials_table"].records]
    assert [trial["trial"] for trial in trials] == [1, 2]
    assert trials[0]["learning_rate"] == "0.0003"
    runs = laboratory.runs()
    assert set(runs) == {"trial 1", "trial 2"}
    assert runs["trial 1"].data.params["learning_rate"] == "0.0003"
    assert laboratory.store.read_pointer("hyperparameter_search/teacher") is not None


def test_a_search_of_the_student_needs_a_training_first(laboratory):
    result = laboratory.materialize(hyperparameter_search, {"trials": 1}, "student")
    assert "a search of the student needs teacher_labels, which has not been materialized" in failure(result)


def test_what_is_found_can_be_set_by_the_lines_that_are_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path))
    for model, fields in SETTING_OF.items():
        chosen = {name: SPACES[model][name].examples[-1] for name in fields}
        lines, without = setting_lines(model, {**chosen, "unknown": 1})
        assert without == ["unknown"]
        with monkeypatch.context() as patch:
            for line in lines:
                patch.setenv(*line.split("=", maxsplit=1))
            plan = TrainingPlan.from_settings(Settings.from_environment())
        parameters = {"teacher": plan.teacher, "student": plan.student, "fast": plan.fast_model}[model]()
        assert {name: getattr(parameters, name) for name in fields} == chosen


def test_a_search_begins_where_the_plan_is_and_leaves_out_how_the_work_is_done(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path))
    plan = TrainingPlan.from_settings(Settings.from_environment())
    for model, set_now in (
        ("teacher", plan.teacher()),
        ("student", plan.student()),
        ("fast", plan.fast_model()),
    ):
        parameters = plan.hyperparameter_search(model, [], 3, 1.5, 5)
        assert parameters.budget_seconds == 90.0
        assert not {"devices", "checkpoint_seconds", "encoder", "encoder_digest"} & parameters.fixed.keys()
        given = msgspec.to_builtins(set_now)
        assert parameters.fixed.items() <= given.items()
        assert parameters.encoder == given.get("encoder", "packaged-minilm")
