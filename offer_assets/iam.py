"""The policies of ``deploy/`` for one account: placeholders filled in from the settings, nothing applied."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml.errors import InputError
from resources.settings import Settings

_DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_KEY = "KmsKey"
_MAY_BE_EMPTY = frozenset({"Prefix"})
_WHERE_FROM = {
    "Region": "OFFER_ASSETS_AWS_REGION",
    "Bucket": "OFFER_ASSETS_AWS_STORE",
    "Repository": "--repository owner/name",
}
"""Of the other placeholders, the ARN of the role says what they are."""


def documents() -> dict[str, Path]:
    """The templates by the name that the command line knows them by."""
    found = [*sorted((_DEPLOY / "iam").glob("*.json")), *sorted(_DEPLOY.glob("s3-*.json"))]
    return {path.stem: path for path in found}


def render(settings: Settings, document: str, repository: str = "") -> str:
    """A policy as JSON, ready for ``aws iam put-role-policy --policy-document file://…``.

    Without a key of one's own, the statements about it are left out: the one that AWS manages needs none.

    Args:
        settings: Those of the deployment, of ``OFFER_ASSETS_ENV=aws``.
        document: One of :func:`documents`.
        repository: ``owner/name`` on GitHub, where the document names it.

    Raises:
        InputError: there is no such document, or a setting that it needs is missing or does not do.
    """
    templates = documents()
    if document not in templates:
        known = ", ".join(templates) or "none: run this in a checkout, the package alone has no deploy/"
        raise InputError(f"{document} is no document of deploy/; there are: {known}")
    template = json.loads(templates[document].read_text(encoding="utf-8"))
    values = {**_values(settings), "Repository": repository}
    if not values[_KEY] and "Statement" in template:
        template["Statement"] = [
            statement for statement in template["Statement"] if _KEY not in json.dumps(statement)
        ]
    return json.dumps(_filled(template, values, document), indent=2)


def _values(settings: Settings) -> dict[str, str]:
    bucket, _, prefix = settings.aws_store.removeprefix("s3://").partition("/")
    _, partition, _, _, account, _ = (settings.aws_role or ":::::").split(":", 5)
    return {
        "Partition": partition,
        "Region": settings.region,
        "AccountId": account,
        "Bucket": bucket,
        "Prefix": f"{prefix}/" if prefix else "",
        "Name": settings.aws_endpoint_name,
        "Role": settings.aws_role,
        _KEY: settings.aws_kms_key,
    }


def _filled(value: Any, values: Mapping[str, str], document: str) -> Any:
    if isinstance(value, dict):
        return {name: _filled(each, values, document) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, values, document) for each in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if not values.get(name) and name not in _MAY_BE_EMPTY:
            needed = _WHERE_FROM.get(name, "OFFER_ASSETS_AWS_ROLE")
            raise InputError(f"{document} needs {needed}, which is not set ({name} of the account)")
        return values[name]

    return _PLACEHOLDER.sub(fill, value)
