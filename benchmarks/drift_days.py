"""Simulated days of offers whose truth is known: days on which nothing drifted, and eight kinds of drift.

Offers come from the demo feed and are catalogued once by real models, a fast model and a student that are
trained for it. A day draws from this pool, so a thousand days cost seconds. What varies from day to day
although nothing drifts: how active each shop is (gamma, one day resembling the day before), what each
weekday does to every country and category, the number of offers, each shop's price level, and the draw.
What is measured on the days, and how well, is :mod:`benchmarks.drift_trust`.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import gamma, norm

from ml.artifacts import read_manifest
from ml.demo.feed import DemoFeed
from ml.demo.offers import CHUNK_OFFERS, OfferMaker
from ml.demo.words import COUNTRIES, LANGUAGES, NEW_MARKETING
from ml.drift.measures import MISSING
from ml.drift.sample import PREDICTED
from ml.drift.totals import DayTotals
from ml.offers import CLEAN_FILE, FEED_COLUMNS, QUARANTINE_FILE, offer_text
from ml.progress import Progress
from ml.runner import StageSpec, key_of, parameters_of, run_stage
from ml.serving.predictor import Predictor
from ml.stages import stage_named

SAMPLED = 4_000
"""Offers of a day that are looked at, as ``drift_report`` takes them."""

FIRST_DAY = datetime.date(2026, 1, 5)
"""A Monday."""


@dataclass(frozen=True)
class Habits:
    """How shops behave from day to day."""

    variation: float
    """Of a shop's offers: standard deviation over mean."""
    memory: float
    """Correlation of a shop's activity with that of the day before."""


USUAL = Habits(variation=0.25, memory=0.5)
RESTLESS = Habits(variation=0.40, memory=0.7)
"""Harder than most feeds: a shop may deliver a third of what it usually does for days."""

WEEKDAY_SWING = 0.17
"""Weekdays raise or lower a country, and a category, by up to this much (log)."""
VOLUME_VARIATION = 0.05
PRICE_LEVEL_VARIATION = 0.01
DELIVERED = 0.25
"""Part of the pool that an average day delivers."""

_SEED = 17
"""Of the demo feed."""

TRUNCATED_TO = 30
"""Characters; the demo feed's titles have 40 on average, and two of its shops in six cut at 60 or 40."""
PRICE_FACTOR = 100.0

STRENGTHS = ("weak", "medium", "strong")


@dataclass(frozen=True)
class Kind:
    """One kind of drift."""

    name: str
    title: str
    amounts: tuple[float, float, float]
    """What weak, medium and strong are."""
    unit: str
    """What the amounts are amounts of."""
    questions: tuple[str, ...]
    """Those that ask for it; what other questions find is a consequence, or a false alarm."""
    columns: tuple[str, ...]
    """The same, in columns of the offers."""


KINDS = (
    Kind(
        "new_shop",
        "a new large shop",
        (0.02, 0.05, 0.15),
        "of the day's offers come from it",
        ("shop_mix_is_usual",),
        ("shop_id",),
    ),
    Kind(
        "wording",
        "wording change",
        (0.02, 0.10, 0.40),
        "of offers (whole shops) carry a phrase that no title had before",
        ("wording_is_usual",),
        ("title",),
    ),
    Kind(
        "language_missing",
        "one language missing",
        (0.35, 0.70, 1.0),
        "of one language's offers are not delivered",
        ("languages_are_usual", "volume_is_usual"),
        ("language", "country"),
    ),
    Kind(
        "price_unit",
        "price unit error x100",
        (0.01, 0.05, 0.20),
        "of offers (whole shops) have their price in cents",
        ("prices_are_usual",),
        ("price",),
    ),
    Kind(
        "category_shift",
        "category share shift",
        (1.5, 2.0, 3.0),
        "times as many offers of one top-level category",
        ("predicted_categories_are_usual",),
        ("category_path",),
    ),
    Kind(
        "stale_taxonomy",
        "taxonomy-stale predictions",
        (0.005, 0.02, 0.10),
        "of predictions are of categories that the taxonomy in force does not have",
        ("predictions_are_of_the_taxonomy_in_force",),
        ("category_path",),
    ),
    Kind(
        "truncated",
        "truncated titles",
        (0.10, 0.30, 1.0),
        f"of offers (whole shops) have titles of {TRUNCATED_TO} characters at most",
        ("wording_is_usual",),
        ("title",),
    ),
    Kind(
        "encoding",
        "encoding damage",
        (0.02, 0.10, 0.40),
        "of offers (whole shops) have every letter beyond ASCII damaged; four titles in five have none",
        ("titles_are_undamaged",),
        ("title",),
    ),
)

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


