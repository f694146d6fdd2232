"""What is believed of links: follows, doubts outliers, ages, and takes lower bounds as such."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flowengine.plan.links import MOST_SPREAD, PRIOR, LinkState, estimate, observe

RATE = st.floats(1e4, 1e12)


def seen(*rates: float, kind: str = "transfers", every_s: float = 5.0) -> LinkState:
    state = PRIOR
    for number, rate in enumerate(rates):
        state = observe(state, rate, 1000.0 + number * every_s, kind)
    return state


def test_a_prior_says_that_it_is_one() -> None:
    assert not estimate(PRIOR, 1000.0).measured
    declared = estimate(PRIOR, 1000.0, 2e8)
    assert (declared.rate_bits_per_s, declared.measured) == (2e8, False)
    assert estimate(seen(1e8), 1000.0, 2e8).rate_bits_per_s == 1e8


def test_one_outlier_moves_it_little_and_a_change_is_followed() -> None:
    steady = seen(*[1e9] * 10)
    once = observe(steady, 1e8, 1050.0, "transfers")
    assert 0.6e9 < once.rate_bits_per_s < 1e9
    state = once
    for number in range(4):
        state = observe(state, 1e8, 1055.0 + number * 5, "transfers")
    assert math.isclose(state.rate_bits_per_s, 1e8, rel_tol=0.1)


def test_age_makes_it_doubtful_but_never_worthless() -> None:
    state = seen(*[1e9] * 10)
    spreads = [estimate(state, 1045.0 + hours * 3600).spread for hours in (0, 1, 24, 1000)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 0.1
    assert spreads[-1] == MOST_SPREAD
    assert estimate(state, 1045.0 + 3600).age_s == 3600


def test_what_was_held_back_only_lifts() -> None:
    state = seen(*[1e8] * 5)
    assert observe(state, 5e7, 1100.0, "transfers", at_least=True) == state
    assert observe(state, 3e8, 1100.0, "transfers", at_least=True).rate_bits_per_s > 1.2e8
    assert observe(PRIOR, 5e9, 1100.0, "transfers", at_least=True) == PRIOR


@given(st.lists(st.tuples(RATE, st.floats(0, 1e5), st.booleans()), min_size=1, max_size=30))
def test_it_stays_between_what_was_seen(looks: list[tuple[float, float, bool]]) -> None:
    state, now = PRIOR, 1000.0
    for rate, pause, probe in looks:
        now += pause
        state = observe(state, rate, now, "probe" if probe else "transfers")
        assert 0 < estimate(state, now).spread <= MOST_SPREAD
    rates = [rate for rate, _, _ in looks]
    assert min(rates) * (1 - 1e-9) <= state.rate_bits_per_s <= max(rates) * (1 + 1e-9)
