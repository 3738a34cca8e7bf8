"""What is usual, and what is not: on days that are made up, so that the truth is known."""

import datetime
import functools
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.drift.answers import LEVELS, SERIES_SCHEMA
from ml.drift.day_series import SIGNS
from ml.drift.expected import weekdays_are_known
from ml.drift.measures import DAMAGES, NEW
from ml.drift.questions import (
    AGREEMENT,
    COMPLETENESS,
    DAMAGED_TITLES,
    HARMLESS,
    LIMITS,
    PRICE_OVER_USUAL,
    PRICES,
    QUESTIONS,
    SHOP_MIX,
    SURENESS,
    TAXONOMY_IN_FORCE,
    UNDAMAGED,
    VOLUME,
    WORDING,
    Limits,
)
from ml.drift.series import expectations, judge

COUNTRIES = {"DE": 0.40, "FR": 0.30, "IT": 0.16, "ES": 0.10, "AT": 0.03, "CZ": 0.01}
MONDAY = datetime.date(2026, 1, 5)


def date(number):
    return (MONDAY + datetime.timedelta(days=number)).isoformat()


def table(rows):
    columns = list(zip(*rows, strict=True)) or [[]] * len(SERIES_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SERIES_SCHEMA, strict=True)]
    return pa.table(arrays, schema=SERIES_SCHEMA)


def a_day(
    number,
    *,
    volume=None,
    missing=0.10,
    dearer=None,
    agrees=0.85,
    odd=0.0,
    stale=0.0,
    weekend=1.0,
    between=0.08,
    offers=40_000,
    looked_at=4_000,
):
    """A day of a feed whose countries go up and down by ``between``, each on its own.

    Equal numbers give equal draws, so that days differ in nothing but what they are told to.
    """
    draws, on = np.random.default_rng(number), date(number)
    expected = {
        country: share * offers * math.exp(between * draws.normal()) * (volume or {}).get(country, 1.0)
        for country, share in COUNTRIES.items()
    }
    factor = weekend if number % 7 >= 5 else 1.0
    counts = {country: int(draws.poisson(mean * factor)) for country, mean in expected.items()}
    total = sum(counts.values())
    rows = [(on, VOLUME, "offers", "", "", "count", total, total, None)]
    for country, count in counts.items():
        group = f"country {country}"
        rows.append((on, VOLUME, "offers", group, "", "count", count, count, None))
        if not count:
            continue
        seen = max(int(looked_at * count / total), 1)
        rows.append((on, SHOP_MIX, "shop", "", f"shop {country}", "share", count / total, total, None))
        for question, measure, share in (
            (COMPLETENESS, "missing", missing),
            (AGREEMENT, "fast model and student", agrees),
        ):
            logit = math.log(share / (1 - share)) + 0.05 * draws.normal()
            found = draws.binomial(seen, 1 / (1 + math.exp(-logit))) / seen
            rows.append((on, question, measure, group, "description", "share", found, seen, None))
        mean = 0.02 * draws.normal() + draws.normal() / math.sqrt(seen) + (dearer or {}).get(country, 0.0)
        rows.append((on, PRICES, PRICE_OVER_USUAL, group, "", "number", mean, seen, 1.0))
    odd_titles = draws.binomial(looked_at, odd) / looked_at
    rows.append((on, WORDING, "titles", "", "with odd characters", "share", odd_titles, looked_at, None))
    rows.append((on, TAXONOMY_IN_FORCE, "categories", "", "retired", "share", stale, looked_at, None))
    return table(rows)


def days(first, last, **changes):
    return [a_day(number, **changes) for number in range(first, last)]


@functools.cache
def reference(count=28, **changes):
    return pa.concat_tables(days(0, count, **changes))


def judged(number=30, *, today=None, of=28, earlier=(), **changes):
    today = a_day(number, **changes) if today is None else today
    return judge(date(number), today, reference(of), list(earlier))


def level(judgements):
    return max((j.level for j in judgements.values()), key=LEVELS.__getitem__)


def levels(judgements):
    return {name: j.level for name, j in judgements.items() if j.level != "OK"}


def first(judgements, question):
    return judgements[question].findings[0]


# Usual days


def test_every_question_is_answered_in_order():
    asked = {question.name for question in QUESTIONS}
    judgements = judged()
    assert list(judgements) == [question.name for question in QUESTIONS]
    assert all(judgements[name].question == name for name in asked)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 14, 28])
