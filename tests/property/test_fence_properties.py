"""Fences and epochs never go back: whatever is restored, however clocks jump, whoever forgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowengine.errors import ProtocolError
from flowengine.trust.fences import MAX_FENCE, MAX_TOLD, lift_fence, next_epoch, next_fence

pytestmark = pytest.mark.slow

CLOCKS = st.floats(min_value=0, max_value=4e9)
STEPS = st.one_of(
    st.tuples(st.just("claim"), CLOCKS),
    st.tuples(st.just("restore"), st.integers(0, 30)),
    st.tuples(st.just("report"), CLOCKS),
    st.tuples(st.just("restart"), CLOCKS),
)


@given(st.lists(STEPS, max_size=40))
def test_a_fence_is_above_all_that_were_given(steps: list[tuple[str, float]]) -> None:
    """The database may come back from any backup: agents that report before the next claim lift it again."""
    states = [0]  # the database after each change: what a backup may hold
    highest = 0  # what agents saw
    for step, value in steps:
        if step == "restore":
            states.append(states[int(value) % len(states)])
            states.append(lift_fence(states[-1], highest))  # agents' heartbeats come before their claims
        elif step == "claim":
            fence = next_fence(states[-1], value)
            assert fence > highest
            highest = fence
            states.append(fence)
        elif step == "report":
            states.append(lift_fence(states[-1], highest))


@given(st.lists(CLOCKS, min_size=1, max_size=20), st.integers(0, 19))
def test_without_any_report_a_right_clock_is_enough(clocks: list[float], backup: int) -> None:
    """Every agent forgot or is away: a clock that runs on lifts a restored database all the same."""
    fences = [0]
    now = 0.0
    for step in clocks:
        now += 0.001 + step % 1000
        fences.append(next_fence(fences[-1], now))
    restored = fences[backup % len(fences)]
    assert next_fence(restored, now + 0.001) > fences[-1]


@given(st.integers(0, MAX_TOLD), st.integers(MAX_TOLD + 1, 1 << 70))
def test_a_lie_cannot_use_the_numbers_up(last: int, told: int) -> None:
    with pytest.raises(ProtocolError):
        lift_fence(last, told)
    with pytest.raises(ProtocolError):
        lift_fence(last, -1)
    assert next_fence(lift_fence(last, MAX_TOLD), 4e9) == MAX_TOLD + 1 < MAX_FENCE


def test_the_last_fence_is_the_last() -> None:
    assert next_fence(MAX_FENCE - 1, 0) == MAX_FENCE
    with pytest.raises(ValueError, match="used up"):
        next_fence(MAX_FENCE, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), CLOCKS), max_size=30))
def test_an_epoch_is_above_the_last_unless_everything_was_lost(
    starts: list[tuple[bool, bool, float]],
) -> None:
    """A start finds the database, the file, or both; as long as one of them is there, epochs rise."""
    database = file = last = 0
    for lose_database, lose_file, now in starts:
        if lose_database and not lose_file:
            database = 0
        elif lose_file and not lose_database:
            file = 0
        epoch = next_epoch(database, file, now)
        assert epoch > last
        database = file = last = epoch
