"""Releases of the taxonomy: every place and format gives the same tree; what is wrong is named."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import InputError
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import TaxonomyFile, TaxonomyParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change import places
from ml.taxonomy_change.formats import parse_tree
from ml.taxonomy_change.releases import (
    Release,
    compose_mappings,
    fingerprint,
    list_releases,
    origins_are_checked,
    read_mapping,
    read_release,
    says_more,
    write_taxonomy,
)

CSV = "category_id,parent_id,name\n1,,Home\n2,1,Kitchen\n3,2,Kettles\n"
VERSION = "# Google_Product_Taxonomy_Version: 2021-09-21\n"
GOOGLE = VERSION + "1 - Home\n2 - Home > Kitchen\n3 - Home > Kitchen > Kettles\n"
GOOGLE_DE = VERSION + "1 - Haus\n2 - Haus > Küche\n3 - Haus > Küche > Kessel\n"
SHOPIFY = (
    "# Shopify Product Taxonomy - Categories: 2024-10\n"
    "# Format: {GID} : {Ancestor name} > ... > {Category name}\n\n"
    "gid://shopify/TaxonomyCategory/aa       : Apparel & Accessories\n"
    "gid://shopify/TaxonomyCategory/aa-1     : Apparel & Accessories > Clothing\n"
)


def put(folder: Path, **contents: str | bytes) -> Path:
    """Write files; ``__`` in a name is a dot, ``_`` a hyphen."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", ".").replace("_", "-")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def only_release(location: Path | str) -> Release:
    (release,) = list_releases(str(location))
    return release


def read(location: Path | str) -> tuple[Taxonomy, list[tuple[str, str]]]:
    release = list_releases(str(location))[-1]
    return read_release(release.files, release.source)


def roles(release: Release) -> list[tuple[str, str, str]]:
    return [(Path(file.uri).name, file.role, file.locale) for file in release.files]


# Formats


@pytest.mark.parametrize("text", [CSV, GOOGLE], ids=["csv", "google"])
@pytest.mark.parametrize(
    "encoded",
    [
        str.encode,
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["plain", "byte order mark", "CRLF", "gzip"],
)
def test_every_format_and_encoding_gives_the_same_tree(tmp_path, text, encoded):
    path = tmp_path / "taxonomy.txt"
    path.write_bytes(encoded(text))
    tree, mapping = read(path)
    assert tree.ids == ["1", "2", "3"]
    assert tree.path("3") == "Home > Kitchen > Kettles"
    assert mapping == []


def test_shopify_ids_are_read_without_their_prefix():
    tree = parse_tree(SHOPIFY.encode(), "categories.txt")
    assert tree.ids == ["aa", "aa-1"]
    assert tree.path("aa-1") == "Apparel & Accessories > Clothing"


def test_a_child_may_come_before_its_parent():
    tree = parse_tree(b"2 - Home > Kitchen\n1 - Home\n", "tree.txt")
    assert tree.ancestors("2") == ["1", "2"]


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=8
)


@st.composite
def trees(draw):
    """Trees whose siblings have different names, in any order."""
    size = draw(st.integers(1, 30))
    names = draw(st.lists(NAMES, min_size=size, max_size=size, unique=True))
    parents = [draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None for i in range(size)]
    nodes = [
        Category(str(number), None if parent is None else str(parent), name)
        for number, (parent, name) in enumerate(zip(parents, names, strict=True))
    ]
    return Taxonomy(draw(st.permutations(nodes)))


@given(trees())
def test_any_tree_comes_back_from_the_text_formats(tree):
    google = "".join(f"{category} - {tree.path(category)}\n" for category in tree)
    shopify = "".join(f"gid://shopify/TaxonomyCategory/{i} : {tree.path(i)}\n" for i in tree)
    for text in (google, shopify):
        assert parse_tree(text.encode(), "tree.txt").table().equals(tree.table())


