"""Releases of the taxonomy: which there are at a place, and the validated content of one.

A place is a file, a web address, or a folder (an S3 prefix) that holds a file per version:

    2024-10.csv             the tree, .csv or .txt, also with .gz
    2025-03.csv
    2025-03.de.csv          its names in one more language
    2025-03.mapping.csv     where the ids of the version before went: from_id,to_id

The order of the versions is the natural one of their names: 2024-7 comes before 2024-10. A version whose
text files all have a language (as Google publishes them) takes the English one as its tree.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.stages import TaxonomyFile, TaxonomyParameters
from ml.taxonomy import TAXONOMY_FILE, Category, Taxonomy
from ml.taxonomy_change.formats import MappingRows, parse_mapping, parse_names, parse_tree
from ml.taxonomy_change.places import beside, file_name, joined, names_beside, names_in_folder, read_bytes

if TYPE_CHECKING:
    from ml.runner import StageContext

MAPPING_FILE = "mapping.parquet"
"""In the artifact of a release that came with a mapping: from_id, to_id ("" where it was removed)."""

_SUFFIXES = (".csv", ".txt")
_PLAIN_TEXT = ".txt"
_COMPRESSED = ".gz"
_MAPPING = "mapping"
_LOCALE = re.compile(
    r"(?:[a-z]{2}|[a-z]{3}(?=[-_]))(?:[-_][a-z]{4})?(?:[-_](?:[a-z]{2}|[0-9]{3}))?", re.IGNORECASE
)
_NUMBER = re.compile(r"([0-9]+)")
_MAX_IGNORED_SHOWN = 8


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the taxonomy as it is published."""

    name: str
    source: str
    """The place it was found at (CATALOG_TAXONOMY)."""
    files: list[TaxonomyFile]
    """The tree first."""


class _Named(msgspec.Struct, frozen=True, kw_only=True):
    """What a file's name says about it."""

    name: str
    version: str
    role: Literal["tree", "names", "mapping"]
    locale: str
    suffix: str


def list_releases(location: str) -> list[Release]:
    """All releases at ``location``, the oldest first; a file or web address is one release.

    Hidden files, and those with other suffixes (``.partial``, ``.tmp``), are ignored; so is a version
    without a tree, as it has not been delivered completely.

    Args:
        location: File, folder, web address, or any URI that fsspec opens.

    Raises:
        InputError: nothing is there, it cannot be reached, or two files say the same.
    """
    names = names_in_folder(location)
    if names is None:
        return [_release_of_file(location)]
    by_version: dict[str, list[_Named]] = {}
    for name in names:
        if (named := _named(name)) is not None:
            by_version.setdefault(named.version, []).append(named)
    releases = []
    for version in sorted(by_version, key=_natural_order):
        tree = _tree_among(by_version[version], location)
        if tree is not None:
            files = [tree, *_companions(by_version[version], tree, location)]
            releases.append(
                Release(
                    name=version,
                    source=location,
                    files=[_file(named, joined(location, named.name), tree) for named in files],
                )
            )
    if not releases:
        raise InputError(
            f"CATALOG_TAXONOMY={location} holds no release of a taxonomy, which would be a file "
            f"<version>.csv or <version>.txt (also with .gz); {_ignored(names)}"
        )
    return releases


def fingerprint(release: Release) -> str:
    """SHA-256 over role, locale and content of each file; places, names and compression do not matter.

    Raises:
        InputError: a file cannot be read.
    """
    return _digest(_contents(release.files, release.source))


def read_release(files: Sequence[TaxonomyFile], source: str) -> tuple[Taxonomy, MappingRows]:
    """The validated tree with its names in all languages, and the rows of the official mapping.

    Args:
        files: Of the release; exactly one is the tree.
        source: What messages call the place the files are at.

    Raises:
        InputError: a file cannot be read or is wrong; the message names file and row or line.
    """
    return _parsed(_contents(files, source), source)


