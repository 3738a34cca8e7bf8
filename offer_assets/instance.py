"""Where Dagster keeps its state: beside the artifacts, whatever OFFER_ASSETS_HOME says."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg
import yaml

from resources.settings import Settings

_ROOT_DAGSTER_YAML = Path(__file__).resolve().parent.parent / "dagster.yaml"


def prepare_dagster_home(settings: Settings) -> Path:
    """Make ``<home>/dagster`` the instance folder and export it as ``DAGSTER_HOME``.

    The instance's configuration is the repository's ``dagster.yaml`` with its paths moved there.
    """
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    configuration = yaml.safe_load(_ROOT_DAGSTER_YAML.read_text(encoding="utf-8"))
    configuration["storage"]["sqlite"]["base_dir"] = str(folder)
    configuration["local_artifact_storage"]["config"]["base_dir"] = str(folder)
    configuration["compute_logs"]["config"]["base_dir"] = str(folder / "logs")
    partial = folder / f"dagster.yaml.{os.getpid()}"
    partial.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    partial.replace(folder / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def instance_for(settings: Settings) -> dg.DagsterInstance:
    """The instance that the UI, the daemon and the headless run share."""
    prepare_dagster_home(settings)
    return dg.DagsterInstance.get()