BAD_TREES = [
    (GOOGLE + "Home > Garden\n", r"line 5 is 'Home > Garden', expected '<id> - .*taxonomy-with-ids"),
    (GOOGLE + "4 - Home >  > Pots\n", "line 5 is '4 - Home >  > Pots', expected"),
    (GOOGLE + "4 - Home > Garden > Pots\n", "line 5: category '4' has no parent, .*'Home > Garden'"),
    (GOOGLE + "2 - Garden\n", "line 5 repeats the id '2' of line 3"),
    (GOOGLE + "4 - Home > Kitchen\n", "line 5 repeats the path 'Home > Kitchen' of line 3"),
    (VERSION, "holds no categories"),
    (SHOPIFY + "aa-2 : Shoes\n", r"line 6 is 'aa-2 : Shoes', expected 'gid://shopify"),
    (CSV + "4,9,Pots\n", "row 4: category '4' is an orphan"),
    ("", "is empty"),
    (" \n\n", "is empty"),
    (GOOGLE.encode("utf-16"), "UTF-16"),
    (GOOGLE_DE.encode("latin-1"), r"not UTF-8 \(line 3\)"),
    ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page or XML, expected a taxonomy"),
    (gzip.compress(CSV.encode() * 50)[:-20], "the gzip file is damaged"),
    (b"PAR1 but not really", "has no column category_id"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_TREES, ids=[expected for _, expected in BAD_TREES])
def test_what_is_wrong_with_a_tree_is_named_on_one_line(tmp_path, text, expected):
    path = put(tmp_path, tree__txt=text) / "tree.txt"
    with pytest.raises(InputError, match=expected) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"CATALOG_TAXONOMY={path}")


def test_a_file_that_is_far_too_large_is_refused_also_if_it_is_small_when_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 1 << 20)
    put(tmp_path, plain__csv=b"x" * (1 << 20) + b"x", bomb__csv__gz=gzip.compress(b"x" * (1 << 21)))
    for name in ("plain.csv", "bomb.csv.gz"):
        with pytest.raises(InputError, match="is larger than 1 MB"):
            read(tmp_path / name)


# Names and mapping


def test_companions_give_names_and_mapping(tmp_path):
    put(
        tmp_path,
        v2__csv="category_id,parent_id,name,name_de\n1,,Home,Haus\n2,1,Kitchen,Kueche\n",
        v2__de__csv="category_id,name\n2,Küche\n",
        v2__pt_BR__txt="1 - Casa\n2 - Casa > Cozinha\n",
        v2__mapping__csv="from_id,to_id\n1,1\n1,2\n7,2\n8,\n",
    )
    tree, mapping = read(tmp_path)
    assert tree.locales == ("de", "pt-br")
    assert tree.path("2", "de") == "Haus > Küche"
    assert tree.path("2", "pt-br") == "Casa > Cozinha"
    assert tree.path("2") == "Home > Kitchen"
    assert mapping == [("1", "1"), ("1", "2"), ("7", "2"), ("8", "")]


@pytest.mark.parametrize(
    ("companion", "text", "expected"),
    [
        ("v1__de__csv", "category_id,name\n1,Haus\n9,Pool\n", r"v1\.de\.csv row 2 names category '9'"),
        ("v1__de__csv", "category_id,name\n1,Haus\n1,Heim\n", r"v1\.de\.csv row 2 repeats .* of row 1"),
        ("v1__de__txt", "# x\n1 - Haus\n9 - Haus > Pool\n", r"v1\.de\.txt line 3 names category '9'"),
        ("v1__de__txt", "1 - Haus\n1 - Haus\n", r"v1\.de\.txt line 2 repeats .* of line 1"),
        ("v1__mapping__csv", "from_id,to_id\n7,9\n", r"v1\.mapping\.csv row 1 leads to category '9'"),
        ("v1__mapping__csv", "from_id,to_id\n,1\n", "row 1 has an empty from_id"),
        ("v1__mapping__csv", "from_id,to_id\n7,1\n7,1\n", "row 2 repeats row 1"),
        ("v1__mapping__csv", "from_id,to_id\n7,1\n7,\n", "row 2 contradicts row 1: category '7'"),
        ("v1__mapping__csv", "old,new\n7,1\n", "has no column from_id, to_id"),
    ],
)
def test_what_is_wrong_with_a_companion_is_named(tmp_path, companion, text, expected):
    put(tmp_path, v1__csv=CSV, **{companion: text})
    with pytest.raises(InputError, match=expected) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"CATALOG_TAXONOMY={tmp_path}: v1.")