# The pool


@dataclass
class Pool:
    """Offers to draw days from; arrays and frames have one row per offer, in the same order."""

    offers: pd.DataFrame
    """What :meth:`ml.drift.frame.Frame.series` reads of an offer, and ``true_top``: the top-level category
    that it really is of."""
    newcomer: Booleans
    """Offers of shops that neither the models nor any usual day have seen."""
    altered: Mapping[str, pd.DataFrame]
    """Kind of drift: the columns that it changes, with what the models then say."""
    quarantined: Mapping[str, float]
    """Rows that go to quarantine, by reason, usually and for each clean offer."""

    @cached_property
    def shop(self) -> Integers:
        """Number of each offer's shop."""
        return np.asarray(pd.factorize(self.offers["shop_id"])[0])

    @cached_property
    def shops(self) -> list[str]:
        """Their ids, by number."""
        return [str(name) for name in pd.factorize(self.offers["shop_id"])[1]]

    @cached_property
    def country(self) -> Integers:
        """Place in ``COUNTRIES`` of each offer; the last place is for those that say none."""
        return _places(self.offers["country"], COUNTRIES)

    @cached_property
    def language(self) -> Integers:
        """Place in ``LANGUAGES``: the declared language, or where there is none that of the country."""
        declared = _places(self.offers["language"], LANGUAGES)
        return np.where(declared == len(LANGUAGES), self.country, declared)

    @cached_property
    def top(self) -> Integers:
        """Number of each offer's true top-level category."""
        return np.asarray(pd.factorize(self.offers["true_top"], sort=True)[0])

    @cached_property
    def empty(self) -> dict[str, Booleans]:
        """Where a value is missing, in every column that may have none; people's labels are not looked at."""
        names = [column.name for column in FEED_COLUMNS if not column.needed and column.name != "category_id"]
        return {name: self.offers[name].isna().to_numpy() for name in names}


def make_pool(home: Path, offers_per_day: int = 20_000) -> Pool:
    """The pool in ``home``; what is not there yet is made: feed, models, predictions (minutes, once)."""
    makes = _Makes(home, offers_per_day)
    folder = home / "pool" / makes.models["compiled_student"].name
    if not (folder / "quarantined.parquet").exists():
        _write_pool(makes, folder)
    offers = pq.read_table(folder / "offers.parquet").to_pandas()
    rates = pq.read_table(folder / "quarantined.parquet").to_pylist()
    return Pool(
        offers=offers.drop(columns="newcomer"),
        newcomer=offers["newcomer"].to_numpy(dtype=bool),
        altered={name: pq.read_table(folder / f"{name}.parquet").to_pandas() for name in ALTERATIONS},
        quarantined={row["reason"]: row["share"] for row in rates},
    )


