"""The graph as a whole: what exists, what depends on what, and what loading it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from offer_assets.definitions import build_defs
from resources.settings import Settings

HEAVY = (
    "torch",
    "transformers",
    "evidently",
    "mlflow",
    "boto3",
    "sagemaker",
    "onnxruntime",
    "sklearn",
    "matplotlib",
    "optuna",
)

UPSTREAM = {
    "catalog_taxonomy_source": set(),
    "offer_feed": set(),
    "catalog_taxonomy": {"catalog_taxonomy_source"},
    "raw_offers": {"offer_feed"},
    "taxonomy_change": {"catalog_taxonomy"},
    "offers": {"raw_offers", "taxonomy_change"},
    "quarantined_offers": {"raw_offers", "taxonomy_change"},
    "migrated_labels": {"offers", "taxonomy_change"},
    "evaluation_set": {"offers", "migrated_labels", "taxonomy_change"},
    "training_sample": {"offers", "migrated_labels", "evaluation_set", "taxonomy_change"},
    "teacher_checkpoint": {"training_sample", "taxonomy_change"},
    "teacher_labels": {"teacher_checkpoint", "training_sample"},
    "fast_checkpoint": {"training_sample", "teacher_labels", "taxonomy_change"},
    "student_checkpoint": {"training_sample", "teacher_labels", "teacher_checkpoint", "taxonomy_change"},
    "encoder_comparison": {"training_sample"},
    "hyperparameter_search": {"training_sample", "teacher_labels"},
    "student_evaluation": {
        "evaluation_set",
        "taxonomy_change",
        "student_checkpoint",
        "teacher_checkpoint",
        "fast_checkpoint",
        "training_sample",
    },
    "compiled_student": {
        "student_checkpoint",
        "fast_checkpoint",
        "training_sample",
        "evaluation_set",
        "taxonomy_change",
    },
    "mistakes_explained": {"student_evaluation", "evaluation_set", "student_checkpoint", "training_sample"},
    "serving_benchmark": {"compiled_student"},
    "model_version": {"student_evaluation", "compiled_student", "taxonomy_change"},
    "offer_endpoint": {"model_version"},
    "catalogued_offers": {"offers", "offer_endpoint"},
    "drift_reference": {"offer_endpoint", "training_sample"},
    "drift_report": {"catalogued_offers", "offers", "drift_reference", "taxonomy_change"},
    "corrections_feed": set(),
    "corrections": {"corrections_feed", "taxonomy_change"},
    "live_quality": {"corrections", "catalogued_offers", "taxonomy_change"},
    "alerts": set(),
}

CHECKS = {
    "taxonomy_change": {"new_categories_have_labelled_offers", "renames_keep_their_meaning"},
    "raw_offers": {"every_feed_file_was_read"},
    "offers": {"no_offer_is_lost", "labels_exist_in_taxonomy"},
    "quarantined_offers": {"few_offers_are_quarantined"},
    "training_sample": {"no_product_is_on_both_sides", "sampled_labels_exist_in_taxonomy"},
    "student_evaluation": {
        "student_is_close_to_teacher",
        "student_is_not_worse_than_production",
        "no_segment_is_worse_than_production",
    },
    "compiled_student": {"compiled_matches_uncompiled", "cascade_keeps_the_student"},
    "serving_benchmark": {"an_instance_meets_latency_and_peak_load"},
    "offer_endpoint": {"endpoint_answers", "endpoint_answers_the_same"},
    "catalogued_offers": {"every_clean_offer_is_catalogued"},
    "drift_report": {
        "volume_is_usual",
        "values_are_complete",
        "wording_is_usual",
        "titles_are_undamaged",
        "languages_are_usual",
        "prices_are_usual",
        "shop_mix_is_usual",
        "predicted_categories_are_usual",
        "model_is_as_sure_as_before",
        "fast_model_agrees",
        "predictions_are_of_the_taxonomy_in_force",
    },
    "corrections": {"every_corrections_file_was_read", "few_corrections_are_quarantined"},
    "live_quality": {
        "corrections_agree_with_predictions",
        "category_shares_match_corrections",
        "corrections_keep_coming",
        "corrections_are_about_catalogued_offers",
    },
}


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path))
    return build_defs(Settings.from_environment())


def test_the_definitions_are_loadable(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)


def test_the_graph_is_the_one_in_the_picture(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    found = {
        node.key.to_user_string(): {parent.to_user_string() for parent in node.parent_keys}
        for node in graph.asset_nodes
    }
    assert found == UPSTREAM


def test_every_check_is_where_it_matters(definitions: dg.Definitions) -> None:
    found: dict[str, set[str]] = {}
    for key in definitions.resolve_asset_graph().asset_check_keys:
        found.setdefault(key.asset_key.to_user_string(), set()).add(key.name)
    assert found == CHECKS


def test_every_asset_says_what_it_is_and_whose(definitions: dg.Definitions) -> None:
    for node in definitions.resolve_asset_graph().asset_nodes:
        name = node.key.to_user_string()
        assert node.description, f"{name} has no description"
        assert node.owners, f"{name} has no owner"
        assert node.group_name != "default", f"{name} has no group"
        assert node.kinds, f"{name} has no kind"


def test_materialized_assets_carry_the_version_of_their_code(definitions: dg.Definitions) -> None:
    for node in definitions.resolve_asset_graph().asset_nodes:
        if node.is_materializable:
            assert node.code_version, f"{node.key.to_user_string()} has no code version"


def test_every_job_has_a_description(definitions: dg.Definitions) -> None:
    for job in definitions.resolve_all_job_defs():
        if not job.name.startswith("__"):
            assert job.description, job.name


def test_loading_the_definitions_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, offer_assets.definitions as d\n"
        "from resources.settings import Settings\n"
        "d.build_defs(Settings.from_environment()).resolve_asset_graph()\n"
        f"print(sorted(set({HEAVY!r}) & {{name.split('.')[0] for name in sys.modules}}))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"OFFER_ASSETS_HOME": str(tmp_path)}
    )
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_loading_the_definitions_prints_no_warning(tmp_path: Path) -> None:
    answer = subprocess.run(
        [
            sys.executable,
            "-W",
            "default",
            "-m",
            "dagster",
            "definitions",
            "validate",
            "-m",
            "offer_assets.definitions",
        ],
        capture_output=True,
        text=True,
        env={"OFFER_ASSETS_HOME": str(tmp_path), "DAGSTER_HOME": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    assert "PreviewWarning" not in answer.stdout + answer.stderr
