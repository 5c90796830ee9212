"""Percentiles from Prometheus pages: windows, restarts, lies."""

from __future__ import annotations

import math

import pytest

from rowen.daemon.histogram import Histogram, HistogramWindow, MetricsError, parse_histograms
from rowen.policies.guard import ObjectiveReading

NAME = "vllm:time_to_first_token_seconds"
EDGES_S = (0.5, 1.0, 2.5, math.inf)


def page(*counts: float, labels: str = 'engine="0",model_name="m"') -> str:
    lines = [f"# HELP {NAME} Histogram.", f"# TYPE {NAME} histogram"]
    for edge, count in zip(("0.5", "1.0", "2.5", "+Inf"), counts, strict=True):
        lines.append(f'{NAME}_bucket{{{labels},le="{edge}"}} {count}')
    return "\n".join([*lines, f"{NAME}_count{{{labels}}} {counts[-1]}", "other_bucket 1"])


def window_of(*snapshots: tuple[float, tuple[float, ...]], window_s: float = 10) -> HistogramWindow:
    window = HistogramWindow(window_s)
    for at_s, counts in snapshots:
        window.add(at_s, Histogram(EDGES_S, counts))
    return window


def test_the_named_histogram_is_read_and_the_rest_of_the_page_ignored() -> None:
    assert parse_histograms(page(1, 2, 3, 4), (NAME,)) == {NAME: Histogram(EDGES_S, (1, 2, 3, 4))}


def test_engines_of_one_server_are_summed() -> None:
    text = page(1, 2, 3, 4) + "\n" + page(10, 20, 30, 40, labels='engine="1",model_name="{}"')
    assert parse_histograms(text, (NAME,))[NAME].counts == (11, 22, 33, 44)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no histogram vllm:time_to_first_token_seconds"),
        (page(1, 2, 3, 4).replace('le="+Inf"', 'le="9"'), "no \\+Inf bucket"),
        (page(1, 2, 3, -4), "negative or no number"),
        (page(1, 2, 3, math.nan), "negative or no number"),
        (page(3, 2, 3, 4), "fall towards larger edges"),
        (page(1, 2, 3, 4).replace("} 2\n", "} two\n"), "not a number"),
        (page(1, 2, 3, 4).replace('le="1.0"', 'lie="1.0"'), "not a histogram bucket"),
    ],
)
def test_a_page_that_cannot_be_believed_is_refused(text: str, expected: str) -> None:
    with pytest.raises(MetricsError, match=expected):
        parse_histograms(text, (NAME,))


def test_before_the_first_page_nothing_is_known_and_after_it_there_are_no_samples() -> None:
    assert HistogramWindow(10).read(99) is None
    assert window_of((0, (5, 5, 5, 5))).read(99) == ObjectiveReading(None, 0)


def test_only_what_came_inside_the_window_counts() -> None:
    window = window_of((0, (0, 0, 0, 0)), (1, (0, 0, 100, 100)))
    slow = window.read(50)
    assert slow is not None
    assert (slow.samples, slow.value_ms) == (100, pytest.approx(1750))
    for at_s in range(2, 12):
        window.add(at_s, Histogram(EDGES_S, (10, 10, 110, 110)))
    fast = window.read(50)
    assert fast is not None
    assert (fast.samples, fast.value_ms) == (10, pytest.approx(250))


def test_the_percentile_is_interpolated_inside_its_bucket() -> None:
    reading = window_of((0, (0, 0, 0, 0)), (1, (50, 100, 100, 100))).read(99)
    assert reading is not None
    assert reading.value_ms == pytest.approx(990)


def test_beyond_the_last_edge_the_value_is_infinite_which_the_guard_closes_on() -> None:
    reading = window_of((0, (0, 0, 0, 0)), (1, (0, 0, 0, 10))).read(99)
    assert reading == ObjectiveReading(math.inf, 10)


def test_a_restarted_engine_begins_the_window_anew() -> None:
    window = window_of((0, (0, 0, 0, 0)), (1, (90, 90, 90, 90)), (2, (3, 3, 3, 3)))
    assert window.read(99) == ObjectiveReading(None, 0)
    window.add(3, Histogram(EDGES_S, (3, 7, 7, 7)))
    reading = window.read(99)
    assert reading is not None
    assert reading.samples == 4


def test_other_bucket_edges_begin_the_window_anew() -> None:
    window = window_of((0, (0, 0, 0, 0)), (1, (9, 9, 9, 9)))
    window.add(2, Histogram((1.0, math.inf), (99, 99)))
    assert window.read(99) == ObjectiveReading(None, 0)
