"""Releases of the taxonomy: which there are at a place, and the validated content of one.

A place is a file, a web address, or a folder (an S3 prefix) that holds a file per version:

    2024-10.csv             the tree, .csv or .txt, also with .gz
    2025-03.csv
    2025-03.de.csv          its names in one more language
    2025-03.mapping.csv     where the ids of the version before went: from_id,to_id

A version takes the mappings of all versions before it along, since not every version is adopted: a label
is followed through all of them. They are held against the trees that lie between them.

The order of the versions is the natural one of their names: 2024-7 comes before 2024-10. A version whose
text files all have a language (as Google publishes them) takes the English one as its tree.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
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
"""In the artifact of a release that came with mappings: ``step`` (its place among them, the oldest is 0),
``from_id``, ``to_id`` ("" where it was removed)."""

_SUFFIXES = (".csv", ".txt")
_PLAIN_TEXT = ".txt"
_COMPRESSED = ".gz"
_MAPPING = "mapping"
_LOCALE = re.compile(
    r"(?:[a-z]{2}|[a-z]{3}(?=[-_]))(?:[-_][a-z]{4})?(?:[-_](?:[a-z]{2}|[0-9]{3}))?", re.IGNORECASE
)
_NUMBER = re.compile(r"([0-9]+)")
_MAX_IGNORED_SHOWN = 8
_MAPPING_SCHEMA = pa.schema(dict[str, pa.DataType](step=pa.int32(), from_id=pa.string(), to_id=pa.string()))


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the taxonomy as it is published."""

    name: str
    source: str
    """The place it was found at (CATALOG_TAXONOMY)."""
    files: list[TaxonomyFile]
    """Its tree is the last one; before it, if there are mappings, the trees and mappings of the releases
    before, the oldest first."""


class _Named(msgspec.Struct, frozen=True, kw_only=True):
    """What a file's name says about it."""

    name: str
    version: str
    role: Literal["tree", "names", "mapping"]
    locale: str
    suffix: str


def list_releases(location: str, give_up_at: float | None = None) -> list[Release]:
    """All releases at ``location``, the oldest first; a file or web address is one release.

    Hidden files, and those with other suffixes (``.partial``, ``.tmp``), are ignored; so is a version
    without a tree, as it has not been delivered completely.

    Args:
        location: File, folder, web address, or any URI that fsspec opens.
        give_up_at: When not to wait any longer (:func:`time.monotonic`).

    Raises:
        InputError: nothing is there, it cannot be reached (in time), or two files say the same.
    """
    names = names_in_folder(location, give_up_at)
    if names is None:
        return [_release_of_file(location, give_up_at)]
    by_version: dict[str, list[_Named]] = {}
    for name in names:
        if (named := _named(name)) is not None:
            by_version.setdefault(named.version, []).append(named)
    releases = []
    history: list[TaxonomyFile] = []
    for version in sorted(by_version, key=_natural_order):
        tree = _tree_among(by_version[version], location)
        if tree is not None:
            companions = _companions(by_version[version], tree, location)
            own = [_file(named, joined(location, named.name), tree) for named in (tree, *companions)]
            maps = any(file.role == _MAPPING for file in (*history, *own))
            files = [*history, *own] if maps else own
            releases.append(Release(name=version, source=location, files=files))
            history += [file for file in own if file.role != "names"]
    if not releases:
        raise InputError(
            f"CATALOG_TAXONOMY={location} holds no release of a taxonomy, which would be a file "
            f"<version>.csv or <version>.txt (also with .gz); {_ignored(names)}"
        )
    return releases


def fingerprint(release: Release, give_up_at: float | None = None) -> str:
    """SHA-256 over role, locale and content of each file; places, names and compression do not matter.

    The trees of the releases before are not part of it: mappings are checked by them, nothing else.

    Raises:
        InputError: a file cannot be read (by ``give_up_at``, of :func:`time.monotonic`).
    """
    files = [file for place, file in enumerate(release.files) if not _of_another(place, release.files)]
    return _digest(_contents(files, release.source, give_up_at))


def origins_are_checked(files: Sequence[TaxonomyFile]) -> bool:
    """Whether :func:`read_release` holds ``from_id`` of the mappings against the releases before."""
    return sum(file.role == "tree" for file in files) > 1


