"""Bulk jobs as tests play them: offers, what an endpoint captured, and what a job answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import ArtifactRef, read_manifest, short_version
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import StageSpec, run_stage
from ml.serving.predictor import Prediction
from ml.serving.sent import SHARDS_FOLDER
from tests.ml.compiled_models import seal

Predict = Callable[[Sequence[dict[str, Any]]], list[Prediction]]


def offers_artifact(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    full = [{"shop_id": "s", **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=CLEAN_SCHEMA), folder / "offers.parquet")
    return seal(folder, "offers")


def version_of(compiled: Path) -> str:
    return short_version(read_manifest(compiled).digest)


def captured_line(
    offers: Sequence[dict[str, Any]],
    predictions: Sequence[Prediction],
    *,
    as_lines: bool = False,
    in_base64: bool = False,
) -> bytes:
    """One request with its answer, as SageMaker writes it."""
    if as_lines:
        asked = b"\n".join(msgspec.json.encode(offer) for offer in offers)
        answered = msgspec.json.Encoder().encode_lines(predictions)
    else:
        asked = msgspec.json.encode({"offers": offers})
        answered = msgspec.json.encode({"predictions": predictions})

    def side(mode: str, body: bytes) -> dict[str, str]:
        return {
            "observedContentType": "application/jsonlines" if as_lines else "application/json",
            "mode": mode,
            "data": base64.b64encode(body).decode() if in_base64 else body.decode(),
            "encoding": "BASE64" if in_base64 else "JSON",
        }

    event = {
        "captureData": {
            "endpointInput": side("INPUT", asked),
            "endpointOutput": side("OUTPUT", answered),
        },
        "eventMetadata": {"eventId": "1", "inferenceTime": "2026-11-02T10:00:00Z"},
        "eventVersion": "0",
    }
    return json.dumps(event).encode() + b"\n"


def prepare(
    folder: Path, offers: Path, compiled: Path, listener: Callable[[str], None] | None = None, **given: Any
) -> ArtifactRef:
    """Run ``transform_input``; the artifact is at ``folder``."""
    return _run("transform_input", folder, offers, compiled, listener, **given)


def catalogue(folder: Path, offers: Path, compiled: Path, **given: Any) -> ArtifactRef:
    """Run ``catalogued_offers``; the artifact is at ``folder``."""
    return _run("catalogued_offers", folder, offers, compiled, None, **given)


def answer_shards(prepared: Path, answers: Path, predict: Predict) -> None:
    """What a bulk job does."""
    answers.mkdir()
    for shard in sorted((prepared / SHARDS_FOLDER).iterdir()):
        offers = [json.loads(line) for line in shard.read_bytes().splitlines()]
        lines = msgspec.json.Encoder().encode_lines(predict(offers))
        (answers / f"{shard.name}.out").write_bytes(lines)


def _run(
    stage: str,
    folder: Path,
    offers: Path,
    compiled: Path,
    listener: Callable[[str], None] | None,
    **parameters: Any,
) -> ArtifactRef:
    inputs = {"offers": str(offers), "compiled_student": str(compiled)}
    parameters = {
        name: str(value) if isinstance(value, Path) else value for name, value in parameters.items()
    }
    spec = StageSpec(
        stage=stage,
        inputs=inputs,
        parameters=parameters,
        output=str(folder),
        workspace=str(folder.with_name(folder.name + ".work")),
    )
    made = run_stage(spec, Progress(stage, listener))
    assert made
    return made
