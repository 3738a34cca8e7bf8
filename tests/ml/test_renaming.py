from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ml.artifacts import ArtifactRef, read_manifest, short_version, verify
from ml.errors import InputError
from ml.runner import StageSpec, run_stage
from ml.serving.compiled_model import CompiledModel
from ml.serving.predictor import Predictor
from ml.taxonomy import Taxonomy
from tests.ml.compiled_models import TAXONOMY_CSV, TITLES, seal

OFFERS = [{"offer_id": str(number), "title": title} for number, title in enumerate(TITLES)]


def catalog_taxonomy(folder: Path, csv: str) -> Path:
    folder.mkdir()
    Taxonomy.parse_csv(csv.encode(), "taxonomy.csv").write(folder / "taxonomy.parquet")
    return seal(folder, "catalog_taxonomy")


def rename(compiled: Path, student: Path, taxonomy: Path, output: Path) -> ArtifactRef:
    return run_stage(
        StageSpec(
            stage="renamed_student",
            inputs={
                "compiled_student": str(compiled),
                "student_checkpoint": str(student),
                "catalog_taxonomy": str(taxonomy),
            },
            parameters={},
            output=str(output),
            workspace=str(output.with_name(output.name + ".work")),
        )
    )


@pytest.fixture
def renamed_csv() -> str:
    """Two names changed, one of them that of the root, and the rows in another order."""
    header, *rows = (
        TAXONOMY_CSV.replace("Everything", "All goods").replace(",Kettle\n", ",Water boilers\n").splitlines()
    )
    return "\n".join([header, *rows[::-1]]) + "\n"


def test_the_renamed_model_answers_the_same_under_new_names(
    compiled_root: Path, compiled_student: Path, renamed_csv: str, tmp_path: Path
) -> None:
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", renamed_csv)
    reference = rename(compiled_student, compiled_root / "student", taxonomy, tmp_path / "renamed")
    folder = Path(reference.uri)
    assert set(verify(folder, kinds=["renamed_student"]).files) == set(read_manifest(compiled_student).files)
    before, after = Predictor.load(compiled_student), Predictor.load(folder)
    answers = after.predict(OFFERS)
    for old, new in zip(before.predict(OFFERS), answers, strict=True):
        assert (new.category_id, new.confidence) == (old.category_id, old.confidence)
        assert [a.category_id for a in new.alternatives] == [a.category_id for a in old.alternatives]
        assert new.category_path == str(old.category_path).replace("Everything", "All goods").replace(
            "Kettle", "Water boilers"
        )
    assert {answer.taxonomy_version for answer in answers} == {short_version(read_manifest(taxonomy).digest)}
    assert {answer.model_version for answer in answers} == {reference.version}
    assert any(answer.category_path == "All goods > Water boilers" for answer in answers)
    np.testing.assert_array_equal(
        CompiledModel.open(folder).predict_logits(TITLES),
        CompiledModel.open(compiled_student).predict_logits(TITLES),
    )


def test_every_form_of_a_model_can_be_renamed(
    compiled_root: Path, traced_student: Path, renamed_csv: str, tmp_path: Path
) -> None:
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", renamed_csv)
    folder = Path(rename(traced_student, compiled_root / "student", taxonomy, tmp_path / "renamed").uri)
    before, after = (read_manifest(each).files for each in (traced_student, folder))
    assert {name for name in before if before[name] != after[name]} == {"model.json", "taxonomy.parquet"}
    (answer,) = Predictor.load(folder).predict([{"title": "Bosch kettle 1.7 l"}])
    assert answer.category_path == "All goods > Water boilers"


def test_what_was_measured_of_the_compiled_student_holds_for_the_renamed_one(
    compiled_root: Path, compiled_student: Path, renamed_csv: str, tmp_path: Path
) -> None:
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", renamed_csv)
    metrics = rename(compiled_student, compiled_root / "student", taxonomy, tmp_path / "renamed").metrics
    assert metrics["renamed"] == 2
    measured = read_manifest(compiled_student).metrics
    changed = {name for name in metrics if metrics[name] != measured.get(name)}
    assert changed <= {"renamed", "size_bytes"}
    assert set(metrics) == {*measured, "renamed"}
    files = verify(tmp_path / "renamed").files
    assert metrics["size_bytes"] == sum(entry.bytes for entry in files.values())


def test_a_renamed_model_can_be_renamed_again_and_back(
    compiled_root: Path, compiled_student: Path, renamed_csv: str, tmp_path: Path
) -> None:
    student = compiled_root / "student"
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", renamed_csv)
    once = Path(rename(compiled_student, student, taxonomy, tmp_path / "once").uri)
    back = rename(once, student, compiled_root / "taxonomy", tmp_path / "back")
    assert back.metrics["renamed"] == 2
    assert back.digest == read_manifest(compiled_student).digest


def test_a_name_in_another_language_is_a_new_name_too(
    compiled_root: Path, compiled_student: Path, tmp_path: Path
) -> None:
    header, *rows = TAXONOMY_CSV.splitlines()
    rows = [f"{row},{'Wasserkocher' if row.startswith('kettle') else ''}" for row in rows]
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", "\n".join([header + ",name_de", *rows]))
    reference = rename(compiled_student, compiled_root / "student", taxonomy, tmp_path / "renamed")
    assert reference.metrics["renamed"] == 1
    assert Taxonomy.load(Path(reference.uri)).path("kettle", "de") == "Everything > Wasserkocher"


@pytest.mark.parametrize(
    ("csv", "said"),
    [
        (TAXONOMY_CSV + "fridge,all,Fridges\n", r"1 added \(fridge\)"),
        (TAXONOMY_CSV.replace("tent,all,Tent\n", ""), r"1 removed \(tent\)"),
        (TAXONOMY_CSV.replace("tent,all,Tent", "tent,bike,Tent"), r"1 moved \(tent\)"),
        (
            TAXONOMY_CSV.replace("tent,all,Tent", "marquee,all,Tent"),
            r"1 added \(marquee\); 1 removed \(tent\)",
        ),
    ],
)
def test_a_taxonomy_that_differs_in_more_than_names_is_refused(
    csv: str, said: str, compiled_root: Path, compiled_student: Path, tmp_path: Path
) -> None:
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", csv)
    with pytest.raises(InputError, match=rf"in more than names \({said}\); train and compile"):
        rename(compiled_student, compiled_root / "student", taxonomy, tmp_path / "renamed")
    assert not (tmp_path / "renamed").exists()


def test_another_student_than_the_compiled_one_is_refused(
    compiled_root: Path, compiled_student: Path, renamed_csv: str, tmp_path: Path
) -> None:
    other = shutil.copytree(compiled_root / "student", tmp_path / "student")
    settings = msgspec.json.decode((other / "classifier.json").read_bytes())
    (other / "classifier.json").write_bytes(msgspec.json.encode(settings | {"temperature": 2.0}))
    seal(other, "student_checkpoint")
    taxonomy = catalog_taxonomy(tmp_path / "taxonomy", renamed_csv)
    with pytest.raises(InputError, match="was not made of student_checkpoint"):
        rename(compiled_student, other, taxonomy, tmp_path / "renamed")
