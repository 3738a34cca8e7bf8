"""What is different between two versions of the catalog taxonomy, exactly.

The diff goes by id alone: it says what was written down differently, not what it means. Where the
categories that are gone went is for :mod:`ml.taxonomy_change.successors` to find out.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ml.errors import InputError
from ml.taxonomy import Category, Taxonomy


class Renamed(msgspec.Struct, frozen=True, kw_only=True):
    """A category with another name, in the tree itself or in any locale."""

    category_id: str
    before: Category
    after: Category


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A category with another parent."""

    category_id: str
    before: str | None
    """Id of the parent; None for a root."""
    after: str | None


class TaxonomyDiff(msgspec.Struct, frozen=True, kw_only=True):
    """The steps from one version to another; every list is sorted by id."""

    added: list[Category]
    removed: list[Category]
    renamed: list[Renamed]
    moved: list[Moved]
    locales_before: list[str]
    """Locales with names, in the order of their columns."""
    locales_after: list[str]

    @classmethod
    def between(cls, old: Taxonomy, new: Taxonomy) -> TaxonomyDiff:
        """What turns ``old`` into ``new``; the order of rows is no part of it."""
        before, after = categories_of(old), categories_of(new)
        kept = sorted(before.keys() & after.keys())
        return cls(
            added=[after[category_id] for category_id in sorted(after.keys() - before.keys())],
            removed=[before[category_id] for category_id in sorted(before.keys() - after.keys())],
            renamed=[
                Renamed(category_id=category_id, before=before[category_id], after=after[category_id])
                for category_id in kept
                if _names(before[category_id]) != _names(after[category_id])
            ],
            moved=[
                Moved(
                    category_id=category_id,
                    before=before[category_id].parent_id,
                    after=after[category_id].parent_id,
                )
                for category_id in kept
                if before[category_id].parent_id != after[category_id].parent_id
            ],
            locales_before=list(old.locales),
            locales_after=list(new.locales),
        )

    @property
    def is_empty(self) -> bool:
        """Whether the two versions are the same tree with the same names."""
        return self.locales_before == self.locales_after and not (
            self.added or self.removed or self.renamed or self.moved
        )

    @property
    def only_names(self) -> bool:
        """Whether names (or locales) differ and nothing else: every category is where it was."""
        return not (self.is_empty or self.added or self.removed or self.moved)

    def apply(self, old: Taxonomy) -> Taxonomy:
        """The newer version, made from the older.

        Raises:
            InputError: ``old`` is not the version that the diff starts from; the message names the
                first category that does not fit.
        """
        categories = categories_of(old)
        self._check_base(old, categories)
        for category in self.removed:
            del categories[category.category_id]
        for category in self.added:
            categories[category.category_id] = category
        for renamed in self.renamed:
            categories[renamed.category_id] = Category(
                category_id=renamed.category_id,
                parent_id=categories[renamed.category_id].parent_id,
                name=renamed.after.name,
                names=renamed.after.names,
            )
        for moved in self.moved:
            category = categories[moved.category_id]
            categories[moved.category_id] = Category(
                category_id=moved.category_id,
                parent_id=moved.after,
                name=category.name,
                names=category.names,
            )
        return Taxonomy(
            list(categories.values()), locales=self.locales_after, source="taxonomy after the change"
        )

    def _check_base(self, old: Taxonomy, categories: Mapping[str, Category]) -> None:
        expected = {category.category_id: _content(category) for category in self.removed}
        misfits = {
            category_id
            for category_id, content in expected.items()
            if category_id not in categories or _content(categories[category_id]) != content
        }
        misfits |= {category.category_id for category in self.added} & categories.keys()
        misfits |= {
            renamed.category_id
            for renamed in self.renamed
            if renamed.category_id not in categories
            or _names(categories[renamed.category_id]) != _names(renamed.before)
        }
        misfits |= {
            moved.category_id
            for moved in self.moved
            if moved.category_id not in categories or categories[moved.category_id].parent_id != moved.before
        }
        if misfits:
            raise InputError(
                f"the change does not start from this taxonomy: category {min(misfits)!r} is not as it was "
                f"before the change ({len(misfits):,} are not); take the version it was made for"
            )
        if list(old.locales) != self.locales_before:
            raise InputError(
                "the change does not start from this taxonomy: it has names in the locales "
                f"({', '.join(old.locales)}), expected ({', '.join(self.locales_before)}); "
                "take the version it was made for"
            )


def categories_of(taxonomy: Taxonomy) -> dict[str, Category]:
    """Every category by id."""
    return {category_id: taxonomy.category(category_id) for category_id in taxonomy}


def _names(category: Category) -> tuple[str, dict[str, str]]:
    return category.name, dict(category.names)


def _content(category: Category) -> tuple[str | None, str, dict[str, str]]:
    return category.parent_id, category.name, dict(category.names)
