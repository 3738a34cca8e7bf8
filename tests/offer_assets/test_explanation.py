"""Explained mistakes in the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import write_manifest
from ml.runner import StageContext
from ml.stages import STAGES, MistakesExplainedParameters
from offer_assets.explanation import mistakes_explained
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.io_manager import ArtifactRefIOManager

INPUTS = ("student_evaluation", "evaluation_set", "student_checkpoint", "training_sample")


def explain_nothing(context: StageContext, parameters: MistakesExplainedParameters) -> dict[str, Any]:
    """In place of a student."""
    (context.output / "mistakes.md").write_text("taken for **Tents**")
    return {"mistakes": 30, "explained": parameters.mistakes}


def test_the_mistakes_are_there_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(STAGES["mistakes_explained"], entry_point=f"{__name__}:explain_nothing", heavy=False)
    monkeypatch.setitem(STAGES, "mistakes_explained", stand_in)
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")
    for name in INPUTS:
        folder = store.destination(name, "0" * 32)
        folder.mkdir(parents=True)
        (folder / "content").write_text(name)
        write_manifest(
            folder,
            kind=name,
            key="0" * 32,
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.0,
        )
        ref = store.find(name, "0" * 32)
        assert ref is not None
        store.write_pointer(name, ref)
    result = dg.materialize(
        [*(dg.AssetSpec(name) for name in INPUTS), mistakes_explained],
        selection=dg.AssetSelection.assets(mistakes_explained),
        resources={"io_manager": ArtifactRefIOManager(store=store), "compute": LocalCompute(store=store)},
    )
    (event,) = result.asset_materializations_for_node("mistakes_explained")
    assert event.metadata["surest_mistakes"].value == "taken for **Tents**"
    assert event.metadata["mistakes"].value == 30
    assert event.metadata["dagster/row_count"].value == 12