def read_mapping(folder: Path) -> MappingRows:
    """The official mapping in the folder of a ``catalog_taxonomy`` artifact; [] where it has none.

    Raises:
        InputError: there is one that cannot be read.
    """
    path = folder / MAPPING_FILE
    try:
        table = pq.read_table(path, columns=["from_id", "to_id"])
    except FileNotFoundError:
        return []
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a mapping ({error}); make catalog_taxonomy anew") from None
    return [(row["from_id"], row["to_id"]) for row in table.to_pylist()]


def write_taxonomy(context: StageContext, parameters: TaxonomyParameters) -> dict[str, Any]:
    """Stage ``catalog_taxonomy``: read and validate a release, write its tree and its mapping.

    Without files it is the newest release at the source; without a fingerprint the content is not checked.
    """
    files = parameters.files or list_releases(parameters.source)[-1].files
    contents = _contents(files, parameters.source)
    if parameters.fingerprint and (found := _digest(contents)) != parameters.fingerprint:
        raise InputError(
            f"CATALOG_TAXONOMY={parameters.source} changed since it was looked at (its SHA-256 is "
            f"{found[:12]}…, no longer {parameters.fingerprint[:12]}…); run again"
        )
    taxonomy, mapping = _parsed(contents, parameters.source)
    taxonomy.write(context.output / TAXONOMY_FILE)
    if mapping:
        _write_mapping(mapping, context.output / MAPPING_FILE)
    context.progress.say(f"{len(taxonomy):,} categories on {taxonomy.levels} levels")
    return {
        "categories": len(taxonomy),
        "leaves": len(taxonomy.leaves),
        "levels": taxonomy.levels,
        "locales": list(taxonomy.locales),
        "mapped": len(mapping),
    }