def test_usual_days_are_usual_however_short_the_reference(of):
    of_days = reference(of)
    errors = warnings = 0
    for number in range(35, 75):
        judgements = judge(date(number), a_day(number), of_days, days(number - 6, number))
        errors += level(judgements) == "ERROR"
        warnings += level(judgements) == "WARN"
    assert errors == 0
    assert warnings <= 2


def test_a_day_of_the_reference_is_usual():
    judgements = judge(date(3), a_day(3), reference(), [])
    assert "WARN" not in levels(judgements).values()
    assert "ERROR" not in levels(judgements).values()


@pytest.mark.parametrize("of", [1, 5, 7, 28])
def test_equal_days_are_ok_and_their_ranges_are_finite(of):
    same = [a_day(0).set_column(0, "day", pa.array([date(n)] * a_day(0).num_rows)) for n in range(of + 1)]
    judgements = judge(date(of), same[of], pa.concat_tables(same[:of]), [])
    assert {j.level for j in judgements.values() if j.series} == {"OK"}
    for question in (VOLUME, COMPLETENESS, PRICES):
        ranges = expectations(question, date(of), same[of], pa.concat_tables(same[:of]))
        low, value, high = (ranges[name].to_numpy() for name in ("low", "value", "high"))
        assert np.isfinite(low).all()
        assert np.isfinite(high).all()
        assert (low < value).all()
        assert (value < high).all()


# Days that are not


def test_a_country_that_is_gone_is_an_error_and_the_sentence_says_so():
    judgements = judged(volume={"AT": 0.0})
    finding = first(judgements, VOLUME)
    assert (finding.level, finding.group, finding.value) == ("ERROR", "country AT", 0.0)
    assert finding.sentence == (
        f"offers, country AT: 0, usually {finding.usual_low:,.0f}–{finding.usual_high:,.0f}"
    )
    assert finding.usual_low < finding.usual < finding.usual_high


def test_a_country_without_a_row_is_a_country_without_offers():
    whole = a_day(30)
    without = whole.filter(pa.compute.not_equal(whole["group"], "country AT"))
    finding = first(judged(today=without), VOLUME)
    assert (finding.level, finding.group, finding.value) == ("ERROR", "country AT", 0.0)


def test_a_segment_of_one_in_a_hundred_that_is_gone_is_a_warning():
    judgements = judged(volume={"CZ": 0.0})
    assert judgements[VOLUME].level == "WARN"
    assert first(judgements, VOLUME).group == "country CZ"


def test_a_day_without_offers_is_an_error_of_volume_and_unknown_in_all_else():
    nothing = table([(date(30), VOLUME, "offers", "", "", "count", 0.0, 0.0, None)])
    judgements = judged(today=nothing)
    assert judgements.pop(VOLUME).level == "ERROR"
    assert {j.level for j in judgements.values()} == {"UNKNOWN"}


def test_a_day_of_which_nothing_is_known_is_unknown():
    assert {j.level for j in judged(today=SERIES_SCHEMA.empty_table()).values()} == {"UNKNOWN"}


def test_a_shop_that_the_reference_does_not_have_is_found():
    today = a_day(30)
    new = table([(date(30), SHOP_MIX, "shop", "", "shop new", "share", 0.08, 40_000.0, None)])
    finding = first(judged(today=pa.concat_tables([today, new])), SHOP_MIX)
    assert (finding.segment, finding.level) == ("shop new", "ERROR")
    assert finding.usual < 0.0001
    assert "shop new: 8.0 %" in finding.sentence


def test_what_never_happened_is_found_once_it_happens_often():
    assert judged(odd=0.05)[WORDING].level == "ERROR"
    assert judged(odd=0.01)[WORDING].level == "WARN"
    assert judged(odd=0.0005)[WORDING].level == "OK"


@pytest.mark.parametrize("of", [1, 3, 7, 28])
def test_prices_a_hundred_times_too_high_in_one_country_are_an_error_after_any_reference(of):
    finding = first(judged(of=of, dearer={"ES": math.log(100)}), PRICES)
    assert (finding.level, finding.group, finding.days) == ("ERROR", "country ES", 1)
    assert f"country ES: {math.exp(finding.value):.0f} times, usually " in finding.sentence


