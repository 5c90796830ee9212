"""Composes what the client gets from the token log, byte for byte in vLLM's shapes.

Logprobs are the engines' own bytes; only token ids are written anew.  Pure.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rowen.scheduler.request import GenerateRequest
from rowen.scheduler.trajectory import TrajectoryLog

_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
ID_PREFIX = "generate-tokens-"
"""vLLM puts it before the client's request id."""


def usage(request: GenerateRequest, completion_tokens: int) -> dict[str, Any]:
    prompt_tokens = len(request.prompt)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def chunk(request: GenerateRequest, log: TrajectoryLog, start: int, end: int, last: bool) -> bytes:
    """One event with the tokens ``[start, end)``; the last one carries finish reason and spans."""
    current_usage = usage(request, end) if request.has_continuous_usage else None
    parts = [b'data: {"request_id":', _json(ID_PREFIX + request.request_id)]
    parts += [b',"usage":', _json(current_usage)]
    if request.returns_prompt and start == 0:
        parts += [b',"prompt_token_ids":', _json(request.prompt)]
    parts += [b',"output_mode":"tokens","choices":[{"index":0,"finish_reason":']
    parts += [_json(log.finish_reason if last else None), b',"stop_reason":']
    parts += [_json(log.stop_reason if last else None), b',"token_ids":']
    parts += [_json(log.tokens[start:end].tolist())]
    parts += [b',"routed_experts":null,"sampling_mask":null,"weight_versions":']
    parts += [_spans(log) if last else b"null", b',"logprobs":']
    parts += [_logprobs(log, start, end), b"}]}\n\n"]
    return b"".join(parts)


def final_usage(request: GenerateRequest, log: TrajectoryLog) -> bytes:
    """The event without choices that ``stream_options.include_usage`` asks for."""
    tokens = usage(request, len(log.tokens))
    parts = [b'data: {"request_id":', _json(ID_PREFIX + request.request_id), b',"usage":']
    brief = {name: value for name, value in tokens.items() if value is not None}
    return b"".join([*parts, _json(brief), b',"output_mode":"tokens","choices":[]}\n\n'])


def error_event(body: dict[str, Any]) -> bytes:
    """A stream that cannot go on says so in an event of its own, then ends."""
    return b"data: " + _json(body) + b"\n\n" + DONE


def whole(request: GenerateRequest, log: TrajectoryLog, model: str, created_s: int) -> bytes:
    """The answer to a request that did not ask for a stream."""
    head = {
        "request_id": ID_PREFIX + request.request_id,
        "model": model,
        "created": created_s,
        "usage": usage(request, len(log.tokens)),
        "prompt_logprobs": None,
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": request.prompt if request.returns_prompt else None,
        "mm_placeholders": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "output_mode": "tokens",
    }
    parts = [_json(head)[:-1], b',"choices":[{"index":0,"finish_reason":']
    parts += [_json(log.finish_reason), b',"stop_reason":', _json(log.stop_reason)]
    parts += [b',"token_ids":', _json(log.tokens.tolist())]
    parts += [b',"routed_experts":null,"sampling_mask":null,"weight_versions":', _spans(log)]
    parts += [b',"logprobs":', _logprobs(log, 0, len(log.tokens)), b"}]}"]
    return b"".join(parts)


def _spans(log: TrajectoryLog) -> bytes:
    return _json([span._asdict() for span in log.spans])


def _logprobs(log: TrajectoryLog, start: int, end: int) -> bytes:
    if not log.has_logprobs:
        return b"null"
    return b'{"content":[' + b",".join(log.logprobs[start:end]) + b"]}"
