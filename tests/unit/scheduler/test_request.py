"""What clients post: errors name field, value and remedy; what cannot be continued is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rowen.scheduler.errors import ApiError
from rowen.scheduler.request import read_request


def read(headers: dict[str, str] | None = None, **changes: Any):
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4}} | changes
    return read_request(json.dumps(body).encode(), headers or {}, "m")


def sampling(**changes: Any):
    return read(sampling_params={"max_tokens": 4} | changes)


def test_a_plain_request() -> None:
    request = read({"x-request-id": "r1", "x-rowen-group": "g", "x-rowen-max-staleness": "2"})
    assert (request.request_id, request.is_id_given) == ("r1", True)
    assert (request.group_key, request.max_staleness, request.max_tokens) == ("g", 2, 4)
    assert not request.is_stream
    assert not request.has_logprobs


def test_the_header_id_beats_the_body_id_and_only_the_header_is_a_key() -> None:
    assert read({"x-request-id": "h"}, request_id="b").request_id == "h"
    request = read(request_id="b")
    assert (request.request_id, request.is_id_given) == ("b", False)


@pytest.mark.parametrize(
    ("body", "param", "shown"),
    [
        (b"{", "body", "JSON"),
        (b"[]", "body", "[]"),
        (b'{"sampling_params": {}}', "body", "token_ids"),
        (b'{"token_ids": [1]}', "body", "sampling_params"),
        (b'{"token_ids": [], "sampling_params": {}}', "token_ids", "[]"),
        (b'{"token_ids": [1, -4], "sampling_params": {}}', "token_ids[1]", "-4"),
        (b'{"token_ids": [1, "x"], "sampling_params": {}}', "token_ids[1]", "'x'"),
        (b'{"token_ids": "abc", "sampling_params": {}}', "token_ids", "'abc'"),
        (b'{"token_ids": [1], "sampling_params": 3}', "sampling_params", "3"),
        (b'{"token_ids": [1], "sampling_params": {}, "cache_salt": ""}', "cache_salt", "''"),
        (b'{"token_ids": [1], "sampling_params": {}, "stream": "yes"}', "stream", "'yes'"),
        (b'{"token_ids": [4294967296], "sampling_params": {}}', "token_ids[0]", "4294967296"),
    ],
)
def test_broken_bodies_name_field_and_value(body, param, shown) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(body, {}, "m")
    assert (caught.value.status, caught.value.param) == (400, param)
    assert shown in caught.value.message


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["\n"]}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"made_up": 1}, "made_up"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"logprobs": -2}, "logprobs"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_sampling_that_cannot_hold_across_engines_is_refused_by_name(changes, param) -> None:
    with pytest.raises(ApiError) as caught:
        sampling(**changes)
    assert caught.value.status == 400
    assert caught.value.param == f"sampling_params.{param}"
    assert repr(next(iter(changes.values()))) in caught.value.message


def test_neutral_values_of_refused_parameters_pass_and_are_dropped() -> None:
    request = sampling(n=1, stop=[], presence_penalty=0.0, structured_outputs=None)
    assert request.sampling == {"max_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "param", "status"),
    [
        ({"model": "other"}, "model", 404),
        ({"output_mode": "text"}, "output_mode", 400),
        ({"features": {}}, "features", 400),
        ({"kv_transfer_params": {}}, "kv_transfer_params", 400),
    ],
)
def test_fields_that_are_not_served(changes, param, status) -> None:
    with pytest.raises(ApiError) as caught:
        read(**changes)
    assert (caught.value.status, caught.value.param) == (status, param)


@pytest.mark.parametrize("value", ["-1", "1.5", "", "two", "²"])
def test_staleness_must_be_a_number(value) -> None:
    with pytest.raises(ApiError, match="x-rowen-max-staleness"):
        read({"x-rowen-max-staleness": value})


@pytest.mark.parametrize("value", ["", "x" * 201, "a\nb", "ä"])
def test_ids_go_into_headers_so_they_are_checked(value) -> None:
    with pytest.raises(ApiError, match="x-request-id"):
        read({"x-request-id": value})


def test_a_wrong_value_is_shown_but_never_a_whole_prompt() -> None:
    with pytest.raises(ApiError) as caught:
        read(token_ids="secret " * 1000)
    assert len(caught.value.message) < 200


def test_fingerprint_ignores_how_the_answer_is_sent_and_nothing_else() -> None:
    same = [read(), read(stream=True), read(return_token_ids=True), read({"x-rowen-group": "g"})]
    other = [read(token_ids=[1, 2]), sampling(temperature=0), read(cache_salt="s")]
    assert len({r.fingerprint for r in same}) == 1
    assert len({r.fingerprint for r in [*same, *other]}) == 4


def test_usage_options() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = read(stream=True, stream_options=options)
    assert request.has_final_usage
    assert request.has_continuous_usage
    assert not read(stream_options={"continuous_usage_stats": True}).has_continuous_usage
