"""Event streams arrive in any pieces, and sometimes are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.scheduler.sse import MAX_EVENT_BYTES, SseError, SseParser

payloads = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])))


@given(payloads, st.data())
def test_payloads_come_whole_however_they_are_split(payloads, data) -> None:
    raw = "".join(f": note\n\ndata: {payload}\r\n\r\n" for payload in payloads).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    parser, got = SseParser(), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        got += parser.feed(raw[start:end])
    assert got == [payload.encode() for payload in payloads]
    assert not parser.is_mid_event


def test_a_cut_event_is_noticed() -> None:
    parser = SseParser()
    assert parser.feed(b'data: {"a":') == []
    assert parser.is_mid_event


def test_html_is_no_event_stream() -> None:
    with pytest.raises(SseError):
        SseParser().feed(b"<html>\n<body>\n")


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(SseError, match=str(MAX_EVENT_BYTES)):
        SseParser().feed(b"data: " + b"x" * MAX_EVENT_BYTES)