@pytest.mark.parametrize("of", [1, 3, 7, 28])
def test_a_third_more_missing_values_everywhere_is_an_error_after_any_reference(of):
    assert judged(of=of, missing=0.43)[COMPLETENESS].level == "ERROR"


def test_a_difference_that_is_certain_but_small_is_ok():
    # In two years' offers even this would be significant.
    judgements = judged(looked_at=4_000_000, offers=40_000_000, missing=0.11, between=0.0)
    assert judgements[COMPLETENESS].level == "OK"


def test_a_reference_of_one_day_gives_wider_ranges_than_one_of_four_weeks():
    def width(of):
        ranges = expectations(VOLUME, date(30), a_day(30), reference(of)).to_pylist()
        total = next(r for r in ranges if r["day"] == date(30) and not r["group"])
        return math.log(total["high"] / total["low"])

    assert width(1) > 1.5 * width(28) > 0


@pytest.mark.parametrize("of", [14, 28])
def test_three_fifths_of_all_offers_are_an_error_and_a_week_of_reference_warns(of):
    all_of_them = dict.fromkeys(COUNTRIES, 0.6)
    finding = first(judged(of=of, volume=all_of_them), VOLUME)
    assert (finding.level, finding.group) == ("ERROR", "")
    assert judged(of=7, volume=all_of_them)[VOLUME].level in ("WARN", "ERROR")


def of_one_series(question, measure, segment, values, *, kind="share", group="", offers=4_000.0):
    rows = [
        (date(n), question, measure, group, segment, kind, value, offers, None)
        for n, value in enumerate(values)
    ]
    today, before = table(rows[-1:]), table(rows[:-1])
    return judge(date(len(rows) - 1), today, before)[question]


# Bad days in the reference


@pytest.mark.parametrize("bad", [1, 2, 4, 6])
def test_an_outage_in_the_reference_does_not_make_the_next_one_usual(bad):
    of_days = pa.concat_tables([*days(0, 28 - bad), *days(28 - bad, 28, volume={"IT": 0.0}, odd=0.5)])
    judgements = judge(date(30), a_day(30, volume={"IT": 0.0}, odd=0.5), of_days)
    assert first(judgements, VOLUME).group == "country IT"
    assert judgements[VOLUME].level == judgements[WORDING].level == "ERROR"
    assert "ERROR" not in levels(judge(date(30), a_day(30), of_days)).values()


def test_two_outages_of_one_weekday_do_not_make_a_third_one_usual():
    of_days = pa.concat_tables([a_day(n, volume={"IT": 0.0} if n in (2, 9) else {}) for n in range(28)])
    assert first(judge(date(30), a_day(30, volume={"IT": 0.0}), of_days), VOLUME).group == "country IT"


@pytest.mark.parametrize("without", [(5, 12, 19, 26), (1, 8, 14, 20), tuple(range(19, 28))])
def test_what_comes_about_again_and_again_or_for_long_is_usual(without):
    # Closed on Saturdays, a shop that sends now and then, one that sends no more.
    of_days = pa.concat_tables([a_day(n, volume={"AT": 0.0} if n in without else {}) for n in range(28)])
    assert judge(date(33), a_day(33, volume={"AT": 0.0}), of_days)[VOLUME].level == "OK"


# Series that are there no more


def without_prices(number, *countries):
    rows = a_day(number).to_pylist()
    return table(
        [
            tuple(row.values())
            for row in rows
            if row["question"] != PRICES or row["group"] not in {f"country {name}" for name in countries}
        ]
    )


def test_what_can_be_measured_no_more_is_a_finding_and_not_left_out():
    judgement = judged(today=without_prices(30, "DE", "IT"))[PRICES]
    assert [(f.level, f.group, f.value) for f in judgement.findings] == [
        ("ERROR", "country DE", 0.0),
        ("ERROR", "country IT", 0.0),
    ]
    assert re.fullmatch(
        r"price over usual, country DE: cannot be measured any more on any of 1,\d{3} offers, "
        r"usually on 100\.0 % of them",
        judgement.findings[0].sentence,
    )
    assert judgement.series == len(COUNTRIES)
    assert judged(today=without_prices(30, "AT"))[PRICES].level == "WARN"
    # Of fewer than a hundred offers nothing is said.
    assert judged(today=without_prices(30, "CZ"))[PRICES].level == "OK"


def test_a_question_that_was_not_asked_today_is_unknown():
    assert judged(today=without_prices(30, *COUNTRIES))[PRICES].level == "UNKNOWN"


