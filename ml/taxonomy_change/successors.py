"""Where the categories went that a new version of the taxonomy no longer has.

An official mapping is believed. For every other removed category the new tree is searched for its
successor, from what the two trees say (names, place, subcategories), what a text encoder says of the
names, and where the teacher sends the category's offers.

The search is a conditional logit: each candidate gets a score, the sum of its evidence, and competes with
the other candidates and with "there is none" (score 0) in a softmax. So two candidates that are equally
good share the confidence, and a name that is merely similar does not win for want of a better one.
Parents are resolved before their children: a category whose parent has a successor is looked for there.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ml.taxonomy import Taxonomy
from ml.taxonomy_change.diff import categories_of
from ml.taxonomy_change.transitions import Kind, Successor, Transition

if TYPE_CHECKING:
    from numpy.typing import NDArray

Flow = tuple[str, float]
"""A category, and the share of a former category's offers that go there."""

Similarity = Callable[[Sequence[str], Sequence[str]], "NDArray[Any]"]
"""Cosine similarity of two lists of texts, shape (first, second)."""

WEIGHTS = {
    "candidate": -7.8,
    "same_name": 3.5,
    "shared_words": 2.0,
    "replaced_words": -4.0,
    "spelling": 4.0,
    "place": 2.0,
    "same_parent": 3.0,
    "below_parent": 1.5,
    "children": 4.0,
    "same_children": 3.0,
    "no_shared_children": -2.0,
    "leaf_or_not": -2.5,
    "existed": -3.0,
    "claimed": -0.5,
    "meaning": 1.5,
}
"""What a piece of evidence adds to a candidate's score. From a maximum-likelihood fit to changes made to real
trees on purpose, rounded, and set by hand to be more cautious about replaced words and to look further from
the old place than those changes go. ``benchmarks/taxonomy_inference.py`` measures what they are worth."""

_CANDIDATES_BY_NAME = 15
_CANDIDATES_BY_MEANING = 5
_NAMES_AT_ONCE = 500
_MOST_NEIGHBOURS = 300
"""New categories in one place that are all looked at. Of more, those of a similar name or meaning are."""
_MOST_IF_EXISTED = 0.7
"""Two categories of one name stood side by side for a reason (boxer shorts for men, for boys): that one of
them stays is no proof that the other went there."""
_TRUSTED_PARENT = 0.5
_DOUBT_IN_FLOWS = 0.05
_TEACHER_ALONE = 0.3
_SMALLEST_SHARE = 0.05
_DOMINANT_SHARE = 0.5

_SMALL_WORDS = frozenset(
    word
    for language in (
        ("a", "an", "and", "for", "in", "of", "or", "the", "to", "with"),
        ("mit", "und", "fur"),
        ("de", "des", "et", "la", "le", "y", "e", "di", "da", "i", "en", "van", "og", "och"),
    )
    for word in language
)
_WORD = re.compile(r"\w+")


# Names


@lru_cache(maxsize=1 << 17)
def words(name: str) -> tuple[str, ...]:
    """Words of a name in the form in which they are compared: lower case, unaccented, singular, no "and"."""
    plain = "".join(
        letter
        for letter in unicodedata.normalize("NFKD", name.casefold())
        if not unicodedata.combining(letter)
    )
    found = _WORD.findall(plain.replace("'", "").replace("’", ""))
    return tuple(_singular(word) for word in found if word not in _SMALL_WORDS) or tuple(found) or (plain,)


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@lru_cache(maxsize=1 << 17)
def _grams(text: str) -> frozenset[str]:
    padded = f" {text} "
    return frozenset(padded[i : i + 2] for i in range(len(padded) - 1))


@lru_cache(maxsize=1 << 19)
def _spelled_alike(one: str, other: str) -> float:
    """Share of letter pairs that two words have in common (Dice), in [0, 1]."""
    a, b = _grams(one), _grams(other)
    return 2 * len(a & b) / (len(a) + len(b))


class NameMatch(msgspec.Struct, frozen=True):
    """How two names compare, each part in [0, 1]."""

    same: bool
    shared: float
    """Weight of the words in common, of all words of both; rare words weigh more."""
    replaced: float
    """Weight of words that stand in place of others ("metal tabs", "adhesive tabs"): a sign of a
    neighbour, where words that were only added or only left out are the sign of a new wording."""
    spelling: float


