"""Stage ``renamed_student``: a compiled student under the names of a newer taxonomy.

A model answers with category ids; names and paths come from the taxonomy beside it. Where a new version
only calls categories otherwise, there is nothing to learn: the weights stay, bit for bit.
"""

from __future__ import annotations

import shutil
from typing import Any

import msgspec

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.compiled_model import SETTINGS_FILE, ModelSettings
from ml.stages import RenamedStudentParameters
from ml.taxonomy import TAXONOMY_FILE, Taxonomy

_SHOWN = 3


def rename_student(context: StageContext, parameters: RenamedStudentParameters) -> dict[str, Any]:
    """Copy the compiled student, with the new taxonomy in place of its own.

    Returns:
        The metrics of the compiled student, which hold for the same weights as before; ``size_bytes``
        anew; ``renamed``: categories that have another name in any locale.

    Raises:
        InputError: the taxonomies differ in more than names, or the compiled student was not made of the
            student given.
    """
    compiled, new_folder = context.input("compiled_student"), context.input("catalog_taxonomy")
    manifest = read_manifest(compiled)
    student = read_manifest(context.input("student_checkpoint")).digest
    if manifest.inputs.get("student_checkpoint") != student:
        raise InputError(
            f"{compiled} was not made of student_checkpoint {short_version(student)}; give the one it was "
            "compiled from"
        )
    before, after = Taxonomy.load(compiled / TAXONOMY_FILE), Taxonomy.load(new_folder)
    _check_only_names_differ(before, after)
    renamed = _renamed(before, after)

    for name in manifest.files.keys() - {SETTINGS_FILE, TAXONOMY_FILE}:
        (context.output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(compiled / name, context.output / name)
    shutil.copyfile(new_folder / TAXONOMY_FILE, context.output / TAXONOMY_FILE)
    settings = ModelSettings.read(compiled)
    version = short_version(read_manifest(new_folder).digest)
    msgspec.structs.replace(settings, taxonomy_version=version).write(context.output)
    context.progress.say(
        f"{len(renamed):,} categories renamed{_examples(renamed)}; taxonomy {version} instead of "
        f"{settings.taxonomy_version}"
    )
    size_bytes = sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file())
    return {**manifest.metrics, "size_bytes": size_bytes, "renamed": len(renamed)}


def _check_only_names_differ(before: Taxonomy, after: Taxonomy) -> None:
    """Refuse categories that came, went or moved: the student has to learn those."""
    differences = {
        "added": [category for category in after if category not in before],
        "removed": [category for category in before if category not in after],
        "moved": [
            category
            for category in before
            if category in after and before.parent(category) != after.parent(category)
        ],
    }
    if any(differences.values()):
        found = "; ".join(f"{len(ids):,} {what}{_examples(ids)}" for what, ids in differences.items() if ids)
        raise InputError(
            f"catalog_taxonomy differs from the compiled student's in more than names ({found}); train and "
            "compile a student on it instead"
        )


def _renamed(before: Taxonomy, after: Taxonomy) -> list[str]:
    locales = (None, *dict.fromkeys((*before.locales, *after.locales)))
    return [
        category
        for category in after
        if any(before.name(category, locale) != after.name(category, locale) for locale in locales)
    ]


def _examples(ids: list[str]) -> str:
    if not ids:
        return ""
    return f" ({', '.join(ids[:_SHOWN])}{', …' if len(ids) > _SHOWN else ''})"