# Directions and rare events


@pytest.mark.parametrize(
    ("question", "measure", "segment"),
    [
        (COMPLETENESS, "brand", "missing"),
        (COMPLETENESS, "delivered rows", "quarantined"),
        (UNDAMAGED, "titles", "with mojibake"),
        (PRICES, "prices", "of 0"),
        (SURENESS, "offers", "to review"),
    ],
)
def test_less_of_what_is_bad_is_never_an_error_and_more_of_it_is(question, measure, segment):
    assert of_one_series(question, measure, segment, [0.4] * 14 + [0.0]).level == "WARN"
    assert of_one_series(question, measure, segment, [0.0] * 14 + [0.4]).level == "ERROR"


def test_more_agreement_is_never_an_error_and_less_of_it_is():
    assert of_one_series(AGREEMENT, "fast model and student", "agree", [0.6] * 14 + [0.95]).level == "WARN"
    assert of_one_series(AGREEMENT, "fast model and student", "agree", [0.95] * 14 + [0.6]).level == "ERROR"


def test_fewer_letters_beyond_a_to_z_are_an_error():
    segment = "with letters beyond a to z"
    assert of_one_series(UNDAMAGED, "titles", segment, [0.4] * 14 + [0.0]).level == "ERROR"


def test_every_rule_of_one_direction_or_segment_is_about_a_series_that_there_is():
    assert set(DAMAGED_TITLES) == {"with signs of damaged encoding", *DAMAGES}
    signs = {(sign.question, sign.measure, sign.segment) for sign in SIGNS}
    for harmless in HARMLESS:
        if harmless.measure == "titles":
            assert {(harmless.question, "titles", s) for s in harmless.segments} <= signs
        if harmless.question == SHOP_MIX:
            assert harmless.segments == (NEW,)


@pytest.mark.parametrize(
    ("question", "measure", "segment", "error"),
    [
        (PRICES, "prices", "above 20 times the usual", 0.0075),
        (UNDAMAGED, "titles", "with signs of damaged encoding", 0.014),
    ],
)
def test_rare_events_are_an_error_from_about_a_point_of_all_offers(question, measure, segment, error):
    usual = [0.0005, 0.001, 0.0, 0.00075] * 4
    assert of_one_series(question, measure, segment, [*usual, error]).level == "ERROR"
    assert of_one_series(question, measure, segment, [*usual, 0.001]).level == "OK"
    assert of_one_series(question, measure, segment, [*usual, error], group="country IT").level == "WARN"


# Sentences


def said(values, question=COMPLETENESS, measure="brand", segment="missing", **kind):
    return of_one_series(question, measure, segment, values, **kind).findings[0].sentence


def test_a_value_never_reads_like_the_end_of_its_range():
    found = [said([0.10] * 14 + [0.10 + place / 4_000]) for place in range(120, 200)]
    for sentence in found:
        value, low, high = re.fullmatch(r"brand, missing: ([\d.]+) %, usually (.+)–(.+) %", sentence).groups()
        assert float(low) < float(high) < float(value)
        assert len(value) <= 6


def test_a_range_of_next_to_nothing_starts_at_zero_and_keeps_the_figure_that_tells():
    assert re.fullmatch(
        r"brand, missing: 8\.0 %, usually 0–0\.\d{1,2} %", said([0.0] * 14 + [0.08], offers=20_000.0)
    )


def test_no_range_goes_beyond_what_a_number_can_be():
    findings = [
        of_one_series(SURENESS, "confidence", "", [0.97, 0.8, 0.99, 0.3], kind="number"),
        of_one_series(WORDING, "title length", "", [2.0, 3.0, 2.5, 60.0], kind="number"),
    ]
    for judgement in findings:
        for finding in judgement.findings:
            assert finding.usual_low >= 0
            assert "usually -" not in finding.sentence
    assert findings[1].findings[0].sentence.startswith("mean title length: 60.0 characters, usually ")
    ranges = expectations(
        SURENESS,
        date(1),
        table([(date(1), SURENESS, "confidence", "", "", "number", 0.9, 4_000.0, None)]),
        table([(date(0), SURENESS, "confidence", "", "", "number", 0.98, 4_000.0, None)]),
    )
    assert ranges["high"].to_pylist() == [1.0, 1.0]


