"""How well the successors of removed categories are found when there is no official mapping.

    python -m benchmarks.taxonomy_inference --taxonomies DIR

``DIR`` holds releases as folders of CSV: ``shopify/2024-10.csv``, ``shopify/2025-03.csv`` with
``shopify/mapping_2024-10_to_2025-03.csv``, and ``gpc/2018.csv``, ``gpc/2020-06.csv``. The inferred
successors are held against the official mapping, which the inference does not see, and against the truth of
changes made to every tree on purpose (fixed seeds). Beside it in the same run: the category of the same
name, and the nearest path by character n-grams (TF-IDF, cosine).

Precision counts the right successors among those proposed; a category that was dropped and gets a
successor is a wrong one. Recall counts the right ones among the categories that have a successor.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import save, show
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.diff import categories_of
from ml.taxonomy_change.successors import infer_transitions

_SEEDS = range(5)
_CHANGED_SHARE = 0.04
_MODIFIERS = (
    "Adhesive",
    "Portable",
    "Wireless",
    "Vintage",
    "Folding",
    "Electric",
    "Kids'",
    "Mini",
    "Heavy-Duty",
)
_ADDITIONS = ("Accessories", "Supplies", "Equipment", "Sets", "Workwear", "Refills")

Truth = Mapping[str, set[str]]
"""Right successors by removed id; none for a category that was dropped."""

Answers = Mapping[str, tuple[str | None, bool]]
"""Proposed successor by removed id, and whether it is certain."""


@dataclass(frozen=True)
class Step:
    """A change of the taxonomy of which the truth is known."""

    name: str
    old: Taxonomy
    new: Taxonomy
    truth: Truth


# Changes made on purpose


class _Editor:
    """Changes a tree in the ways in which catalogs change, and remembers what became of every category."""

    def __init__(self, tree: Taxonomy, seed: int) -> None:
        self._old = tree
        self._random = random.Random(seed)
        self._nodes = categories_of(tree)
        self._children: dict[str | None, list[str]] = defaultdict(list)
        for category in self._nodes.values():
            self._children[category.parent_id].append(category.category_id)
        self._now: dict[str, set[str]] = {category_id: {category_id} for category_id in tree}
        self._touched: set[str] = set()
        self._count = 0

    def edit(self, share: float) -> tuple[Taxonomy, Truth]:
        """About ``share`` of the categories get other ids or go; others are added among them."""
        kinds = (
            self._reidentify,
            self._reidentify_and_move,
            self._reidentify_and_rename,
            self._sink,
            self._merge,
            self._merge_into_sibling,
            self._split,
            self._drop,
            self._drop_beside_a_newcomer,
            self._drop_from_a_family,
            self._add,
        )
        while len(self._touched) < share * len(self._old):
            category_id = self._random.choice(sorted(self._nodes))
            if category_id in self._touched or len(self._subtree(category_id)) > 40:
                continue
            self._random.choice(kinds)(category_id)
        new = Taxonomy(list(self._nodes.values()), locales=self._old.locales)
        return new, {former: now for former, now in self._now.items() if former not in new}

    def _subtree(self, category_id: str) -> list[str]:
        found = [category_id]
        for member in found:
            found.extend(self._children[member])
        return found

    def _fresh(self) -> str:
        self._count += 1
        return f"new-{self._count}"

    def _insert(self, parent_id: str | None, name: str) -> str:
        category_id = self._fresh()
        self._nodes[category_id] = Category(category_id, parent_id, name)
        self._children[parent_id].append(category_id)
        self._touched.add(category_id)
        return category_id

    def _attach(self, category_id: str, parent_id: str | None) -> None:
        category = self._nodes[category_id]
        self._children[category.parent_id].remove(category_id)
        self._children[parent_id].append(category_id)
        self._nodes[category_id] = replace(category, parent_id=parent_id)

    def _remove(self, category_id: str, heirs: Iterable[str]) -> None:
        category = self._nodes.pop(category_id)
        self._children[category.parent_id].remove(category_id)
        self._touched.add(category_id)
        for now in self._now.values():
            if category_id in now:
                now.remove(category_id)
                now.update(heirs)

    def _reidentify(self, category_id: str) -> str:
        """New ids for the subtree; sometimes the subcategories keep theirs."""
        category = self._nodes[category_id]
        heir = self._insert(category.parent_id, category.name)
        keep = self._random.random() < 0.3
        for child in list(self._children[category_id]):
            self._attach(child, heir)
            if not keep:
                self._reidentify(child)
        self._remove(category_id, [heir])
        return heir

    def _reidentify_and_move(self, category_id: str) -> None:
        heir = self._reidentify(category_id)
        below = set(self._subtree(heir))
        near = self._nodes[heir].parent_id
        if self._random.random() < 0.7 and near is not None:
            above = self._nodes[near].parent_id
            choices = [*self._children[near], *self._children[above]]
        else:
            choices = sorted(self._nodes)
        choices = [choice for choice in choices if choice not in below]
        if choices:
            self._attach(heir, self._random.choice(choices))

    def _sink(self, category_id: str) -> None:
        """A new level between the parent and some of its subcategories."""
        parent = self._nodes[category_id].parent_id
        if parent is None:
            return
        level = self._insert(parent, self._reworded(self._nodes[parent].name))
        brood = [child for child in self._children[parent] if child not in self._touched]
        for child in self._random.sample(brood, min(len(brood), self._random.randint(1, 4))):
            if len(self._subtree(child)) < 20:
                self._attach(self._reidentify(child), level)

    def _reidentify_and_rename(self, category_id: str) -> None:
        heir = self._reidentify(category_id)
        category = self._nodes[heir]
        self._nodes[heir] = replace(category, name=self._reworded(category.name))

    def _reworded(self, name: str) -> str:
        words = name.split()
        ways: list[Callable[[], str]] = [
            lambda: f"{name} & {self._random.choice(_ADDITIONS)}",
            lambda: f"{self._random.choice(_MODIFIERS)} {name}",
            lambda: f"{self._random.choice(_MODIFIERS)} {self._random.choice(_ADDITIONS)}",
            lambda: " ".join(reversed(words)) if len(words) > 1 else f"{name}s",
            lambda: name[:-1] if name.endswith("s") else f"{name}s",
        ]
        if len(words) > 1:
            ways += [
                lambda: " ".join(words[1:]),
                lambda: " ".join([*words[:-1], self._random.choice(_ADDITIONS)]),
            ]
        return self._random.choice(ways)()

    def _leaf_siblings(self, category_id: str) -> list[str]:
        siblings = self._children[self._nodes[category_id].parent_id]
        return [s for s in siblings if s != category_id and not self._children[s] and s not in self._touched]

    def _merge(self, category_id: str) -> None:
        siblings = self._leaf_siblings(category_id)
        if not siblings or self._children[category_id]:
            return
        category, other = self._nodes[category_id], self._nodes[self._random.choice(siblings)]
        name = self._random.choice([f"{category.name} & {other.name}", category.name])
        heir = self._insert(category.parent_id, name)
        self._remove(category_id, [heir])
        self._remove(other.category_id, [heir])

    def _merge_into_sibling(self, category_id: str) -> None:
        siblings = self._leaf_siblings(category_id)
        if siblings and not self._children[category_id]:
            self._remove(category_id, [self._random.choice(siblings)])

    def _split(self, category_id: str) -> None:
        if self._children[category_id]:
            return
        category = self._nodes[category_id]
        parts = [
            self._insert(category.parent_id, f"{modifier} {category.name}")
            for modifier in self._random.sample(_MODIFIERS, 2)
        ]
        self._remove(category_id, parts)

    def _drop(self, category_id: str) -> None:
        for member in reversed(self._subtree(category_id)):
            self._remove(member, [])

    def _drop_beside_a_newcomer(self, category_id: str) -> None:
        """A neighbour of a similar name comes as the category goes."""
        category = self._nodes[category_id]
        self._drop(category_id)
        self._newcomer(category)

    def _drop_from_a_family(self, category_id: str) -> None:
        """Neighbours come back under other ids, this one does not."""
        for sibling in self._leaf_siblings(category_id)[:4]:
            self._reidentify(sibling)
        self._drop(category_id)

    def _add(self, category_id: str) -> None:
        self._newcomer(self._nodes[category_id])

    def _newcomer(self, beside: Category) -> None:
        words = beside.name.split()
        kept = words[1:] if len(words) > 1 else words
        self._insert(beside.parent_id, " ".join([self._random.choice(_MODIFIERS), *kept]))


def edited(name: str, tree: Taxonomy, seed: int, share: float = _CHANGED_SHARE) -> Step:
    """A step from ``tree`` to itself after changes made on purpose."""
    new, truth = _Editor(tree, seed).edit(share)
    return Step(name, tree, new, truth)


# What is compared


def inferred(step: Step) -> Answers:
    """The successors that the project infers."""
    transitions = infer_transitions(step.old, step.new, since="new")
    return {
        former: (transition.to[0].category_id if transition.to else None, transition.certain)
        for former, transition in transitions.items()
    }


def same_name(step: Step) -> Answers:
    """The category of the same name, if there is exactly one."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for category_id in step.new:
        by_name[step.new.name(category_id).casefold()].append(category_id)
    answers: dict[str, tuple[str | None, bool]] = {}
    for former in step.truth:
        found = by_name[step.old.name(former).casefold()]
        answers[former] = (found[0] if len(found) == 1 else None, True)
    return answers


