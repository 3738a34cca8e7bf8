"""The door to what was measured on devices that this machine does not have: a folder of reports.

``python -m ml device-report`` writes one such file on the host of a device; somebody puts it here.
"""

import dagster as dg
import msgspec

from ml.errors import InputError
from ml.serving.device_report import DeviceReport, read_report
from resources.failures import input_errors_fail_plainly
from resources.redaction import without_secrets

SETTING = "OFFER_ASSETS_DEVICE_REPORTS"


class ReportsFound(msgspec.Struct, frozen=True, kw_only=True):
    """What the reports say of one model."""

    newest: DeviceReport | None
    """None: the model was not measured yet."""
    unreadable: list[str]
    """Files that were left out, whichever model they are of; each with what is wrong with it."""


class DeviceReports(dg.ConfigurableResource["DeviceReports"]):
    """Reports in a folder, or under a prefix of any file system that fsspec knows."""

    location: str

    @input_errors_fail_plainly()
    def of(self, digest: str) -> ReportsFound:
        """Reports of the model with this digest.

        Raises:
            InputFailure: the location cannot be read.
        """
        reports, unreadable = self.all()
        of_model = [report for report in reports if report.model_digest == digest]
        newest = max(of_model, key=lambda report: report.measured_at, default=None)
        return ReportsFound(newest=newest, unreadable=unreadable)

    @input_errors_fail_plainly()
    def all(self) -> tuple[list[DeviceReport], list[str]]:
        """Reports of all models, and the files that are none, each with what is wrong with it.

        Raises:
            InputFailure: the location cannot be read.
        """
        reports, unreadable = list[DeviceReport](), list[str]()
        for path, content in self._files().items():
            try:
                reports.append(read_report(content, path))
            except InputError as error:
                unreadable.append(str(error))
        return reports, unreadable

    def _files(self) -> dict[str, bytes]:
        """Content of every file, in the order of their names; none where nothing was measured yet."""
        import fsspec

        try:
            filesystem, folder = fsspec.core.url_to_fs(self.location)
            filesystem.invalidate_cache()
            if not filesystem.exists(folder):
                return {}
            paths = sorted(str(path) for path in filesystem.ls(folder, detail=False))
            return {path: filesystem.cat_file(path) for path in paths if path.endswith(".json")}
        except Exception as error:  # each file system fails in ways of its own
            line = without_secrets(" ".join(str(error).split())[:300]) or type(error).__name__
            raise InputError(f"{SETTING}={self.location} cannot be read: {line}") from None
