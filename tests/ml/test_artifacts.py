"""Artifacts: sealed by their manifest, refused when they changed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.artifacts import MANIFEST, artifact_key, read_manifest, reference, verify, write_manifest
from ml.errors import InputError


def seal(folder: Path, kind: str = "table", **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_manifest(
        folder,
        kind=kind,
        key="k" * 32,
        inputs={},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={"rows": 1},
        seconds=0.1,
    )
    return folder


def test_a_folder_without_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(InputError, match=r"not an artifact.*manifest\.json"):
        read_manifest(tmp_path)


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    one = reference(seal(tmp_path / "a", data="x", more="y"))
    same = reference(seal(tmp_path / "b", data="x", more="y"))
    other = reference(seal(tmp_path / "c", data="x", more="z"))
    renamed = reference(seal(tmp_path / "d", data="x", less="y"))
    assert one.digest == same.digest
    assert len({one.digest, other.digest, renamed.digest}) == 3
    assert one.digest.startswith(one.version)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "data").write_text("y"), "data differs from its digest"),
        (lambda folder: (folder / "data").unlink(), "data is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_artifact_is_refused_naming_the_file(tmp_path: Path, damage, message: str) -> None:
    folder = seal(tmp_path / "a", data="x")
    verify(folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        verify(folder)


def test_a_manifest_that_lists_other_files_contradicts_its_digest(tmp_path: Path) -> None:
    folder = seal(tmp_path / "a", data="x", more="y")
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"more"', '"less"'))
    (folder / "more").rename(folder / "less")
    with pytest.raises(InputError, match="contradicts itself"):
        verify(folder)


def test_kind_and_digest_are_held_against_what_is_expected(tmp_path: Path) -> None:
    folder = seal(tmp_path / "a", data="x")
    with pytest.raises(InputError, match="is a table, expected a model"):
        verify(folder, kinds=["model"])
    with pytest.raises(InputError, match="expected 0000"):
        verify(folder, digest="0000")


parameters = st.dictionaries(
    st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=4
)
digests = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@given(parameters, digests, st.randoms(use_true_random=False))
def test_the_key_does_not_depend_on_the_order_of_parameters_and_inputs(parameters, digests, random) -> None:
    def shuffled(mapping: dict) -> dict:
        items = list(mapping.items())
        random.shuffle(items)
        return dict(items)

    key = artifact_key("kind", "1", parameters, digests)
    assert key == artifact_key("kind", "1", shuffled(parameters), shuffled(digests))
    assert key != artifact_key("kind", "2", parameters, digests)
    assert key != artifact_key("other", "1", parameters, digests)
    assert key != artifact_key("kind", "1", {**parameters, "one more": 1}, digests)
