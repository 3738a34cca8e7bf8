"""The training loop of teacher and student, and its checkpoints.

The order of batches, dropout and the learning rate are functions of seed and step alone. So a
checkpoint is weights, optimiser state and a step number, and a run that was killed and started
again ends with the weights of one that was not.

Several processes share every batch: as many as there are, a step is the same up to rounding and to which
neurons drop out. So a run can go on with another number of them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ml.artifacts import sha256_of
from ml.learning.devices import training_autocast
from ml.learning.distributed import message_of_first, start_fabric, tensors_of_first
from ml.learning.encoder import Classifier, TokenizedTexts, plain_attention
from ml.progress import Progress
from ml.stages import Precision, StudentParameters, TeacherParameters
from ml.world import World, world_from_environment

_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.01
_MAX_GRADIENT_NORM = 1.0
_BATCHES_SORTED_TOGETHER = 32
"""Texts are sorted by length within so many batches: little padding, still a random order."""
_CURVE_POINTS_PER_EPOCH = 10
_CHECKPOINTS_KEPT = 2
"""The newest, and the one before in case the newest turns out damaged."""

LossFunction = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""Mean loss of logits (rows, classes) of the training texts with these row numbers (rows,)."""

CurvePoint = dict[str, int | float]
"""``step``, ``epoch``, ``loss`` since the point before; at epoch ends also ``validation_…``."""


class TrainingArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop needs to know beside model, texts and loss."""

    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    token_dropout: float
    precision: Precision
    checkpoint_seconds: float
    seed: int

    @classmethod
    def of(cls, parameters: TeacherParameters | StudentParameters) -> TrainingArguments:
        """What a stage's parameters say about the loop."""
        return cls(**{name: getattr(parameters, name) for name in cls.__struct_fields__})


class TrainingState(msgspec.Struct, kw_only=True):
    """``state.json`` of a checkpoint: where the run is, and what it has seen."""

    step: int = 0
    loss_sum: float = 0.0
    """Over the steps since the last point of the curve."""
    curve: list[CurvePoint] = []
    seconds: float = 0.0
    """Time spent so far, over all processes, validation not counted."""
    tensors_sha256: str = ""


