"""Settings: read from the environment and .env, wrong ones told in one line, all of them documented."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from dotenv import dotenv_values

from ml.errors import InputError
from ml.stages import FastModelParameters, StudentParameters, TeacherParameters, TrainingSampleParameters
from resources.settings import Settings, SettingsError, monitoring_checks, variables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and none of the settings of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("OFFER_") or name in {
            "CATALOG_TAXONOMY",
            "CORRECTIONS_FEED",
            "MLFLOW_TRACKING_URI",
        }:
            monkeypatch.delenv(name)
    return tmp_path


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """The line that these settings are refused with."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment()
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_without_settings_everything_has_its_default(folder):
    settings = Settings.from_environment()
    assert settings.is_demo
    assert settings.home == folder / ".offer_assets"
    assert settings.environment == "local"
    assert settings.first_day == datetime.date(2026, 11, 1)
    assert settings.tracking_uri == f"sqlite:///{folder}/.offer_assets/mlflow.db"


def test_defaults_of_stages_are_the_defaults_of_settings():
    settings = Settings.from_environment()
    sample, teacher = TrainingSampleParameters(), TeacherParameters()
    student = StudentParameters()
    assert settings.labelled_offers == sample.labelled
    assert settings.unlabelled_offers == sample.unlabelled
    assert settings.cap_per_category == sample.cap_per_category
    assert settings.split_by == sample.split_by
    assert (settings.encoder, settings.max_tokens) == (teacher.encoder, teacher.max_tokens)
    assert (settings.teacher_epochs, settings.instruction) == (teacher.epochs, teacher.instruction)
    assert (settings.student_encoder, settings.student_layers) == (student.encoder, student.layers)
    assert settings.student_epochs == student.epochs
    assert settings.teacher_learning_rate == teacher.learning_rate
    assert (settings.student_learning_rate, settings.student_label_weight) == (
        student.learning_rate,
        student.label_weight,
    )
    assert settings.fast_regularisation == FastModelParameters().regularisation


def test_encoders_to_compare_may_say_how_many_layers_are_kept(folder, monkeypatch):
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").touch()
    monkeypatch.setenv("OFFER_ASSETS_ENCODERS_COMPARED", "./mine:2, packaged-minilm,owner/name@v1:6,./mine:2")
    assert Settings.from_environment().encoders_compared == (
        f"{folder}/mine:2,packaged-minilm,owner/name@v1:6"
    )


def test_local_paths_become_absolute_and_remote_ones_stay(folder, monkeypatch):
    (folder / "offers.csv").touch()
    (folder / "taxonomy.csv").touch()
    monkeypatch.setenv("OFFER_FEED", "*.csv")
    monkeypatch.setenv("CATALOG_TAXONOMY", "taxonomy.csv")
    settings = Settings.from_environment()
    assert settings.offer_feed == f"{folder}/*.csv"
    assert settings.catalog_taxonomy == f"{folder}/taxonomy.csv"
    assert not settings.is_demo
    monkeypatch.setenv("OFFER_FEED", "s3://bucket/offers/*.parquet")
    assert Settings.from_environment().offer_feed == "s3://bucket/offers/*.parquet"


@pytest.mark.parametrize("name", ["offers [new].csv", "offers"])
def test_a_file_with_brackets_in_its_name_and_a_folder_are_feeds(folder, monkeypatch, name):
    path = folder / name
    path.touch() if path.suffix else path.mkdir()
    (folder / "taxonomy.csv").touch()
    monkeypatch.setenv("OFFER_FEED", name)
    monkeypatch.setenv("CATALOG_TAXONOMY", "taxonomy.csv")
    assert Settings.from_environment().offer_feed == str(path)


def test_a_dotenv_file_is_read_and_the_environment_wins(folder, monkeypatch):
    (folder / ".env").write_text("OFFER_ASSETS_DEMO_DAYS=5\nOFFER_ASSETS_DEMO_SEED=3\nUNRELATED=1\n")
    monkeypatch.setenv("OFFER_ASSETS_DEMO_SEED", "4")
    settings = Settings.from_environment()
    assert (settings.demo_days, settings.demo_seed) == (5, 4)