# Folders


def test_releases_are_in_the_natural_order_of_their_names(tmp_path):
    versions = ["2024-7", "2024-10", "2024-10.1", "2025-03", "v2", "v10"]
    for version in reversed(versions):
        (tmp_path / f"{version}.csv").write_text(CSV)
    assert [release.name for release in list_releases(str(tmp_path))] == versions


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 99)), min_size=2, max_size=8, unique=True))
def test_numbered_versions_are_in_the_order_of_their_numbers(numbers):
    files = fsspec.filesystem("memory")
    if files.exists("/numbered"):
        files.rm("/numbered", recursive=True)
    for major, minor in numbers:
        files.pipe_file(f"/numbered/r{major}.{minor}.csv", b"x")
    expected = [f"r{major}.{minor}" for major, minor in sorted(numbers)]
    assert [release.name for release in list_releases("memory://numbered/")] == expected


def test_other_files_and_versions_that_are_not_complete_are_ignored(tmp_path):
    put(
        tmp_path,
        v1__csv=CSV,
        v2__csv__partial=CSV,
        v3__csv__tmp=CSV,
        __v4__csv=CSV,
        v5__mapping__csv="from_id,to_id\n",
        v6__de__csv="category_id,name\n1,Haus\n",
        README__md="x",
    )
    (tmp_path / "v7.csv").mkdir()
    (tmp_path / "v8.csv").symlink_to(tmp_path / "v7.csv")
    assert roles(only_release(tmp_path)) == [("v1.csv", "tree", "")]
    (tmp_path / "v1.csv").unlink()
    with pytest.raises(
        InputError,
        match=r"holds no release of a taxonomy.*ignored: \.v4\.csv, README\.md, v2\.csv\.partial, "
        r"v3\.csv\.tmp, v5\.mapping\.csv, v6\.de\.csv",
    ):
        list_releases(str(tmp_path))


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(InputError, match=r"^CATALOG_TAXONOMY=.* holds no release .*; it is empty"):
        list_releases(str(tmp_path))
    for absent in ("absent", "absent/", "absent.csv"):
        with pytest.raises(InputError, match=rf"^CATALOG_TAXONOMY=.*/{absent}: no such file or folder"):
            list_releases(f"{tmp_path}/{absent}")


def test_of_files_that_all_have_a_language_the_english_one_is_the_tree(tmp_path):
    put(
        tmp_path,
        v1__de_DE__txt=GOOGLE_DE,
        v1__en_GB__txt=GOOGLE,
        v1__en_US__txt=GOOGLE,
        v2__fr_FR__txt=GOOGLE,
        v2__de_DE__txt__gz=gzip.compress(GOOGLE_DE.encode()),
    )
    first, second = list_releases(str(tmp_path))
    assert roles(first) == [
        ("v1.en-US.txt", "tree", "en-us"),
        ("v1.de-DE.txt", "names", "de-de"),
        ("v1.en-GB.txt", "names", "en-gb"),
    ]
    assert roles(second) == [("v2.de-DE.txt.gz", "tree", "de-de"), ("v2.fr-FR.txt", "names", "fr-fr")]
    tree, _ = read_release(first.files, first.source)
    assert tree.path("2", "de-de") == "Haus > Küche"
    assert tree.path("2") == tree.path("2", "en-us") == "Home > Kitchen"