class _Makes:
    """Stages run in a folder of its own, each once."""

    days = (datetime.date(2026, 11, 1), datetime.date(2026, 11, 2), datetime.date(2026, 11, 3))
    newcomers_day = datetime.date(2026, 11, 4)

    def __init__(self, home: Path, offers_per_day: int) -> None:
        self.home, self.offers_per_day = home, offers_per_day
        self.feed = (home / f"feed-{offers_per_day}").resolve()  # its files are known by their full paths
        self._write_feed()
        release = {"uri": str(DemoFeed().write_taxonomy(home / "taxonomy")), "role": "tree"}
        self.taxonomy = self.make("catalog_taxonomy", {}, source="demo", files=[release])
        days = [*self.days, self.newcomers_day]
        self.offers = {day.isoformat(): self._clean(day.isoformat()) for day in days}
        self.models = self._models()

    def make(self, name: str, inputs: Mapping[str, Path], **parameters: Any) -> Path:
        """Folder of the artifact that the stage makes of this."""
        stage = stage_named(name)
        digests = {of: read_manifest(folder).digest for of, folder in inputs.items()}
        key = key_of(stage, parameters_of(stage, parameters), digests)
        output = self.home / name / key[:16]
        run_stage(
            StageSpec(
                stage=name,
                inputs={of: str(folder) for of, folder in inputs.items()},
                parameters=parameters,
                output=str(output),
                workspace=str(self.home / "work" / name / key[:16]),
            )
        )
        return output

    def truth(self) -> dict[str, str]:
        """Category of every offer of the feed, labelled by people or not (1.5 % are wrong)."""
        tables = [pq.read_table(path, columns=["offer_id", "category_id"]) for path in self._truths()]
        both = pa.concat_tables(tables).to_pydict()
        return dict(zip(both["offer_id"], both["category_id"], strict=True))

    def _truths(self) -> Iterator[Path]:
        return self.feed.glob("truth-*.parquet")

    def _write_feed(self) -> None:
        """Days without the shops that are to be new later, a day of these shops alone, and the truth."""
        if (self.feed / f"{self.newcomers_day}.parquet").exists():
            return
        self.feed.mkdir(parents=True, exist_ok=True)
        first = OfferMaker(_SEED, self.offers_per_day, 1).chunk(self.days[0], 0, drifted=False)
        withheld = pa.array(_withheld_shops(first))
        for day in self.days:
            self._write_day(day, self.offers_per_day, lambda of: pc.invert(pc.is_in(of["shop_id"], withheld)))
        # A larger feed of the same shops: each of them has offers enough for a large share of a day.
        larger = 15 * self.offers_per_day
        self._write_day(self.newcomers_day, larger, lambda of: pc.is_in(of["shop_id"], withheld))

    def _write_day(self, day: datetime.date, offers: int, kept: Callable[[pa.Table], Any]) -> None:
        maker = OfferMaker(_SEED, offers, 1)
        usual_rates = maker.tables.label_rates
        tables = {}
        for name, rates in (("truth-", np.ones_like(usual_rates)), ("", usual_rates)):
            maker.tables.label_rates = rates
            chunks = [maker.chunk(day, number, drifted=False) for number in range(-(-offers // CHUNK_OFFERS))]
            tables[name] = pa.concat_tables([table.filter(kept(table)) for table in chunks])
        for name, table in tables.items():
            pq.write_table(table, self.feed / f"{name}{day}.parquet")

    def _clean(self, day: str) -> Path:
        file = {"uri": str(self.feed / f"{day}.parquet"), "fingerprint": "", "loaded_on": day}
        raw = self.make("raw_offers", {}, files=[file], day=day)
        return self.make("offers", {"raw_offers": raw, "catalog_taxonomy": self.taxonomy})

    def _models(self) -> dict[str, Path]:
        taxonomy = {"catalog_taxonomy": self.taxonomy}
        days = {f"offers/{day}": self.offers[day.isoformat()] for day in self.days}
        change = {"taxonomy_change": self.make("taxonomy_change", taxonomy)}
        labels = {"migrated_labels": self.make("migrated_labels", taxonomy | change | days)}
        held_out = {"evaluation_set": self.make("evaluation_set", taxonomy | change | labels | days)}
        sample = {
            "training_sample": self.make(
                "training_sample", taxonomy | labels | held_out | days, labelled=4_000, unlabelled=1_500
            )
        }
        teacher = {"teacher_checkpoint": self.make("teacher_checkpoint", taxonomy | sample, max_tokens=32)}
        word = {"teacher_labels": self.make("teacher_labels", teacher | sample)}
        student = {
            "student_checkpoint": self.make(
                "student_checkpoint", taxonomy | sample | teacher | word, max_tokens=32, epochs=3
            )
        }
        fast = {"fast_checkpoint": self.make("fast_checkpoint", taxonomy | sample | word)}
        return {
            **sample,
            "compiled_student": self.make("compiled_student", taxonomy | sample | student | fast | held_out),
        }


def _withheld_shops(offers: pa.Table) -> list[str]:
    """The second largest shop of every country."""
    counts = offers.select(["shop_id", "country"]).to_pandas().value_counts().reset_index()
    return [str(counts[counts["country"] == country]["shop_id"].iloc[1]) for country in COUNTRIES]


_NEWCOMERS_PER_SHOP = 2_500
_TEXTS_AT_ONCE = 500


def _write_pool(makes: _Makes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress("drift-days")
    usual = pa.concat_tables([pq.read_table(makes.offers[str(day)] / CLEAN_FILE) for day in makes.days])
    new = pq.read_table(makes.offers[str(makes.newcomers_day)] / CLEAN_FILE)
    frame = pd.concat([usual.to_pandas().assign(newcomer=False), new.to_pandas().assign(newcomer=True)])
    frame = frame.drop_duplicates("offer_id").reset_index(drop=True)
    place_in_shop = frame.groupby("shop_id").cumcount()
    frame = frame[~frame["newcomer"] | (place_in_shop < _NEWCOMERS_PER_SHOP)].reset_index(drop=True)
    truth = makes.truth()
    frame["true_top"] = [(truth.get(offer_id) or "unknown")[:2] for offer_id in frame["offer_id"]]
    frame = frame.drop(columns="category_id")
    frame["trained"] = _is_trained(frame, makes.models["training_sample"])
    frame["taxonomy_known"] = True
    model = _Model(makes.models["compiled_student"], progress)
    frame = frame.assign(**model.answers(frame, "the pool"))
    for name, alter in ALTERATIONS.items():
        changed = pd.DataFrame(alter(frame))
        answers = model.answers(frame.assign(**changed), f"the pool, {name}")
        _write(changed.assign(**answers), folder / f"{name}.parquet")
    _write(frame, folder / "offers.parquet")
    _write(pd.DataFrame(_quarantine_shares(makes)), folder / "quarantined.parquet")


def _is_trained(offers: pd.DataFrame, sample: Path) -> Booleans:
    """Whether the models learned from the offer, or from another one of its product."""
    trained = np.zeros(len(offers), dtype=bool)
    for key in ("offer_id", "product_id", "gtin", "title"):
        for part in ("labelled", "unlabelled"):
            seen = pq.read_table(sample / f"{part}.parquet", columns=[key])[key].drop_null()
            trained |= offers[key].isin(set(seen.to_pylist())).to_numpy()
    return trained


def _write(frame: pd.DataFrame, path: Path) -> None:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)


def _quarantine_shares(makes: _Makes) -> list[dict[str, Any]]:
    folders = [makes.offers[str(day)] for day in makes.days]
    reasons = pa.concat_tables([pq.read_table(f / QUARANTINE_FILE, columns=["reason"]) for f in folders])
    clean = sum(pq.read_metadata(f / CLEAN_FILE).num_rows for f in folders)
    counts = pc.value_counts(pc.list_flatten(pc.split_pattern(reasons["reason"], ","))).to_pylist()
    return [{"reason": count["values"], "share": count["counts"] / clean} for count in counts]


class _Model:
    """The compiled model; equal offers are answered once."""

    _COLUMNS = ("title", "brand", "shop_category", "description", "country")

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._predictor = Predictor.load(folder)
        self._progress = progress
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def answers(self, offers: pd.DataFrame, what: str) -> dict[str, Any]:
        """Columns that the model adds to offers."""
        columns = offers[list(self._COLUMNS)].astype(object)
        keys = list(columns.where(columns.notna(), None).itertuples(index=False, name=None))
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        with self._progress.bar(f"cataloguing {what}", len(new), "offers") as bar:
            for start in range(0, len(new), _TEXTS_AT_ONCE):
                self._learn(new[start : start + _TEXTS_AT_ONCE])
                bar.update(len(new[start : start + _TEXTS_AT_ONCE]))
        return pd.DataFrame([self._known[key] for key in keys]).to_dict("list")

    def _learn(self, keys: list[tuple[Any, ...]]) -> None:
        offers = [dict(zip(self._COLUMNS, key, strict=True)) for key in keys]
        fast, student = self._predictor.each_alone([offer_text(offer) for offer in offers])
        for place, (key, prediction) in enumerate(zip(keys, self._predictor.predict(offers), strict=True)):
            self._known[key] = {
                **{name: getattr(prediction, name) for name in PREDICTED},
                "fast_category_id": fast[place],
                "student_category_id": student[place],
            }


# What drift does to an offer


def _new_words(offers: pd.DataFrame) -> dict[str, list[str]]:
    """Each shop has its phrase, and puts it before or behind the title."""
    titles = []
    places = _places(offers["language"], LANGUAGES)
    for title, shop, place in zip(offers["title"], offers["shop_id"], places.tolist(), strict=True):
        phrases = NEW_MARKETING[place % len(LANGUAGES)]
        chance = zlib.crc32(shop.encode())
        phrase = phrases[chance % len(phrases)]
        titles.append(f"{phrase} {title}" if chance // 8 % 2 else f"{title} {phrase}")
    return {"title": titles}


def _cut_titles(offers: pd.DataFrame) -> dict[str, list[str]]:
    return {"title": [title[:TRUNCATED_TO].rstrip() for title in offers["title"]]}


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _damaged(offers: pd.DataFrame) -> dict[str, list[str | None]]:
    """Half of the shops: UTF-8 read as Windows-1252; the others: replacement characters."""
    mojibake = [zlib.crc32(shop.encode()) % 2 == 0 for shop in offers["shop_id"]]

    def spoiled(text: Any, as_mojibake: bool) -> str | None:
        if not isinstance(text, str):
            return None
        if as_mojibake:
            return text.encode().decode("cp1252", errors="replace")
        return _NOT_ASCII.sub("\ufffd", text)

    return {
        name: [spoiled(text, way) for text, way in zip(offers[name], mojibake, strict=True)]
        for name in ("title", "brand", "description", "shop_category")
    }


ALTERATIONS: dict[str, Callable[[pd.DataFrame], dict[str, Any]]] = {
    "wording": _new_words,
    "truncated": _cut_titles,
    "encoding": _damaged,
}
"""By kind of drift: the columns that it changes, of all offers."""


@dataclass(frozen=True, eq=False)
class Drift:
    """A kind of drift at one strength, as it happens to one pool: which offers, by how much."""

    kind: str
    amount: float
    affected: Booleans
    """Of a new shop its offers; else the offers that are changed, more, fewer or badly answered."""

    @classmethod
    def draw(cls, pool: Pool, kind: Kind, strength: str, chance: np.random.Generator) -> Drift:
        """One way it can happen: which shop, which language, which categories is left to chance."""
        amount = kind.amounts[STRENGTHS.index(strength)]
        match kind.name:
            case "new_shop":
                shops = pool.offers["shop_id"].to_numpy()
                affected = pool.newcomer & (shops == chance.choice(np.unique(shops[pool.newcomer])))
            case "language_missing":
                affected = pool.language == chance.integers(len(LANGUAGES))
            case "category_shift":
                known = [top for top in np.unique(pool.top) if (pool.top == top).mean() > 0.02]
                affected = pool.top == chance.choice(known)
            case "stale_taxonomy":
                affected = _some_categories(pool, amount, chance)
            case _:
                affected = _some_shops(pool, amount, chance)
        return cls(kind.name, amount, affected)


def _some_shops(pool: Pool, share: float, chance: np.random.Generator) -> Booleans:
    """Whole shops that have this share of the offers together; of the last one only a part of its offers."""
    usual = ~pool.newcomer
    sizes = np.bincount(pool.shop[usual], minlength=len(pool.shops)) / usual.sum()
    affected = np.zeros(len(usual), dtype=bool)
    left = share
    for shop in chance.permutation(len(sizes)):
        if left <= 0:
            break
        if sizes[shop] > 0:
            part = min(1.0, left / sizes[shop])
            affected |= (pool.shop == shop) & (chance.random(len(usual)) < part)
            left -= sizes[shop]
    return affected & usual if share < 1 else usual


def _some_categories(pool: Pool, share: float, chance: np.random.Generator) -> Booleans:
    """Predicted categories that have about this share of the offers together."""
    categories = pool.offers["category_id"]
    shares = categories[~pool.newcomer].value_counts(normalize=True)
    chosen, found = [], 0.0
    for category in chance.permutation(shares.index.to_numpy(dtype=object)):
        if found >= 0.9 * share:
            break
        if found + shares[category] <= 1.1 * share:
            chosen.append(category)
            found += float(shares[category])
    return np.asarray(categories.isin(chosen))


# Days


@dataclass(frozen=True, eq=False)
class Day:
    """One day: what was delivered of the pool, and the sample that is looked at."""

    day: str
    rows: pd.DataFrame
    """The sample."""
    delivered: Integers
    """Rows of the pool."""
    totals: DayTotals


@dataclass
class World:
    """One shop landscape with its habits, day after day; another seed has others."""

    pool: Pool
    seed: int
    days: int
    """How many there are."""
    sampled: int = SAMPLED
    habits: Habits = USUAL

    def __post_init__(self) -> None:
        chance = np.random.default_rng([self.seed, 0])
        self._activity = _activity(chance, self.days, len(self.pool.shops), self.habits)
        self._countries = chance.uniform(-WEEKDAY_SWING, WEEKDAY_SWING, (7, len(COUNTRIES) + 1))
        self._tops = chance.uniform(-WEEKDAY_SWING, WEEKDAY_SWING, (7, int(self.pool.top.max()) + 1))

    def day(self, number: int, drift: Drift | None = None, sampled: int | None = None) -> Day:
        """Day ``number`` (from 0), drifted or not; the same arguments give the same day.

        Args:
            number: Place in the order of days.
            drift: What happens to it.
            sampled: Offers that are looked at, if other than the world's.
        """
        pool, chance = self.pool, np.random.default_rng([self.seed, 1, number])
        date = FIRST_DAY + datetime.timedelta(days=number)
        weekday = date.weekday()
        rates = np.exp(self._countries[weekday][pool.country] + self._tops[weekday][pool.top])
        rates *= self._activity[number][pool.shop] * DELIVERED
        rates *= np.exp(chance.normal(0.0, VOLUME_VARIATION))
        rates[pool.newcomer] = 0.0
        if drift is not None:
            _drift_rates(rates, drift)
        delivered = np.flatnonzero(chance.random(len(rates)) < rates)
        levels = np.exp(chance.normal(0.0, PRICE_LEVEL_VARIATION, len(pool.shops)))
        looked_at = chance.permutation(delivered)[: sampled or self.sampled]
        rows = pool.offers.iloc[looked_at].drop(columns="true_top").reset_index(drop=True)
        rows["price"] = (rows["price"] * levels[pool.shop[looked_at]]).round(2)
        if drift is not None:
            _drift_rows(rows, pool, drift, looked_at)
        shape = 1 / self.habits.variation**2
        quarantined = {
            reason: int(chance.poisson(len(delivered) * share * chance.gamma(shape, 1 / shape)))
            for reason, share in pool.quarantined.items()
        }
        day = date.isoformat()
        return Day(day, rows, delivered, _totals(pool, day, delivered, quarantined))


def _totals(pool: Pool, day: str, delivered: Integers, quarantined: dict[str, int]) -> DayTotals:
    """What is counted over all offers of the day; a damaged value is not a missing one."""
    names = (*COUNTRIES, MISSING)

    def by_country(rows: Integers) -> dict[str, int]:
        counts = np.bincount(pool.country[rows], minlength=len(names)).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    of_shops = np.bincount(pool.shop[delivered], minlength=len(pool.shops))
    return DayTotals(
        day=day,
        complete=True,
        offers=len(delivered),
        by_country=by_country(delivered),
        by_shop={pool.shops[shop]: int(of_shops[shop]) for shop in np.flatnonzero(of_shops)},
        missing={name: by_country(delivered[empty[delivered]]) for name, empty in pool.empty.items()},
        quarantined=quarantined,
        delivered=len(delivered) + sum(quarantined.values()),
        shops=int((of_shops > 0).sum()),
    )


def _activity(chance: np.random.Generator, days: int, shops: int, habits: Habits) -> Floats:
    """Gamma with mean 1, (days, shops)."""
    normal = chance.normal(size=(days, shops))
    for number in range(1, days):
        normal[number] *= np.sqrt(1 - habits.memory**2)
        normal[number] += habits.memory * normal[number - 1]
    shape = 1 / habits.variation**2
    return np.asarray(gamma.ppf(norm.cdf(normal), shape, scale=1 / shape))


def _drift_rates(rates: Floats, drift: Drift) -> None:
    """How many offers there are of what the drift affects."""
    affected = drift.affected
    if drift.kind == "new_shop":
        wanted = drift.amount / (1 - drift.amount) * rates.sum()
        rates[affected] = wanted / affected.sum()
    elif drift.kind == "language_missing":
        rates[affected] *= 1 - drift.amount
    elif drift.kind == "category_shift":
        rates[affected] *= drift.amount


def _drift_rows(rows: pd.DataFrame, pool: Pool, drift: Drift, looked_at: Integers) -> None:
    """What offers are like that the drift affects."""
    hit = np.flatnonzero(drift.affected[looked_at])
    if drift.kind == "price_unit":
        rows.loc[hit, "price"] *= PRICE_FACTOR
    elif drift.kind == "stale_taxonomy":
        rows.loc[hit, "taxonomy_known"] = False
    elif drift.kind in pool.altered:
        altered = pool.altered[drift.kind].iloc[looked_at[hit]]
        for name in altered.columns:
            rows.loc[hit, name] = altered[name].to_numpy()


def _places(values: pd.Series, names: tuple[str, ...]) -> Integers:
    """Place of each value in ``names``; ``len(names)`` for any other."""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(value, len(names)) for value in values])