def match_names(one: str, other: str, weight: Callable[[str], float] = lambda word: 1.0) -> NameMatch:
    """Compare two names; ``weight`` says how much a word tells."""
    a, b = words(one), words(other)
    if a == b:
        return NameMatch(same=True, shared=1.0, replaced=0.0, spelling=1.0)
    common = set(a) & set(b)
    shared = sum(weight(word) for word in common)
    lost, gained = sorted(set(a) - common), sorted(set(b) - common)
    for word in list(lost):
        alike = max(gained, key=lambda candidate: _spelled_alike(word, candidate), default="")
        if alike and (degree := _spelled_alike(word, alike)) >= 0.6:
            shared += degree * max(weight(word), weight(alike))
            lost.remove(word)
            gained.remove(alike)
    lost_weight, gained_weight = sum(map(weight, lost)), sum(map(weight, gained))
    total = shared + lost_weight + gained_weight
    return NameMatch(
        same=set(a) == set(b),
        shared=shared / total if total else 1.0,
        replaced=min(lost_weight, gained_weight) / (shared + max(lost_weight, gained_weight))
        if lost_weight and gained_weight
        else 0.0,
        spelling=_spelled_alike(" ".join(a), " ".join(b)),
    )


# One tree, as the search looks at it


class _Tree:
    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.names = {
            category_id: {"": category.name, **category.names}
            for category_id, category in categories_of(taxonomy).items()
        }
        self.parents = {category_id: taxonomy.parent(category_id) for category_id in taxonomy}
        self.lines = {category_id: taxonomy.ancestors(category_id) for category_id in taxonomy}
        self.children = {category_id: taxonomy.children(category_id) for category_id in taxonomy}

    @cached_property
    def by_words(self) -> dict[tuple[str, tuple[str, ...]], list[str]]:
        """Categories by locale and words of the name."""
        index: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
        for category_id, names in self.names.items():
            for locale, name in names.items():
                index[locale, words(name)].append(category_id)
        return index

    @cached_property
    def texts(self) -> dict[str, str]:
        """All names of a category in one text."""
        return {
            category_id: " ".join(sorted({" ".join(words(name)) for name in names.values()}))
            for category_id, names in self.names.items()
        }

    def nearness(self, one: str | None, other: str | None) -> float:
        """How near two places are, in (0, 1] (Wu and Palmer).

        Twice the depth of the last common ancestor by the sum of the depths; the place above all roots
        (None) has depth 1.
        """
        a = self.lines[one] if one is not None else []
        b = self.lines[other] if other is not None else []
        common = 0
        for left, right in zip(a, b, strict=False):
            if left != right:
                break
            common += 1
        return 2 * (common + 1) / (len(a) + len(b) + 2)


# The search


class _Place(msgspec.Struct, frozen=True):
    """Where a category of the old tree went, as far as known."""

    category_id: str
    confidence: float


class _Candidate(msgspec.Struct, frozen=True):
    category_id: str
    features: dict[str, float]
    score: float


