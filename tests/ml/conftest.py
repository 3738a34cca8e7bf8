"""Fixtures that several test modules of this room use."""

from tests.ml.compiled_models import (
    compiled_root,
    compiled_student,
    neuron_student,
    other_compiled_student,
    traced_student,
)

__all__ = ["compiled_root", "compiled_student", "neuron_student", "other_compiled_student", "traced_student"]