def read_release(
    files: Sequence[TaxonomyFile], source: str, in_force: Path | None = None
) -> tuple[Taxonomy, MappingRows]:
    """The validated tree with its names in all languages, and the official mapping to it.

    Args:
        files: Of the release, in its order.
        source: What messages call the place the files are at.
        in_force: As in :func:`read_mapping`.

    Raises:
        InputError: a file cannot be read or is wrong; the message names file and row or line.
    """
    tree, steps = _parsed(_contents(files, source), source)
    return tree, _mapping_to(tree, steps, in_force)


def read_mapping(folder: Path, in_force: Path | None = None) -> MappingRows:
    """The official mapping in the folder of a ``catalog_taxonomy`` artifact; [] where it has none.

    Args:
        folder: Of the artifact.
        in_force: Folder of the ``catalog_taxonomy`` artifact in force. What its mappings say already is
            left out then: a category that was split and lives on is not split again with every release.

    Returns:
        From every former id to those of this taxonomy, through all of its mappings. An id of which
        nothing is left but that a mapping names no successor of is left out: nobody knows. ``""`` beside
        other successors: a part of the category is gone.

    Raises:
        InputError: there is one that cannot be read.
    """
    steps = _read_steps(folder)
    return _mapping_to(Taxonomy.load(folder), steps, in_force) if steps else []


def says_more(rows: MappingRows, rows_in_force: MappingRows) -> bool:
    """Whether a mapping says of any id what the mapping in force does not (that it stays is nothing)."""
    return any(former != current for former, current in set(rows) - set(rows_in_force))


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
    taxonomy, steps = _parsed(contents, parameters.source)
    taxonomy.write(context.output / TAXONOMY_FILE)
    if any(steps):
        _write_steps(steps, context.output / MAPPING_FILE)
    context.progress.say(f"{len(taxonomy):,} categories on {taxonomy.levels} levels")
    return {
        "categories": len(taxonomy),
        "leaves": len(taxonomy.leaves),
        "levels": taxonomy.levels,
        "locales": list(taxonomy.locales),
        "mapped": len(_mapping_to(taxonomy, steps)),
    }


def _write_steps(steps: Sequence[MappingRows], path: Path) -> None:
    rows = [
        {"step": step, "from_id": former, "to_id": current}
        for step, mapping in enumerate(steps)
        for former, current in mapping
    ]
    pq.write_table(pa.Table.from_pylist(rows, _MAPPING_SCHEMA), path, compression="zstd")


def _read_steps(folder: Path) -> list[MappingRows]:
    path = folder / MAPPING_FILE
    try:
        rows = pq.read_table(path, schema=_MAPPING_SCHEMA).to_pylist()
    except FileNotFoundError:
        return []
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a mapping ({error}); make catalog_taxonomy anew") from None
    steps: dict[int, MappingRows] = {}
    for row in rows:
        steps.setdefault(row["step"] or 0, []).append((row["from_id"], row["to_id"]))
    return [steps[step] for step in sorted(steps)]


def _mapping_to(tree: Taxonomy, steps: Sequence[MappingRows], in_force: Path | None = None) -> MappingRows:
    if in_force is None:
        return compose_mappings(steps, tree)
    return compose_mappings(steps, tree, known=_read_steps(in_force), before=Taxonomy.load(in_force))


def compose_mappings(
    steps: Sequence[MappingRows],
    current: Container[str],
    *,
    known: Sequence[MappingRows] = (),
    before: Container[str] = (),
) -> MappingRows:
    """Several mappings as one, from every id that one of them names to ids of the newest tree.

    Args:
        steps: Rows of each mapping, the oldest first.
        current: Ids of the newest tree.
        known: Mappings in force: what they say of an id is left out, unless the id is gone from
            ``before`` and a later mapping says more of where it went.
        before: Ids of the tree in force.

    Returns:
        What :func:`read_mapping` returns.
    """
    groups = [_successors(rows) for rows in steps]
    said = Counter((former, frozenset(to)) for rows in known for former, to in _successors(rows).items())
    fresh: set[tuple[int, str]] = set()
    for step, group in enumerate(groups):
        for former, to in group.items():
            if said[former, frozenset(to)]:
                said[former, frozenset(to)] -= 1
            else:
                fresh.add((step, former))
    composed: dict[str, list[str]] = {}
    for step, group in enumerate(groups):
        for former, to in group.items():
            if former in composed:
                continue
            places, on_the_way = _followed(to, step, groups)
            if (step, former) in fresh or (former not in before and on_the_way & fresh):
                composed[former] = places
    return [
        (former, place) for former, places in composed.items() for place in _that_are_there(places, current)
    ]


