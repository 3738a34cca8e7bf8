"""Late labels against predictions: at equal age, weighted to all offers, and too few are said to be."""

from __future__ import annotations

import datetime
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import short_version
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.quality.compared import DecidedDay, Delivery
from ml.quality.corrections import CORRECTIONS_SCHEMA, DELIVERIES_SCHEMA
from ml.quality.feed import about_catalogued, keep_coming, usual_silence
from ml.quality.live import QualityReport, read_quality_report, write_live_quality
from ml.quality.questions import AGREEMENT, CATALOGUED, COMING, SHARES
from ml.quality.statistics import (
    arrival_curve,
    holm,
    mean_of,
    share_differences,
    spread_between_days,
    weights_at_equal_age,
    weights_of_mix,
    wilson,
)
from ml.runner import StageContext
from ml.serving.predictor import PREDICTION_SCHEMA
from ml.stages import LiveQualityParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Successor, Transition, Transitions

FIRST = datetime.date(2026, 9, 1)
V1, V2 = "1" * 64, "2" * 64
LEAVES = [f"{top}{number}" for top in "ab" for number in range(3)]


def iso(number: int) -> str:
    return (FIRST + datetime.timedelta(days=number)).isoformat()


class World:
    """Catalogued days and decisions about them, and the stage that compares the two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.decided: list[dict[str, Any]] = []
        self.deliveries: list[dict[str, Any]] = []
        self.days: dict[str, Path] = {}
        tops = [Category(top, None, top.upper()) for top in "ab"]
        leaves = [Category(leaf, leaf[0], leaf.upper()) for leaf in LEAVES]
        self.taxonomy = folder / "taxonomy"
        self.taxonomy.mkdir()
        Taxonomy([*tops, *leaves]).write(self.taxonomy / "taxonomy.parquet")
        moves = {"old": ["a0"], "torn": ["a1", "a2"]}
        Transitions(
            history=[V1, V2],
            transitions=[
                Transition(
                    from_id=former,
                    from_name=former,
                    from_path=former,
                    kind="split" if len(to) > 1 else "merged",
                    to=[Successor(category_id=category, share=1 / len(to)) for category in to],
                    origin="official",
                    confidence=1.0,
                    certain=len(to) == 1,
                    since=V2,
                    reason="",
                )
                for former, to in moves.items()
            ],
            adopted_on=["", iso(0)],
        ).write(self.taxonomy)

    def catalogue(
        self,
        number: int,
        predicted: Mapping[str, str | None],
        *,
        taxonomy: str = V2,
        model: str = "m1",
        marked: Sequence[str] = (),
    ) -> None:
        """A day of offers, with the category that each was given; some are marked for review."""
        folder = self.folder / iso(number)
        folder.mkdir()
        rows = [
            {
                "offer_id": offer,
                "category_id": category,
                "confidence": 0.9 if category else None,
                "needs_review": offer in marked,
                "model_version": model,
                "taxonomy_version": short_version(taxonomy),
            }
            for offer, category in predicted.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows, PREDICTION_SCHEMA), folder / "catalogued.parquet")
        offers = [{"offer_id": offer, "country": "DE" if len(offer) % 2 else "FR"} for offer in predicted]
        pq.write_table(pa.Table.from_pylist(offers, CLEAN_SCHEMA), folder / "offers.parquet")
        self.days[iso(number)] = folder

    def decide(self, number: int, offer: str, category: str, standing: str = "newest") -> None:
        self.decided.append(
            {
                "offer_id": offer,
                "category_id": category,
                "decided_as": category,
                "decided_at": datetime.datetime.fromisoformat(iso(number)) + datetime.timedelta(hours=9),
                "standing": standing,
                "source_file": "f",
                "source_row": len(self.decided) + 1,
            }
        )

    def run(self, **parameters: Any) -> QualityReport:
        output, checkpoints, corrections = (
            self.folder / name for name in ("output", "checkpoints", "decided")
        )
        for folder in (output, checkpoints, corrections):
            folder.mkdir()
        pq.write_table(
            pa.Table.from_pylist(self.decided, CORRECTIONS_SCHEMA), corrections / "corrections.parquet"
        )
        pq.write_table(
            pa.Table.from_pylist(self.deliveries, DELIVERIES_SCHEMA), corrections / "deliveries.parquet"
        )
        inputs = {
            "corrections": corrections,
            "catalog_taxonomy": self.taxonomy,
            "taxonomy_change": self.taxonomy,
        }
        for day, folder in self.days.items():
            inputs |= {f"catalogued_offers/{day}": folder, f"offers/{day}": folder}
        given = {"newest_day": max(self.days, default=iso(0)), **parameters}
        self.metrics = write_live_quality(
            StageContext(inputs, output, checkpoints, Progress("q")), LiveQualityParameters(**given)
        )
        return read_quality_report(output)

    def compared(self) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / "output" / "compared.parquet").to_pylist()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def fill(
    world: World,
    days: int,
    per_day: int = 80,
    right: Callable[[int, int], float] = lambda day, delay: 0.9,
    chosen: Callable[[str], float] = lambda predicted: 1.0,
    confused: Callable[[int], Mapping[str, str]] = lambda day: {},
    seed: int = 3,
    model: Callable[[int], str] = lambda day: "m1",
    share_labelled: Callable[[int], float] = lambda day: 0.2,
) -> None:
    """Days of offers whose labels take 0 to 4 days; those whose time has come by the last day are there."""
    draws = np.random.default_rng(seed)
    for day in range(days):
        predicted = {
            f"{'x' * draws.integers(1, 3)}{day}-{n}": str(draws.choice(LEAVES)) for n in range(per_day * 5)
        }
        world.catalogue(day, predicted, model=model(day))
        looked_at = [
            offer for offer in predicted if draws.random() < share_labelled(day) * chosen(predicted[offer])
        ]
        for offer in looked_at:
            delay = int(min(draws.geometric(0.45) - 1, 4))
            if day + delay >= days:
                continue
            truth = predicted[offer]
            if draws.random() >= right(day, delay):
                truth = confused(day).get(truth) or str(
                    draws.choice([leaf for leaf in LEAVES if leaf != truth])
                )
            world.decide(day + delay, offer, truth)


def levels(report: QualityReport) -> dict[str, str]:
    return {answer.question: answer.level for answer in report.answers}


def sentence(report: QualityReport, question: str) -> str:
    return next(answer.sentence for answer in report.answers if answer.question == question)


# Which prediction a decision is about


def test_a_decision_is_about_the_newest_day_up_to_it(world):
    world.catalogue(0, {"o": "a0"}, model="m1")
    world.catalogue(2, {"o": "a1"}, model="m2")
    world.catalogue(5, {"o": "a2"}, model="m3")
    world.decide(3, "o", "a1")
    world.run()
    (row,) = world.compared()
    assert (row["day"], row["delay_days"], row["model_version"], row["right"]) == (iso(2), 1, "m2", True)
    assert (row["country"], row["predicted_top"]) == ("DE", "a")


def test_only_the_newest_decision_on_an_offer_counts(world):
    world.catalogue(0, {"o": "a0"})
    world.decide(1, "o", "b0", standing="superseded")
    world.decide(2, "o", "a0")
    world.decide(2, "o", "a0", standing="repeated")
    report = world.run()
    assert (report.labels, report.confirmed) == (1, 1)


def test_decisions_that_are_about_no_catalogued_offer_are_counted_and_said(world):
    world.catalogue(2, {"later": "a0", "o": "a0"})
    world.catalogue(4, {"late": "a0"})
    world.decide(0, "o", "a0")
    world.decide(3, "late", "a0")
    world.decide(3, "stranger", "a0")
    report = world.run()
    assert report.unmatched == {"before": 1, "too_early": 1, "unknown": 1}
    assert "corrections compared with nothing: 1 of offers that no catalogued day has" in report.sentence
    assert world.metrics["unmatched"] == 3


def test_an_answer_for_review_is_right_if_the_decision_lies_below_it(world):
    world.catalogue(0, {"m": "a", "n": "a", "o": "a", "p": "a0"}, marked=["m", "n", "p"])
    for offer, category in (("m", "a1"), ("n", "b1"), ("o", "a1"), ("p", "a0")):
        world.decide(1, offer, category)
    world.run()
    found = {row["offer_id"]: (row["right"], row["right_in_force"]) for row in world.compared()}
    assert found == {"m": (True, True), "n": (False, False), "o": (False, False), "p": (True, True)}


def test_an_old_model_is_judged_in_its_own_taxonomy_first(world):
    world.catalogue(0, {"m": "old", "t": "torn", "u": "torn", "n": None}, taxonomy=V1)
    for offer, category in (("m", "a0"), ("t", "a1"), ("u", "a2"), ("n", "a0")):
        world.decide(1, offer, category)
    world.run()
    found = {
        row["offer_id"]: (row["predicted"], row["right"], row["right_in_force"]) for row in world.compared()
    }
    assert found == {
        "m": ("a0", True, True),
        "t": ("a1", True, True),
        "u": ("a1", True, False),  # a category of its own since; the model could not know
        "n": ("", False, False),
    }


# Too little to tell


def test_without_any_decision_the_answer_is_unknown_and_says_why(world):
    world.catalogue(0, {"o": "a0"})
    report = world.run()
    assert set(levels(report).values()) == {"UNKNOWN"}
    assert report.may_be_unknown
    assert "too few to tell: 0 labels of the recent days" in sentence(report, AGREEMENT)
    assert report.sentence == "no correction has come yet"


def test_without_a_catalogued_day_nothing_breaks(world):
    world.decide(0, "o", "a0")
    report = world.run()
    assert report.sentence.startswith("no day is catalogued yet")
    assert report.unmatched["unknown"] + report.unmatched["before"] == 1


def test_a_day_whose_labels_have_hardly_come_is_said_to_be_too_young(world):
    for day in range(12):
        world.catalogue(day, {f"{day}-{n}": "a0" for n in range(40)})
        for n in range(40):
            delay = 5 if n else 0
            if day + delay < 12:
                world.decide(day + delay, f"{day}-{n}", "a0")
    report = world.run()
    young = [day.day for day in report.days if day.too_young]
    assert young == [iso(day) for day in range(7, 12)]
    assert f"5 days are too young to judge ({young[0]} to {young[-1]})" in report.sentence
    assert report.days[-1].completeness == pytest.approx(1 / 40, abs=0.01)
    assert report.delays.median_days == 5


def test_a_feed_of_mistakes_only_says_nothing_of_agreement(world):
    fill(world, 12, right=lambda day, delay: 0.0)
    assert "the feed holds mistakes only" in sentence(world.run(), AGREEMENT)
    assert world.metrics[f"level_{AGREEMENT}"] == 1


# What is found, and what is not


def test_days_as_before_are_ok_though_quick_labels_are_others_than_late_ones(world):
    """Quick labels are right 97 % of the time, late ones 60 %: young days look good, and nobody is misled."""
    fill(world, 28, right=lambda day, delay: 0.97 if delay == 0 else 0.6)
    report = world.run()
    assert set(levels(report).values()) == {"OK"}
    newest = report.days[-1]
    assert newest.right - report.right > 0.1
    assert newest.usual == pytest.approx(0.97, abs=0.03)
    assert report.right_low < report.right < report.right_high


def test_late_labels_that_are_worse_do_not_hide_a_fall(world):
    """The same, and the newest week fell to the level that old days have with all their labels."""
    fill(world, 28, right=lambda day, delay: (0.97 if delay == 0 else 0.6) - (0.2 if day >= 21 else 0.0))
    report = world.run()
    assert levels(report)[AGREEMENT] == "ERROR"
    finding = report.answers[0].findings[0]
    assert finding.value < finding.usual_low
    assert finding.sentence in sentence(report, AGREEMENT)


def test_a_fall_in_one_country_is_found_there(world):
    fill(world, 28, per_day=120)
    for decision in world.decided:
        day, is_german = int(decision["offer_id"].lstrip("x").split("-")[0]), len(decision["offer_id"]) % 2
        if day >= 21 and is_german and decision["source_row"] % 3:
            decision["category_id"] = "b0"
    report = world.run()
    assert any(finding.group == "country DE" for finding in report.answers[0].findings)
    assert not any(finding.group == "country FR" for finding in report.answers[0].findings)


A0_FOR_B1 = {"a0": "b1"} | {leaf: leaf for leaf in LEAVES[1:]}
AS_THEY_ARE = {leaf: leaf for leaf in LEAVES}


def test_a_category_that_comes_to_be_predicted_too_often_is_named_with_its_shares(world):
    fill(
        world,
        28,
        right=lambda day, delay: 0.4,
        confused=lambda day: A0_FOR_B1 if day >= 21 else AS_THEY_ARE,
    )
    report = world.run()
    assert levels(report)[SHARES] in ("WARN", "ERROR")
    found = {finding.segment: finding for finding in report.answers[1].findings}
    assert found["A > A0"].effect > 0.03
    assert found["B > B1"].effect < -0.03
    assert "A > A0: predicted " in sentence(report, SHARES)
    assert "points more often than people decide, before 0.0 points" in found["A > A0"].sentence


def test_a_model_that_is_imperfect_in_the_same_way_every_day_is_no_finding(world):
    """``a0`` is wrong in half of its offers on every day: the table says so, and nobody is called for it."""
    fill(world, 28, right=lambda day, delay: 0.5, confused=lambda day: A0_FOR_B1)
    report = world.run()
    assert levels(report)[SHARES] == "OK"
    rows = pq.read_table(world.folder / "output" / "shares.parquet").to_pylist()
    (row,) = [row for row in rows if row["category_id"] == "a0"]
    assert (row["verdict"], row["difference"] > 0.05) == ("predicted too often", True)


def test_a_model_that_is_less_one_sided_than_the_one_before_is_no_finding(world):
    fill(
        world,
        28,
        right=lambda day, delay: 0.5,
        confused=lambda day: A0_FOR_B1 if day < 21 else AS_THEY_ARE,
    )
    assert levels(world.run())[SHARES] == "OK"


# Which days are judged


def judged(report: QualityReport) -> list[str]:
    return [day.day for day in report.days if day.recent]


def test_a_new_model_is_judged_on_its_own_days_as_soon_as_they_have_labels(world):
    fill(
        world,
        28,
        right=lambda day, delay: 0.9 if day < 25 else 0.6,
        model=lambda day: "m1" if day < 25 else "m2",
    )
    report = world.run()
    days = judged(report)
    assert set(days) <= {iso(25), iso(26), iso(27)}
    assert (report.judged_model, levels(report)[AGREEMENT]) == ("m2", "ERROR")
    assert {name: world.metrics[name] for name in ("judged_model", "judged_from", "judged_until")} == {
        "judged_model": "m2",
        "judged_from": days[0],
        "judged_until": days[-1],
    }
    assert [day.usual is None for day in report.days] == [True] * 25 + [False] * 3


def test_a_new_model_with_too_few_labels_leaves_the_one_before_judged(world):
    fill(
        world,
        28,
        right=lambda day, delay: 0.9 if day < 19 else 0.6,
        model=lambda day: "m1" if day < 26 else "m2",
        share_labelled=lambda day: 0.2 if day < 26 else 0.02,
    )
    report = world.run()
    assert judged(report) == [iso(day) for day in range(19, 26)]
    assert (report.judged_model, levels(report)[AGREEMENT]) == ("m1", "ERROR")


# Whether the feed lives, and knows these offers


def test_a_feed_that_ended_is_noticed_though_its_labels_were_good(world):
    fill(world, 20)
    for day in range(20, 34):
        world.catalogue(day, {f"late{day}": "a0"})
    report = world.run()
    assert levels(report)[COMING] == "WARN"
    assert sentence(report, COMING) == (
        f"the newest decision is of {iso(19)}, 14 days before the newest catalogued day ({iso(33)}); usually "
        "one comes within 1 day"
    )
    assert not report.may_be_unknown


def test_a_feed_whose_ids_became_others_is_an_error(world):
    fill(world, 28)
    for decision in world.decided:
        if decision["decided_at"].date() >= FIRST + datetime.timedelta(days=21):
            decision["offer_id"] = f"new-{decision['offer_id']}"
    report = world.run()
    assert levels(report)[CATALOGUED] == "ERROR"
    assert sentence(report, CATALOGUED).startswith("100.0% of the ")
    assert "are about offers that no catalogued day has, 0" in sentence(report, CATALOGUED)


def test_a_feed_that_never_knew_these_offers_is_a_warning(world):
    fill(world, 20)
    for decision in world.decided:
        decision["offer_id"] = f"x-{decision['offer_id']}"
    report = world.run()
    assert levels(report)[CATALOGUED] == "WARN"
    assert levels(report)[AGREEMENT] == "UNKNOWN"


def decided(days: range, decisions: int = 30, unknown: int = 3) -> dict[str, DecidedDay]:
    return {iso(day): DecidedDay(decisions, unknown) for day in days}


def test_a_share_of_unknown_offers_that_is_always_there_is_no_finding_and_more_is():
    half = decided(range(7, 40), unknown=15)
    assert about_catalogued(half, iso(0)).level == "OK"
    assert about_catalogued(half | decided(range(36, 40), unknown=28), iso(0)).level == "WARN"


def test_decisions_about_offers_from_before_the_first_day_say_nothing():
    beginning = decided(range(7), unknown=30)
    assert about_catalogued(beginning, iso(0)).level == "UNKNOWN"
    assert about_catalogued(beginning | decided(range(7, 12)), iso(0)).level == "OK"


def test_a_feed_that_comes_once_a_week_may_be_silent_for_a_week():
    days = decided(range(35))
    weekly = [Delivery(loaded_on=iso(7 * week + 1), decided_until=iso(7 * week - 1)) for week in range(1, 6)]
    assert usual_silence(list(days), weekly) == 9
    assert keep_coming(days, weekly, iso(34 + 16)).level == "OK"
    assert keep_coming(days, weekly, iso(34 + 17)).level == "WARN"
    assert keep_coming(days, [], iso(34 + 16)).level == "WARN"


def test_one_outage_does_not_become_usual():
    days = decided(range(20)) | decided(range(50, 60))
    assert usual_silence(list(days), []) == 1


def test_a_feed_of_a_few_days_is_given_time():
    few = decided(range(2))
    assert keep_coming(few, [], iso(29)).level == "OK"
    assert keep_coming(few, [], iso(30)).level == "WARN"


@pytest.mark.parametrize(("per_day", "right", "may_be"), [(1, 0.9, False), (80, 0.0, True)])
def test_after_four_weeks_of_labels_no_answer_is_news_unless_people_report_mistakes_only(
    world, per_day, right, may_be
):
    fill(world, 40, per_day=per_day, right=lambda day, delay: right)
    report = world.run()
    assert levels(report)[AGREEMENT] == "UNKNOWN"
    assert report.may_be_unknown is may_be


def test_a_biased_choice_of_offers_is_evened_out(world):
    """People look ten times as often at what the model calls ``a0``, where it is wrong half of the time."""
    fill(
        world,
        20,
        per_day=150,
        right=lambda day, delay: 1.0,
        chosen=lambda predicted: 3.0 if predicted == "a0" else 0.3,
    )
    for number, decision in enumerate(world.decided):
        if decision["category_id"] == "a0" and number % 2:
            decision["category_id"] = "a1"
    report = world.run()
    assert report.right < 0.75
    assert report.right_weighted == pytest.approx(1 - 0.5 / 6, abs=0.03)


def test_tables_and_plots_are_written_and_the_same_again(world, tmp_path):
    fill(world, 10)
    report = world.run()
    output = tmp_path / "output"
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(first) == {
        "quality.json",
        "compared.parquet",
        "days.parquet",
        "groups.parquet",
        "shares.parquet",
        "accuracy.png",
        "shares.png",
        "decisions.png",
        "report.html",
    }
    assert [answer.picture for answer in report.answers] == [
        "accuracy.png",
        "shares.png",
        "decisions.png",
        "decisions.png",
    ]
    page = (output / "report.html").read_text()
    assert page.count("<img alt=") == page.count("src='data:image/png;base64,") == 3
    assert all(html.escape(answer.sentence) in page for answer in report.answers)
    assert html.escape(report.sentence) in page
    assert "<td>A &gt; A0</td>" in page
    assert pq.read_table(output / "days.parquet").num_rows == len(report.days) == 10
    assert {group.kind for group in report.groups} == {"country", "department", "model version"}
    for name in ("output", "checkpoints", "decided"):
        (tmp_path / name).rename(tmp_path / f"{name}-before")
    world.run()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first


# Statistics


def test_the_arrival_curve_sees_through_the_missing_late_labels_of_young_days():
    draws = np.random.default_rng(1)
    ages = list(range(30))
    delays = [d[d <= age] for age in ages for d in [np.minimum(draws.geometric(0.4, 400) - 1, 6)]]
    curve = arrival_curve(ages, delays)
    expected = 1 - 0.6 ** np.arange(1, 7)
    assert curve[:6] == pytest.approx(expected, abs=0.02)
    assert curve[6] == 1
    assert len(arrival_curve([3], [np.zeros(0, np.int64)])) == 0


def test_older_labels_get_the_ages_of_the_recent_ones():
    older = np.array([0, 0, 1, 2])
    weights = weights_at_equal_age(older, np.array([0, 2]), np.array([10, 30]))
    assert weights == pytest.approx([0.25 / 2 + 0.75 / 4] * 2 + [0.75 / 4] * 2)


def test_labels_get_the_mix_of_all_offers_and_rare_categories_that_of_their_department():
    category = ["x"] * 6 + ["y"] * 2 + ["z"] * 4
    weights = weights_of_mix(
        category, ["t"] * 12, {"x": 50, "y": 20, "z": 30}, {"x": "t", "y": "t", "z": "t"}, np.ones(12)
    )
    assert weights.sum() == pytest.approx(1)
    assert weights[:6].sum() == pytest.approx(0.5)
    assert weights[6] == weights[8]


def test_days_that_differ_widen_the_interval_and_days_that_do_not_leave_it():
    day = np.repeat(np.arange(20), 100)
    equal = np.tile(np.arange(100) < 90, 20)
    unequal = np.concatenate([np.arange(100) < (80 if number % 2 else 100) for number in range(20)])
    narrow, wide = spread_between_days(equal, day), spread_between_days(unequal, day)
    assert narrow.variance < 0.0005 < 0.005 < wide.variance < 0.02
    weights = np.ones(2000)
    assert mean_of(unequal.astype(float), weights, day, wide).variance > 4 * (
        mean_of(equal.astype(float), weights, day, narrow).variance
    )


def test_pairs_that_agree_add_nothing_to_a_difference():
    predicted, actual = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    as_predicted, as_decided, difference, _ = share_differences(predicted, actual, np.ones(4), 2)
    assert (as_predicted.tolist(), as_decided.tolist()) == ([0.5, 0.5], [0.25, 0.75])
    assert difference.tolist() == [0.25, -0.25]


def test_wilson_and_holm_are_the_known_ones():
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
