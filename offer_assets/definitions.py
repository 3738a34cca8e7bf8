"""Assembles the code location; everything it names is defined elsewhere."""

from __future__ import annotations

from typing import Any

import dagster as dg

from offer_assets import (
    benchmark,
    compilation,
    evaluation,
    experiments,
    explanation,
    feed,
    models,
    operation,
    quality,
    release,
    sampling,
    taxonomy,
)
from offer_assets.headless import LOGGERS
from offer_assets.incidents import ALERTS
from offer_assets.jobs import JOBS, SCHEDULES
from offer_assets.partitions import days_from
from offer_assets.plan import RetrainPolicy, ServingLimits, TrainingPlan
from offer_assets.preview import preview_taxonomy
from offer_assets.promotion import PROMOTION_JOBS, ReleasePolicy
from offer_assets.traffic import TRAFFIC_JOBS
from resources.device_reports import DeviceReports
from resources.environment import resources_for
from resources.settings import Settings


def build_defs(settings: Settings, **resource_overrides: Any) -> dg.Definitions:
    """The graph for these settings; tests pass their own resources by name."""
    from sensors.decided_versions import decided_versions
    from sensors.incidents import alert_delivery, incidents
    from sensors.lasting_drift import lasting_drift
    from sensors.new_corrections import new_corrections
    from sensors.new_offers import new_offers
    from sensors.taxonomy_changed import taxonomy_changed

    days = days_from(settings.first_day)
    return dg.Definitions(
        assets=[
            taxonomy.catalog_taxonomy_source,
            feed.offer_feed_source,
            taxonomy.catalog_taxonomy,
            taxonomy.taxonomy_change,
            *feed.feed_assets(days),
            sampling.migrated_labels,
            sampling.evaluation_set,
            sampling.training_sample,
            models.teacher_checkpoint,
            models.teacher_labels,
            models.fast_checkpoint,
            models.student_checkpoint,
            experiments.encoder_comparison,
            experiments.hyperparameter_search,
            evaluation.student_evaluation,
            explanation.mistakes_explained,
            compilation.compiled_student,
            benchmark.serving_benchmark,
            release.model_version,
            release.offer_endpoint,
            *operation.operation_assets(days),
            quality.corrections_feed_source,
            *quality.quality_assets(),
            ALERTS,
        ],
        asset_checks=[
            taxonomy.new_categories_have_labelled_offers,
            taxonomy.renames_keep_their_meaning,
            *feed.feed_checks(days),
            sampling.no_product_is_on_both_sides,
            sampling.sampled_labels_exist_in_taxonomy,
            evaluation.student_is_close_to_teacher,
            evaluation.student_is_not_worse_than_production,
            evaluation.no_segment_is_worse_than_production,
            compilation.compiled_matches_uncompiled,
            compilation.cascade_keeps_the_student,
            benchmark.an_instance_meets_latency_and_peak_load,
            release.endpoint_answers,
            release.endpoint_answers_the_same,
            *operation.operation_checks(days),
            *quality.quality_checks(),
        ],
        jobs=[*JOBS, *PROMOTION_JOBS, *TRAFFIC_JOBS, preview_taxonomy],
        schedules=SCHEDULES,
        sensors=[
            new_offers,
            taxonomy_changed,
            decided_versions,
            new_corrections,
            lasting_drift,
            incidents,
            alert_delivery,
        ],
        loggers={"console": dg.colored_console_logger, **LOGGERS},
        resources={
            **resources_for(settings),
            "plan": TrainingPlan.from_settings(settings),
            "retrain_policy": RetrainPolicy.from_settings(settings),
            "release_policy": ReleasePolicy(approval=settings.approval),
            "serving_limits": ServingLimits.from_settings(settings),
            "device_reports": DeviceReports(location=settings.device_reports_location),
            **resource_overrides,
        },
        # Heavy stages are programs of their own: a process per step would only import everything once more.
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster loads."""
    return build_defs(Settings.from_environment())
