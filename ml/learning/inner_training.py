"""Trainings inside a stage: many models one after the other, of which none becomes an artifact.

They are the stages of the catalogue themselves, so that what is compared or searched here is what a
training makes later.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import Parameters, Stage


class InnerTraining(msgspec.Struct, frozen=True):
    """What one of them made; :meth:`forget` it before the next."""

    folder: Path
    """As the artifact would be, without a manifest."""
    metrics: dict[str, Any]
    place: Path
    checkpoints: Path

    def forget(self) -> None:
        """Remove the model and its checkpoints."""
        for folder in (self.place, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)


def train_inside(
    context: StageContext, stage: Stage, parameters: Parameters, name: str, progress: Progress
) -> InnerTraining:
    """Run ``stage`` on the inputs of the stage that ``context`` belongs to.

    One that was killed continues from its checkpoints, which lie under ``name`` among those of the outer
    stage.

    Raises:
        InputError: the outer stage lacks an input of this one, or the training refuses its parameters.
    """
    if missing := [wanted for wanted in stage.inputs if context.optional_input(wanted) is None]:
        raise InputError(f"{stage.name} needs {', '.join(missing)} as input as well")
    place, checkpoints = context.scratch / name, context.checkpoints / f"training-{name}"
    output = place / "output"
    shutil.rmtree(place, ignore_errors=True)
    output.mkdir(parents=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    inner = StageContext(
        {wanted: context.input(wanted) for wanted in stage.inputs}, output, checkpoints, progress
    )
    return InnerTraining(output, stage.function()(inner, parameters), place, checkpoints)