class Search:
    """Candidates for the successor of a removed category, and their scores.

    Args:
        old: The tree that has the category.
        new: The tree that does not.
        unresolved: The removed categories to look for.
        known: Successor of the categories whose successor is known.
        extra: More candidates, by removed id.
        similarity: Cosine of names.
    """

    def __init__(
        self,
        old: Taxonomy,
        new: Taxonomy,
        unresolved: Sequence[str],
        *,
        known: Mapping[str, str],
        extra: Mapping[str, Iterable[str]],
        similarity: Similarity | None = None,
    ) -> None:
        self.old, self.new = _Tree(old), _Tree(new)
        self.unresolved = list(unresolved)
        self.added = {category_id for category_id in new if category_id not in old}
        self._places = {category_id: _Place(category_id, 1.0) for category_id in old if category_id in new}
        self._places |= {former: _Place(successor, 1.0) for former, successor in known.items()}
        self._weights = _word_weights([*self.old.names.values(), *self.new.names.values()])
        self._meanings: dict[tuple[str, str], float] = {}
        self._neighbours: dict[str | None, set[str]] = {}
        self._candidates = {former: set(extra.get(former, ())) for former in self.unresolved}
        self._add_candidates_by_name()
        self._add_candidates_by_children()
        if similarity is not None:
            self._add_candidates_by_meaning(similarity)
        self._claims = {
            (locale, words(name))
            for former in self.unresolved
            for locale, name in self.old.names[former].items()
        }

    def place(self, former: str, category_id: str, confidence: float) -> None:
        """Say where ``former`` went; its subcategories are then looked for below."""
        self._places[former] = _Place(category_id, confidence)

    def candidates(self, former: str) -> list[_Candidate]:
        """Candidates for the successor of ``former``, best first."""
        home, skipped = self._home(former)
        pool = self._candidates[former] | self._near(home)
        found = [self._judged(former, candidate, home, skipped) for candidate in sorted(pool)]
        return sorted(found, key=lambda candidate: (-candidate.score, candidate.category_id))

    def name_match(self, former: str, candidate: str) -> NameMatch:
        """The best match of two categories' names in any locale."""
        a, b = self.old.names[former], self.new.names[candidate]
        matches = [
            match_names(name, b[locale], self._weights.__getitem__)
            for locale, name in a.items()
            if locale in b
        ]
        return max(matches, key=lambda match: (match.same, match.shared, match.spelling))

    def children_shared(self, former: str, candidate: str) -> tuple[int, float]:
        """How many subcategories of ``former`` are found under ``candidate`` (by id or name); Dice share."""
        before, after = self.old.children[former], self.new.children[candidate]
        if not before or not after:
            return 0, 0.0
        ids = set(after)
        names = {words(self.new.names[child][""]) for child in after}
        found = sum(
            child in ids or (child not in self.new.names and words(self.old.names[child][""]) in names)
            for child in before
        )
        return found, 2 * found / (len(before) + len(after))

    def _children_moved(self, former: str, candidate: str) -> float:
        """Share of the subcategories that live on under their own ids, and now under ``candidate``."""
        children = self.old.children[former]
        moved = sum(self.new.parents.get(child) == candidate for child in children)
        return moved / len(children) if children else 0.0

    def _home(self, former: str) -> tuple[str | None, int]:
        """Where the former parent is now, or its parent if that is gone too; how many levels are gone."""
        parent, skipped = self.old.parents[former], 0
        while parent is not None:
            place = self._places.get(parent)
            if place is not None and place.confidence >= _TRUSTED_PARENT:
                return place.category_id, skipped
            parent, skipped = self.old.parents[parent], skipped + 1
        return None, skipped

    def _near(self, home: str | None) -> set[str]:
        """New subcategories of the place where the category would be by its parent; none if too many."""
        if home not in self._neighbours:
            siblings = self.new.children[home] if home is not None else self.new.taxonomy.roots
            added = {sibling for sibling in siblings if sibling in self.added}
            self._neighbours[home] = added if len(added) <= _MOST_NEIGHBOURS else set()
        return self._neighbours[home]

    def _judged(self, former: str, candidate: str, home: str | None, skipped: int) -> _Candidate:
        features = self._features(former, candidate, home, skipped)
        score = sum(WEIGHTS[name] * value for name, value in features.items())
        return _Candidate(category_id=candidate, features=features, score=score)

    def _features(self, former: str, candidate: str, home: str | None, skipped: int) -> dict[str, float]:
        name = self.name_match(former, candidate)
        parent = self.new.parents[candidate]
        leaf, candidate_leaf = not self.old.children[former], not self.new.children[candidate]
        _, children = self.children_shared(former, candidate)
        claimed = not name.same and any(
            (locale, words(text)) in self._claims for locale, text in self.new.names[candidate].items()
        )
        return {
            "candidate": 1.0,
            "same_name": float(name.same),
            "shared_words": name.shared,
            "replaced_words": name.replaced,
            "spelling": name.spelling,
            "place": self.new.nearness(home, parent),
            "same_parent": float(parent == home and not skipped),
            "below_parent": float(
                home is not None and parent != home and home in self.new.lines[candidate][:-1]
            ),
            "children": children,
            "same_children": self._children_moved(former, candidate),
            "no_shared_children": float(not leaf and not candidate_leaf and not children),
            "leaf_or_not": float(leaf != candidate_leaf),
            "existed": float(candidate not in self.added),
            "claimed": float(claimed),
            "meaning": (1 - name.shared) * self._meanings.get((former, candidate), 0.0),
        }

    def _add_candidates_by_name(self) -> None:
        for former in self.unresolved:
            for locale, name in self.old.names[former].items():
                self._candidates[former].update(self.new.by_words.get((locale, words(name)), ()))
        for former, similar in zip(self.unresolved, self._most_similar_names(), strict=True):
            self._candidates[former].update(similar)

    def _most_similar_names(self) -> list[list[str]]:
        """By character n-grams (TF-IDF, cosine), the nearest categories of the new tree."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not self.unresolved:
            return []
        ids = list(self.new.texts)
        vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 3), dtype=np.float32, sublinear_tf=True
        )
        targets = vectorizer.fit_transform(self.new.texts.values()).T.tocsr()
        similar: list[list[str]] = []
        for start in range(0, len(self.unresolved), _NAMES_AT_ONCE):
            chunk = [self.old.texts[former] for former in self.unresolved[start : start + _NAMES_AT_ONCE]]
            cosines = (vectorizer.transform(chunk) @ targets).toarray()
            count = min(_CANDIDATES_BY_NAME, len(ids))
            for row, best in zip(
                cosines, np.argpartition(-cosines, count - 1, axis=1)[:, :count], strict=True
            ):
                similar.append([ids[column] for column in best if row[column] > 0])
        return similar

    def _add_candidates_by_children(self) -> None:
        """The new parents of subcategories that live on, or that came back under another id."""
        for former in self.unresolved:
            for child in self.old.children[former]:
                heirs = (
                    [child]
                    if child in self.new.parents
                    else self.new.by_words.get(("", words(self.old.names[child][""])), [])
                )
                parents = (self.new.parents[heir] for heir in heirs[:_CANDIDATES_BY_NAME])
                self._candidates[former].update(parent for parent in parents if parent is not None)

    def _add_candidates_by_meaning(self, similarity: Similarity) -> None:
        """Nearest new categories by the encoder's cosine of the names."""
        pool = sorted(self.added.union(*self._candidates.values()))
        if not pool or not self.unresolved:
            return
        cosines = np.asarray(
            similarity(
                [self.old.names[former][""] for former in self.unresolved],
                [self.new.names[candidate][""] for candidate in pool],
            )
        )
        for former, row in zip(self.unresolved, cosines, strict=True):
            nearest = {pool[column] for column in np.argsort(-row, kind="stable")[:_CANDIDATES_BY_MEANING]}
            self._candidates[former] |= nearest & self.added
            for candidate, cosine in zip(pool, row.tolist(), strict=True):
                if candidate in self._candidates[former]:
                    self._meanings[former, candidate] = min(max((cosine - 0.5) / 0.5, 0.0), 1.0)


