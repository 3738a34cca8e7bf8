"""A day at work: what it is catalogued with, what it is held against, and how its report becomes checks."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest

from ml.artifacts import ArtifactRef, write_manifest
from ml.drift.answers import LEVELS, Answer, DayReport, DistanceOfColumn, Finding, Level
from ml.drift.questions import PRICES, QUESTIONS, SHOP_MIX
from ml.runner import key_of
from ml.stages import DriftParameters, DriftReferenceParameters, Parameters, stage_named
from offer_assets.jobs import CATALOGUE_DAY, catalogue_day
from offer_assets.operation import drift_reference, operation_assets, operation_checks
from offer_assets.partitions import days_from
from resources.cataloguing import EndpointCataloguing
from resources.compute import LocalCompute, StageResult
from resources.endpoints import Endpoints, EndpointStatus
from resources.io_manager import ArtifactRefIOManager
from tests.registry import registry_in
from tests.release_world import World, free_port

FIRST_DAY = datetime.date(2026, 1, 1)
DAYS = days_from(FIRST_DAY)
PNG = b"\x89PNG\r\n\x1a\n"


def date(number: int) -> str:
    return (FIRST_DAY + datetime.timedelta(days=number - 1)).isoformat()


class Asked(msgspec.Struct):
    """What the stand-ins below were asked for. Dagster copies resources: it is kept outside them."""

    inputs: dict[str, Any] = {}
    parameters: dict[str, Parameters] = {}
    deployed: list[ArtifactRef] = []
    levels: dict[str, Level] = {}
    """What the next report says, by question; OK where nothing is said."""


ASKED = Asked()


class StandInStages(LocalCompute):
    """Real artifacts, found and kept as ever; only the stages' work is left out."""

    def run(self, context: Any, stage_name: str, inputs: Any, parameters: Parameters) -> StageResult:
        ASKED.inputs[stage_name], ASKED.parameters[stage_name] = inputs, parameters
        digests = _digests(inputs)
        key = key_of(stage_named(stage_name), parameters, digests)
        if found := self.store.find(stage_name, key):
            return self._result(found, reused=True)
        folder = self.store.destination(stage_name, key)
        folder.mkdir(parents=True)
        (folder / "key").write_text(key)
        metrics: dict[str, Any] = {"offers": 1000}
        if stage_name == "drift_report":
            metrics |= _write_report(folder, parameters)
        write_manifest(
            folder,
            kind=stage_name,
            key=key,
            inputs=digests,
            code_version="1",
            code_revision=None,
            parameters=msgspec.to_builtins(parameters),
            metrics=metrics,
            seconds=0.1,
        )
        return self._result(self.store.adopt(stage_name, key), reused=False)


