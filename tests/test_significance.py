from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import raised

from stlora_peft import significance
from stlora_peft.significance import Difference, paired_difference

INF = float("inf")


def daily(errors: Any, count: int = 10) -> list[list[list[float]]]:
    """Daily errors from sums of shape (seeds, days)."""
    return [[[day, float(total), count] for day, total in enumerate(row)] for row in errors]


def random_pair(seeds: int = 3, days: int = 20, factor: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    """Daily errors of two methods that share what makes a day hard."""
    rng = np.random.default_rng(seed)
    level = rng.lognormal(5, 0.5, days)
    noise = rng.normal(1, 0.02, (2, seeds, days))
    return daily(factor * level * noise[0]), daily(level * noise[1])


def test_relative_difference_is_that_of_the_two_mean_absolute_errors() -> None:
    ours = [[[0, 4.0, 10], [3, 9.0, 5]], [[0, 6.0, 10], [3, 8.0, 5]]]
    theirs = [[[0, 10.0, 10], [3, 9.0, 5]], [[0, 12.0, 10], [3, 11.0, 5]]]
    mae, other = (4 + 9 + 6 + 8) / 30, (10 + 9 + 12 + 11) / 30
    assert paired_difference(ours, theirs, resamples=9).relative == pytest.approx((mae - other) / other, rel=1e-12)


def test_draws_match_an_explicit_resampling_loop() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.uniform(5, 9, (3, 4)), rng.uniform(5, 9, (3, 4))
    draws = significance._draw(ours - theirs, theirs, 50, seed=8)
    of_seeds, of_days = np.random.default_rng(8).spawn(2)
    for draw in draws:
        seeds = np.repeat(range(3), of_seeds.multinomial(3, [1 / 3] * 3))
        days = np.repeat(range(4), of_days.multinomial(4, [1 / 4] * 4))
        drawn = [(ours[s, d], theirs[s, d]) for s in seeds for d in days]
        mae, other = (sum(errors) / (10 * len(drawn)) for errors in zip(*drawn, strict=True))
        assert draw == pytest.approx((mae - other) / other, rel=1e-12)
    assert len(set(draws.tolist())) > 30


def test_interval_and_p_value_follow_from_the_draws() -> None:
    ours, theirs = random_pair(days=4)
    sums = [np.array([[row[1] for row in rows] for rows in method]) for method in (ours, theirs)]
    draws = np.sort(significance._draw(sums[0] - sums[1], sums[1], 999, seed=2))
    found = paired_difference(ours, theirs, resamples=999, confidence=0.8, seed=2)
    assert (found.low, found.high) == (np.quantile(draws, 0.1), np.quantile(draws, 0.9))
    below = sum(draw <= 0 for draw in draws.tolist())
    assert 0 < below < 999
    assert found.p_value == pytest.approx(2 * (min(below, 999 - below) + 1) / 1000)


def test_draws_do_not_depend_on_the_size_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = random_pair()
    whole = paired_difference(ours, theirs, resamples=100)
    monkeypatch.setattr(significance, "DRAWN_AT_ONCE", 7 * 23)
    parts = paired_difference(ours, theirs, resamples=100)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert parts.p_value == whole.p_value


def test_same_seed_gives_the_same_result_and_another_seed_another() -> None:
    pair = random_pair()
    assert paired_difference(*pair, seed=4) == paired_difference(*pair, seed=4)
    assert paired_difference(*pair, seed=4).low != paired_difference(*pair, seed=5).low


def test_identical_methods_do_not_differ() -> None:
    ours, _ = random_pair()
    assert paired_difference(ours, ours) == Difference(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("factor", "sign"), [(0.9, -1), (1.1, 1)])
def test_clear_difference_has_a_small_p_value_and_an_interval_on_its_side(factor: float, sign: int) -> None:
    found = paired_difference(*random_pair(factor=factor))
    assert found.low <= found.relative <= found.high
    assert 0 < sign * found.low
    assert 0 < sign * found.high
    assert found.p_value == 2 / 10_001


def test_pairing_finds_what_is_smaller_than_the_spread_between_days() -> None:
    ours, theirs = random_pair(factor=0.98, days=40)
    spread = np.std([row[1] for row in theirs[0]]) / np.mean([row[1] for row in theirs[0]])
    assert spread > 0.3
    assert paired_difference(ours, theirs).p_value < 0.05


def test_order_of_seeds_does_not_matter_as_long_as_pairs_stay_together() -> None:
    ours, theirs = random_pair(seeds=5)
    before = paired_difference(ours, theirs)
    after = paired_difference(ours[::-1], theirs[::-1])
    assert after.relative == pytest.approx(before.relative, rel=1e-9)
    assert (after.low, after.high) == pytest.approx((before.low, before.high), abs=5e-4)
    assert after.p_value == pytest.approx(before.p_value, abs=0.05)


def test_seeds_that_disagree_widen_the_interval() -> None:
    days = np.full((4, 20), 10.0)
    ours = days * np.array([0.8, 1.1, 0.9, 1.15])[:, None]
    found = paired_difference(daily(ours), daily(days))
    assert found.low < 0 < found.high
    assert paired_difference(daily(ours[:1]), daily(days[:1])) == Difference(
        pytest.approx(-0.2), pytest.approx(-0.2), pytest.approx(-0.2), 2 / 10_001
    )


@pytest.mark.parametrize(("seeds", "days"), [(1, 5), (5, 1)])
def test_axis_of_length_one_leaves_the_other_to_be_resampled(seeds: int, days: int) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.uniform(5, 9, (seeds, days)), rng.uniform(5, 9, (seeds, days))
    found = paired_difference(daily(ours), daily(theirs))
    turned = paired_difference(daily(ours.T), daily(theirs.T), seed=1)
    assert found.low < found.relative < found.high
    assert (found.low, found.high) == pytest.approx((turned.low, turned.high), abs=0.03)


def test_one_day_of_one_seed_cannot_be_tested() -> None:
    assert paired_difference(daily([[9.0]]), daily([[10.0]])) == Difference(pytest.approx(-0.1))


def test_days_without_a_truth_change_nothing() -> None:
    ours, theirs = random_pair()
    more = [[[*rows, [99, 0.0, 0]] for rows in method] for method in (ours, theirs)]
    assert paired_difference(*more) == paired_difference(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[[0, None, 5], [1, 2.0, 5]]], daily([[2.0, 2.0]], 5), Difference(None)),
        (daily([[2.0, 2.0]], 5), [[[0, None, 5], [1, 2.0, 5]]], Difference(None)),
        (daily([[2.0, INF]]), daily([[2.0, 2.0]]), Difference(None)),
        (daily([[2.0, 2.0]]), daily([[0.0, 0.0]]), Difference(None)),
        (daily([[0.0, 0.0]], 0), daily([[0.0, 0.0]], 0), Difference(None)),
        (daily([[2.0, 2.0]]), daily([[0.0, 2.0]]), Difference(1.0)),
    ],
    ids=["ours broken", "theirs broken", "infinite", "nothing to be relative to", "no truth", "in a resample only"],
)
def test_what_cannot_be_compared_is_none(ours: Any, theirs: Any, expected: Difference) -> None:
    assert paired_difference(ours, theirs) == expected