def _successors(rows: MappingRows) -> dict[str, list[str]]:
    successors: dict[str, list[str]] = {}
    for former, current in rows:
        successors.setdefault(former, []).append(current)
    return successors


def _followed(
    places: Iterable[str], step: int, groups: Sequence[Mapping[str, list[str]]]
) -> tuple[list[str], set[tuple[int, str]]]:
    """Where ids went through the mappings after ``step``, and what those say on the way."""
    on_the_way: set[tuple[int, str]] = set()
    for later in range(step + 1, len(groups)):
        on_the_way |= {(later, place) for place in places if place in groups[later]}
        places = [after for place in places for after in groups[later].get(place, [place])]
    return list(dict.fromkeys(places)), on_the_way


def _that_are_there(places: Sequence[str], current: Container[str]) -> list[str]:
    there = [place for place in places if place in current]
    if len(there) == len(places):
        return there
    # Gone for good, all of it or a part; of an id that is gone without a word nobody knows that.
    return [*there, ""] if there or not any(places) else []


def _release_of_file(location: str, give_up_at: float | None) -> Release:
    """A file that was named itself is the tree, whatever it is called; others beside it may belong to it."""
    name = file_name(location)
    tree = _named(name) or _Named(name=name, version=name, role="tree", locale="", suffix="")
    same_version = [
        other
        for other in map(_named, names_beside(location, give_up_at))
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


def _of_another(place: int, files: Sequence[TaxonomyFile]) -> bool:
    """Whether the file is the tree of a release before, which ends with the tree of the release itself."""
    return files[place].role == "tree" and any(file.role == "tree" for file in files[place + 1 :])


def _contents(
    files: Sequence[TaxonomyFile], source: str, give_up_at: float | None = None
) -> list[tuple[TaxonomyFile, bytes]]:
    return [(file, read_bytes(file.uri, _label(file, source), give_up_at)) for file in files]


def _label(file: TaxonomyFile, source: str) -> str:
    """What messages call the file: the setting, and the name where the setting is not the file itself."""
    name = file_name(file.uri)
    return f"CATALOG_TAXONOMY={source}" + ("" if file_name(source) == name else f": {name}")


def _digest(contents: Sequence[tuple[TaxonomyFile, bytes]]) -> str:
    files = [file for file, _ in contents]
    own = [pair for place, pair in enumerate(contents) if not _of_another(place, files)]
    digest = hashlib.sha256()
    for file, content in sorted(own, key=lambda pair: (pair[0].role, pair[0].locale)):
        digest.update(f"{file.role}\n{file.locale}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _parsed(
    contents: Sequence[tuple[TaxonomyFile, bytes]], source: str
) -> tuple[Taxonomy, list[MappingRows]]:
    """The tree of the release, and the rows of each mapping, the oldest first."""
    trees = [(file, content) for file, content in contents if file.role == "tree"]
    if not trees:
        raise InputError(f"CATALOG_TAXONOMY={source}: no file is the tree, expected one")
    tree_file, content = trees[-1]
    tree = parse_tree(content, _label(tree_file, source))
    names: dict[str, dict[str, str]] = {}
    if tree_file.locale:
        names[tree_file.locale] = {category_id: tree.name(category_id) for category_id in tree}
    for file, content in contents:
        if file.role == "names":
            names[file.locale] = parse_names(content, _label(file, source), tree)
    steps = _parsed_mappings(contents, tree_file, tree, source)
    return (_with_names(tree, names, source) if names else tree), steps


def _parsed_mappings(
    contents: Sequence[tuple[TaxonomyFile, bytes]], own: TaxonomyFile, tree: Taxonomy, source: str
) -> list[MappingRows]:
    """Rows of each mapping: to the tree that comes right before it, from ids of anything before that."""
    steps: list[MappingRows] = []
    trees: list[Taxonomy | None] = []
    for file, content in contents:
        label = _label(file, source)
        if file.role == "tree":
            trees.append(tree if file is own else _tree_or_none(content, label))
        elif file.role == "mapping":
            *before, into = trees or [tree]
            former_ids: set[str] | None = None
            if before and None not in before:
                former_ids = {category_id for earlier in before if earlier for category_id in earlier}
                former_ids |= {former for rows in steps for former, _ in rows}
            steps.append(parse_mapping(content, label, into, former_ids))
    return steps


def _tree_or_none(content: bytes, label: str) -> Taxonomy | None:
    """A release before this one may be broken; that must not be held against this one."""
    try:
        return parse_tree(content, label)
    except InputError:
        return None


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
