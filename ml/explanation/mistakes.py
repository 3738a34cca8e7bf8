"""Stage ``mistakes_explained``: the evaluation offers that the student was surest of, and wrong about.

A confident mistake is worth a look: mostly it is a label that is wrong, a category that has a twin, or a
word that leads astray. Which of these it is, words and similar labelled offers tell at a glance.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.explanation.explaining import Explainer, Explanation
from ml.explanation.rendering import as_markdown, as_page
from ml.learning.devices import use_available_cores
from ml.runner import StageContext
from ml.stages import MistakesExplainedParameters

MISTAKES_FILE = "mistakes.json"
PAGE_FILE = "mistakes.html"
MARKDOWN_FILE = "mistakes.md"

_COLUMNS = ["offer_id", "title", "brand", "shop_category", "description", "category_id"]


class Mistake(msgspec.Struct, frozen=True, kw_only=True):
    """An offer whose predicted category is not its label."""

    labelled: str
    """Category id of the label."""
    labelled_path: str
    explanation: Explanation
    """Why the wrong category was predicted."""

    @property
    def neighbours_as_labelled(self) -> int:
        """Similar offers that have the label that the student missed."""
        return sum(offer.category_id == self.labelled for offer in self.explanation.similar)


def explain_mistakes(context: StageContext, parameters: MistakesExplainedParameters) -> dict[str, Any]:
    """Write ``mistakes.json`` (list of :class:`Mistake`), ``mistakes.html`` and ``mistakes.md``.

    Returns:
        ``mistakes`` in all, ``explained`` of them, and among the similar offers of these the shares
        ``similar_as_predicted`` and ``similar_as_labelled``: where the former is high, labels are in doubt.

    Raises:
        InputError: the evaluation is of another student or of other offers.
    """
    use_available_cores()
    predictions = _predictions_of_student(context)
    offers = pq.read_table(context.input("evaluation_set") / "offers.parquet", columns=_COLUMNS)
    if not offers["offer_id"].equals(predictions["offer_id"]):
        raise InputError(
            "student_evaluation was made on other offers than evaluation_set holds; materialize it again"
        )
    rows = _surest_mistakes(predictions)
    explainer = Explainer.load(
        context.input("student_checkpoint"),
        context.input("training_sample"),
        context.checkpoints,
        progress=context.progress,
    )
    chosen = offers.take(rows[: parameters.mistakes]).to_pylist()
    mistakes = [
        Mistake(
            labelled=offer["category_id"],
            labelled_path=explainer.path(offer["category_id"]),
            explanation=explainer.explain(offer, parameters.similar),
        )
        for offer in chosen
    ]
    (context.output / MISTAKES_FILE).write_bytes(msgspec.json.encode(mistakes))
    (context.output / PAGE_FILE).write_text(
        as_page(
            [mistake.explanation for mistake in mistakes], [mistake.labelled_path for mistake in mistakes]
        ),
        encoding="utf-8",
    )
    sections = [as_markdown(mistake.explanation, true_path=mistake.labelled_path) for mistake in mistakes]
    (context.output / MARKDOWN_FILE).write_text("\n\n---\n\n".join(sections) or "none", encoding="utf-8")
    similar = max(1, sum(len(mistake.explanation.similar) for mistake in mistakes))
    return {
        "mistakes": len(rows),
        "explained": len(mistakes),
        "similar_as_predicted": round(sum(m.explanation.agreeing for m in mistakes) / similar, 6),
        "similar_as_labelled": round(sum(m.neighbours_as_labelled for m in mistakes) / similar, 6),
    }


def _predictions_of_student(context: StageContext) -> pa.Table:
    """What the student said, offer by offer."""
    evaluation = context.input("student_evaluation")
    evaluated = read_manifest(evaluation).inputs["student_checkpoint"]
    student = read_manifest(context.input("student_checkpoint")).digest
    if evaluated != student:
        raise InputError(
            f"student_evaluation measured student {evaluated[:12]}, student_checkpoint is {student[:12]}; "
            "materialize student_evaluation again"
        )
    columns = ["offer_id", "category_id", "student_category_id", "student_confidence"]
    return pq.read_table(evaluation / "predictions.parquet", columns=columns)


def _surest_mistakes(predictions: pa.Table) -> list[int]:
    """Rows whose prediction is not the label, the surest first; of equals the first."""
    labelled, predicted = (
        np.array(predictions[name].to_pylist(), dtype=str) for name in ("category_id", "student_category_id")
    )
    confidence = predictions["student_confidence"].to_numpy()
    wrong = np.flatnonzero(labelled != predicted)
    rows: list[int] = wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()
    return rows
