"""What is kept from people's eyes, and what is not."""

from __future__ import annotations

import pytest

from resources.redaction import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("at https://me:p@ss/w?rd@host/x: refused", "at https://***@host/x: refused"),
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql://db/mlflow?user=me&password=hunter2", "postgresql://db/mlflow?user=me&password=***"),
        (
            "https://host/t.csv?X-Amz-Signature=abc&X-Amz-Date=1&X-Amz-Security-Token=def",
            "https://host/t.csv?X-Amz-Signature=***&X-Amz-Date=1&X-Amz-Security-Token=***",
        ),
        (
            "https://host/t.csv?access_token=abc&api_key=def",
            "https://host/t.csv?access_token=***&api_key=***",
        ),
        ("https://host/t?key=abc&code=def", "https://host/t?key=***&code=***"),
        ("https://host/t?access_key=abc&auth=def", "https://host/t?access_key=***&auth=***"),
        ("s3://b/t?AWSAccessKeyId=abc&Expires=1", "s3://b/t?AWSAccessKeyId=***&Expires=1"),
        ("https://host/t?country_code=de&keyword=x", "https://host/t?country_code=de&keyword=x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("s3://bucket/offers@2026/*.csv", "s3://bucket/offers@2026/*.csv"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("no URI at all: a@b", "no URI at all: a@b"),
        ("https://hooks.slack.com/services/T0/B0/abc: 404", "https://hooks.slack.com/*** 404"),
        ("host=db password=hunter2 user=me", "host=db password=*** user=me"),
        ("password='hunter 2' user=me", "password=*** user=me"),
        ('{"api_key": "hunter\\" 2", "a": 1}', '{"api_key": ***, "a": 1}'),
        ("{'client_secret': 'hunter2'}", "{'client_secret': ***}"),
        ("AWS_SECRET_ACCESS_KEY: abc/def+g, next", "AWS_SECRET_ACCESS_KEY: *** next"),
        ("MLFLOW_TRACKING_PASSWORD = hunter2", "MLFLOW_TRACKING_PASSWORD = ***"),
        ("Authorization: Bearer abcdef.ghi-jkl", "Authorization: ***"),
        ("it sent Bearer abcdef.ghi-jkl= twice", "it sent Bearer *** twice"),
        ("password=a&b", "password=***"),
        ('write password = "${MAIL_PASSWORD}"', 'write password = "${MAIL_PASSWORD}"'),
        ("max_tokens=512, a bearer of news", "max_tokens=512, a bearer of news"),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text, shown):
    assert without_secrets(text) == shown
