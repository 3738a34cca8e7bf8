"""Where the labels of a category go that is no more, or that gave up a part of itself.

A :class:`TaxonomyDiff` says what is different between two trees. A :class:`Transition` says what that
means for offers labelled under the older one. Transitions are cumulative: those of the last change are
added to those of all changes before, so that a label of any earlier version finds its place today.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ml.artifacts import short_version
from ml.errors import InputError

TRANSITIONS_FILE = "transitions.json"

Kind = Literal["replaced", "merged", "split", "removed"]
"""``replaced``: one successor that nothing else goes to; ``merged``: one successor that others go to or
that was there before; ``split``: several successors (maybe itself among them); ``removed``: none."""

Origin = Literal["official", "inferred"]


class Successor(msgspec.Struct, frozen=True, kw_only=True):
    """A category that offers of an older one go to."""

    category_id: str
    share: float
    """Of the older category's offers, as far as known; equal shares where nothing is."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """Where the labels of one category go."""

    from_id: str
    from_name: str
    from_path: str
    """Names from the root, in the taxonomy that had the category."""
    kind: Kind
    to: list[Successor]
    """Categories of the current taxonomy, the largest share first; empty if ``removed``."""
    origin: Origin
    confidence: float
    """That the successors are right, in [0, 1]; 1 where the mapping is official."""
    certain: bool
    """Labels move along without a look at the offer: one successor, official or inferred with enough
    confidence."""
    since: str
    """Digest of the taxonomy version that brought the transition."""
    reason: str
    """In words: what speaks for it."""
    lives_on: bool = False
    """Whether the id is still a category: then only labels from before the transition need it."""


