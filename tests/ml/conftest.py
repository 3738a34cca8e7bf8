"""Fixtures that several test modules of this room use."""

from tests.ml.compiled_models import (
    cascading_student,
    compiled_root,
    compiled_student,
    neuron_student,
    other_compiled_student,
    traced_student,
)

__all__ = [
    "cascading_student",
    "compiled_root",
    "compiled_student",
    "neuron_student",
    "other_compiled_student",
    "traced_student",
]
