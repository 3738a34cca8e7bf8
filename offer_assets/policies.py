"""Policies that hold for the whole graph, each in one place."""

from __future__ import annotations

import dagster as dg

from ml.drift.questions import (
    AGREEMENT,
    LANGUAGES,
    PREDICTED_CATEGORIES,
    SHOP_MIX,
    SURENESS,
    WORDING,
)
from ml.evaluation.gate import GateLimits
from ml.quality.questions import AGREEMENT as CORRECTIONS
from ml.quality.questions import SHARES as CORRECTED_SHARES

TAXONOMY = "taxonomy"
FEED = "feed"
TRAINING = "training"
EVALUATION = "evaluation"
RELEASE = "release"
OPERATION = "operation"
"""Asset groups: the stages of an offer's way, from left to right."""

DATA_TEAM = "team:data-engineering"
ML_TEAM = "team:machine-learning"
"""Owners: who is asked when an asset or a check fails."""

CONTINUE_ONCE = dg.RetryPolicy(max_retries=1)
"""A heavy stage that was ended from outside goes on from its last checkpoint, once; what is the input's
fault fails without a retry, whatever this says."""

GATE = GateLimits()
"""What a student has to reach before it may serve."""

QUARANTINE_WARNING_SHARE = 0.05
"""A feed with more quarantined offers than this deserves a look."""

QUARANTINE_ERROR_SHARE = 0.5
"""A feed with more quarantined offers than this is not the feed it was."""

TAXONOMY_FINGERPRINT_TAG = "offer_assets/taxonomy_fingerprint"
"""Tag of a run that a release of the taxonomy started: the release's fingerprint."""

TAXONOMY_RELEASE_TAG = "offer_assets/taxonomy_release"
"""Tag of the same run: the release's name."""

DRIFT_CHECKS_TAG = "offer_assets/drift_checks"
"""Tag of a run that drift started: the checks that asked for it."""

MENDED_BY_TRAINING = (
    WORDING,
    LANGUAGES,
    SHOP_MIX,
    PREDICTED_CATEGORIES,
    SURENESS,
    AGREEMENT,
    CORRECTIONS,
    CORRECTED_SHARES,
)
"""Checks of monitoring whose lasting ERROR a new training can cure, for it learns from the offers of those
days: other words, languages, shops or categories than the model knows, a model that is less sure of what
it sees, and answers that people correct more often. Not among them is what no training mends: offers and
values that do not arrive and titles that arrive damaged are the feed's fault, prices are not read by the
model, and a change of the taxonomy starts a training of its own."""

ENDPOINT_SAMPLE_OFFERS = 200
"""Evaluation offers on which the endpoint has to answer like the artifact it serves."""

RELEASE_CODE_VERSION = "2"
"""Raised when registering or deploying comes to mean something else; the stages have their own versions."""
