"""The token log: nothing lost, nothing twice, every token under its true version."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.scheduler.trajectory import (
    FinishedError,
    NonsenseError,
    Step,
    TrajectoryLog,
    VersionSpan,
    canonical_version,
    continue_sampling,
)


def make_log(max_tokens: int | None = None, has_logprobs: bool = False) -> TrajectoryLog:
    return TrajectoryLog(max_tokens, has_logprobs)


chunks = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), max_size=6)
stays = st.lists(st.tuples(st.integers(0, 3), chunks, st.booleans()), min_size=1, max_size=8)


@given(stays)
def test_log_holds_exactly_what_arrived_and_spans_tile_it_with_true_versions(stays) -> None:
    log = make_log()
    arrived: list[int] = []
    truth: list[str] = []
    for number, (version, pieces, is_ended_by_engine) in enumerate(stays):
        log.begin(f"engine-{number % 2}", 1, str(version))
        start = len(arrived)
        for piece in pieces:
            log.append(piece, None)
            arrived += piece
            truth += [str(version)] * len(piece)
        if is_ended_by_engine:
            spans = [VersionSpan(str(version), 0, len(arrived) - start)]
            decision = log.end("abort", None, spans)
        else:
            decision = log.break_off("connection_broken")
        assert decision.action is Step.CONTINUE
        assert not decision.is_contradicted
    assert log.tokens.tolist() == arrived
    spans = log.spans
    assert [v for span in spans for v in [span.version] * (span.end - span.start)] == truth
    assert all(a.end == b.start and a.version != b.version for a, b in pairwise(spans))


@given(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_log_never_grows_past_max_tokens(max_tokens, tokens) -> None:
    log = make_log(max_tokens)
    log.begin("a", 1, "0")
    for token in tokens:
        if len(log.tokens) < max_tokens:
            log.append([token], None)
        else:
            with pytest.raises(NonsenseError):
                log.append([token], None)
    assert log.tokens.tolist() == tokens[:max_tokens]


def test_all_tokens_logged_but_the_engine_gone_before_saying_so_is_finished_by_length() -> None:
    log = make_log(2)
    log.begin("a", 1, "0")
    log.append([5, 6], None)
    assert log.break_off("connection_broken").action is Step.DONE
    assert log.finish_reason == "length"


@pytest.mark.parametrize("reason", ["stop", "length", "repetition"])
def test_an_engines_own_end_finishes(reason) -> None:
    log = make_log(10)
    log.begin("a", 1, "0")
    log.append([5], None)
    assert log.end(reason, 5, None).action is Step.DONE
    assert (log.finish_reason, log.stop_reason) == (reason, 5)
    with pytest.raises(FinishedError):
        log.begin("b", 1, "0")


@pytest.mark.parametrize("reason", ["abort", "error", "something new"])
def test_any_other_end_continues(reason) -> None:
    log = make_log(10)
    log.begin("a", 1, "0")
    assert log.end(reason, None, None).action is Step.CONTINUE
    assert log.finish_reason is None


def test_the_engines_word_on_versions_beats_our_belief_and_is_reported_as_contradiction() -> None:
    log = make_log()
    log.begin("a", 1, "3")
    log.append([1, 2, 3], None)
    reported = [VersionSpan("default", 0, 1), VersionSpan("4", 1, 3)]
    assert log.end("stop", None, reported).is_contradicted
    assert log.spans == [VersionSpan("0", 0, 1), VersionSpan("4", 1, 3)]


@pytest.mark.parametrize(
    "reported",
    [
        [VersionSpan("3", 0, 2)],
        [VersionSpan("3", 0, 4)],
        [VersionSpan("3", 1, 3)],
        [VersionSpan("3", 0, 2), VersionSpan("4", 1, 3)],
    ],
)
def test_spans_that_do_not_tile_the_segment_are_a_contradiction_and_not_used(reported) -> None:
    log = make_log()
    log.begin("a", 1, "3")
    log.append([1, 2, 3], None)
    assert log.end("stop", None, reported).is_contradicted
    assert log.spans == [VersionSpan("3", 0, 3)]


def test_wrong_number_of_logprobs_logs_nothing() -> None:
    log = make_log(has_logprobs=True)
    log.begin("a", 1, "0")
    for logprobs in (None, [], [b"{}", b"{}"]):
        with pytest.raises(NonsenseError):
            log.append([7], logprobs)
    log.append([7], [b"{}"])
    assert (log.tokens.tolist(), log.logprobs) == ([7], [b"{}"])


def test_impossible_token_ids_are_nonsense() -> None:
    log = make_log()
    log.begin("a", 1, "0")
    for token in (-1, 2**31):
        with pytest.raises(NonsenseError):
            log.append([3, token], None)
    assert len(log.tokens) == 0


def test_tokens_outside_a_segment_are_our_own_bug() -> None:
    log = make_log()
    with pytest.raises(FinishedError):
        log.append([1], None)
    log.begin("a", 1, "0")
    with pytest.raises(FinishedError):
        log.begin("b", 1, "0")
    log.break_off("stalled")
    with pytest.raises(FinishedError):
        log.break_off("stalled")


def test_continuation_shrinks_lengths_and_moves_the_seed() -> None:
    sampling = {"max_tokens": 10, "min_tokens": 4, "seed": 11, "temperature": 0.5}
    rest = continue_sampling(sampling, 6)
    assert (rest["max_tokens"], rest["min_tokens"], rest["temperature"]) == (4, 0, 0.5)
    assert rest["seed"] != 11
    assert continue_sampling(sampling, 0) == sampling
    assert continue_sampling({"max_tokens": None, "seed": None}, 3) == {
        "max_tokens": None,
        "seed": None,
    }


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 10_000))
def test_continuation_seeds_fit_vllm(seed, generated) -> None:
    assert 0 <= continue_sampling({"seed": seed}, generated)["seed"] < 2**63


def test_weights_an_engine_was_started_with_are_version_0() -> None:
    assert [canonical_version(v) for v in ("default", "0", "12")] == ["0", "0", "12"]
