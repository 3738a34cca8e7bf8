import re

import botocore.session
import pytest

from ml.errors import InputError
from ml.serving.prices import PRICES_FILE, read_prices

HEAD = 'region = "eu-west-1"\nas_of = "2026-11-01"\n'
ROW = '[instances."ml.c7i.large"]\nusd_per_hour = 0.1\nvcpus = 2\nmemory_gib = 4\n'


def test_the_packaged_prices_say_that_they_are_to_be_checked_and_name_types_that_the_service_has():
    prices = read_prices()
    assert "check before you rely on it" in prices.in_words
    assert all(price.source in ("published", "estimate") for price in prices.instances)
    model = botocore.session.get_session().get_service_model("sagemaker")
    known = set(model.shape_for("ProductionVariantInstanceType").enum)
    names = [price.instance_type for price in prices.instances]
    assert set(names) <= known
    assert {"ml.c7i.xlarge", "ml.m7i.xlarge", "ml.c7g.xlarge", "ml.inf2.xlarge", "ml.g5.xlarge"} <= set(names)


def test_a_file_of_ones_own_replaces_them_all(tmp_path):
    file = tmp_path / "prices.toml"
    file.write_text(HEAD + ROW)
    prices = read_prices(str(file))
    (price,) = prices.instances
    assert (price.instance_type, price.family, price.usd_per_hour) == ("ml.c7i.large", "ml.c7i", 0.1)
    assert prices.in_words == "eu-west-1, as of 2026-11-01"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("region = ", "is not TOML"),
        (ROW, "has no region"),
        ('region = "x"\n' + ROW, "has no as_of"),
        (HEAD, "has no prices: tables are called"),
        (
            HEAD + "[instances.ml.c7i.large]\nvcpus = 2\n",
            'instances."ml" must be a table, its name in quotes',
        ),
        (HEAD + "[instances]\na = 1\n", 'instances."a" must be a table'),
        (HEAD + "[prices]\na = 1\n", "has the key 'prices', which is unknown; did you mean instances"),
        (HEAD + ROW + "vcpu = 2\n", "has the key 'vcpu', which is unknown; did you mean vcpus"),
        (
            HEAD + ROW.replace("0.1", '"0.1"'),
            'instances."ml.c7i.large": usd_per_hour is wrong: Expected `float`',
        ),
        (HEAD + ROW.replace("0.1", "0"), "usd_per_hour is wrong: Expected `float` > 0"),
        (HEAD + ROW.replace("0.1", "nan"), "usd_per_hour is wrong"),
        (HEAD + ROW.replace("0.1", "inf"), "usd_per_hour is wrong"),
        (HEAD + ROW.replace("vcpus = 2\n", ""), 'instances."ml.c7i.large": .*missing required field `vcpus`'),
        (HEAD + ROW + 'architecture = "sparc"\n', "architecture is wrong"),
        (HEAD + ROW + 'accelerator = "neuron"\n', "accelerator and accelerator_cores go together"),
        (HEAD + ROW + ROW, "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(tmp_path, text, said):
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .*{said}") as error:
        read_prices(str(file))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match=f"there is no such file; {re.escape(str(PRICES_FILE))} is one to start"
    ):
        read_prices(str(tmp_path / "nowhere.toml"))
    with pytest.raises(InputError, match="cannot be read"):
        read_prices(str(tmp_path))
    (tmp_path / "prices.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_prices(str(tmp_path / "prices.toml"))