def test_two_files_for_the_same_thing_are_named(tmp_path):
    put(tmp_path, v1__csv=CSV, v1__txt=GOOGLE)
    with pytest.raises(InputError, match=r"more than one tree of version v1: v1\.csv, v1\.txt; remove"):
        list_releases(str(tmp_path))
    (tmp_path / "v1.txt").unlink()
    put(tmp_path, v1__de__csv="category_id,name\n", v1__DE__txt=GOOGLE_DE)
    with pytest.raises(InputError, match=r"version v1 has two files for de, v1\.DE\.txt and v1\.de\.csv"):
        list_releases(str(tmp_path))


def test_a_file_takes_along_what_belongs_to_it(tmp_path):
    put(
        tmp_path,
        taxonomy__csv=CSV,
        taxonomy__de__csv="category_id,name\n1,Haus\n",
        taxonomy__mapping__csv="from_id,to_id\n9,1\n",
        other__de__csv="category_id,name\n77,Haus\n",
        other__csv=CSV,
    )
    release = only_release(tmp_path / "taxonomy.csv")
    assert release.name == "taxonomy"
    assert [name for name, _, _ in roles(release)] == [
        "taxonomy.csv",
        "taxonomy.mapping.csv",
        "taxonomy.de.csv",
    ]
    tree, mapping = read_release(release.files, release.source)
    assert (tree.name("1", "de"), mapping) == ("Haus", [("9", "1")])
    assert only_release((tmp_path / "other.csv").as_uri()).name == "other"


def test_a_file_that_is_named_itself_is_the_tree_whatever_it_is_called(tmp_path, monkeypatch):
    put(tmp_path, taxonomy_with_ids__de_DE__txt=GOOGLE_DE, taxonomy_with_ids__en_US__txt=GOOGLE, tree=CSV)
    release = only_release(tmp_path / "taxonomy-with-ids.de-DE.txt")
    assert roles(release)[0] == ("taxonomy-with-ids.de-DE.txt", "tree", "de-de")
    assert read(tmp_path / "taxonomy-with-ids.de-DE.txt")[0].path("2", "en-us") == "Home > Kitchen"
    monkeypatch.chdir(tmp_path)
    assert read("tree")[0].ids == ["1", "2", "3"]


# Mappings of several releases


def chain(tmp_path: Path) -> Path:
    """v1 {1 2 3}, v2 splits 2 into 2 and 4 and replaces 3 by 5, v3 replaces 4 by 6 and has no 5."""
    return put(
        tmp_path / "chain",
        v1__csv=CSV,
        v2__csv="category_id,parent_id,name\n1,,Home\n2,1,Kitchen\n4,1,Cooking\n5,2,Boilers\n",
        v2__mapping__csv="from_id,to_id\n2,2\n2,4\n3,5\n",
        v3__csv="category_id,parent_id,name\n1,,Home\n2,1,Kitchen\n6,1,Cookware\n7,2,Jugs\n",
        v3__mapping__csv="from_id,to_id\n4,6\n5,7\n",
    )


def adopted(tmp_path: Path, release: Release) -> Path:
    """The folder of the release's artifact."""
    (tmp_path / release.name).mkdir()
    return run(tmp_path / release.name, parameters_of(release))[0]


def test_a_release_carries_the_mappings_of_all_before_it_as_one(tmp_path):
    first, second, third = list_releases(str(chain(tmp_path)))
    assert roles(first) == [("v1.csv", "tree", "")]
    assert [Path(file.uri).name for file in third.files] == [
        "v1.csv",
        "v2.csv",
        "v2.mapping.csv",
        "v3.csv",
        "v3.mapping.csv",
    ]
    tree, mapping = read_release(third.files, third.source)
    assert tree.ids == ["1", "2", "6", "7"]
    expected = [("2", "2"), ("2", "6"), ("3", "7"), ("4", "6"), ("5", "7")]
    assert mapping == expected
    assert read_mapping(adopted(tmp_path, third)) == expected
    assert read_release(second.files, second.source)[1] == [("2", "2"), ("2", "4"), ("3", "5")]


