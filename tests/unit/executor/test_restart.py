"""Restart decisions: delays double inside the window, and a crash loop ends."""

from __future__ import annotations

from rowen.executor.restart import RestartPolicy, decide

POLICY = RestartPolicy(first_delay_s=1.0, longest_delay_s=5.0, crashes_in_window=5, window_s=100.0)


def test_the_delay_doubles_up_to_its_bound() -> None:
    ages = [0.0, 10.0, 20.0, 30.0]
    delays = [decide(ages[:count], POLICY).delay_s for count in (1, 2, 3, 4)]
    assert delays == [1.0, 2.0, 4.0, 5.0]


def test_the_last_crash_of_a_loop_is_not_followed_by_a_start() -> None:
    decision = decide([0.0, 1.0, 2.0, 3.0, 100.0], POLICY)
    assert decision == (None, "5 crashes within 100 s")


def test_crashes_outside_the_window_are_forgotten() -> None:
    assert decide([0.0, 100.1, 200.0, 300.0, 400.0, 500.0], POLICY).delay_s == 1.0
