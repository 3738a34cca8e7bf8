"""Which instance is the cheapest: arithmetic that money depends on."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.serving.device_report import Latency, Throughput
from ml.serving.instances import Limits, cheapest, compare_instances, usd_per_million, verdict
from ml.serving.machine import Machine
from ml.serving.prices import InstancePrice, read_prices
from tests.device_reports import device_report

HERE = Machine(cpu="Fast CPU", cores=2, architecture="x86_64")
LIMITS = Limits(peak_offers_per_second=80_000, p99_milliseconds=100, max_instances=20)
PRICES = read_prices().instances


def measured(
    instance_type, *, target="cpu", bulk=2_000.0, loaded=1_000.0, p99=20.0, failed=0, vcpus=2, **fields
):
    """A report of an instance that answers so much within so many milliseconds."""
    latency = Latency(
        request_offers=32,
        asked_offers_per_second=loaded,
        offers_per_second=loaded,
        requests=1_000,
        failed=failed,
        p50_milliseconds=p99 / 2,
        p99_milliseconds=p99,
    )
    idle = msgspec.structs.replace(
        latency, asked_offers_per_second=0, offers_per_second=5e6, p99_milliseconds=9_000
    )
    return device_report(
        **{
            "instance_type": instance_type,
            "target": target,
            "vcpus": vcpus,
            "neuron_cores": 2 if target == "neuron" else 0,
            "throughput": [Throughput(workers=vcpus, offers=1_000, offers_per_second=bulk)],
            "latency": [idle, latency],
            "peak_memory_bytes": 10**8,
        }
        | fields
    )


def compared(*reports, here=None, prices=PRICES, limits=LIMITS, machine=HERE):
    return compare_instances(machine, here or measured("Fast CPU"), reports, prices, limits)


def row(rows, instance_type, target=None):
    (found,) = [row for row in rows if row.instance_type == instance_type and target in (None, row.target)]
    return found


def test_a_million_offers_cost_what_the_hours_for_them_cost():
    assert usd_per_million(3.6, 1_000) == pytest.approx(1.0)


def test_the_peak_is_borne_at_the_load_of_the_measured_latency_with_one_to_spare():
    found = row(compared(measured("ml.c7i.4xlarge", bulk=16_000, loaded=8_000, vcpus=16)), "ml.c7i.4xlarge")
    assert (found.basis, found.meets_limits, found.why_not) == ("measured", True, "")
    assert (found.offers_per_second, found.loaded_offers_per_second) == (16_000, 8_000)
    assert (found.p50_milliseconds, found.p99_milliseconds) == (10, 20)
    assert found.instances_for_peak == 10 + 1
    assert found.usd_per_hour_for_peak == pytest.approx(11 * found.usd_per_hour)
    assert found.usd_per_million_offers == pytest.approx(found.usd_per_hour / (16_000 * 3_600) * 1e6)


def test_hardware_measured_on_ec2_has_the_price_of_the_endpoint():
    found = row(compared(measured("inf2.xlarge", target="neuron")), "ml.inf2.xlarge")
    assert found.basis == "measured"
    assert found.usd_per_hour == 0.99
    assert found.how.startswith("measured on inf2.xlarge at 2026-11-02")


def test_a_type_without_a_price_is_shown_and_never_the_cheapest():
    rows = compared(measured("ml.z9.huge", bulk=1e9, loaded=1e9))
    for name in ("ml.z9.huge", "Fast CPU"):
        found = row(rows, name)
        assert (found.basis, found.meets_limits, found.usd_per_hour) == ("measured", False, None)
        assert found.usd_per_million_offers is None
        assert "no price" in found.why_not
    assert cheapest(rows).instance_type != "ml.z9.huge"


def test_a_projection_is_marked_says_what_it_assumes_and_prefers_its_own_family():
    rows = compared(measured("ml.c7i.xlarge", bulk=4_000, loaded=2_000, vcpus=4))
    within = row(rows, "ml.c7i.4xlarge")
    assert (within.basis, within.offers_per_second) == ("projected", 16_000)
    assert "a vCPU does what one of ml.c7i.xlarge does (16 instead of 4)" in within.how
    across = row(rows, "ml.m7i.4xlarge")
    assert (across.basis, across.offers_per_second) == ("projected", 16_000)
    assert "a vCPU does what a core of this machine (Fast CPU) does (16 instead of 2)" in across.how


def test_of_several_sizes_the_nearest_is_projected_from():
    rows = compared(
        measured("ml.c7i.large", bulk=1_000, vcpus=2), measured("ml.c7i.4xlarge", bulk=16_000, vcpus=16)
    )
    assert "one of ml.c7i.4xlarge does" in row(rows, "ml.c7i.8xlarge").how
    assert "one of ml.c7i.large does" in row(rows, "ml.c7i.xlarge").how


def test_nothing_is_projected_onto_another_architecture_or_accelerator():
    rows = compared()
    for name, how in (
        ("ml.c7g.xlarge", "run python -m ml device-report there"),
        ("ml.inf2.xlarge", "run python -m ml device-report there"),
        ("ml.g5.xlarge", "no target uses its gpu"),
    ):
        found = row(rows, name)
        assert (found.basis, found.meets_limits, found.offers_per_second) == ("not measured", False, None)
        assert found.how == how
    on_arm = compared(machine=msgspec.structs.replace(HERE, architecture="arm64"))
    assert row(on_arm, "ml.c7g.xlarge").basis == "projected"
    assert row(on_arm, "ml.c7i.xlarge").basis == "not measured"


def test_neuron_grows_with_its_cores():
    rows = compared(measured("inf2.xlarge", target="neuron", bulk=15_000, vcpus=4))
    assert row(rows, "ml.inf2.8xlarge").offers_per_second == 15_000  # more CPU, as many cores
    assert row(rows, "ml.inf2.24xlarge").offers_per_second == 6 * 15_000


def test_the_newest_report_of_a_type_and_target_counts():
    rows = compared(
        measured("ml.c7i.xlarge", bulk=2, measured_at="2026-11-04T10:00:00+00:00"),
        measured("ml.c7i.xlarge", bulk=1, measured_at="2026-11-03T10:00:00+00:00"),
        measured("ml.c7i.xlarge", bulk=9, target="torchscript"),
    )
    assert row(rows, "ml.c7i.xlarge", "cpu").offers_per_second == 2
    assert row(rows, "ml.c7i.xlarge", "torchscript").offers_per_second == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p99": 100.1}, "p99 100 ms, limit 100"),
        ({"failed": 3}, "3 of 1000 requests failed"),
        ({"loaded": 4_000}, "21 instances for the peak, limit 20"),
        ({"loaded": 0}, "no request was answered under load"),
        ({"peak_memory_bytes": 9 * 2**30}, "needs 9.0 GiB of memory, has 8"),
    ],
)
def test_a_limit_that_is_not_met_is_named(change, said):
    given_back = {"loaded": 8_000, **change}
    if given_back["loaded"] == 0:
        latency = msgspec.structs.replace(measured("x").latency[0], offers_per_second=0)
        given_back = {"latency": [latency]}
    found = row(compared(measured("ml.c7i.xlarge", vcpus=4, **given_back)), "ml.c7i.xlarge")
    assert not found.meets_limits
    assert said in found.why_not


def test_a_projection_must_fit_into_memory():
    big = measured("ml.c7i.8xlarge", vcpus=32, loaded=64_000, peak_memory_bytes=32 * 2**30)
    small = [price for price in PRICES if price.family == "ml.c7i"]
    tight = [msgspec.structs.replace(small[0], memory_gib=1), *small[1:]]
    assert "needs 2.0 GiB of memory, has 1" in row(compared(big, prices=tight), "ml.c7i.large").why_not


def test_what_was_measured_is_told_apart_from_what_is_cheaper_by_projection():
    one = measured("ml.c7i.8xlarge", bulk=32_000, loaded=30_000, vcpus=32)
    found = verdict(compared(one), LIMITS)
    assert found.level == "OK"
    assert found.sentence.startswith("4 x ml.c7i.8xlarge, $6.85 per hour, p99 20.0 ms")
    assert "Cheaper by projection only: " in found.sentence
    assert "(projected)" in found.sentence


def test_only_projections_are_a_warning_and_nothing_at_all_an_error():
    found = verdict(compared(), LIMITS)
    assert found.level == "WARN"
    assert found.sentence.startswith("only by projection: ")
    assert "80,000 offers/s with one instance missing" in found.sentence
    none = verdict(compared(here=measured("Fast CPU", p99=500)), LIMITS)
    assert none.level == "ERROR"
    assert "Fast CPU: no price; p99 500 ms, limit 100" in none.sentence


rates = st.floats(min_value=1e-3, max_value=1e9)
dollars = st.floats(min_value=1e-3, max_value=1e3)


@given(rate=rates, more=st.floats(min_value=1, max_value=1e3), price=dollars)
def test_more_throughput_never_costs_more(rate, more, price):
    priced = InstancePrice(instance_type="ml.a.b", usd_per_hour=price, vcpus=2, memory_gib=64)
    slow, fast = (
        row(compared(measured("ml.a.b", bulk=each, loaded=each), prices=[priced]), "ml.a.b")
        for each in (rate, rate * more)
    )
    assert fast.usd_per_million_offers <= slow.usd_per_million_offers
    assert fast.instances_for_peak <= slow.instances_for_peak
    assert fast.usd_per_hour_for_peak <= slow.usd_per_hour_for_peak


@given(
    instances=st.lists(
        st.tuples(
            dollars, rates, st.floats(0, 1e4), st.integers(0, 3), st.sampled_from(["a", "b"]), st.booleans()
        ),
        min_size=1,
        max_size=8,
    ),
    peak=rates,
)
def test_the_cheapest_is_minimal_among_those_that_meet_the_limits_and_every_figure_is_a_number(
    instances, peak
):
    limits = msgspec.structs.replace(LIMITS, peak_offers_per_second=peak)
    prices = [
        InstancePrice(instance_type=f"ml.{family}.{size}", usd_per_hour=price, vcpus=size + 1, memory_gib=64)
        for size, (price, _, _, _, family, _) in enumerate(instances)
    ]
    reports = [
        measured(price.instance_type, bulk=rate, loaded=rate, p99=p99, failed=failed, vcpus=price.vcpus)
        for price, (_, rate, p99, failed, _, is_measured) in zip(prices, instances, strict=True)
        if is_measured
    ]
    rows = compared(*reports, prices=prices, limits=limits)
    assert len(rows) == len(prices) + 1
    assert [each.basis for each in rows].count("measured") == len(reports) + 1
    for each in rows:
        figures = [value for value in msgspec.structs.asdict(each).values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value >= 0 for value in figures)
    fitting = [each for each in rows if each.meets_limits]
    best = cheapest(rows)
    assert (best is None) == (not fitting)
    for each in fitting:
        assert best.usd_per_hour_for_peak <= each.usd_per_hour_for_peak
        assert each.p99_milliseconds <= limits.p99_milliseconds
        assert each.instances_for_peak <= limits.max_instances
        assert (each.instances_for_peak - 1) * each.loaded_offers_per_second >= peak * (1 - 1e-9)
    assert verdict(rows, limits).level == (
        "ERROR" if best is None else "OK" if cheapest(rows, "measured") else "WARN"
    )
