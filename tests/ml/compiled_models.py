"""A real, small student (one MiniLM layer, 12 categories) and what it is compiled to; made once per run.

With so few validation offers nothing can be certified of the fast model: all offers go to the student. Of
:func:`cascading_student` the fast model answers what it is sure of.
"""

import fcntl
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import MANIFEST, read_manifest, short_version, write_manifest
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.ensemble import EnsembleWeights, Teacher
from ml.offers import TEXT_VERSION, offer_text
from ml.runner import StageSpec, run_stage
from ml.serving.cascade import OTHER_COUNTRIES, CascadeSettings
from ml.serving.neuron import SDK_VERSION
from ml.taxonomy import Taxonomy

NEURON_SDK = Path(__file__).resolve().parent / "neuron_sdk"
"""For the search path: a stand-in of torch_neuronx, as if installed in the versions that compile for inf2."""

PRODUCTS = {
    "kettle": "Bosch kettle 1.7 l stainless steel",
    "toaster": "Philips toaster two slots white",
    "phone": "Samsung Galaxy smartphone 128 GB",
    "laptop": "Lenovo ThinkPad laptop 14 inch",
    "shoe": "Adidas running shoes size 42",
    "shirt": "cotton t-shirt for men blue",
    "sofa": "three seat sofa grey fabric",
    "lamp": "LED desk lamp dimmable",
    "drill": "Makita cordless drill 18 V",
    "hose": "garden hose 20 m green",
    "bike": "city bike 28 inch seven gears",
    "tent": "camping tent for four people",
}
TITLES = [f"{text} {word}" for text in PRODUCTS.values() for word in ("new", "offer", "2024", "XL", "used")]
TAXONOMY_CSV = "category_id,parent_id,name\nall,,Everything\n" + "".join(
    f"{category},all,{category.title()}\n" for category in PRODUCTS
)


@pytest.fixture(scope="session")
def compiled_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the artifacts taxonomy, sample, student, fast, evaluation, compiled; do not write to it."""
    base = tmp_path_factory.getbasetemp()
    # Workers of one parallel run have neighbouring folders; the first makes the models for all.
    root = (base.parent if base.name.startswith("popen-") else base) / "compiled-models"
    with _locked(root.with_suffix(".lock")):
        if not (root / "compiled").exists():
            shutil.rmtree(root, ignore_errors=True)
            _make(root)
    return root


@pytest.fixture(scope="session")
def compiled_student(compiled_root: Path) -> Path:
    """Artifact folder; do not write to it."""
    return compiled_root / "compiled"


@pytest.fixture(scope="session")
def traced_student(compiled_root: Path) -> Path:
    """The same student for target torchscript; artifact folder, do not write to it."""
    folder = compiled_root / "traced"
    with _locked(compiled_root.with_suffix(".traced.lock")):
        run_stage(compile_spec(compiled_root, folder, target="torchscript"))
    return folder


@pytest.fixture(scope="session")
def neuron_student(compiled_root: Path) -> Path:
    """The same student for target neuron, compiled by the stand-in of the SDK; do not write to it.

    Beside it, ``neuron-calls.jsonl`` holds what the SDK was called with.
    """
    folder = compiled_root / "neuron"
    with _locked(compiled_root.with_suffix(".neuron.lock")):
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch, neuron_sdk(patch):
                patch.setenv("TESTS_NEURON_CALLS", str(compiled_root / "neuron-calls.jsonl"))
                run_stage(compile_spec(compiled_root, folder, target="neuron", sdk=SDK_VERSION))
    return folder


@contextmanager
def neuron_sdk(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in of the SDK, as if it were installed."""
    patch.syspath_prepend(str(NEURON_SDK))
    patch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "")  # is set by who compiles; gone afterwards
    try:
        yield
    finally:
        sys.modules.pop("torch_neuronx", None)


@pytest.fixture
def other_compiled_student(compiled_student: Path, tmp_path: Path) -> Path:
    """The same model with another temperature: another version."""
    folder = shutil.copytree(compiled_student, tmp_path / "other-compiled")
    settings = msgspec.json.decode((folder / "model.json").read_bytes())
    (folder / "model.json").write_bytes(msgspec.json.encode(settings | {"temperature": 3.0}))
    return seal(folder, "compiled_student")


@pytest.fixture
def cascading_student(compiled_student: Path, tmp_path: Path) -> Path:
    """The same model, whose fast model answers from a confidence on that separates the offers."""
    return with_cascade(compiled_student, tmp_path / "cascading", fast_from=0.95, review_below=0.7)


