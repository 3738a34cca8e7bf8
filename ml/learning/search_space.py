"""Where a search looks: for each model the parameters that are worth varying, and their ranges.

The names are those of the stages' parameters, and every value is one that the stage takes: both are
checked when this module is imported. Needs neither torch nor Optuna.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from ml.errors import InputError
from ml.stages import STAGES, Parameters, Stage

Value = float | int


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers from ``low`` to ``high``; whole ones where both are whole."""

    low: Value
    high: Value
    logarithmic: bool = False
    """Whether it is factors that matter, not differences."""
    proposed: bool = True
    """Whether a search varies it unless told otherwise."""

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values that a stage has to take if it takes all of them."""
        return (self.low, self.high)

    def including(self, value: Value) -> Range:
        """The range, made wide enough for ``value``."""
        return msgspec.structs.replace(self, low=min(self.low, value), high=max(self.high, value))


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A few numbers to choose from."""

    values: tuple[Value, ...]
    proposed: bool = True
    """Whether a search varies it unless told otherwise."""
    logarithmic: bool = False
    """As for a range; for plots."""

    @property
    def examples(self) -> tuple[Value, ...]:
        """All of them."""
        return self.values

    def including(self, value: Value) -> Choice:
        """The choice with ``value`` among the others, in order."""
        return msgspec.structs.replace(self, values=tuple(sorted({*self.values, value})))


Space = Mapping[str, Range | Choice]
SearchedModel = Literal["teacher", "student", "fast"]

STAGE_OF: dict[str, str] = {
    "teacher": "teacher_checkpoint",
    "student": "student_checkpoint",
    "fast": "fast_checkpoint",
}
"""The stage that trains each model."""

SPACES: dict[str, Space] = {
    "teacher": {
        "learning_rate": Range(low=2e-5, high=5e-4, logarithmic=True),
        "head_learning_rate": Range(low=3e-4, high=3e-2, logarithmic=True),
        "ancestor_loss": Range(low=0.0, high=1.0),
        "batch_size": Choice(values=(16, 32, 64), logarithmic=True),
        "epochs": Range(low=1, high=4),
    },
    "student": {
        "learning_rate": Range(low=5e-5, high=1e-3, logarithmic=True),
        "head_learning_rate": Range(low=1e-4, high=1e-2, logarithmic=True),
        "label_weight": Range(low=0.0, high=1.0),
        "temperature": Range(low=0.5, high=4.0, logarithmic=True),
        "batch_size": Choice(values=(16, 32, 64), logarithmic=True),
        # More layers are nearly always better and always slower: quality alone cannot choose their number.
        "layers": Range(low=1, high=6, proposed=False),
    },
    "fast": {
        "regularisation": Range(low=0.05, high=20.0, logarithmic=True),
        "max_features": Range(low=20_000, high=300_000, logarithmic=True),
        "pseudo_label_confidence": Range(low=0.5, high=1.0),
        "label_weight": Range(low=0.0, high=1.0),
    },
}


def space_of(model: str, names: Sequence[str], set_now: Parameters) -> dict[str, Range | Choice]:
    """What a search of ``model`` varies.

    Args:
        model: ``teacher``, ``student`` or ``fast``.
        names: Of the parameters that vary; none: those that are proposed.
        set_now: Parameters of the model's stage; the ranges are made wide enough for them.

    Raises:
        InputError: a name is not in the model's search space.
    """
    space = SPACES[model]
    for name in names:
        if name not in space:
            nearest = difflib.get_close_matches(name, space, n=1, cutoff=0.0)[0]
            raise InputError(
                f"searched: {model} has no {name!r} to search, did you mean {nearest!r}? "
                f"There are {', '.join(space)}"
            )
    return {
        name: candidate.including(getattr(set_now, name))
        for name, candidate in space.items()
        if (name in names if names else candidate.proposed)
    }


def _stage(model: str) -> Stage:
    return STAGES[STAGE_OF[model]]


def _check(spaces: Mapping[str, Space]) -> None:
    """Hold the spaces against the parameters of the stages.

    Raises:
        TypeError: a parameter was renamed, or its range goes beyond what the stage takes.
    """
    for model, space in spaces.items():
        parameters = _stage(model).parameters
        for name, candidate in space.items():
            for value in candidate.examples:
                try:
                    msgspec.convert({name: value}, parameters)
                except msgspec.ValidationError as error:
                    raise TypeError(f"search space of {model}: {name} {value}: {error}") from None


_check(SPACES)
