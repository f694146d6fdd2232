"""Paces are learned from what ended, whatever mixture of sizes that was."""

from __future__ import annotations

import random
import statistics

import pytest

from flowengine.plan.learning import learn
from flowengine.plan.pace import UNLEARNED, Pace, Seen, expect_s


def ended(pace: Pace, count: int, seed: int, noise: float = 0.05) -> list[Seen]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        objects, size = int(10 ** rng.uniform(0, 4)), int(10 ** rng.uniform(4, 9))
        rate = rng.choice([2e8, 1e9, 1e10])
        took = expect_s(pace, objects, size, rate) * rng.gauss(1, noise)
        found.append(Seen(objects=objects, size_bytes=size, seconds=took, rate_bits_per_s=rate))
    return found


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_learned_tells_the_next_ones(at_once: bool) -> None:
    true = Pace(start_s=0.2, object_s=4e-4, byte_s=2e-9, at_once=at_once)
    pace = learn(ended(true, 30, 1))
    wrong = [
        abs(expect_s(pace, one.objects, one.size_bytes, one.rate_bits_per_s) / one.seconds - 1)
        for one in ended(true, 30, 2)
    ]
    assert statistics.median(wrong) < 0.1
    assert pace.spread < 0.2


def test_an_outlier_changes_little() -> None:
    true = Pace(start_s=0.2, object_s=4e-4, byte_s=2e-9)
    seen = ended(true, 20, 3)
    odd = Seen(objects=1, size_bytes=1000, seconds=500.0)
    pace = learn([*seen, odd])
    assert abs(expect_s(pace, 100, 10**8, 1e9) / expect_s(true, 100, 10**8, 1e9) - 1) < 0.15


def test_too_few_teach_nothing() -> None:
    assert learn(ended(Pace(), 3, 4)) == UNLEARNED
    assert learn([]) == UNLEARNED


def test_equal_observations_give_an_equal_pace() -> None:
    assert learn(ended(Pace(), 20, 5)) == learn(ended(Pace(), 20, 5))
