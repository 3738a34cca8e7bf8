"""Reports of devices in S3."""

from __future__ import annotations

import msgspec

from resources.device_reports import DeviceReports
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn
from tests.device_reports import device_report


def test_reports_are_read_from_s3_as_they_come(stand_in: StandIn) -> None:
    reports = DeviceReports(location=f"s3://{BUCKET}/device-reports")
    model = "a" * 64
    assert reports.of(model).newest is None
    content = msgspec.json.encode(device_report(model_digest=model))
    s3 = access().client("s3")
    s3.put_object(Bucket=BUCKET, Key="device-reports/one.json", Body=content)
    assert reports.of(model).newest == device_report(model_digest=model)