def nearest_path(step: Step) -> Answers:
    """The category of the nearest path, always; certain from a cosine of 0.8."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    ids, removed = step.new.ids, list(step.truth)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    paths = vectorizer.fit_transform([step.new.path(category_id) for category_id in ids])
    cosines = (vectorizer.transform([step.old.path(former) for former in removed]) @ paths.T).toarray()
    return {
        former: (ids[row.argmax()], bool(row.max() >= 0.8))
        for former, row in zip(removed, cosines, strict=True)
    }


def measured(steps: Iterable[Step], answer: Callable[[Step], Answers]) -> dict[str, float | int | None]:
    """Precision and recall of one method over steps."""
    count: Counter[str] = Counter()
    started_at = time.perf_counter()
    for step in steps:
        answers = answer(step)
        for former, right in step.truth.items():
            successor, certain = answers[former]
            hit = successor in right
            count["removed"] += 1
            count["with_successor"] += bool(right)
            count["proposed"] += successor is not None
            count["right"] += hit
            count["certain"] += certain and successor is not None
            count["certain_right"] += certain and hit
    return {
        "removed": count["removed"],
        "with_successor": count["with_successor"],
        "precision": _share(count["right"], count["proposed"]),
        "recall": _share(count["right"], count["with_successor"]),
        "certain": count["certain"],
        "precision_certain": _share(count["certain_right"], count["certain"]),
        "recall_certain": _share(count["certain_right"], count["with_successor"]),
        "seconds": time.perf_counter() - started_at,
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


_METHODS: dict[str, Callable[[Step], Answers]] = {
    "inferred": inferred,
    "same name": same_name,
    "nearest path": nearest_path,
}


def official_step(folder: Path) -> Step:
    """The step of the Shopify taxonomy that came with an official mapping."""
    old = Taxonomy.read_csv(str(folder / "2024-10.csv"))
    new = Taxonomy.read_csv(str(folder / "2025-03.csv"))
    truth: dict[str, set[str]] = {category_id: set() for category_id in old if category_id not in new}
    with (folder / "mapping_2024-10_to_2025-03.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["from_id"] in truth and row["to_id"]:
                truth[row["from_id"]].add(row["to_id"])
    return Step("Shopify, official mapping", old, new, truth)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--taxonomies", required=True, type=Path, help="folder with shopify/ and gpc/")
    folder = parser.parse_args().taxonomies
    shopify = official_step(folder / "shopify")
    gpc_old = Taxonomy.read_csv(str(folder / "gpc" / "2018.csv"))
    gpc_new = Taxonomy.read_csv(str(folder / "gpc" / "2020-06.csv"))
    groups = {
        shopify.name: [shopify],
        "Shopify, edited": [edited("shopify", shopify.new, seed) for seed in _SEEDS],
        "GPC, edited": [edited("gpc", gpc_new, seed) for seed in _SEEDS],
    }
    rows: list[dict[str, Any]] = [
        {"step": f"{name}: {method}", **measured(steps, answer)}
        for name, steps in groups.items()
        for method, answer in _METHODS.items()
    ]
    show(rows)
    transitions = infer_transitions(gpc_old, gpc_new, since="2020-06")
    print("\nGPC 2018 to 2020-06, for which there is no official mapping:\n")
    for transition in transitions.values():
        targets = ", ".join(gpc_new.path(successor.category_id) for successor in transition.to) or "nowhere"
        sure = "certain" if transition.certain else f"confidence {transition.confidence:.2f}"
        print(f"{transition.from_path}\n  {transition.kind}: {targets} ({sure}; {transition.reason})")
    save(
        "taxonomy_inference",
        {
            "seeds": len(_SEEDS),
            "changed_share": _CHANGED_SHARE,
            "steps": rows,
            # Counts only: the names are not ours to publish.
            "gpc_2018_to_2020_06": Counter(transition.kind for transition in transitions.values()),
        },
    )


if __name__ == "__main__":
    main()
