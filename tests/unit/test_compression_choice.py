"""Which zstd level is chosen, from what lanes report."""

from __future__ import annotations

from flowengine.transfer.compression import CompressionChooser

LANES = 8


def windows(
    chooser: CompressionChooser, count: int, *, link: float, speed: float, ratio: float, begin: float = 1.0
) -> list[int]:
    """Let lanes send over a link of a rate, with data of a ratio, where level 1 compresses `speed` bytes/s a thread."""
    levels = []
    now = begin
    cost = {0: 0.0, -3: 0.62, 1: 1.0, 3: 2.0, 6: 5.0}
    full = False
    for _ in range(count):
        level = chooser.level_for(0.9 if full else 0.0)
        able = 1e12 if not level else speed / cost[level]
        logical = min(able, link * (ratio if level else 1.0))
        sealed = logical / (ratio if level else 1.0)
        full = sealed > 0.95 * link
        if level:
            chooser.compressed(
                int(logical * 0.6), int(sealed * 0.6), logical * 0.6 * cost[level] / speed, level
            )
        chooser.sent(0, 0.0, now, LANES)
        now += 0.6
        chooser.sent(int(sealed * 0.6), 0.6 * LANES * (0.8 if full else 0.05), now, LANES)
        levels.append(chooser.level)
    return levels


def test_a_long_slow_link_is_compressed_for_better_and_better() -> None:
    chooser = CompressionChooser(0.08, cores=2)
    assert chooser.level == 1
    windows(chooser, 10, link=5e6, speed=500e6, ratio=3.0)
    assert chooser.level == 6
    assert "5.00 MB/s" in chooser.reason


def test_a_gigabit_link_gets_the_level_that_two_cores_can_do() -> None:
    chooser = CompressionChooser(0.08, cores=2)
    assert set(windows(chooser, 20, link=120e6, speed=500e6, ratio=3.0)) == {1}


def test_compression_is_given_up_where_the_processors_are_slower_than_the_link() -> None:
    chooser = CompressionChooser(0.0001, cores=2)
    assert chooser.level == 0
    assert set(windows(chooser, 10, link=1.2e9, speed=500e6, ratio=3.0)) == {0}
    chooser = CompressionChooser(0.08, cores=2)
    chooser._link = 1.2e9  # as it was seen before
    assert windows(chooser, 5, link=1.2e9, speed=200e6, ratio=3.0)[-1] == 0
    assert "holds it up" in chooser.reason


def test_a_level_is_left_where_others_have_the_processors_as_well() -> None:
    chooser = CompressionChooser(0.08, cores=2)
    now = 1.0
    for _ in range(8):  # both threads are busy all the time, for a third of which there is a processor
        chooser.compressed(40 << 20, 14 << 20, 0.4, chooser.level_for(0.0), wall_s=1.1)
        chooser.sent(0, 0.0, now, LANES)
        now += 0.6
        chooser.sent(15 << 20, 0.02, now, LANES)
    assert chooser.level == -3
    assert "holds it up" in chooser.reason


def test_the_first_bytes_are_compressed_whatever_the_link() -> None:
    chooser = CompressionChooser(0.0001, cores=2)
    assert [chooser.among_first(1 << 20) for _ in range(9)] == [True] * 8 + [False]
    assert chooser.level_for(0.0, first=True) == 3
    assert chooser.level_for(0.0) == 0
    assert not CompressionChooser(0.0001, 0).among_first(1)
    assert CompressionChooser(0.0001, 0).level_for(0.0) == 0


def test_inside_one_machine_only_a_rate_that_was_asked_for_is_worth_compressing_for() -> None:
    for link, level in ((300e6, 0), (20e6, 6)):
        chooser = CompressionChooser(0.0001, cores=2)
        chooser.inside = True
        assert not chooser.among_first(1 << 20)
        assert windows(chooser, 10, link=link, speed=500e6, ratio=3.0)[-1] == level
    assert windows(CompressionChooser(0.0001, cores=2), 10, link=300e6, speed=500e6, ratio=3.0)[-1] == -3


def test_what_was_asked_for_stays() -> None:
    chooser = CompressionChooser(0.08, 9, cores=2)
    chooser.sent(1 << 30, 100.0, 1.0, 1)
    chooser.sent(1 << 30, 100.0, 100.0, 1)
    assert (chooser.level, chooser.reason) == (9, "asked for")