def with_cascade(compiled: Path, folder: Path, *, fast_from: float | None, review_below: float) -> Path:
    """A copy of a compiled student with other thresholds."""
    shutil.copytree(compiled, folder)
    settings = CascadeSettings.read(folder)
    threshold = msgspec.structs.replace(settings.thresholds[OTHER_COUNTRIES], confidence=fast_from)
    msgspec.structs.replace(
        settings,
        thresholds={OTHER_COUNTRIES: threshold},
        review=msgspec.structs.replace(settings.review, confidence=review_below),
    ).write(folder)
    return seal(folder, "compiled_student")


def compile_spec(root: Path, output: Path, **parameters: object) -> StageSpec:
    """How the student under ``root`` is compiled."""
    return StageSpec(
        stage="compiled_student",
        inputs={
            "student_checkpoint": str(root / "student"),
            "fast_checkpoint": str(root / "fast"),
            "training_sample": str(root / "sample"),
            "evaluation_set": str(root / "evaluation"),
            "catalog_taxonomy": str(root / "taxonomy"),
        },
        parameters=parameters,
        output=str(output),
        workspace=str(output.with_name(output.name + ".work")),
    )


def seal(folder: Path, kind: str, inputs: dict[str, str] | None = None) -> Path:
    """Make an artifact of a folder, made of ``inputs`` (digests by name)."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(
        folder,
        kind=kind,
        key="0" * 32,
        inputs=inputs or {},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.0,
    )
    return folder


def _make(root: Path) -> None:
    taxonomy = Taxonomy.parse_csv(TAXONOMY_CSV.encode(), "taxonomy.csv")
    (root / "taxonomy").mkdir(parents=True)
    taxonomy.write(root / "taxonomy" / "taxonomy.parquet")
    seal(root / "taxonomy", "catalog_taxonomy")

    settings = ClassifierSettings(
        text_version=TEXT_VERSION,
        taxonomy_version=short_version(read_manifest(root / "taxonomy").digest),
        max_tokens=32,
        temperature=0.5,
    )
    student = Classifier.from_encoder("packaged-minilm", list(PRODUCTS), settings).keep_layers(1)
    student.initialise_head(list(PRODUCTS.values()), list(PRODUCTS), list(PRODUCTS))
    (root / "student").mkdir()
    student.save(root / "student")
    taxonomy.write(root / "student" / "taxonomy.parquet")
    seal(root / "student", "student_checkpoint")

    (root / "evaluation").mkdir()
    labels = [category for category in PRODUCTS for _ in range(5)]
    texts = [offer_text({"title": title}) for title in TITLES]
    offers = {"text": texts, "category_id": labels, "country": ["DE"] * len(texts)}
    pq.write_table(pa.table(offers), root / "evaluation" / "offers.parquet")
    seal(root / "evaluation", "evaluation_set")
    _make_sample(root / "sample")
    _make_fast(root)
    # By its name: which of them is the fastest is up to the machine, and may change from run to run.
    run_stage(compile_spec(root, root / "compiled", backend="onnx-int8-rows"))


def _make_sample(folder: Path) -> None:
    """Ten training and ten validation offers of each category."""
    rows = [
        {
            "offer_id": f"{split} {category} {number}",
            "text": offer_text({"title": f"{text} {split} {number}"}),
            "category_id": category,
            "country": "DE",
            "split": split,
        }
        for split in ("train", "validation")
        for category, text in PRODUCTS.items()
        for number in range(10)
    ]
    folder.mkdir()
    labelled = pa.Table.from_pylist(rows)
    pq.write_table(labelled, folder / "labelled.parquet")
    pq.write_table(labelled.drop_columns(["category_id", "split"]).slice(0, 0), folder / "unlabelled.parquet")
    seal(folder, "training_sample")


def _make_fast(root: Path) -> None:
    """The fast model; its teacher is the student."""
    (root / "teacher").mkdir()
    Teacher(Classifier.load(root / "student"), None, EnsembleWeights(encoder=1.0)).save(root / "teacher")
    seal(root / "teacher", "teacher_checkpoint")
    sample, taxonomy, labels = (str(root / name) for name in ("sample", "taxonomy", "teacher-labels"))
    teacher = str(root / "teacher")
    for stage, inputs, parameters, output in (
        ("teacher_labels", {"training_sample": sample, "teacher_checkpoint": teacher}, {}, labels),
        (
            "fast_checkpoint",
            {"training_sample": sample, "teacher_labels": labels, "catalog_taxonomy": taxonomy},
            {"max_features": 400},
            str(root / "fast"),
        ),
    ):
        spec = StageSpec(
            stage=stage, inputs=inputs, parameters=parameters, output=output, workspace=f"{output}.work"
        )
        run_stage(spec)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
