"""What Dagster passes between assets: references to artifacts, never the artifacts themselves.

An asset's output is kept as a pointer named ``<asset>`` or ``<asset>/<partition>``. A downstream
asset types its input ``ArtifactRef``, or ``dict[str, ArtifactRef]`` to get the partitions that exist
so far (an unpartitioned asset downstream of a partitioned one).
"""

import typing

import dagster as dg
from typing_extensions import override

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from resources.artifact_store import ArtifactStore
from resources.failures import input_errors_fail_plainly


class ArtifactRefIOManager(dg.ConfigurableIOManager):
    """Keeps the references that assets return, and hands them on."""

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    store: dg.ResourceDependency[ArtifactStore]

    @override
    def handle_output(self, context: dg.OutputContext, obj: ArtifactRef) -> None:
        """Let the pointer of the asset (or of its partition) point to ``obj``."""
        if not isinstance(obj, ArtifactRef):
            raise TypeError(
                f"{context.asset_key.to_user_string()} returned a {type(obj).__name__}, "
                "assets with this I/O manager return an ArtifactRef"
            )
        partition = context.asset_partition_key if context.has_asset_partitions else None
        self.store.write_pointer(pointer_name(context.asset_key, partition), obj)

    @override
    @input_errors_fail_plainly()
    def load_input(self, context: dg.InputContext) -> ArtifactRef | dict[str, ArtifactRef]:
        """The reference, or the references by partition where the input is typed ``dict``.

        Raises:
            InputFailure: what is needed was not materialized yet; says what to materialize.
        """
        if not context.has_asset_partitions:
            return self._only(context.asset_key)
        if typing.get_origin(context.dagster_type.typing_type) is dict:
            return self._existing(context.asset_key, context.asset_partition_keys)
        return self._only(context.asset_key, _partition(context))

    def _only(self, asset: dg.AssetKey, partition: str | None = None) -> ArtifactRef:
        ref = self.store.read_pointer(pointer_name(asset, partition))
        if ref is None:
            of_partition = f" for partition {partition}" if partition is not None else ""
            raise InputError(
                f"{asset.to_user_string()} has not been materialized{of_partition}: materialize it first"
            )
        return ref

    def _existing(self, asset: dg.AssetKey, partitions: typing.Sequence[str]) -> dict[str, ArtifactRef]:
        known = self.store.list_pointers(pointer_name(asset))
        existing = {partition: known[partition] for partition in partitions if partition in known}
        if not existing:
            span = partitions[0] if len(partitions) == 1 else f"{partitions[0]} … {partitions[-1]}"
            raise InputError(
                f"{asset.to_user_string()} has not been materialized for any of its partitions ({span}): "
                "materialize at least one first"
            )
        return existing


def pointer_name(asset: dg.AssetKey, partition: str | None = None) -> str:
    """Name of the pointer of an asset, or of one of its partitions."""
    name = "/".join(asset.path)
    return name if partition is None else f"{name}/{partition}"


def _partition(context: dg.InputContext) -> str:
    """The one partition that is wanted: the only one of the input, or else the run's own.

    A check without partitions of its own sees all partitions of its asset, though the run it is
    part of makes just one.
    """
    partitions = context.asset_partition_keys
    if len(partitions) == 1:
        return partitions[0]
    if context.has_partition_key and context.partition_key in partitions:
        return context.partition_key
    raise InputError(
        f"{context.asset_key.to_user_string()} spans {len(partitions)} partitions here: run one partition, "
        "or type the input dict[str, ArtifactRef]"
    )