def _write_mapping(mapping: MappingRows, path: Path) -> None:
    columns = {
        name: pa.array([pair[place] for pair in mapping], pa.string())
        for place, name in enumerate(("from_id", "to_id"))
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def _release_of_file(location: str) -> Release:
    """A file that was named itself is the tree, whatever it is called; others beside it may belong to it."""
    name = file_name(location)
    tree = _named(name) or _Named(name=name, version=name, role="tree", locale="", suffix="")
    same_version = [
        other
        for other in map(_named, names_beside(location))
        if other is not None and other.version == tree.version and other.name != name
    ]
    companions = _companions(same_version, tree, location)
    return Release(
        name=tree.version,
        source=location,
        files=[
            _file(tree, location, tree),
            *(_file(named, beside(location, named.name), tree) for named in companions),
        ],
    )


def _named(name: str) -> _Named | None:
    """What the name says; None where the file is none of a taxonomy's."""
    stem = name.removesuffix(_COMPRESSED)
    suffix = next((suffix for suffix in _SUFFIXES if stem.lower().endswith(suffix)), None)
    if name.startswith(".") or suffix is None:
        return None
    stem = stem[: -len(suffix)]
    version, _, last = stem.rpartition(".")
    if version and last.lower() == _MAPPING:
        return _Named(name=name, version=version, role="mapping", locale="", suffix=suffix)
    if version and _LOCALE.fullmatch(last):
        locale = last.replace("_", "-").lower()  # as the columns name_<locale> of a tree are
        return _Named(name=name, version=version, role="names", locale=locale, suffix=suffix)
    return _Named(name=name, version=stem, role="tree", locale="", suffix=suffix)


def _tree_among(files: Sequence[_Named], location: str) -> _Named | None:
    trees = [named for named in files if named.role == "tree"]
    if len(trees) > 1:
        raise InputError(
            f"CATALOG_TAXONOMY={location} holds more than one tree of version {trees[0].version}: "
            f"{', '.join(named.name for named in trees)}; remove all but one"
        )
    if trees:
        return trees[0]
    # Only a text file with names has the tree as well.
    in_a_language = [named for named in files if named.role == "names" and named.suffix == _PLAIN_TEXT]
    return min(in_a_language, key=_english_first, default=None)


def _english_first(named: _Named) -> tuple[bool, bool, bool, str]:
    locale = named.locale
    return (locale != "en", locale != "en-us", not locale.startswith("en-"), locale)


def _companions(files: Sequence[_Named], tree: _Named, location: str) -> list[_Named]:
    """Files of names and the mapping, in the order of their locales.

    Raises:
        InputError: two are of the same language, or two are mappings.
    """
    companions = sorted(
        (named for named in files if named.role != "tree" and named.name != tree.name),
        key=lambda named: (named.role, named.locale, named.name),
    )
    seen: dict[tuple[str, str], _Named] = {("names", tree.locale): tree}
    for named in companions:
        if (other := seen.setdefault((named.role, named.locale), named)) is not named:
            what = named.locale or _MAPPING
            raise InputError(
                f"CATALOG_TAXONOMY={location}: version {named.version} has two files for {what}, "
                f"{other.name} and {named.name}; remove one"
            )
    return companions


def _file(named: _Named, uri: str, tree: _Named) -> TaxonomyFile:
    return TaxonomyFile(uri=uri, role="tree" if named is tree else named.role, locale=named.locale)


def _natural_order(version: str) -> tuple[list[str | int], str]:
    """Sorts numbers as numbers; text and numbers alternate, so like is compared with like."""
    parts = _NUMBER.split(version.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], version


def _ignored(names: Sequence[str]) -> str:
    if not names:
        return "it is empty"
    shown = ", ".join(names[:_MAX_IGNORED_SHOWN])
    more = len(names) - _MAX_IGNORED_SHOWN
    return f"ignored: {shown}{f' and {more} more' if more > 0 else ''}"


def _contents(files: Sequence[TaxonomyFile], source: str) -> list[tuple[TaxonomyFile, bytes]]:
    return [(file, read_bytes(file.uri, _label(file, source))) for file in files]


def _label(file: TaxonomyFile, source: str) -> str:
    """What messages call the file: the setting, and the name where the setting is not the file itself."""
    name = file_name(file.uri)
    return f"CATALOG_TAXONOMY={source}" + ("" if file_name(source) == name else f": {name}")


def _digest(contents: Iterable[tuple[TaxonomyFile, bytes]]) -> str:
    digest = hashlib.sha256()
    for file, content in sorted(contents, key=lambda pair: (pair[0].role, pair[0].locale)):
        digest.update(f"{file.role}\n{file.locale}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _parsed(contents: Sequence[tuple[TaxonomyFile, bytes]], source: str) -> tuple[Taxonomy, MappingRows]:
    trees = [(file, content) for file, content in contents if file.role == "tree"]
    if len(trees) != 1:
        raise InputError(f"CATALOG_TAXONOMY={source}: {len(trees)} files are the tree, expected one")
    [(tree_file, content)] = trees
    tree = parse_tree(content, _label(tree_file, source))
    names: dict[str, dict[str, str]] = {}
    if tree_file.locale:
        names[tree_file.locale] = {category_id: tree.name(category_id) for category_id in tree}
    mapping: MappingRows = []
    for file, content in contents:
        if file.role == "names":
            names[file.locale] = parse_names(content, _label(file, source), tree)
        elif file.role == "mapping":
            mapping = parse_mapping(content, _label(file, source), tree)
    return (_with_names(tree, names, source) if names else tree), mapping


def _with_names(tree: Taxonomy, names: dict[str, dict[str, str]], source: str) -> Taxonomy:
    """``tree`` with further languages; where it has names of one itself, those of the file win."""
    categories = []
    for category_id in tree:
        category = tree.category(category_id)
        further = {locale: given[category_id] for locale, given in names.items() if category_id in given}
        categories.append(
            Category(category_id, category.parent_id, category.name, {**category.names, **further})
        )
    locales = tuple(dict.fromkeys((*tree.locales, *names)))
    return Taxonomy(categories, locales=locales, source=source)