def _word_weights(categories: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """How much a word tells, by how few categories have it."""
    counts: Counter[str] = Counter()
    total = 0
    for names in categories:
        total += 1
        counts.update({word for name in names.values() for word in words(name)})
    return {word: math.log1p(total / count) for word, count in counts.items()}


# Transitions


def infer_transitions(
    old: Taxonomy,
    new: Taxonomy,
    *,
    mapping: Sequence[tuple[str, str]] = (),
    flows: Mapping[str, Sequence[Flow]] = {},
    similarity: Similarity | None = None,
    certain_from: float = 0.8,
    since: str,
) -> dict[str, Transition]:
    """Where the labels of every category go that is gone, or that the official mapping sends elsewhere.

    Args:
        old: The version before.
        new: The version that comes.
        mapping: The official mapping, rows of (from_id, to_id); an empty to_id says that there is no
            successor, or beside other rows that a part has none. It wins over everything else. Rows that do
            not fit the trees are passed over (:func:`ml.taxonomy_change.limits.objections` names them).
        flows: By removed id, where the teacher sends its offers. Shares may sum to less than 1: the rest
            is unknown, which is how little evidence (few offers) is told from much.
        similarity: Cosine of names, of a text encoder.
        certain_from: An inferred single successor of this confidence needs no look at the offers.
        since: Digest of the new version.

    Returns:
        Transitions by former id.
    """
    official, rows = _official_targets(old, new, mapping), set(mapping)
    removed = [category_id for category_id in old if category_id not in new]
    unresolved = sorted((i for i in removed if i not in official), key=lambda i: (old.level(i), i))
    flows = {former: _flows_in(new, flows.get(former, ())) for former in {*unresolved, *official}}
    found = {
        former: _official(
            old.name(former),
            old.path(former),
            former,
            targets,
            flows[former],
            since,
            lives_on=former in new,
            whole=(former, "") not in rows,
        )
        for former, targets in official.items()
    }
    search = Search(
        old,
        new,
        unresolved,
        known={former: targets[0] for former, targets in official.items() if len(targets) == 1},
        extra={former: [category_id for category_id, _ in flows[former]] for former in unresolved},
        similarity=similarity,
    )
    for former in unresolved:
        transition = _inferred(search, former, flows[former], certain_from, since)
        if transition.kind != "split" and transition.to:
            search.place(former, transition.to[0].category_id, transition.confidence)
        found[former] = transition
    return _with_kinds(old, found)


def late_transitions(
    earlier: Sequence[Transition],
    old: Taxonomy,
    new: Taxonomy,
    mapping: Sequence[tuple[str, str]],
    *,
    since: str,
) -> dict[str, Transition]:
    """Where the official mapping says that ids went which were gone before: it came late, or was corrected.

    Args:
        earlier: Transitions to the version before.
        old: The version before.
        new: The version that comes.
        mapping: The official mapping, rows of (from_id, to_id).
        since: Digest of the new version.

    Returns:
        Transitions by former id, to replace those of ``earlier`` (:func:`compose` does it). Those that are
        official and say the same are left out.
    """
    standing = {t.from_id: t for t in earlier if t.from_id not in old}
    targets = _official_targets(standing, new, mapping)
    late = {
        former: _official(
            standing[former].from_name,
            standing[former].from_path,
            former,
            to,
            [],
            since,
            lives_on=former in new,
            whole=(former, "") not in mapping,
        )
        for former, to in targets.items()
        if standing[former].origin != "official" or {s.category_id for s in standing[former].to} != set(to)
    }
    return _with_kinds(old, late)


def _official_targets(
    old: Container[str], new: Taxonomy, mapping: Sequence[tuple[str, str]]
) -> dict[str, list[str]]:
    """Successors by former id, of every former id for which the mapping says more than "itself"."""
    rows: dict[str, list[str]] = defaultdict(list)
    for former, successor in dict.fromkeys(mapping):
        if former in old:
            rows[former].append(successor)
    targets = {}
    for former, successors in rows.items():
        known = [successor for successor in successors if successor in new]
        if (known or not any(successors)) and known != [former]:
            targets[former] = known
    # An empty row for a category that lives on says nothing about its labels.
    return {former: known for former, known in targets.items() if known or former not in new}


def _flows_in(new: Taxonomy, flows: Sequence[Flow]) -> list[Flow]:
    shares: dict[str, float] = defaultdict(float)
    for category_id, share in flows:
        if category_id in new and share > 0:
            shares[category_id] += share
    total = max(1.0, sum(shares.values()))
    return sorted(
        ((category_id, share / total) for category_id, share in shares.items()),
        key=lambda flow: (-flow[1], flow[0]),
    )


def _successors(shares: Mapping[str, float]) -> list[Successor]:
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return [Successor(category_id=category_id, share=share / total) for category_id, share in ordered]


def _official(
    name: str,
    path: str,
    former: str,
    targets: Sequence[str],
    flows: Sequence[Flow],
    since: str,
    *,
    lives_on: bool,
    whole: bool,
) -> Transition:
    """``whole``: no part of the category is gone for good, so all that had it goes to the targets."""
    seen = dict(flows)
    shares = {target: seen.get(target, 0.0) for target in targets}
    if not any(shares.values()):
        shares = dict.fromkeys(targets, 1.0)
    return Transition(
        from_id=former,
        from_name=name,
        from_path=path,
        kind="removed" if not targets else "replaced" if len(targets) == 1 else "split",
        to=_successors(shares) if targets else [],
        origin="official",
        confidence=1.0,
        certain=len(targets) == 1 and whole,
        since=since,
        reason="the official mapping says so",
        lives_on=lives_on,
    )


def _inferred(
    search: Search, former: str, flows: Sequence[Flow], certain_from: float, since: str
) -> Transition:
    candidates = search.candidates(former)
    chances, none = _chances(candidates, flows)
    old = search.old.taxonomy
    best = max(chances, key=lambda category_id: (chances[category_id], category_id), default=None)
    if best is None or max(chances.values()) <= none:
        to, confidence, reason = [], none, "nothing in the new tree resembles it enough"
    elif flows and flows[0][1] < _DOMINANT_SHARE and chances[best] < _DOMINANT_SHARE:
        parts = {category_id: share for category_id, share in flows if share >= _SMALLEST_SHARE} or dict(
            flows
        )
        to, confidence = _successors(parts), (1 - none) * sum(parts.values())
        reason = f"its offers spread over {len(parts)} categories, {_go_to(search, flows[0])}"
    else:
        to, confidence = _successors({best: 1.0}), chances[best]
        reason = _reason(search, former, best, dict(flows))
    return Transition(
        from_id=former,
        from_name=old.name(former),
        from_path=old.path(former),
        kind="removed" if not to else "replaced" if len(to) == 1 else "split",
        to=to,
        origin="inferred",
        confidence=round(float(confidence), 4),
        certain=len(to) == 1 and confidence >= certain_from,
        since=since,
        reason=reason,
    )


def _chances(candidates: Sequence[_Candidate], flows: Sequence[Flow]) -> tuple[dict[str, float], float]:
    """Probability of each candidate, and that there is no successor."""
    scores = np.array([0.0, *(candidate.score for candidate in candidates)])
    exponents = np.exp(scores - scores.max())
    chances = (exponents / exponents.sum()).tolist()
    by_tree = {
        candidate.category_id: min(chance, _MOST_IF_EXISTED) if candidate.features["existed"] else chance
        for candidate, chance in zip(candidates, chances[1:], strict=True)
    }
    none = 1.0 - sum(by_tree.values()) if by_tree else 1.0
    if not flows:
        return by_tree, none
    # The trees' chances are a prior for what the offers say. Where the trees know of no successor the
    # teacher's word is taken for what it is, but never for certain: its own mistakes would become labels.
    seen = dict(flows)
    unseen = max(0.0, 1.0 - sum(seen.values()))
    joint = {
        category_id: chance * (seen.get(category_id, 0.0) + unseen + _DOUBT_IN_FLOWS)
        + none * seen.get(category_id, 0.0)
        for category_id, chance in by_tree.items()
    }
    left = none * (_TEACHER_ALONE + unseen)
    total = left + sum(joint.values())
    return {category_id: weight / total for category_id, weight in joint.items()}, left / total


def _reason(search: Search, former: str, best: str, seen: Mapping[str, float]) -> str:
    name = search.name_match(former, best)
    children, _ = search.children_shared(former, best)
    parent, new_parent = search.old.parents[former], search.new.parents[best]
    parts = []
    if parent == new_parent:
        where = "under the same parent" if parent is not None else "at the root"
    elif new_parent == search._home(former)[0]:
        where = "where its parent went"
    else:
        where = "under a new parent"
    if name.same:
        parts.append(f"same name {where}")
    elif name.shared >= 0.3 or name.spelling >= 0.5:
        parts.append(f"similar name {where}")
    if children:
        parts.append(f"{children} of its {len(search.old.children[former])} subcategories are there")
    if best in seen:
        parts.append(_go_to(search, (best, seen[best])))
    return ", ".join(parts) or f"new {where}"


def _go_to(search: Search, flow: Flow) -> str:
    return f"{100 * flow[1]:.0f} % of its offers go to {search.new.names[flow[0]]['']}"


def _with_kinds(old: Taxonomy, found: Mapping[str, Transition]) -> dict[str, Transition]:
    """Tell ``merged`` from ``replaced``, which takes all transitions together."""
    goers = Counter(successor.category_id for transition in found.values() for successor in transition.to)
    kinds: dict[str, Kind] = {
        former: "merged"
        for former, transition in found.items()
        if len(transition.to) == 1
        and (goers[transition.to[0].category_id] > 1 or transition.to[0].category_id in old)
    }
    return {
        former: msgspec.structs.replace(found[former], kind=kinds.get(former, found[former].kind))
        for former in sorted(found)
    }