def test_interval_covers_as_often_as_its_docstring_says() -> None:
    rng = np.random.default_rng(0)

    def holds(seeds: int, seed_deviation: float, day_deviation: float) -> bool:
        theirs = np.full((seeds, 20), 100.0)
        of_seeds, of_days = rng.normal(0, seed_deviation, (seeds, 1)), rng.normal(0, day_deviation, 20)
        found = paired_difference(daily(theirs * (1 + of_seeds + of_days)), daily(theirs), resamples=500)
        return found.low <= 0 <= found.high

    assert 0.65 < np.mean([holds(3, 0.02, 0.0) for _ in range(300)]) < 0.85  # far too narrow
    assert 0.88 < np.mean([holds(1, 0.0, 0.02) for _ in range(300)]) < 0.98


# -- properties ---------------------------------------------------------------------------------------------

SUMS = st.floats(0.5, 100)


@st.composite
def pairs(draw: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    seeds, days = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    numbers = draw(st.lists(SUMS, min_size=2 * seeds * days, max_size=2 * seeds * days))
    both = np.array(numbers).reshape(2, seeds, days)
    return both[0], both[1]


@given(pairs())
def test_swapping_the_methods_turns_the_sign_and_keeps_the_p_value(pair: tuple[np.ndarray, np.ndarray]) -> None:
    ours, theirs = (daily(sums) for sums in pair)
    there, back = paired_difference(ours, theirs, resamples=200), paired_difference(theirs, ours, resamples=200)
    assert np.sign(there.relative) == -np.sign(back.relative)
    assert there.p_value == back.p_value
    assert (1 + there.relative) * (1 + back.relative) == pytest.approx(1)


@given(pairs(), st.integers(-20, 20))
def test_scale_of_the_errors_does_not_matter(pair: tuple[np.ndarray, np.ndarray], power: int) -> None:
    scaled = (daily(sums * 2.0**power) for sums in pair)
    assert paired_difference(*scaled, resamples=200) == paired_difference(*map(daily, pair), resamples=200)


@given(pairs())
def test_result_is_ordered_and_a_probability(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = paired_difference(*map(daily, pair), resamples=200)
    assert -1 < found.low <= found.high
    assert 0 < found.p_value <= 1


# -- errors -------------------------------------------------------------------------------------------------

ONE = daily([[1.0, 2.0]])


@pytest.mark.parametrize(("ours", "theirs"), [([], ONE), (ONE, []), ([[]], [[]])])
def test_nothing_to_compare_is_refused(ours: Any, theirs: Any) -> None:
    assert raised(lambda: paired_difference(ours, theirs)) == {
        "where": "there is nothing to compare",
        "expected": "at least one day of one seed, of both methods",
        "got": "none",
        "fix": "give DailyErrors.to_list() of each seed, for both methods",
    }


def test_different_numbers_of_seeds_are_refused() -> None:
    assert raised(lambda: paired_difference(ONE * 3, ONE * 2)) == {
        "where": "the seeds of two methods are not pairs",
        "expected": "as many of both",
        "got": "3 and 2 seeds",
        "fix": "give the seeds that both have",
    }


@pytest.mark.parametrize(
    ("rows", "expected", "got"),
    [
        ([[0, 1.0, 10], [2, 2.0, 10]], "day 1 with 10 truths", "day 2 with 10 truths"),
        ([[0, 1.0, 10], [1, 2.0, 9]], "day 1 with 10 truths", "day 1 with 9 truths"),
        ([[0, 1.0, 10]], "day 1 with 10 truths", "no further day"),
        ([], "day 0 with 10 truths", "no further day"),
        ([*ONE[0], [2, 0.0, 1]], "no further day", "day 2 with 1 truths"),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["another seed of ours", "theirs"])
def test_different_days_are_refused(rows: Any, expected: str, got: str, own: bool) -> None:
    ours, theirs = ([*ONE, rows], [*ONE, *ONE]) if own else (ONE, [rows])
    assert raised(lambda: paired_difference(ours, theirs)) == {
        "where": "the days of two methods are not pairs",
        "expected": expected,
        "got": got,
        "fix": "measure all seeds of both methods on the same windows of the same city",
    }


@pytest.mark.parametrize(("resamples", "confidence"), [(0, 0.95), (10, 0.0), (10, 1.0), (10, 95.0)])
def test_bootstrap_without_meaning_is_refused(resamples: int, confidence: float) -> None:
    assert raised(lambda: paired_difference(ONE, ONE, resamples=resamples, confidence=confidence)) == {
        "where": "no such bootstrap",
        "expected": "resamples >= 1 and 0 < confidence < 1",
        "got": f"resamples={resamples}, confidence={confidence}",
        "fix": "give for instance 10000 and 0.95",
    }
