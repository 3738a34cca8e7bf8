"""The catalog taxonomy: valid trees come out as they went in, invalid ones are named."""

from __future__ import annotations

from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import InputError
from ml.taxonomy import MAX_LEVELS, Category, Taxonomy

HOME = "category_id,parent_id,name\nh,,Home\nk,h,Kitchen\nw,k,Kettles\ng,,Garden\n"


def read(text: str | bytes) -> Taxonomy:
    return Taxonomy.parse_csv(text.encode() if isinstance(text, str) else text, "tree.csv")


def test_a_tree_answers_paths_levels_children_and_leaves():
    tree = read(HOME)
    assert tree.ids == ["h", "k", "w", "g"]
    assert tree.path("w") == "Home > Kitchen > Kettles"
    assert tree.ancestors("w") == ["h", "k", "w"]
    assert [tree.level(i) for i in tree] == [1, 2, 3, 1]
    assert tree.levels == 3
    assert tree.roots == ["h", "g"]
    assert tree.children("h") == ["k"]
    assert tree.leaves == ["w", "g"]
    assert tree.parent("k") == "h"
    assert "k" in tree
    assert "Kitchen" not in tree
    with pytest.raises(KeyError):
        tree.path("unknown")


def test_children_may_come_before_their_parents():
    assert read("category_id,parent_id,name\nb,a,B\na,,A\n").path("b") == "A > B"


def test_an_empty_name_is_replaced_by_the_id():
    assert read('category_id,parent_id,name\na,,""\nb,a,\n').path("b") == "a > b"


def test_names_of_locales_are_kept_and_absent_ones_are_null(tmp_path):
    tree = read(
        "category_id,parent_id,name,name_de,name_pt-BR,note\nh,,Home,Haus,,x\nk,h,Kitchen,,Cozinha,y\n"
    )
    assert tree.locales == ("de", "pt-br")
    assert tree.path("k", "de") == "Haus > Kitchen"
    tree.write(tmp_path / "taxonomy.parquet")
    table = pq.read_table(tmp_path / "taxonomy.parquet")
    assert table["name_de"].to_pylist() == ["Haus", None]
    assert table["name_pt-br"].to_pylist() == [None, "Cozinha"]
    assert "note" not in table.column_names
    assert Taxonomy.load(tmp_path).path("k", "pt-br") == "Home > Cozinha"


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_a_byte_order_mark_and_header_case_do_not_matter(delimiter):
    text = HOME.replace(",", delimiter).replace("category_id", " Category_ID ")
    assert read(b"\xef\xbb\xbf" + text.encode()).path("k") == "Home > Kitchen"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "category_id,parent_id,name\na,b,A\nb,c,B\nc,b,C\n",
            "tree.csv row 2: the parents form a cycle of 2",
        ),
        ("category_id,parent_id,name\na,a,A\n", "row 1: the parents form a cycle of 1, 'a' → 'a'"),
        ("category_id,parent_id,name\na,,A\nb,x,B\n", "row 2: category 'b' is an orphan, its parent_id 'x'"),
        ("category_id,parent_id,name\na,,A\nb,,B\na,b,C\n", "row 3 repeats category_id 'a' of row 1"),
        ("category_id,parent_id,name\na,,A\n ,a,B\n", "row 2 has an empty category_id"),
        ("category_id,name\na,A\n", "tree.csv has no column parent_id; it has category_id, name"),
        ("category_id,parent_id,name\na,,A,more\n", "row 1 has 4 fields, the header 3"),
        ("category_id,parent_id,name,name\na,,A,B\n", "more than one column name"),
        ("category_id,parent_id,name\n", "holds no categories"),
        ("", "tree.csv is empty"),
        ("\n\n", "tree.csv is empty"),
        ('category_id,parent_id,name\na,,"A\n', "is not CSV"),
        (HOME.encode("utf-16"), "UTF-16"),
        (HOME.encode("utf-16-le"), r"a NUL character \(line 1\)"),
        (b"category_id,parent_id,name\na,,K\xfcche\n", r"not UTF-8 \(line 2\)"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(text, expected):
    with pytest.raises(InputError, match=expected) as error:
        read(text)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("tree.csv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.csv cannot be read: No such file"):
        Taxonomy.read_csv(tmp_path / "absent.csv")


def test_a_chain_that_is_too_deep_is_refused():
    def chain(length):
        return [Category(str(i), str(i - 1) if i else None, str(i)) for i in range(length)]

    assert Taxonomy(chain(MAX_LEVELS)).levels == MAX_LEVELS
    with pytest.raises(InputError, match=f"{MAX_LEVELS + 1} levels deep"):
        Taxonomy(chain(MAX_LEVELS + 1))


def test_a_very_long_cycle_is_found_without_recursion():
    ring = [Category(str(i), str((i + 1) % 20_000), str(i)) for i in range(20_000)]
    with pytest.raises(InputError, match="cycle of 20000"):
        Taxonomy(ring)


@pytest.mark.parametrize("content", [None, b"not parquet"])
def test_loading_something_else_fails_naming_it(tmp_path, content):
    if content is not None:
        (tmp_path / "taxonomy.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"taxonomy\.parquet"):
        Taxonomy.load(tmp_path)


@st.composite
def forests(draw):
    """Categories in any order; each has an earlier one as its parent, or none."""
    size = draw(st.integers(1, 40))
    parents = [draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None for i in range(size)]
    nodes = [Category(f"c{i}", None if p is None else f"c{p}", f"n{i}") for i, p in enumerate(parents)]
    return draw(st.permutations(nodes))


@given(forests())
def test_paths_levels_and_children_of_any_forest_agree(categories):
    tree = Taxonomy(categories)
    for category in categories:
        ancestors = tree.ancestors(category.category_id)
        assert ancestors[-1] == category.category_id
        assert ancestors[0] in tree.roots
        assert tree.level(category.category_id) == len(ancestors) <= tree.levels
        assert tree.path(category.category_id).split(" > ") == [tree.name(i) for i in ancestors]
        for parent, child in pairwise(ancestors):
            assert child in tree.children(parent)
    assert len(tree.roots) + sum(len(tree.children(i)) for i in tree) == len(tree) == len(categories)
    assert set(tree.leaves) == {i for i in tree if not tree.children(i)}
    assert max(tree.table()["level"].to_pylist()) == tree.levels


@given(forests(), st.data())
def test_a_cycle_is_always_found(categories, data):
    tree = Taxonomy(categories)
    node = data.draw(st.sampled_from(tree.ids))
    root = tree.ancestors(node)[0]
    bent = [
        Category(c.category_id, node if c.category_id == root else c.parent_id, c.name) for c in categories
    ]
    with pytest.raises(InputError, match=f"cycle of {tree.level(node)}"):
        Taxonomy(bent)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "categories", "levels"),
    [
        ("gpc/2018.csv", 1_099, 3),
        ("gpc/2020-06.csv", 1_084, 3),
        ("groceries.csv", 1_710, 1),
        ("pricerunner.csv", 10, 1),
        ("shopify/2024-07.csv", 10_281, 8),
        ("shopify/2024-10.csv", 10_365, 8),
        ("shopify/2025-03.csv", 10_595, 8),
    ],
)
def test_real_data_taxonomies_are_read(real_data, name, categories, levels):
    tree = Taxonomy.read_csv(real_data / "taxonomy" / name)
    assert (len(tree), tree.levels) == (categories, levels)
    assert tree.table().num_rows == categories