class Transitions(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``transitions.json``: every transition that holds today, and the versions behind them."""

    history: list[str]
    """Digests of all taxonomy versions, oldest first; the last is the current one."""
    transitions: list[Transition]
    added: list[str] = []
    """Ids of the current version that some change added and none took away, in order."""
    adopted_on: list[str] = []
    """ISO date on which each version of ``history`` was taken; empty where it is not known."""

    @classmethod
    def read(cls, taxonomy_change: Path) -> Transitions:
        """The transitions in the folder of a ``taxonomy_change`` artifact.

        Raises:
            InputError: there are none that can be read.
        """
        path = taxonomy_change / TRANSITIONS_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); make taxonomy_change anew") from None

    def write(self, folder: Path) -> None:
        """Write ``transitions.json`` into ``folder``."""
        encoded = msgspec.json.format(msgspec.json.encode(self), indent=2)
        (folder / TRANSITIONS_FILE).write_bytes(encoded)

    def digest_of(self, taxonomy_version: str) -> str:
        """Digest of the version that models name by its short form; empty if it is not in the history."""
        return next((d for d in self.history if short_version(d) == taxonomy_version), "")

    def for_labels_of(self, taxonomy_digest: str) -> dict[str, Transition]:
        """Transitions, by id, that labels need which were given under the version ``taxonomy_digest``.

        A category that was split but lives on stands for less than before: labels given since then need
        no transition. A retired id needs its transition whenever it was given, since shops go on using it.
        Labels of a version that is not in the history count as the oldest.
        """
        age = {digest: place for place, digest in enumerate(self.history)}
        given = age.get(taxonomy_digest, -1)
        return {
            t.from_id: t for t in self.transitions if not t.lives_on or age.get(t.since, len(age)) > given
        }

    def version_of_labels(self, taken_with: str, day: str) -> str:
        """The version that the labels of a day were given under: the older of two.

        One is the version that the day was taken with. A day may be taken again long after it was
        delivered, so the other is the version that was in force the day before: on the day that a version
        is adopted labels are still the old ones.

        Args:
            taken_with: Digest of the taxonomy that the offers of the day were validated with.
            day: ISO date of the delivery.

        Returns:
            A digest; one that is not in the history (or empty) is older than all, see :meth:`for_labels_of`.
        """
        age = {digest: place for place, digest in enumerate(self.history)}
        later = next((place for place, date in enumerate(self.adopted_on) if date >= day), len(self.history))
        in_force = self.history[later - 1] if later else ""
        return min(taken_with, in_force, key=lambda digest: age.get(digest, -1))


def certain_moves(transitions: Iterable[Transition]) -> dict[str, str]:
    """Successor by former id, of those transitions that need no look at the offer."""
    return {t.from_id: t.to[0].category_id for t in transitions if t.certain and t.to}


def most_likely_moves(transitions: Iterable[Transition]) -> dict[str, str]:
    """Largest successor by former id, of every transition that has one (certain or not)."""
    return {t.from_id: t.to[0].category_id for t in transitions if t.to}


def compose(
    earlier: Sequence[Transition],
    step: Mapping[str, Transition],
    previous: Iterable[str],
    current: Iterable[str],
) -> list[Transition]:
    """Transitions to the newest version: those up to the version before, followed by the last step.

    Args:
        earlier: Transitions to the version before.
        step: Transitions from the version before to the newest, by id. Of an id that the version before
            did not have, it is what is known now: it takes the place of the earlier one.
        previous: Ids of the version before.
        current: Ids of the newest version. An id that was gone and is back, or that got back all that it
            gave up, needs no transition.

    Returns:
        One transition per former id, sorted by id. Shares multiply, confidences too, and shares of
        successors that are gone go to the others. A chain is official only if every link is, and certain
        only if every link is, or if all parts of an official split end in one category. An id that lived
        on after it was split keeps the successors of the split. An id that was used again for something
        else goes to the successors of both, and is not certain.
    """
    existing, existed = set(current), set(previous)
    composed = {t.from_id: _followed(t, step, existing) for t in earlier}
    lived_on = {t.from_id for t in earlier if any(s.category_id == t.from_id for s in t.to)}
    for former, link in step.items():
        if former not in composed or former not in existed:
            composed[former] = link
        elif former not in lived_on:
            composed[former] = _either(composed[former], link)
        else:
            # What it still stood for changed too: labels from between the two need this as well.
            composed[former] = msgspec.structs.replace(composed[former], since=link.since)
    restored = {former for former in composed if former in existing - existed and former not in step}
    restored |= {
        former for former, transition in composed.items() if certain_moves([transition]) == {former: former}
    }
    return [
        msgspec.structs.replace(composed[former], lives_on=former in existing)
        for former in sorted(composed.keys() - restored)
    ]


def _followed(transition: Transition, step: Mapping[str, Transition], existing: set[str]) -> Transition:
    """``transition`` with each of its successors replaced by the successor's own, if those changed."""
    if all(s.category_id in existing and s.category_id not in step for s in transition.to):
        return transition
    shares: dict[str, float] = {}
    right = 0.0
    links = [step[s.category_id] for s in transition.to if s.category_id in step]
    for successor in transition.to:
        category_id = successor.category_id
        link = step.get(category_id)
        if link is not None:
            targets = link.to
        else:
            targets = [Successor(category_id=category_id, share=1.0)] if category_id in existing else []
        right += successor.share * (1.0 if link is None else link.confidence)
        for target in targets:
            shares[target.category_id] = shares.get(target.category_id, 0.0) + successor.share * target.share
    to = _largest_first(shares)
    # Parts of an official split that all end in one category leave no doubt; a part that is gone does.
    complete = all(s.category_id in existing or s.category_id in step for s in transition.to)
    undivided = len(to) == 1 and complete and all(link.certain for link in links)
    kind: Kind = transition.kind
    if not to:
        kind = "removed"
    elif len(to) > 1:
        kind = "split"
    elif kind == "split" or any(link.kind == "merged" for link in links):
        kind = "merged"
    return msgspec.structs.replace(
        transition,
        kind=kind,
        to=to,
        confidence=transition.confidence * right,
        origin="official" if _all_official(transition, *links) else "inferred",
        certain=undivided
        and (transition.certain or (transition.origin == "official" and len(transition.to) > 1)),
        reason="; then ".join(dict.fromkeys([transition.reason, *(link.reason for link in links)])),
    )


def _either(earlier: Transition, later: Transition) -> Transition:
    """Where an id goes that was used again: to what it stood for before, or to what it stood for since."""
    meanings = [t for t in (earlier, later) if t.to]
    shares: dict[str, float] = {}
    for transition in meanings:
        for successor in transition.to:
            share = successor.share / len(meanings)
            shares[successor.category_id] = shares.get(successor.category_id, 0.0) + share
    to = _largest_first(shares)
    return msgspec.structs.replace(
        later,
        kind="removed" if not to else "split" if len(to) > 1 else "merged",
        to=to,
        origin="official" if _all_official(earlier, later) else "inferred",
        confidence=min(earlier.confidence, later.confidence),
        certain=False,
        reason=f"the id stood for {earlier.from_path} and for {later.from_path}",
    )


def _all_official(*transitions: Transition) -> bool:
    return all(transition.origin == "official" for transition in transitions)


def _largest_first(shares: Mapping[str, float]) -> list[Successor]:
    """Successors by their shares, which are made to sum to 1."""
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return [Successor(category_id=category_id, share=share / total) for category_id, share in ordered]
