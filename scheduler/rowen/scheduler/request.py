"""Reads what a client posts to ``/inference/v1/generate`` and says exactly what is wrong with it.

Lets through what can be continued on another engine without a change of meaning, and refuses the
rest by name: a request that only works while its engine lives would break the endpoint's promise.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from typing import Annotated, Any

import msgspec

from rowen.scheduler.errors import ApiError, wrong_field

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
MAX_ID_CHARS = 200
"""Ids go into a header towards the engines and into status pages."""

PASSED_SAMPLING = frozenset(
    {
        "allowed_token_ids", "detokenize", "ignore_eos", "include_stop_str_in_output",
        "logit_bias", "logprobs", "max_tokens", "min_p", "min_tokens", "repetition_penalty",
        "seed", "skip_reading_prefix_cache", "skip_special_tokens",
        "spaces_between_special_tokens", "stop_token_ids", "temperature", "top_k", "top_p",
    }
)  # fmt: skip
"""Depend on one token, or on prompt and output together, so they hold across a seam."""

UNSUPPORTED_SAMPLING: Mapping[str, str] = {
    "n": "send n requests with one X-Rowen-Group instead",
    "stop": "a stop string may straddle two engines; use stop_token_ids",
    "bad_words": "a bad word may straddle two engines; use logit_bias",
    "presence_penalty": "it counts output that a continuing engine has as prompt; "
    "use repetition_penalty",
    "frequency_penalty": "it counts output that a continuing engine has as prompt; "
    "use repetition_penalty",
    "structured_outputs": "a grammar cannot be resumed on another engine; leave it out",
    "prompt_logprobs": "logprobs of the prompt are not relayed; ask an engine directly",
    "flat_logprobs": "the flat form is not relayed; leave it out",
    "extra_args": "arguments of plugins are not relayed; leave it out",
}
NEUTRAL_VALUES: tuple[object, ...] = (None, 0, 0.0, False, "", [], {})

UNSUPPORTED_FIELDS: Mapping[str, str] = {
    "features": "multi-modal input is not relayed; leave it out",
    "content_parts": "multi-modal input is not relayed; leave it out",
    "kv_transfer_params": "KV transfer is not relayed; leave it out",
    "ec_transfer_params": "encoder-cache transfer is not relayed; leave it out",
    "reasoning_ended": "it only matters to structured outputs; leave it out",
}


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(msgspec.Struct):
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    sampling_params: dict[str, Any]
    request_id: str | None = None
    model: str | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    priority: int = 0
    output_mode: str = "tokens"
    return_token_ids: bool | None = None
    features: Any = None
    content_parts: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    reasoning_ended: Any = None


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_any = msgspec.json.Decoder().decode
_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request that can be served; ``prompt`` and ``sampling`` go to the engines."""

    request_id: str
    is_id_given: bool
    """The client chose the id by ``X-Request-Id``, so it may come back with it."""
    fingerprint: bytes
    """Of everything that decides the tokens; the same id with another one is a mistake."""
    prompt: list[int]
    sampling: dict[str, Any]
    passed: dict[str, Any]
    """Further fields for the engine: cache_salt, priority."""
    is_stream: bool
    has_final_usage: bool
    has_continuous_usage: bool
    returns_prompt: bool
    trajectory_key: str | None
    group_key: str | None
    max_staleness: int | None

    @property
    def max_tokens(self) -> int | None:
        value: int | None = self.sampling.get("max_tokens")
        return value

    @property
    def has_logprobs(self) -> bool:
        return self.sampling.get("logprobs") is not None


def read_request(body: bytes, headers: Mapping[str, str], model: str) -> GenerateRequest:
    """Validate one request.

    Raises:
        ApiError: 400 or 404 with the field, its value and the remedy.
    """
    parsed = _parse(body)
    _check_fields(parsed, body, model)
    _check_sampling(parsed.sampling_params)
    header_id = _id_header(headers, "x-request-id")
    if parsed.request_id is not None:
        _check_id("request_id", parsed.request_id)
    options = parsed.stream_options or _StreamOptions()
    passed: dict[str, Any] = {}
    if parsed.cache_salt is not None:
        passed["cache_salt"] = parsed.cache_salt
    if parsed.priority:
        passed["priority"] = parsed.priority
    return GenerateRequest(
        request_id=header_id or parsed.request_id or uuid.uuid4().hex,
        is_id_given=header_id is not None,
        fingerprint=_fingerprint(parsed, passed),
        prompt=parsed.token_ids,
        sampling=parsed.sampling_params,
        passed=passed,
        is_stream=bool(parsed.stream),
        has_final_usage=bool(options.include_usage),
        has_continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        returns_prompt=bool(parsed.return_token_ids),
        trajectory_key=_id_header(headers, "x-rowen-trajectory"),
        group_key=_id_header(headers, "x-rowen-group"),
        max_staleness=_staleness(headers),
    )