def test_what_the_mapping_in_force_says_already_is_not_said_again(tmp_path):
    first, second, third = list_releases(str(chain(tmp_path)))
    in_force = adopted(tmp_path, second)
    # Labels that were given 2 since v2 stand for the smaller 2; those that were given 3 went on.
    expected = [("3", "7"), ("4", "6"), ("5", "7")]
    assert read_release(third.files, third.source, in_force)[1] == expected
    folder = adopted(tmp_path, third)
    assert read_mapping(folder, in_force) == expected
    assert read_mapping(folder, folder) == []
    assert read_mapping(folder, adopted(tmp_path, first)) == read_mapping(folder)


def test_the_fingerprint_covers_the_mappings_of_releases_before_but_not_their_trees(tmp_path):
    folder = chain(tmp_path)
    before = fingerprint(list_releases(str(folder))[-1])
    put(folder, v1__csv=CSV + "8,1,Pots\n")
    assert fingerprint(list_releases(str(folder))[-1]) == before
    put(folder, v2__mapping__csv="from_id,to_id\n2,2\n2,4\n")
    assert fingerprint(list_releases(str(folder))[-1]) != before


def test_every_mapping_is_held_against_the_trees_around_it(tmp_path):
    folder = chain(tmp_path)
    put(folder, v3__mapping__csv="from_id,to_id\n4,6\n55,7\n")
    with pytest.raises(InputError, match=r"v3\.mapping\.csv row 2 starts from category '55', which no"):
        read(folder)
    put(folder, v3__mapping__csv="from_id,to_id\n3,6\n")  # 3 was retired with v2
    assert ("3", "7") not in read(folder)[1]
    put(folder, v2__mapping__csv="from_id,to_id\n3,6\n")  # 6 is only of v3
    with pytest.raises(InputError, match=r"v2\.mapping\.csv row 1 leads to category '6', which the tree"):
        read(folder)


def test_a_broken_release_that_was_skipped_is_not_held_against_later_ones(tmp_path):
    folder = put(chain(tmp_path), v2__csv="nonsense")
    assert ("4", "6") in read(folder)[1]
    assert origins_are_checked(list_releases(str(folder))[-1].files)
    assert not origins_are_checked(only_release(folder / "v3.csv").files)


STEP = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3)
)


def rows_of(step: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(former, current) for former, to in step.items() for current in dict.fromkeys(to)]


@given(st.lists(STEP, max_size=4), st.sets(st.sampled_from("abcdefg")), st.integers(0, 4))
def test_mappings_as_one_lead_where_they_lead_one_by_one(steps, current, in_force):
    composed = compose_mappings([rows_of(step) for step in steps], current)
    expected = {}
    for number, step in enumerate(steps):
        for former, to in step.items():
            places = set(to)
            for later in steps[number + 1 :]:
                places = {after for place in places for after in later.get(place, [place])}
            expected.setdefault(former, places)
    for former, places in expected.items():
        found = {current for start, current in composed if start == former}
        assert found - {""} == places & current
        assert ("" in found) == (bool(places & current) and not places <= current)
    rows = [rows_of(step) for step in steps]
    # With all of them in force nothing is new; of ids that live, only what came after counts.
    assert compose_mappings(rows, current, known=rows, before="abcdefg") == []
    after = compose_mappings(rows[in_force:], current)
    names = [name for step in steps[:in_force] for name in step.items()]
    if not any(name in names for step in steps[in_force:] for name in step.items()):
        assert compose_mappings(rows, current, known=rows[:in_force], before="abcdefg") == after