def test_an_empty_value_means_the_default(monkeypatch):
    monkeypatch.setenv("OFFER_ASSETS_ENDPOINT_PORT", "")
    assert Settings.from_environment().endpoint_port == 8765


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("OFFER_ASSETS_DEMO_DAYS", "abc", "must be a whole number"),
        ("OFFER_ASSETS_DEMO_DAYS", "0", "must be greater than or equal to 1"),
        ("OFFER_ASSETS_ENV", "gcp", "must be 'local' or 'aws'"),
        ("OFFER_ASSETS_SPLIT_BY", "offer", "must be 'product' or 'shop'"),
        ("OFFER_ASSETS_FIRST_DAY", "yesterday", "must be an ISO date such as 2026-11-01"),
        ("OFFER_ASSETS_FIRST_DAY", "2026-13-01", "must be an ISO date such as 2026-11-01"),
        ("OFFER_ASSETS_ENDPOINT_PORT", "70000", "must be less than or equal to 65535"),
        ("OFFER_ASSETS_MAX_TOKENS", "1000", "must be less than or equal to 512"),
        (
            "OFFER_ASSETS_ENCODER",
            "./nowhere",
            "points nowhere: {folder}/nowhere is not a folder with an encoder",
        ),
        ("OFFER_ASSETS_ENCODERS_COMPARED", "packaged-minilm,:3", "':3' is no encoder to compare"),
        ("OFFER_ASSETS_ENCODERS_COMPARED", "./nowhere:3", "points nowhere: {folder}/nowhere is not a folder"),
        ("OFFER_ASSETS_FAST_REGULARISATION", "0", "must be greater than 0"),
        ("OFFER_ASSETS_MODEL_NAME", "a b", "must have neither spaces nor / or :"),
        ("MLFLOW_TRACKING_URI", "server", "must be a URI such as https://mlflow.example.com"),
        ("MLFLOW_TRACKING_URI", "arn:aws:s3:::bucket", "must be the ARN of MLflow in SageMaker, such as"),
        ("OFFER_FEED", "nowhere/*.csv", "points nowhere: nothing matches {folder}/nowhere/*.csv"),
        (
            "CATALOG_TAXONOMY",
            "nowhere.csv",
            "points nowhere: there is no file or folder {folder}/nowhere.csv",
        ),
        ("CORRECTIONS_FEED", "nowhere.csv", "points nowhere: nothing matches {folder}/nowhere.csv"),
        ("OFFER_ASSETS_ALERT_ROUTES", "no.toml", "points nowhere: there is no file {folder}/no.toml"),
        ("OFFER_ASSETS_AWS_STORE", "my-bucket", "must be a bucket and perhaps a prefix, such as s3://"),
        ("OFFER_ASSETS_AWS_STORE", "s3://bucket/a*", "must be a bucket and perhaps a prefix, such as s3://"),
        ("OFFER_ASSETS_AWS_REGION", "frankfurt", "must be a region such as eu-central-1"),
        ("OFFER_ASSETS_AWS_ROLE", "jobs", "must be the ARN of a role, such as arn:aws:iam::"),
        ("OFFER_ASSETS_AWS_KMS_KEY", "a key", "must have no spaces"),
        ("OFFER_ASSETS_AWS_SERVING_IMAGE", "image 1", "must have no spaces"),
        ("OFFER_ASSETS_AWS_ENDPOINT_NAME", "OfferAssets", "must be of small letters, digits and single"),
        ("OFFER_ASSETS_AWS_ENDPOINT_INSTANCE_TYPE", "c7i.xlarge", "must be an instance type such as ml."),
        ("OFFER_ASSETS_AWS_SUBNETS", "subnet-1,eu", "must be ids separated by commas, such as subnet-"),
        ("OFFER_ASSETS_POSTGRES_URL", "postgresql://db", "must be an address such as postgresql+psycopg2://"),
        ("OFFER_ASSETS_CANARY_PERCENT", "80", "must be less than or equal to 50"),
        ("OFFER_ASSETS_UI_URL", "dagster", "must be an address such as http://localhost:3000"),
        ("OFFER_ASSETS_UI_URL", "https://dagster.example.com?a=b", "must be an address such as"),
        ("OFFER_ASSETS_RETRAIN_AFTER_DAYS", "0", "must be greater than or equal to 1"),
        (
            "OFFER_ASSETS_RETRAIN_ON_DRIFT",
            "default,shop_mix_is_normal",
            "names no check of monitoring: 'shop_mix_is_normal'; did you mean shop_mix_is_usual?",
        ),
    ],
)
def test_a_wrong_value_names_variable_value_and_expectation(folder, monkeypatch, name, value, expectation):
    line = refusal(monkeypatch, **{name: value})
    assert line.startswith(f"{name}={value} {expectation.format(folder=folder)}")


