"""What clients get, cut from the log: vLLM's keys, the engines' own logprobs."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rowen.scheduler.reply import chunk, final_usage, whole
from rowen.scheduler.request import read_request
from rowen.scheduler.trajectory import TrajectoryLog

CHUNK_KEYS = ["request_id", "usage", "output_mode", "choices"]
CHOICE_KEYS = {
    "index", "finish_reason", "stop_reason", "token_ids", "routed_experts", "sampling_mask",
    "weight_versions", "logprobs",
}  # fmt: skip


def make(tokens: list[int], **changes):
    body = {"token_ids": [1, 2], "sampling_params": {"logprobs": 0}} | changes
    request = read_request(json.dumps(body).encode(), {"x-request-id": "r"}, "m")
    log = TrajectoryLog(None, True)
    log.begin("a", 1, "3")
    for token in tokens:
        log.append([token], [b'{"token_id":%d,"logprob":-0.25}' % token])
    log.end("stop", 2, None)
    return request, log


def event(raw: bytes):
    assert raw.startswith(b"data: ")
    assert raw.endswith(b"\n\n")
    return json.loads(raw[6:])


@given(st.lists(st.integers(0, 99), min_size=1), st.data())
def test_pieces_put_together_are_the_whole(tokens, data) -> None:
    request, log = make(tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)))))
    bounds = list(zip([0, *cuts], [*cuts, len(tokens)], strict=True))
    events = [event(chunk(request, log, a, b, b == len(tokens))) for a, b in bounds]
    choices = [e["choices"][0] for e in events]
    complete = json.loads(whole(request, log, "m", 0))["choices"][0]
    assert [t for c in choices for t in c["token_ids"]] == complete["token_ids"] == tokens
    entries = [e for c in choices for e in c["logprobs"]["content"]]
    assert entries == complete["logprobs"]["content"]
    assert choices[-1]["weight_versions"] == complete["weight_versions"]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", 2)


def test_shapes_are_vllms() -> None:
    request, log = make([5, 6])
    first = event(chunk(request, log, 0, 1, False))
    assert list(first) == CHUNK_KEYS
    assert set(first["choices"][0]) == CHOICE_KEYS
    assert first["request_id"] == "generate-tokens-r"
    answer = json.loads(whole(request, log, "m", 17))
    assert set(answer["choices"][0]) == CHOICE_KEYS
    assert (answer["model"], answer["created"]) == ("m", 17)
    assert answer["usage"]["total_tokens"] == 4
    assert answer["choices"][0]["weight_versions"] == [{"version": "3", "start": 0, "end": 2}]


def test_options_add_what_they_ask_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request, log = make([5, 6], stream_options=options, return_token_ids=True)
    first = event(chunk(request, log, 0, 1, False))
    assert first["prompt_token_ids"] == [1, 2]
    assert first["usage"]["completion_tokens"] == 1
    assert "prompt_token_ids" not in event(chunk(request, log, 1, 2, True))
    assert event(final_usage(request, log))["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 4,
        "completion_tokens": 2,
    }
