"""The SageMaker model that serves a compiled student, named by all that it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError
from resources.aws import AwsAccess, aws_errors, error_code

_SETTINGS = {"cpu": "OFFER_ASSETS_AWS_SERVING_IMAGE", "neuron": "OFFER_ASSETS_AWS_NEURON_IMAGE"}


class ServedModels:
    """Makes SageMaker models; each name begins with the endpoint's."""

    def __init__(self, aws: AwsAccess, endpoint: str, images: Mapping[str, str]) -> None:
        """Take the images by target of the compiled student."""
        self._aws = aws
        self._endpoint = endpoint
        self._images = images

    def make(self, folder: Path, uri: str, version: str) -> str:
        """Name of the SageMaker model that serves a compiled student; made unless it is there.

        Args:
            folder: The compiled student's local folder, whose ``model.json`` names its target.
            uri: Its place in S3, without a slash at its end.
            version: Its version.

        Raises:
            InputError: there is no image for its target.
        """
        from botocore.exceptions import ClientError

        request = self._request(folder, uri, version)
        name = f"{self._endpoint}-{version}-{_digest(request)[:8]}"
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"creating model {name}"):
            try:
                sagemaker.create_model(ModelName=name, **request)
            except ClientError as error:
                if error_code(error) != "ValidationException" or "existing" not in str(error):
                    raise
        return name

    def _request(self, folder: Path, uri: str, version: str) -> dict[str, Any]:
        target = msgspec.json.decode((folder / "model.json").read_bytes(), type=dict[str, Any])["target"]
        image = self._images.get(target)
        if not image:
            setting = _SETTINGS.get(target, "its image")
            raise InputError(f"model {version} is compiled for {target}, but {setting} is not set")
        source = {"S3Uri": f"{uri}/", "S3DataType": "S3Prefix", "CompressionType": "None"}
        return {
            "PrimaryContainer": {"Image": image, "ModelDataSource": {"S3DataSource": source}},
            "ExecutionRoleArn": self._aws.role,
            "EnableNetworkIsolation": True,
            **self._aws.vpc,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