def test_a_wrong_value_is_told_without_its_password(monkeypatch):
    line = refusal(monkeypatch, MLFLOW_TRACKING_URI="oracle://me:hunter2@db/mlflow")
    assert line.startswith("MLFLOW_TRACKING_URI=oracle://***@db/mlflow must be a URI")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    line = refusal(monkeypatch, OFFER_ASSETS_SLACK="https://hooks.example.com/services/hunter2")
    assert line.startswith("OFFER_ASSETS_SLACK is not a setting; did you mean OFFER_ASSETS_")
    assert "hunter2" not in line


def test_a_home_that_is_a_file_is_refused(folder, monkeypatch):
    (folder / "file").touch()
    assert "OFFER_ASSETS_HOME=file must be a folder" in refusal(monkeypatch, OFFER_ASSETS_HOME="file")


@pytest.mark.parametrize(
    ("given", "missing"), [("OFFER_FEED", "CATALOG_TAXONOMY"), ("CATALOG_TAXONOMY", "OFFER_FEED")]
)
def test_a_feed_without_taxonomy_or_the_reverse_names_the_missing_one(folder, monkeypatch, given, missing):
    (folder / "file.csv").touch()
    assert refusal(monkeypatch, **{given: "file.csv"}).startswith(f"{missing} is missing: {given} is set")


def test_the_address_of_the_ui_has_no_password_and_no_last_slash(monkeypatch):
    line = refusal(monkeypatch, OFFER_ASSETS_UI_URL="https://me:hunter2@dagster.example.com")
    assert line.startswith("OFFER_ASSETS_UI_URL=https://***@dagster.example.com must have no user")
    monkeypatch.setenv("OFFER_ASSETS_UI_URL", "https://dagster.example.com/prod/")
    assert Settings.from_environment().ui_url == "https://dagster.example.com/prod"


def test_checks_that_retrain_are_named_once_each(monkeypatch):
    assert Settings.from_environment().checks_that_retrain == ()
    monkeypatch.setenv("OFFER_ASSETS_RETRAIN_ON_DRIFT", "default, volume_is_usual,,volume_is_usual ")
    assert Settings.from_environment().checks_that_retrain == ("default", "volume_is_usual")


def test_every_check_of_monitoring_may_retrain(monkeypatch):
    monkeypatch.setenv("OFFER_ASSETS_RETRAIN_ON_DRIFT", ",".join(monitoring_checks()))
    assert Settings.from_environment().checks_that_retrain == tuple(monitoring_checks())


def test_a_cool_down_that_is_over_before_drift_can_be_seen_again_is_refused(monkeypatch):
    monkeypatch.setenv("OFFER_ASSETS_RETRAIN_AFTER_DAYS", "5")
    monkeypatch.setenv("OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS", "4")
    Settings.from_environment()  # nothing retrains
    line = refusal(monkeypatch, OFFER_ASSETS_RETRAIN_ON_DRIFT="default")
    assert line.startswith(
        "OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS=4 is less than OFFER_ASSETS_RETRAIN_AFTER_DAYS=5: "
    )


def test_corrections_of_another_feed_than_the_demo_need_that_feed(folder, monkeypatch):
    (folder / "corrections.csv").touch()
    line = refusal(monkeypatch, CORRECTIONS_FEED="corrections.csv")
    assert line.startswith("OFFER_FEED is missing: CORRECTIONS_FEED is set")
    for name in ("OFFER_FEED", "CATALOG_TAXONOMY"):
        monkeypatch.setenv(name, "corrections.csv")
    assert Settings.from_environment().corrections_feed == str(folder / "corrections.csv")


