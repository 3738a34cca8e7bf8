"""What an endpoint and its clients call the models that serve side by side, and tell of each other."""

from __future__ import annotations

TARGET_VARIANT_HEADER = "x-amzn-sagemaker-target-variant"
"""Of a request: the variant that has to answer it (SageMaker's own header)."""

INVOKED_VARIANT_HEADER = "x-amzn-invoked-production-variant"
"""Of an answer: the variant that gave it (SageMaker's own header)."""

OFFERS_HEADER = "x-offers"
"""Of an answer: ``<offers>;<offers of low confidence>``."""

LOW_CONFIDENCE = 0.5
"""Below it the model is less than half sure of the category it names."""


_PREFIX = "model-"


def variant_of(model_version: str) -> str:
    """Name of the variant that serves a model version."""
    return f"{_PREFIX}{model_version}"


def names_a_version(variant: str) -> bool:
    """Whether a variant is named by what it serves; SageMaker's main one is not, it keeps its name."""
    return variant.startswith(_PREFIX)
