"""What keeps a new version of the taxonomy from being adopted, in sentences for the person who sent it.

A tree that is not a tree never gets here (:class:`ml.taxonomy.Taxonomy` refuses it). This module judges the
step from the version before: too much removed, ids used for something else, a mapping of other trees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from ml.taxonomy import PATH_SEPARATOR, Taxonomy
from ml.taxonomy_change.diff import Renamed, TaxonomyDiff
from ml.taxonomy_change.successors import match_names, words
from ml.taxonomy_change.transitions import Transition

_SHOWN = 3
_ANOTHER_NAME = 0.2
_ANOTHER_SPELLING = 0.4
_ABBREVIATION = re.compile(r"([A-Z]{2,5})s?")


class TaxonomyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where a step is adopted without a person."""

    max_removed_share: float = 0.3
    """Of the old categories, without an official successor, in [0, 1]."""


def objections(
    old: Taxonomy | None,
    new: Taxonomy,
    mapping: Sequence[tuple[str, str]],
    earlier: Sequence[Transition],
    limits: TaxonomyLimits,
    *,
    origins_are_checked: bool = False,
) -> list[str]:
    """Why ``new`` may not be adopted.

    Args:
        old: The version before; None for the first, of which only the mapping's targets are judged.
        new: The version that comes.
        mapping: Its official mapping, rows of (from_id, to_id); an empty to_id means no successor.
        earlier: Transitions to the version before.
        limits: The limits.
        origins_are_checked: The releases before were at hand when the mapping was read
            (:func:`ml.taxonomy_change.releases.origins_are_checked`): it may start from ids that only a
            release had that was never adopted.

    Returns:
        One sentence per objection; none if the version may be adopted.
    """
    found = _unknown_targets(new, mapping)
    if old is not None:
        found += [] if origins_are_checked else _unknown_origins(old, mapping, earlier)
        found += _too_many_removed(old, new, mapping, limits)
        found += _returned_as_another(old, new, mapping, earlier)
        found += _became_another(old, new, mapping)
    return found


def unlike_renames(diff: TaxonomyDiff) -> list[Renamed]:
    """Renamed categories whose names are unlike in every locale that both versions have.

    Such an id may have been used again for something else. A new wording, a word more or less, another
    spelling and an abbreviation are no such sign; words that mean the same are, as nobody knows it here.
    """
    return [renamed for renamed in diff.renamed if not any(_reworded(*pair) for pair in _pairs(renamed))]


def _pairs(renamed: Renamed) -> list[tuple[str, str]]:
    before, after = renamed.before, renamed.after
    shared = [locale for locale in before.names if locale in after.names]
    return [(before.name, after.name), *((before.names[locale], after.names[locale]) for locale in shared)]


def _reworded(one: str, other: str) -> bool:
    return _alike(one, [other]) or _abbreviates(one, other) or _abbreviates(other, one)


def _abbreviates(short: str, name: str) -> bool:
    """Whether ``short`` is an abbreviation with letters of ``name`` in their order: TV, PC, LED."""
    match = _ABBREVIATION.fullmatch(short)
    if match is None:
        return False
    spelled_out, abbreviation = "".join(words(name)), match[1].casefold()
    letters = iter(spelled_out)
    return spelled_out[0] == abbreviation[0] and all(letter in letters for letter in abbreviation)


def _unknown_targets(new: Taxonomy, mapping: Sequence[tuple[str, str]]) -> list[str]:
    unknown = sorted({successor for _, successor in mapping if successor and successor not in new})
    if not unknown:
        return []
    return [
        f"The mapping leads to {_listed(unknown)}, which the new taxonomy does not have; "
        "correct to_id, or leave it empty where there is no successor."
    ]


def _unknown_origins(
    old: Taxonomy, mapping: Sequence[tuple[str, str]], earlier: Sequence[Transition]
) -> list[str]:
    retired = {transition.from_id for transition in earlier}
    unknown = sorted({former for former, _ in mapping if former not in old and former not in retired})
    if not unknown:
        return []
    return [
        f"The mapping starts from {_listed(unknown)}, which no earlier version has; "
        "correct from_id, or give the mapping that belongs to this step."
    ]


def _too_many_removed(
    old: Taxonomy, new: Taxonomy, mapping: Sequence[tuple[str, str]], limits: TaxonomyLimits
) -> list[str]:
    succeeded = {former for former, successor in mapping if successor in new}
    removed = [former for former in old if former not in new and former not in succeeded]
    if len(removed) <= limits.max_removed_share * len(old):
        return []
    return [
        f"{len(removed):,} of {len(old):,} categories ({100 * len(removed) / len(old):.0f} %) are gone "
        f"without an official successor ({_listed(removed)}), at most "
        f"{100 * limits.max_removed_share:.0f} % may be; "
        "check that the file is complete, or give a mapping from the old ids to the new."
    ]


def _returned_as_another(
    old: Taxonomy, new: Taxonomy, mapping: Sequence[tuple[str, str]], earlier: Sequence[Transition]
) -> list[str]:
    mapped = {former for former, _ in mapping}
    found = []
    for transition in earlier:
        former = transition.from_id
        if former in old or former not in new or former in mapped:
            continue
        place = transition.from_path.split(PATH_SEPARATOR)[:-1]
        same_name = _alike(transition.from_name, _all_names(new, former))
        if not same_name and place != new.path(former).split(PATH_SEPARATOR)[:-1]:
            found.append(
                f"Category {former!r} was retired as {transition.from_path!r} and returns as "
                f"{new.path(former)!r}; give the new category an id that was never used."
            )
    return _first_few(found, "ids return with another meaning")


def _became_another(old: Taxonomy, new: Taxonomy, mapping: Sequence[tuple[str, str]]) -> list[str]:
    mapped = {former for former, _ in mapping}
    found = [
        f"Category {category_id!r} was {old.path(category_id)!r} and is now {new.path(category_id)!r}, "
        "another name in another place; give the new category an id of its own, "
        "or say in the mapping where the old one goes."
        for category_id in old
        if category_id in new
        and category_id not in mapped
        and _elsewhere(old, new, category_id)
        and not _names_alike(old, new, category_id)
    ]
    return _first_few(found, "ids change their meaning")


def _elsewhere(old: Taxonomy, new: Taxonomy, category_id: str) -> bool:
    """Whether the parent is another; one that only got another id, or another name, is not."""
    before, after = old.parent(category_id), new.parent(category_id)
    if before is None or after is None:
        return before != after
    return before != after and not _alike(old.name(before), _all_names(new, after))


def _all_names(taxonomy: Taxonomy, category_id: str) -> list[str]:
    category = taxonomy.category(category_id)
    return [category.name, *category.names.values()]


def _names_alike(old: Taxonomy, new: Taxonomy, category_id: str) -> bool:
    names = _all_names(new, category_id)
    return any(_alike(name, names) for name in _all_names(old, category_id))


def _alike(name: str, others: Iterable[str]) -> bool:
    matches = [match_names(name, other) for other in others]
    return any(match.shared >= _ANOTHER_NAME or match.spelling >= _ANOTHER_SPELLING for match in matches)


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(category_id) for category_id in ids[:_SHOWN])
    return f"{shown} and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else shown


def _first_few(sentences: list[str], what: str) -> list[str]:
    if len(sentences) <= _SHOWN:
        return sentences
    return [*sentences[:_SHOWN], f"In all, {len(sentences):,} {what}; the first {_SHOWN} are named."]
