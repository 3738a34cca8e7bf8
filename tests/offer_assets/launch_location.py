"""A code location with a job that succeeds for one of its partitions and one that fails (for test_launch)."""

import dagster as dg


@dg.asset
def nothing() -> None:
    """Never comes to be."""
    raise dg.Failure("it is not meant to be")


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["cpu"]))
def part(context: dg.AssetExecutionContext) -> None:
    """One of its partitions."""
    assert context.partition_key == "cpu"


defs = dg.Definitions(
    assets=[nothing, part],
    jobs=[dg.define_asset_job(f"make_{asset.key.path[-1]}", [asset]) for asset in (nothing, part)],
    executor=dg.in_process_executor,
)