def _digests(inputs: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, given in inputs.items():
        if isinstance(given, ArtifactRef):
            flat[name] = given.digest
        else:
            flat |= {f"{name}/{partition}": ref.digest for partition, ref in given.items()}
    return flat


def _write_report(folder: Path, parameters: Parameters) -> dict[str, int]:
    answers = [answer(question.name, ASKED.levels.get(question.name, "OK")) for question in QUESTIONS]
    for found in answers:
        if found.picture:
            (folder / found.picture).write_bytes(PNG)
    report = DayReport(
        day=parameters.day,
        offers=1000,
        offers_looked_at=900,
        reference_days=28,
        reference_offers=28_000,
        weekdays_allowed_for=True,
        sentence="the day in a sentence",
        answers=answers,
        columns=[DistanceOfColumn(column="price", distance=0.3, usual_high=0.1)],
    )
    (folder / "drift.json").write_bytes(msgspec.json.encode(report))
    (folder / "report.html").write_text("<html></html>")
    return {f"level_{found.question}": LEVELS[found.level] for found in answers}


def answer(question: str, level: Level) -> Answer:
    moved = level in ("WARN", "ERROR")
    finding = Finding(
        question=question,
        measure="offers of shop",
        group="country IT",
        segment="shop 7",
        level=level,
        value=0.0,
        usual=0.15,
        usual_low=0.14,
        usual_high=0.18,
        effect=0.15,
        p_value=1e-9,
        days=1,
        sentence="shop 7 is gone",
    )
    return Answer(
        question=question,
        title=question,
        level=level,
        sentence=f"{question} is {level}",
        series=12,
        findings=[finding] if moved else [],
        found=3 if moved else 0,
        picture=f"{question}.png" if moved else "",
    )


class DeadEndpoints(Endpoints):
    def releasing(self):
        return contextlib.nullcontext()

    def deploy(self, folder: Path, ref: ArtifactRef, at_once: bool = False) -> EndpointStatus:
        ASKED.deployed.append(ref)
        return EndpointStatus(
            url="http://up", model_version="v", taxonomy_version="t", started="", variants=[]
        )

    def check_available(self) -> None:
        raise AssertionError("not needed to catalogue a day")

    def status(self) -> EndpointStatus | None:
        return None

    def invoke(self, offers: Any, variant: str = "") -> list[dict[str, Any]]:
        raise AssertionError("not needed to catalogue a day")

    def split(self, variants: Any) -> EndpointStatus:
        raise AssertionError("not needed to catalogue a day")

    def shadow(self, folder: Path, ref: ArtifactRef, percent: float) -> EndpointStatus:
        raise AssertionError("not needed to catalogue a day")

    def end_shadow(self) -> EndpointStatus | None:
        raise AssertionError("not needed to catalogue a day")

    def observations(self) -> list[Any]:
        raise AssertionError("not needed to catalogue a day")

    def stop(self) -> bool:
        raise AssertionError("not needed to catalogue a day")


class Operation:
    """Days of offers, models that were trained on them, and the job that looks at a day."""

    def __init__(self, world: World) -> None:
        self.world, self.store = world, world.store
        self.offers: dict[str, ArtifactRef] = {}
        self.change = world.artifact(
            "taxonomy_change", "change", {}, {"catalog_taxonomy": self._taxonomy("in-force").digest}
        )
        self.store.write_pointer("taxonomy_change", self.change)

    def _taxonomy(self, name: str) -> ArtifactRef:
        return self.world.artifact("catalog_taxonomy", name, {}, {})

    def take(self, *numbers: int, as_they_are: str = "first") -> None:
        for number in numbers:
            taken = self.world.artifact("offers", f"{date(number)}-{as_they_are}", {}, {})
            self.offers[date(number)] = taken
            self.store.write_pointer(f"offers/{date(number)}", taken)

    def train(self, name: str) -> ArtifactRef:
        """Train on all that was taken, evaluate, register and serve."""
        artifact = self.world.artifact
        behind = {f"offers/{day}": ref.digest for day, ref in self.offers.items()}
        sample = artifact("training_sample", name, {}, behind)
        student = artifact("student_checkpoint", name, {}, {"training_sample": sample.digest})
        model = artifact("compiled_student", name, {}, {"student_checkpoint": student.digest})
        evaluation = artifact("student_evaluation", name, {}, {})
        tags = {"verdict": "passed", "evaluation": evaluation.digest}
        self.world.tracking.register(model, {}, tags, "automatic")
        self.store.write_pointer("offer_endpoint", model)
        return model

    def run(self, number: int) -> dg.ExecuteInProcessResult:
        """The job ``catalogue_day`` for one day."""
        ASKED.inputs.clear()
        with_endpoint = {
            "artifact_store": self.store,
            "io_manager": ArtifactRefIOManager(store=self.store),
            "compute": (compute := StandInStages(store=self.store)),
            "cataloguing": EndpointCataloguing(compute=compute, endpoints=DeadEndpoints()),
            "tracking": self.world.tracking,
        }
        definitions = dg.Definitions(
            assets=[
                dg.AssetSpec("offers", partitions_def=DAYS),
                *(dg.AssetSpec(name) for name in ("offer_endpoint", "taxonomy_change")),
                *operation_assets(DAYS),
            ],
            asset_checks=operation_checks(DAYS)[1:],  # the first reads tables
            jobs=[catalogue_day],
            resources=with_endpoint,
            executor=dg.in_process_executor,
        )
        job = definitions.resolve_job_def(CATALOGUE_DAY)
        done = job.execute_in_process(
            instance=self.world.instance, partition_key=date(number), raise_on_error=False
        )
        assert done.success
        return done


@pytest.fixture
def operation(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operation]:
    ASKED.inputs, ASKED.parameters, ASKED.deployed, ASKED.levels = {}, {}, [], {}
    with dg.DagsterInstance.ephemeral() as instance:
        operation = Operation(World(tmp_path, registry_in(tmp_path, tmp_path_factory), instance, free_port()))
        operation.take(1, 2)
        yield operation


def metadata_of(done: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = [
        event for event in done.get_asset_materialization_events() if event.asset_key == dg.AssetKey(asset)
    ]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def test_an_endpoint_that_is_gone_is_brought_up_again(operation):
    model = operation.train("model")
    operation.run(2)
    assert [deployed.digest for deployed in ASKED.deployed] == [model.digest]
    assert ASKED.inputs["catalogued_offers"]["compiled_student"].digest == model.digest


def test_the_reference_is_of_the_days_that_the_serving_model_was_trained_on(operation):
    operation.train("older")
    model = operation.train("model")
    trained_on = dict(operation.offers)
    operation.take(2, as_they_are="taken again")
    operation.take(3)
    operation.run(3)
    inputs = ASKED.inputs["drift_reference"]
    assert {day: ref.digest for day, ref in inputs["offers"].items()} == {
        day: ref.digest for day, ref in trained_on.items()
    }
    assert inputs["compiled_student"].digest == model.digest
    assert inputs["training_sample"].key == "model"
    assert ASKED.inputs["drift_report"]["compiled_student"].digest == model.digest
    assert ASKED.inputs["drift_report"]["catalog_taxonomy"].key == "in-force"


def test_of_a_long_training_the_newest_days_are_the_reference(operation):
    operation.take(*range(3, 33))
    operation.train("model")
    operation.run(32)
    newest = DriftReferenceParameters().days
    assert list(ASKED.inputs["drift_reference"]["offers"]) == [date(n) for n in range(33 - newest, 33)]


def test_the_reference_is_made_once_per_model(operation):
    operation.train("model")
    assert metadata_of(operation.run(1), "drift_reference")["made_in_this_run"]
    assert not metadata_of(operation.run(2), "drift_reference")["made_in_this_run"]
    operation.train("next")
    assert metadata_of(operation.run(2), "drift_reference")["made_in_this_run"]


def test_a_day_is_held_against_the_reference_of_the_model_that_catalogued_it(operation):
    older = operation.train("older")
    operation.run(2)
    catalogued = operation.store.read_pointer(f"catalogued_offers/{date(2)}")
    reference = ASKED.inputs["drift_report"]["drift_reference"]
    operation.train("newer")
    resources = {
        "artifact_store": operation.store,
        "io_manager": ArtifactRefIOManager(store=operation.store),
        "compute": StandInStages(store=operation.store),
    }
    _, _, drift_report = operation_assets(DAYS)
    specs = [dg.AssetSpec(name) for name in ("offer_endpoint", "taxonomy_change")]
    by_day = [dg.AssetSpec(name, partitions_def=DAYS) for name in ("offers", "catalogued_offers")]
    done = dg.materialize(
        [*specs, *by_day, drift_reference, drift_report],
        selection=["drift_reference", "drift_report"],
        partition_key=date(2),
        resources=resources,
    )
    assert done.success
    assert operation.store.read_pointer(f"catalogued_offers/{date(2)}") == catalogued
    assert operation.store.read_pointer("drift_reference").digest != reference.digest
    assert ASKED.inputs["drift_report"]["drift_reference"].digest == reference.digest
    assert ASKED.inputs["drift_reference"]["compiled_student"].digest == older.digest
    assert ASKED.inputs["drift_report"]["compiled_student"].digest == older.digest


def test_a_day_is_seen_with_up_to_six_days_before_of_the_same_reference(operation):
    operation.take(*range(3, 12))
    operation.train("older")
    operation.run(3)
    operation.train("model")
    for number in (2, 4, 5, 6, 7, 8, 9):
        operation.run(number)
    assert list(ASKED.inputs["drift_report"]["earlier"]) == [date(n) for n in (4, 5, 6, 7, 8)]
    operation.run(11)
    assert list(ASKED.inputs["drift_report"]["earlier"]) == [date(n) for n in (5, 6, 7, 8, 9)]


def test_a_day_counts_as_complete_when_it_is_over(operation, monkeypatch):
    operation.train("model")
    for today, complete in ((date(2), False), (date(3), True)):
        monkeypatch.setattr("offer_assets.operation.today_in_utc", lambda today=today: today)
        operation.run(2)
        assert ASKED.parameters["drift_report"] == DriftParameters(day=date(2), complete=complete)


def test_the_report_shows_every_answer_the_plots_and_where_it_is(operation):
    operation.train("model")
    ASKED.levels = {SHOP_MIX: "ERROR"}
    shown = metadata_of(operation.run(2), "drift_report")
    assert shown["summary"] == "the day in a sentence"
    assert Path(shown["report"]).read_text() == "<html></html>"
    assert len(shown["answers"].records) == len(QUESTIONS)
    assert [name for name in shown if name.startswith("plot_")] == [f"plot_{SHOP_MIX}"]
    assert shown["distances_of_columns"].records[0].data["usual_below"] == 0.1


@pytest.mark.parametrize(
    ("level", "passed", "severity"),
    [("OK", True, "WARN"), ("WARN", False, "WARN"), ("ERROR", False, "ERROR"), ("UNKNOWN", False, "WARN")],
)
def test_every_question_is_a_check_that_says_what_moved(operation, level, passed, severity):
    operation.train("model")
    ASKED.levels = {SHOP_MIX: level}
    checks = {check.check_name: check for check in operation.run(2).get_asset_check_evaluations()}
    assert checks.keys() == {question.name for question in QUESTIONS}
    check = checks.pop(SHOP_MIX)
    assert all(other.passed for other in checks.values())
    assert (check.passed, check.severity.value, check.description) == (
        passed,
        severity,
        f"UNKNOWN: {SHOP_MIX} is UNKNOWN" if level == "UNKNOWN" else f"{SHOP_MIX} is {level}",
    )
    assert check.partition == date(2)
    shown = {name: value.value for name, value in check.metadata.items()}
    assert (shown["level"], shown["complete"], shown["series_tested"]) == (level, True, 12)
    assert Path(shown["report"]).name == "report.html"
    if level in ("WARN", "ERROR"):
        assert shown["findings_in_all"] == 3
        assert shown["findings"].records[0].data["in_words"] == "shop 7 is gone"
        assert shown["plot"].startswith("![plot](data:image/png;base64,")
    else:
        assert shown["findings"] == "none"
        assert "plot" not in shown


def test_what_cannot_be_told_yet_is_no_failure(operation, monkeypatch):
    operation.train("model")
    monkeypatch.setattr("offer_assets.operation.today_in_utc", lambda: date(2))
    ASKED.levels = {SHOP_MIX: "UNKNOWN", PRICES: "WARN"}
    checks = {check.check_name: check for check in operation.run(2).get_asset_check_evaluations()}
    assert [name for name, check in checks.items() if not check.passed] == [PRICES]
    assert checks[SHOP_MIX].description == f"UNKNOWN: {SHOP_MIX} is UNKNOWN"
    assert {check.metadata["complete"].value for check in checks.values()} == {False}
