"""References between assets, in real Dagster runs with every mix of partitions that the graph has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.io_manager import ArtifactRefIOManager

DAYS = dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-05")
TARGETS = dg.StaticPartitionsDefinition(["cpu", "neuron"])

seen: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


def made(context: dg.AssetExecutionContext, **inputs: Any) -> dg.MaterializeResult:
    """Note what arrived, and return a reference that tells asset and partition."""
    name = context.asset_key.to_user_string()
    seen[name] = inputs
    partition = context.partition_key if context.has_partition_key else ""
    return dg.MaterializeResult(value=ref(f"{name} {partition}".strip()))


def ref(label: str) -> ArtifactRef:
    return ArtifactRef(kind="thing", key=label, digest=label, uri=label, metrics={"rows": 1})


@dg.asset
def taxonomy(context: dg.AssetExecutionContext):
    return made(context)


@dg.asset(partitions_def=DAYS)
def raw_offers(context: dg.AssetExecutionContext, taxonomy: ArtifactRef):
    return made(context, taxonomy=taxonomy)


@dg.asset(partitions_def=DAYS)
def offers(context: dg.AssetExecutionContext, raw_offers: ArtifactRef):
    return made(context, raw_offers=raw_offers)


@dg.asset
def sample(context: dg.AssetExecutionContext, offers: dict[str, ArtifactRef]):
    return made(context, offers=offers)


@dg.asset
def whole(context: dg.AssetExecutionContext, offers: ArtifactRef):
    return made(context, offers=offers)


@dg.asset(partitions_def=TARGETS)
def compiled(context: dg.AssetExecutionContext, sample: ArtifactRef):
    return made(context, sample=sample)


@dg.asset
def all_targets(context: dg.AssetExecutionContext, compiled: dict[str, ArtifactRef]):
    return made(context, compiled=compiled)


@dg.asset(
    ins={"compiled": dg.AssetIn(partition_mapping=dg.SpecificPartitionsPartitionMapping(["cpu"]))},
)
def model(context: dg.AssetExecutionContext, compiled: ArtifactRef):
    return made(context, compiled=compiled)


@dg.asset
def wrong() -> str:
    return "not a reference"


@dg.asset_check(asset=offers, partitions_def=DAYS)
def partitioned_check(offers: ArtifactRef) -> dg.AssetCheckResult:
    seen["partitioned_check"] = offers
    return dg.AssetCheckResult(passed=True)


@dg.asset_check(asset=offers)
def plain_check(offers: ArtifactRef) -> dg.AssetCheckResult:
    seen["plain_check"] = offers
    return dg.AssetCheckResult(passed=True)


GRAPH = [taxonomy, raw_offers, offers, sample, whole, compiled, all_targets, model, wrong]
CHECKS = [partitioned_check, plain_check]

Materialize = Callable[..., None]


@pytest.fixture
def materialize(tmp_path: Path) -> Materialize:
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")

    def materialize(*names: str, partition: str | None = None) -> None:
        dg.materialize(
            [*GRAPH, *CHECKS],
            selection=list(names),
            partition_key=partition,
            resources={"io_manager": ArtifactRefIOManager(store=store)},
        )

    return materialize


def key_of(given: ArtifactRef) -> str:
    return given.key


def test_an_unpartitioned_asset_reaches_every_day(materialize):
    materialize("taxonomy")
    materialize("raw_offers", partition="2026-11-02")
    assert key_of(seen["raw_offers"]["taxonomy"]) == "taxonomy"
    assert seen["raw_offers"]["taxonomy"].metrics == {"rows": 1}


def test_a_day_reaches_the_same_day_downstream(materialize):
    materialize("taxonomy")
    for day in ("2026-11-02", "2026-11-03"):
        materialize("raw_offers", partition=day)
    materialize("offers", partition="2026-11-02")
    assert key_of(seen["offers"]["raw_offers"]) == "raw_offers 2026-11-02"


def test_an_unpartitioned_asset_gets_the_days_that_exist_in_order(materialize):
    materialize("taxonomy")
    for day in ("2026-11-03", "2026-11-01"):
        materialize("raw_offers", "offers", partition=day)
    materialize("sample")
    found = seen["sample"]["offers"]
    assert [(day, key_of(found[day])) for day in found] == [
        ("2026-11-01", "offers 2026-11-01"),
        ("2026-11-03", "offers 2026-11-03"),
    ]


def test_static_partitions_come_by_name_or_one_by_mapping(materialize):
    materialize("taxonomy")
    materialize("raw_offers", "offers", partition="2026-11-01")
    materialize("sample")
    materialize("compiled", partition="cpu")
    materialize("all_targets", "model")
    assert {name: key_of(found) for name, found in seen["all_targets"]["compiled"].items()} == {
        "cpu": "compiled cpu"
    }
    assert key_of(seen["model"]["compiled"]) == "compiled cpu"


def test_a_new_materialization_of_a_partition_replaces_its_reference(materialize):
    materialize("taxonomy")
    for _ in range(2):
        materialize("raw_offers", "offers", partition="2026-11-01")
    materialize("sample")
    assert list(seen["sample"]["offers"]) == ["2026-11-01"]


def test_checks_of_a_day_see_that_day_with_or_without_partitions_of_their_own(materialize):
    materialize("taxonomy")
    materialize("raw_offers", partition="2026-11-02")
    materialize("offers", partition="2026-11-02")
    assert key_of(seen["partitioned_check"]) == "offers 2026-11-02"
    assert key_of(seen["plain_check"]) == "offers 2026-11-02"


@pytest.mark.parametrize(
    ("asset", "partition", "message"),
    [
        ("raw_offers", "2026-11-02", "^taxonomy has not been materialized: materialize it first"),
        ("offers", "2026-11-02", "^raw_offers has not been materialized for partition 2026-11-02"),
        ("sample", None, r"^offers has not been materialized for any of its partitions \(2026-11-01 … "),
        ("model", None, "^compiled has not been materialized for partition cpu"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(materialize, asset, partition, message):
    with pytest.raises(dg.Failure, match=message) as failure:
        materialize(asset, partition=partition)
    assert not failure.value.allow_retries


def test_many_partitions_where_one_is_wanted_are_refused(materialize):
    materialize("taxonomy")
    materialize("raw_offers", "offers", partition="2026-11-01")
    with pytest.raises(dg.Failure, match=r"offers spans 4 partitions here.*dict\[str, ArtifactRef\]"):
        materialize("whole")


def test_an_output_that_is_no_reference_is_refused(materialize):
    with pytest.raises(TypeError, match="wrong returned a str"):
        materialize("wrong")