def test_an_id_that_is_gone_without_a_word_is_unknown_and_one_that_was_removed_is_not():
    assert compose_mappings([[("a", "b")], []], {"c"}) == []
    assert compose_mappings([[("a", "b")], [("b", "")]], {"c"}) == [("a", ""), ("b", "")]
    assert compose_mappings([[("a", "b"), ("a", "c")]], {"c"}) == [("a", "c"), ("a", "")]


def test_a_mapping_says_more_only_if_it_says_something_new():
    assert says_more([("a", "b")], [])
    assert says_more([("a", "b"), ("a", "c")], [("a", "b")])
    assert not says_more([("a", "b"), ("c", "c")], [("a", "b"), ("x", "y")])
    assert not says_more([], [("x", "y")])


# Fingerprint and stage


def test_the_fingerprint_is_of_the_content_and_its_role_not_of_places_and_compression(tmp_path):
    here = only_release(put(tmp_path / "here", v1__csv=CSV))
    moved = only_release(put(tmp_path / "there", v2__csv__gz=gzip.compress(CSV.encode())))
    assert fingerprint(here) == fingerprint(moved)
    names = "category_id,name\n1,X\n"
    different = [
        only_release(put(tmp_path / "a", v1__csv=CSV + "4,1,Pots\n")),
        only_release(put(tmp_path / "b", v1__csv=CSV, v1__de__csv=names)),
        only_release(put(tmp_path / "c", v1__csv=CSV, v1__fr__csv=names)),
        only_release(put(tmp_path / "d", v1__csv=CSV, v1__mapping__csv=names)),
    ]
    assert len({fingerprint(release) for release in (here, *different)}) == 5


def run(tmp_path: Path, parameters: TaxonomyParameters) -> tuple[Path, dict[str, Any]]:
    output = tmp_path / "output"
    output.mkdir()
    return output, write_taxonomy(
        StageContext({}, output, tmp_path, Progress("catalog_taxonomy")), parameters
    )


def parameters_of(release: Release, **changes: str) -> TaxonomyParameters:
    given = {"source": release.source, "fingerprint": fingerprint(release), **changes}
    return TaxonomyParameters(files=release.files, **given)


def test_the_stage_writes_tree_and_mapping(tmp_path):
    folder = put(tmp_path / "taxonomy", v1__csv=CSV, v1__mapping__csv="from_id,to_id\n9,1\n8,\n")
    output, metrics = run(tmp_path, parameters_of(only_release(folder)))
    assert metrics == {"categories": 3, "leaves": 1, "levels": 3, "locales": [], "mapped": 2}
    assert pq.read_table(output / "taxonomy.parquet").to_pylist()[2] == {
        "category_id": "3",
        "parent_id": "2",
        "name": "Kettles",
        "level": 3,
        "path": "Home > Kitchen > Kettles",
        "path_ids": ["1", "2", "3"],
        "is_leaf": True,
    }
    assert read_mapping(output) == [("9", "1"), ("8", "")]