def test_what_concerns_most_offers_comes_first_and_a_country_before_all_offers_that_it_moves():
    judgements = judged(volume={"IT": 0.0, "AT": 0.0})
    assert [f.group for f in judgements[VOLUME].findings[:2]] == ["country IT", "country AT"]
    judgements = judged(dearer={"DE": 0.8, "CZ": 3.0})
    assert [f.group for f in judgements[PRICES].findings if f.group] == ["country DE", "country CZ"]


# The last week


def test_a_small_shift_that_stays_is_found_by_the_week():
    changes = {"agrees": 0.81}
    alone = judged(40, **changes)
    lasting = judged(40, earlier=days(34, 40, **changes), **changes)
    assert alone[AGREEMENT].level == "OK"
    finding = first(lasting, AGREEMENT)
    assert (finding.level, finding.days) == ("WARN", 7)
    assert "over 7 days" in finding.sentence


def test_a_week_that_was_unusual_until_yesterday_is_not_found_today():
    judgements = judged(40, earlier=days(34, 40, agrees=0.70))
    assert judgements[AGREEMENT].level == "OK"


def test_two_days_are_no_week_and_older_days_do_not_count():
    changes = {"agrees": 0.81}
    for earlier in (days(39, 40, **changes), days(28, 33, **changes)):
        assert judged(40, earlier=earlier, **changes)[AGREEMENT].level == "OK"


# Weekdays


def test_weekdays_are_known_from_two_of_each():
    assert weekdays_are_known(date(n) for n in range(14))
    assert not weekdays_are_known(date(n) for n in range(13))
    assert not weekdays_are_known([])


def test_a_quiet_sunday_is_usual_and_a_quiet_wednesday_is_not():
    of_days = reference(28, weekend=0.5, between=0.03)
    sunday, wednesday = 34, 37
    quiet = dict.fromkeys(COUNTRIES, 0.5)
    assert judge(date(sunday), a_day(sunday, weekend=0.5), of_days)[VOLUME].level == "OK"
    assert judge(date(wednesday), a_day(wednesday, volume=quiet), of_days)[VOLUME].level == "ERROR"
    busy = judge(date(sunday), a_day(sunday), of_days)[VOLUME]
    assert busy.level == "ERROR"
    assert busy.findings[0].usual == pytest.approx(20_000, rel=0.15)


def test_expectations_follow_the_weekday_and_cover_all_days():
    of_days = reference(28, weekend=0.5, between=0.03)
    changes = {"weekend": 0.5, "between": 0.03}
    found = expectations(VOLUME, date(34), a_day(34, **changes), of_days, days(31, 34, **changes)).to_pylist()
    total = {r["day"]: r for r in found if not r["group"]}
    assert list(total) == [date(n) for n in (*range(28), 31, 32, 33, 34)]
    assert total[date(34)]["expected"] < 0.6 * total[date(31)]["expected"]
    usual = [r for r in found if r["low"] <= r["value"] <= r["high"]]
    assert len(usual) >= 0.97 * len(found)


# Predictions of a taxonomy that is no longer in force


@pytest.mark.parametrize(
    ("stale", "expected"), [(0.0, "OK"), (0.0003, "WARN"), (0.01, "WARN"), (0.02, "ERROR")]
)
def test_one_stale_prediction_is_a_warning_and_one_in_fifty_an_error(stale, expected):
    judgement = judged(stale=stale)[TAXONOMY_IN_FORCE]
    assert (judgement.level, judgement.series) == (expected, 1)
    if stale:
        assert judgement.findings[0].sentence.startswith("categories, retired: ")
        assert judgement.findings[0].sentence.endswith(" %, expected is none")


# Too little to tell


def test_fewer_offers_than_the_least_are_unknown_but_their_number_is_judged():
    judgements = judged(offers=90, looked_at=90, volume={})
    assert judgements[AGREEMENT].level == "UNKNOWN"
    assert judgements[VOLUME].level == "ERROR"


def test_a_reference_of_fewer_offers_than_the_least_is_unknown():
    few = reference(1, offers=60, looked_at=60)
    assert judge(date(30), a_day(30), few)[AGREEMENT].level == "UNKNOWN"