def test_routes_that_cannot_be_read_are_told_at_the_start(folder, monkeypatch):
    (folder / "alerts.toml").write_text("[channels.team\n")
    line = refusal(monkeypatch, OFFER_ASSETS_ALERT_ROUTES="alerts.toml")
    assert line.startswith("OFFER_ASSETS_ALERT_ROUTES: ")
    assert "alerts.toml" in line


def test_prices_that_cannot_be_read_are_told_at_the_start(folder, monkeypatch):
    (folder / "prices.toml").write_text("region = ")
    line = refusal(monkeypatch, OFFER_ASSETS_PRICES="prices.toml")
    assert line.startswith(f"OFFER_ASSETS_PRICES: {folder}/prices.toml: is not TOML")


def test_secrets_of_routes_may_be_in_the_dotenv_file_and_the_environment_wins(folder, monkeypatch):
    (folder / ".env").write_text("SLACK_WEBHOOK=in the file\nPAGER_KEY=in the file\n")
    monkeypatch.setenv("PAGER_KEY", "in the environment")
    assert variables()["SLACK_WEBHOOK"] == "in the file"
    assert variables()["PAGER_KEY"] == "in the environment"


def test_a_misspelt_setting_names_the_nearest(folder, monkeypatch):
    line = refusal(monkeypatch, OFFER_ASSETS_DEMO_DAY="4")
    assert line.startswith("OFFER_ASSETS_DEMO_DAY is not a setting; did you mean OFFER_ASSETS_DEMO_DAYS?")
    monkeypatch.delenv("OFFER_ASSETS_DEMO_DAY")
    (folder / ".env").write_text("OFFER_ASSETS_HOMES=x\n")
    assert "did you mean OFFER_ASSETS_HOME?" in refusal(monkeypatch)


def test_several_wrong_values_are_told_together(monkeypatch):
    line = refusal(monkeypatch, OFFER_ASSETS_DEMO_DAYS="x", OFFER_ASSETS_ENV="gcp")
    assert "OFFER_ASSETS_DEMO_DAYS=x" in line
    assert "OFFER_ASSETS_ENV=gcp" in line


def test_a_settings_error_is_the_readers_to_mend_and_settings_do_not_change():
    assert issubclass(SettingsError, InputError)
    with pytest.raises(ValueError, match="frozen"):
        Settings.from_environment().demo_days = 7


def test_the_example_file_lists_every_setting_with_description_and_default():
    text = (ROOT / ".env.example").read_text()
    words = " ".join(text.replace("\n# ", " ").split())
    listed = dotenv_values(ROOT / ".env.example")
    for field in Settings.model_fields.values():
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        assert listed.pop(str(field.validation_alias)) == default
        assert f"{field.description} {field.validation_alias}=" in words
    assert listed == {}


def test_the_example_file_is_a_valid_dotenv_file(folder):
    (folder / ".env").write_text((ROOT / ".env.example").read_text())
    assert Settings.from_environment() == Settings()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"OFFER_ASSETS_AWS_ENDPOINT_MIN_INSTANCES": "30"},
            "OFFER_ASSETS_AWS_ENDPOINT_MIN_INSTANCES=30 is more than",
        ),
        (
            {"OFFER_ASSETS_AWS_SUBNETS": "subnet-0a1b2c3d"},
            "OFFER_ASSETS_AWS_SECURITY_GROUPS is missing: OFFER_ASSETS_AWS_SUBNETS is set",
        ),
        (
            {"OFFER_ASSETS_AWS_SECURITY_GROUPS": "sg-0a1b2c3d"},
            "OFFER_ASSETS_AWS_SUBNETS is missing: OFFER_ASSETS_AWS_SECURITY_GROUPS is set",
        ),
        ({"OFFER_ASSETS_ENV": "aws"}, "OFFER_ASSETS_AWS_STORE, OFFER_ASSETS_AWS_REGION, "),
    ],
)
def test_settings_of_aws_that_contradict_or_miss_each_other_are_one_line(monkeypatch, given, said):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        Settings.from_environment()
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_region_may_be_that_of_every_aws_tool(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert Settings.from_environment().region == "eu-west-1"
    monkeypatch.setenv("OFFER_ASSETS_AWS_REGION", "eu-central-1")
    assert Settings.from_environment().region == "eu-central-1"