def test_without_a_mapping_there_is_none(tmp_path):
    folder = put(tmp_path / "taxonomy", v1__csv=CSV)
    output, metrics = run(tmp_path, parameters_of(only_release(folder)))
    assert metrics["mapped"] == 0
    assert [path.name for path in output.iterdir()] == ["taxonomy.parquet"]
    assert read_mapping(output) == []
    (output / "mapping.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"mapping\.parquet is not a mapping"):
        read_mapping(output)


def test_a_release_that_changed_under_way_is_refused(tmp_path):
    folder = put(tmp_path / "taxonomy", v1__csv=CSV)
    looked_at = parameters_of(only_release(folder))
    put(folder, v1__csv=CSV + "4,1,Pots\n")
    with pytest.raises(InputError, match=r"^CATALOG_TAXONOMY=.* changed since it was looked at"):
        run(tmp_path, looked_at)


def test_of_a_source_alone_the_stage_takes_the_newest_release(tmp_path):
    folder = put(tmp_path / "taxonomy", v9__csv="x", v10__csv=CSV)
    _, metrics = run(tmp_path, TaxonomyParameters(source=str(folder), files=[], fingerprint=""))
    assert metrics["categories"] == 3


def test_a_release_needs_one_tree(tmp_path):
    file = TaxonomyFile(uri=str(put(tmp_path, v1__csv=CSV) / "v1.csv"), role="names", locale="de")
    with pytest.raises(InputError, match="no file is the tree"):
        read_release([file], str(tmp_path))


# Web addresses


class Site:
    """A web server on this machine; ``answers`` gives status, headers and body by path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = site.answers.get(self.path, (404, {}, b"nothing here"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    yield site
    site.close()


def test_a_taxonomy_is_read_from_the_web_through_redirects(site):
    site.answers["/latest.txt"] = (302, {"Location": "/files/taxonomy-with-ids.en-US.txt?v=2"}, b"")
    site.answers["/files/taxonomy-with-ids.en-US.txt?v=2"] = (200, {}, GOOGLE.encode())
    site.answers["/tree.csv.gz"] = (200, {}, gzip.compress(CSV.encode()))
    site.answers["/encoded.csv"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(CSV.encode()))
    release = only_release(f"{site.url}/files/taxonomy-with-ids.en-US.txt?v=2")
    assert release.name == "taxonomy-with-ids"
    assert [(file.role, file.locale) for file in release.files] == [("tree", "en-us")]
    for path in ("/latest.txt", "/tree.csv.gz", "/encoded.csv"):
        tree, _ = read(site.url + path)
        assert tree.path("3") == "Home > Kitchen > Kettles"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((404, {}, b"no"), "answers with HTTP 404 Not Found; check the address"),
        ((403, {}, b"no"), "answers with HTTP 403 Forbidden; check that the address gives access"),
        ((503, {}, b"no"), "answers with HTTP 503 Service Unavailable; run again later"),
        ((200, {}, b""), "is empty"),
        ((200, {}, b"  <!doctype HTML><title>Sign in</title>"), "is a web page or XML"),
        ((200, {"Content-Length": "1000"}, CSV.encode()), "cannot be read: peer closed connection"),
        ((302, {"Location": "/tree.csv"}, b""), "cannot be read: Exceeded maximum allowed redirects"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "cannot be read"),
    ],
)
def test_what_a_server_answers_instead_is_named(site, answer, expected):
    site.answers["/tree.csv"] = answer
    with pytest.raises(InputError, match=expected) as error:
        fingerprint(only_release(f"{site.url}/tree.csv"))
    assert str(error.value).startswith(f"CATALOG_TAXONOMY={site.url}/tree.csv ")
    assert "\n" not in str(error.value)


def test_an_answer_that_is_too_large_or_too_slow_is_given_up(site, monkeypatch):
    site.answers["/tree.csv"] = (200, {}, b"x" * (2 << 20))
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(InputError, match="is larger than 1 MB"):
        read(f"{site.url}/tree.csv")
    monkeypatch.setattr(places, "SECONDS_TO_DOWNLOAD", 0.0)
    with pytest.raises(InputError, match="is too slow"):
        read(f"{site.url}/tree.csv")


@pytest.mark.parametrize("stuck", ["_read_file", "_names"])
def test_whoever_waits_goes_on_when_the_time_is_up(tmp_path, monkeypatch, stuck):
    put(tmp_path, v1__csv=CSV)
    never = threading.Event()
    monkeypatch.setattr(places, stuck, lambda *_: never.wait())

    def look() -> None:
        give_up_at = time.monotonic() + 0.05
        for release in list_releases(str(tmp_path), give_up_at):
            fingerprint(release, give_up_at)

    try:
        with pytest.raises(InputError, match=r"^CATALOG_TAXONOMY=.* is too slow: it was given up"):
            look()
    finally:
        never.set()


def test_a_server_that_is_not_there_is_named(site):
    site.close()
    with pytest.raises(InputError, match=r"cannot be read: .*(refused|failed)"):
        read(f"{site.url}/tree.csv")


# Object stores


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of an S3 server on this machine, as fsspec's file system."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.mkdir("catalog")
    yield files
    S3FileSystem.clear_instance_cache()
    httpx.post(f"{url}/moto-api/reset")  # its buckets belong to the process, not to the server
    server.stop()


def test_a_prefix_holds_versions_and_a_new_one_is_seen(bucket):
    bucket.pipe_file("catalog/taxonomy/2024-7.csv", CSV.encode())
    bucket.pipe_file("catalog/taxonomy/old/2026-1.csv", b"of a folder below")
    for location in ("s3://catalog/taxonomy/", "s3://catalog/taxonomy"):
        assert only_release(location).files == [
            TaxonomyFile(uri="s3://catalog/taxonomy/2024-7.csv", role="tree")
        ]
    # Written by somebody else: this process must not trust what it listed before.
    from s3fs import S3FileSystem

    other = S3FileSystem(skip_instance_cache=True)
    other.pipe_file("catalog/taxonomy/2024-10.mapping.csv", b"from_id,to_id\n3,1\n")
    other.pipe_file("catalog/taxonomy/2024-10.txt.gz", gzip.compress(GOOGLE.encode()))
    tree, mapping = read("s3://catalog/taxonomy/")
    assert (tree.path("2"), mapping) == ("Home > Kitchen", [("3", "1")])
    before = fingerprint(list_releases("s3://catalog/taxonomy/")[-1])
    other.pipe_file("catalog/taxonomy/2024-10.txt.gz", gzip.compress(GOOGLE_DE.encode()))
    assert fingerprint(list_releases("s3://catalog/taxonomy/")[-1]) != before


def test_an_object_is_a_release_and_an_absent_one_is_named(bucket):
    bucket.pipe_file("catalog/tree.csv", CSV.encode())
    assert read("s3://catalog/tree.csv")[0].ids == ["1", "2", "3"]
    for absent in ("s3://catalog/absent.csv", "s3://catalog/absent/", "s3://nowhere/tree.csv"):
        with pytest.raises(InputError, match=f"^CATALOG_TAXONOMY={absent}: no such file or folder"):
            list_releases(absent)


def test_a_protocol_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"^CATALOG_TAXONOMY=nonsense://x/y cannot be read: .*nonsense"):
        list_releases("nonsense://x/y")


# Real releases


@pytest.mark.real_data
def test_real_releases_are_read_in_order_with_their_mapping_and_names(real_data, tmp_path):
    shopify = real_data / "taxonomy" / "shopify"
    for version in ("2024-07", "2024-10", "2025-03"):
        (tmp_path / f"{version}.csv").symlink_to(shopify / f"{version}.csv")
    (tmp_path / "2025-03.mapping.csv").symlink_to(shopify / "mapping_2024-10_to_2025-03.csv")
    names = pq.read_table(shopify / "names_2025-03.parquet", filters=[("locale", "=", "de")]).to_pylist()
    text = "".join(f"gid://shopify/TaxonomyCategory/{n['category_id']} : {n['full_name']}\n" for n in names)
    (tmp_path / "2025-03.de.txt").write_text(text)

    releases = list_releases(str(tmp_path))
    assert [release.name for release in releases] == ["2024-07", "2024-10", "2025-03"]
    tree, mapping = read_release(releases[-1].files, releases[-1].source)
    before, _ = read_release(releases[-2].files, releases[-2].source)
    assert (len(tree), len(mapping)) == (10_595, 50)
    assert {former for former, _ in mapping} == set(before) - set(tree)
    assert {tree.path(n["category_id"], "de") for n in names} == {n["full_name"] for n in names}
