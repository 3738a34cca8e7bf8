"""Fixtures that several test modules of this room use."""

from tests.aws.conftest import stand_in
from tests.ml.compiled_models import compiled_root, compiled_student, other_compiled_student
from tests.postgres import postgres_server, postgres_url

__all__ = [
    "compiled_root",
    "compiled_student",
    "other_compiled_student",
    "postgres_server",
    "postgres_url",
    "stand_in",
]