def _parse(body: bytes) -> _Body:
    try:
        return _decode_body(body)
    except msgspec.ValidationError as error:
        field, value = _locate(str(error), body)
        expected = _PATH.sub("", str(error))
        raise wrong_field(field, value, f"{expected}; correct it") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = f"the body is not JSON ({error}); send one JSON object"
        raise ApiError(HTTPStatus.BAD_REQUEST, text, param="body") from None


def _locate(message: str, body: bytes) -> tuple[str, object]:
    """Field and value that a decoder's message speaks of."""
    found = _PATH.search(message)
    path = found["path"].lstrip(".") if found else ""
    value: Any = _decode_any(body)
    for part in re.findall(r"\w+", path):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            break
    if isinstance(value, dict):
        value = sorted(value)
    return path or "body", value


def _check_fields(parsed: _Body, body: bytes, model: str) -> None:
    if parsed.model is not None and parsed.model != model:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"model is {parsed.model!r}: this endpoint serves {model!r}; name that, or omit it",
            param="model",
        )
    if parsed.output_mode != "tokens":
        raise wrong_field(
            "output_mode", parsed.output_mode, "only 'tokens' is served here; leave it out"
        )
    for field, remedy in UNSUPPORTED_FIELDS.items():
        value = getattr(parsed, field)
        if value is not None:
            raise wrong_field(field, value, remedy)


def _check_sampling(sampling: dict[str, Any]) -> None:
    for name, value in sampling.items():
        if name in PASSED_SAMPLING:
            continue
        is_neutral = value == 1 if name == "n" else value in NEUTRAL_VALUES
        if not is_neutral:
            remedy = UNSUPPORTED_SAMPLING.get(
                name, "it is not known to hold across engines; leave it out"
            )
            raise wrong_field(f"sampling_params.{name}", value, remedy)
    for name in [n for n in sampling if n not in PASSED_SAMPLING]:
        del sampling[name]
    _check_integer(sampling, "max_tokens", 1)
    _check_integer(sampling, "min_tokens", 0)
    _check_integer(sampling, "logprobs", -1)
    _check_integer(sampling, "seed", -(2**63))
    shortest, longest = sampling.get("min_tokens") or 0, sampling.get("max_tokens")
    if longest is not None and shortest > longest:
        raise wrong_field(
            "sampling_params.min_tokens", shortest, f"max_tokens is {longest}; raise that one"
        )


def _check_integer(sampling: dict[str, Any], name: str, lowest: int) -> None:
    value = sampling.get(name)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_integer and lowest <= value < 2**63):
        raise wrong_field(f"sampling_params.{name}", value, f"give an integer of at least {lowest}")


def _id_header(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    if value is not None:
        _check_id(name, value)
    return value


def _check_id(name: str, value: str) -> None:
    if not value or len(value) > MAX_ID_CHARS or not value.isascii() or not value.isprintable():
        raise wrong_field(name, value, f"give 1 to {MAX_ID_CHARS} printable ASCII characters")


def _staleness(headers: Mapping[str, str]) -> int | None:
    value = headers.get("x-rowen-max-staleness")
    if value is None:
        return None
    if not value.isdecimal() or not value.isascii():
        raise wrong_field(
            "x-rowen-max-staleness",
            value,
            "give how many weight versions behind is allowed, 0 or more",
        )
    return int(value)


def _fingerprint(parsed: _Body, passed: dict[str, Any]) -> bytes:
    decisive = (parsed.token_ids, parsed.sampling_params, passed)
    return blake2b(msgspec.json.encode(decisive, order="sorted"), digest_size=16).digest()