def train(
    model: Classifier,
    texts: TokenizedTexts,
    batch_loss: LossFunction,
    validate: Callable[[], dict[str, float]],
    initialise: Callable[[], None],
    plan: TrainingArguments,
    checkpoints: Path,
    progress: Progress,
) -> TrainingState:
    """Train ``model`` in place, from its last checkpoint if there is one.

    Every process that shares the work calls this; all end with the same weights. The first alone reads and
    writes checkpoints.

    Args:
        model: Encoder and output layer, on the device to train on.
        texts: The training texts.
        batch_loss: Loss of a batch, to be minimised.
        validate: Figures on held-out offers, called after every epoch.
        initialise: Called once before the first step; a resumed run does without.
        plan: Epochs, rates and so on.
        checkpoints: Folder that survives a kill.
        progress: Where to report.

    Returns:
        The final state, with the learning curve.

    Raises:
        RuntimeError: called inside autocast.
    """
    if torch.is_autocast_enabled(model.device.type):
        raise RuntimeError("a training inside autocast would compute with its first copies of the weights")
    world, fabric = world_from_environment(), start_fabric(model.device, plan.precision)
    optimiser = _optimiser(model, plan)
    state = _resume(model, optimiser, checkpoints, progress)
    if state is None:
        initialise()
        state = TrainingState()
    for point in state.curve:
        progress.figures(point)
    step = _Step(model, optimiser, fabric, world, plan.token_dropout)
    steps_per_epoch = -(-len(texts) // plan.batch_size)
    total_steps = steps_per_epoch * plan.epochs
    curve_interval = max(1, steps_per_epoch // _CURVE_POINTS_PER_EPOCH)
    last_checkpoint_at = time.monotonic()
    done = min(
        state.step // steps_per_epoch * len(texts) + state.step % steps_per_epoch * plan.batch_size,
        len(texts) * plan.epochs,
    )

    with progress.bar("training", len(texts) * plan.epochs, "offers", done=done) as bar:
        for epoch in range(state.step // steps_per_epoch, plan.epochs):
            batches = epoch_batches(texts.lengths, plan.batch_size, plan.seed, epoch)
            for rows in batches[state.step % steps_per_epoch :]:
                started_at = time.monotonic()
                _set_rates(optimiser, plan, state.step, total_steps)
                loss = step.take(texts, rows, batch_loss, _step_seed(plan.seed, state.step, world.rank))
                state.step += 1
                state.loss_sum += loss
                state.seconds += time.monotonic() - started_at
                bar.update(len(rows), loss=loss)
                epoch_ends = state.step % steps_per_epoch == 0
                if epoch_ends or state.step % steps_per_epoch % curve_interval == 0:
                    with training_autocast(model.device, plan.precision):
                        _add_point(state, epoch, validate() if epoch_ends else {})
                    progress.figures(state.curve[-1])
                if epoch_ends:
                    progress.say(_describe(state.curve[-1], plan.epochs))
                is_due = epoch_ends or time.monotonic() - last_checkpoint_at >= plan.checkpoint_seconds
                if is_due and world.is_first:
                    save_checkpoint(checkpoints, model, optimiser, state)
                    last_checkpoint_at = time.monotonic()
    model.eval()
    return state


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Row numbers of each batch of an epoch: every row once, similar lengths together, random order."""
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    pool = batch_size * _BATCHES_SORTED_TOGETHER
    for start in range(0, len(shuffled), pool):
        rows = shuffled[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def save_checkpoint(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Add a checkpoint to ``folder``; it appears whole or not at all, older ones go."""
    place = folder / f"step-{state.step:09d}"
    partial = folder / (place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{slot}": tensor for slot, tensor in slots.items()}
    tensors_path = partial / "tensors.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, tensors_path)
    state.tensors_sha256 = sha256_of(tensors_path)
    (partial / "state.json").write_bytes(msgspec.json.encode(state))
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    for old in _checkpoints_in(folder)[:-_CHECKPOINTS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _resume(
    model: nn.Module, optimiser: torch.optim.Optimizer, folder: Path, progress: Progress
) -> TrainingState | None:
    """Put the first process's newest sound checkpoint into model and optimiser; None if there is none."""
    state, tensors = None, dict[str, Tensor]()
    if world_from_environment().is_first:
        state, tensors = _newest_checkpoint(folder, progress)
    state = msgspec.json.decode(message_of_first(msgspec.json.encode(state)), type=TrainingState | None)
    if state is None:
        return None
    tensors = tensors_of_first(tensors)
    model.load_state_dict(_under("model.", tensors))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimiser.", tensors).items():
        index, slot = name.split(".")
        slots.setdefault(int(index), {})[slot] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
    progress.say(f"resumed from the checkpoint at step {state.step:,}")
    return state


def _newest_checkpoint(folder: Path, progress: Progress) -> tuple[TrainingState | None, dict[str, Tensor]]:
    """The newest sound checkpoint, if there is one; damaged ones go."""
    for path in reversed(_checkpoints_in(folder)):
        try:
            return _read_checkpoint(path)
        except (OSError, ValueError, msgspec.DecodeError, SafetensorError) as error:
            progress.say(f"checkpoint {path.name} is damaged ({error}), discarded")
            shutil.rmtree(path, ignore_errors=True)
    return None, {}


def _read_checkpoint(path: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    state = msgspec.json.decode((path / "state.json").read_bytes(), type=TrainingState)
    if sha256_of(path / "tensors.safetensors") != state.tensors_sha256:
        raise ValueError("tensors.safetensors differs from its digest")
    return state, load_file(path / "tensors.safetensors")


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimiser(model: Classifier, plan: TrainingArguments) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": list(model.encoder.parameters()), "peak": plan.learning_rate},
            {"params": list(model.head.parameters()), "peak": plan.head_learning_rate},
        ],
        lr=plan.learning_rate,
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )


def _set_rates(optimiser: torch.optim.Optimizer, plan: TrainingArguments, step: int, total: int) -> None:
    """Rise linearly to the peak over the first tenth of the steps, then fall linearly to zero."""
    warmup = max(1, round(total * _WARMUP_SHARE))
    share = min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


class _Step:
    """One step of the optimiser, taken by all processes together."""

    def __init__(
        self,
        model: Classifier,
        optimiser: torch.optim.Optimizer,
        fabric: Any,
        world: World,
        token_dropout: float,
    ) -> None:
        self._model = model
        self._token_dropout = token_dropout
        self._fabric = fabric
        self._world = world
        self._shared_model, self._shared_optimiser = fabric.setup(model, optimiser)
        # On a CPU the gradient of torch's own attention takes longer than that of its parts.
        self._attention = plain_attention if model.device.type == "cpu" else nullcontext

    def take(
        self, texts: TokenizedTexts, rows: NDArray[np.int64], batch_loss: LossFunction, seed: int
    ) -> float:
        """Learn from the batch ``rows``, of which this process sees its share; returns the batch's loss."""
        torch.manual_seed(seed)
        model = self._model
        model.train()
        own, weight = self._world.share_of(rows)
        ids, mask = texts.padded(own, model.pad_id)
        mask = _with_hidden_tokens(mask, self._token_dropout)
        with self._attention(model.encoder):
            logits = self._shared_model(ids.to(model.device), mask.to(model.device))
        loss = batch_loss(logits.float(), own) * weight
        self._shared_optimiser.zero_grad(set_to_none=True)
        self._fabric.backward(loss)
        self._fabric.clip_gradients(
            self._shared_model,
            self._shared_optimiser,
            max_norm=_MAX_GRADIENT_NORM,
            error_if_nonfinite=False,  # to look costs a wait for the GPU at every step
        )
        self._shared_optimiser.step()
        return float(self._fabric.all_reduce(loss.detach(), reduce_op="mean").item())


def _with_hidden_tokens(mask: Tensor, share: float) -> Tensor:
    """The mask (rows, width), some of its tokens hidden at random, but for the first of each text.

    What is hidden differs from step to step, so that the model learns to do without any one word of a shop.
    """
    if not share:
        return mask
    kept = torch.rand(mask.shape) >= share
    kept[:, 0] = True
    return mask * kept


def _step_seed(seed: int, step: int, rank: int) -> int:
    """What dropout depends on: step and process, not on what ran before."""
    if rank == 0:
        return (seed << 32) + step
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]) >> 1


def _add_point(state: TrainingState, epoch: int, figures: dict[str, float]) -> None:
    last_step = int(state.curve[-1]["step"]) if state.curve else 0
    point: CurvePoint = {
        "step": state.step,
        "epoch": epoch + 1,
        "loss": state.loss_sum / (state.step - last_step),
    }
    state.curve.append(point | {f"validation_{name}": value for name, value in figures.items()})
    state.loss_sum = 0.0


def _describe(point: CurvePoint, epochs: int) -> str:
    figures = (
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in point.items()
        if name not in ("step", "epoch")
    )
    return f"epoch {point['epoch']:.0f} of {epochs}: {', '.join(figures)}"


def learning_curve_json(state: TrainingState) -> bytes:
    """``learning_curve.json``: the points of the curve, one per line."""
    return b"[\n" + b",\n".join(msgspec.json.encode(point) for point in state.curve) + b"\n]\n"


def training_metrics(
    model: Classifier, state: TrainingState, texts: TokenizedTexts, epochs: int
) -> dict[str, Any]:
    """What both training stages report of the run itself."""
    return {
        "rows": len(texts),
        "tokens": int(texts.lengths.sum()),
        "mean_tokens": round(float(texts.lengths.mean()), 2),
        "epochs": epochs,
        "steps": state.step,
        "parameters": model.parameter_count,
        "categories": len(model.labels),
        "training_seconds": round(state.seconds, 2),
        "training_rows_per_second": round(len(texts) * epochs / max(state.seconds, 1e-9), 1),
        "training_loss": round(state.curve[-1]["loss"], 6),
    }