# Invariants


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), of=st.sampled_from([1, 4, 9, 28]))
def test_the_order_of_rows_and_of_days_does_not_matter(seed, of):
    draws = np.random.default_rng(seed)
    today, before, earlier = a_day(30, missing=0.2, volume={"IT": 0.0}), reference(of), days(26, 30)

    def shuffled(rows):
        return rows.take(pa.array(draws.permutation(rows.num_rows)))

    straight = judge(date(30), today, before, earlier)
    mixed = judge(date(30), shuffled(today), shuffled(before), [shuffled(t) for t in earlier[::-1]])
    assert levels(straight) == levels(mixed)
    for name, judgement in straight.items():
        assert [f.sentence for f in judgement.findings] == [f.sentence for f in mixed[name].findings]


@settings(max_examples=40, deadline=None)
@given(
    shifts=st.tuples(st.floats(0, 6), st.floats(0, 6)).map(sorted),
    side=st.sampled_from([-1, 1]),
    of=st.sampled_from([1, 3, 7, 14, 28]),
    series=st.sampled_from(["share", "count", "number"]),
    lasting=st.booleans(),
)
def test_a_larger_shift_never_gives_a_milder_level(shifts, side, of, series, lasting):
    place = {
        "share": (COMPLETENESS, "country IT"),
        "count": (VOLUME, "country IT"),
        "number": (PRICES, "country IT"),
    }
    question, group = place[series]
    of_days, earlier = reference(of), days(27, 30) if lasting else []
    usual = next(
        r["expected"]
        for r in expectations(question, date(30), a_day(30), of_days).to_pylist()
        if (r["day"], r["group"]) == (date(30), group)
    )

    def moved(shift):
        rows = a_day(30).to_pylist()
        for row in rows:
            if (row["question"], row["group"]) == (question, group):
                if series == "share":
                    row["value"] = 1 / (1 + (1 / usual - 1) * math.exp(-side * shift))
                elif series == "count":
                    row["value"] = usual * math.exp(side * shift)
                else:
                    row["value"] = usual + side * shift
        return judge(date(30), pa.Table.from_pylist(rows, SERIES_SCHEMA), of_days, earlier)[question]

    mild, strong = (moved(shift) for shift in shifts)
    assert LEVELS[strong.level] >= LEVELS[mild.level]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), kept=st.floats(0, 1), of=st.integers(1, 16))
def test_series_that_are_missing_here_and_there_break_nothing(seed, kept, of):
    draws = np.random.default_rng(seed)

    def thinned(rows):
        return rows.filter(pa.array(draws.random(rows.num_rows) < kept))

    before, today = thinned(reference(of)), thinned(a_day(30))
    judgements = judge(date(30), today, before, [thinned(t) for t in days(25, 30)])
    for judgement in judgements.values():
        assert (judgement.level == "UNKNOWN") is (judgement.series == 0)
        for finding in judgement.findings:
            assert finding.usual_low <= finding.usual <= finding.usual_high
            assert 0 <= finding.p_value < 1
            assert math.isfinite(finding.effect)
    for question in QUESTIONS:
        ranges = expectations(question.name, date(30), today, before)
        assert not ranges.num_rows or set(ranges["day"].to_pylist()) >= {date(30)}


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(0, 1), min_size=2, max_size=20),
    offers=st.sampled_from([1, 30, 500, 1e6]),
    of=st.integers(1, 30),
)
def test_any_shares_have_ranges_within_zero_and_one_around_their_expectation(values, offers, of):
    rows = [
        (date(n), COMPLETENESS, "missing", "", f"column {place}", "share", value, offers, None)
        for n in range(of + 1)
        for place, value in enumerate(values[n % 2 :: 2] or values)
    ]
    everything = table(rows)
    today = everything.filter(pa.compute.equal(everything["day"], date(of)))
    before = everything.filter(pa.compute.not_equal(everything["day"], date(of)))
    ranges = expectations(COMPLETENESS, date(of), today, before)
    low, expected, high = (ranges[name].to_numpy() for name in ("low", "expected", "high"))
    assert (low >= 0).all()
    assert (low <= expected).all()
    assert (expected <= high).all()
    assert (high <= 1).all()


def test_looser_limits_find_less():
    strict, loose = LIMITS, Limits(false_errors_per_day=1e-12, false_warnings_per_day=1e-12)
    today, before = a_day(30, agrees=0.80), reference(28)
    found = [
        len(judge(date(30), today, before, limits=limits)[AGREEMENT].findings) for limits in (strict, loose)
    ]
    assert found[0] > found[1]
