"""Measure the coefficients of the service model on an engine that has nothing else to do."""

from __future__ import annotations

from statistics import median
from typing import Any

import aiohttp
import numpy as np

from rowen.bench.completions import (
    Arrivals,
    StreamError,
    completed,
    completed_together,
    completion_body,
    engine_session,
)
from rowen.bench.errors import BenchError
from rowen.bench.service_model import ServiceModel

_TOGETHER = 4
"""Sequences that decode at the same time in the second decode measurement."""


class CalibrationError(BenchError):
    """The engine did not answer the calibration requests; nothing was changed."""


async def calibrate(
    url: str,
    model: str,
    *,
    vocabulary: tuple[int, int],
    context_tokens: int,
    seed: int = 0,
    repeats: int = 3,
    timeout_s: float = 60.0,
) -> ServiceModel:
    """Measure an idle engine with single requests and with four at once.

    A prefill token costs the TTFT of a prompt of half the context over its length; a decode step
    the TPOT of one sequence; a further sequence a third of what three of them add.
    The least of all rounds counts, since whatever else happens on the machine only adds time.
    Takes ``repeats + 1`` rounds (the first warms up) of about two seconds on the two-core rig.

    Raises:
        CalibrationError: an answer failed or did not come within ``timeout_s``.
    """
    if context_tokens < 64:
        raise CalibrationError(f"context_tokens is {context_tokens}; calibration needs at least 64")
    random = np.random.Generator(np.random.PCG64(seed))
    long = context_tokens // 2
    decode = min(16, context_tokens // 4)
    long_ms: list[float] = []
    single_ms: list[float] = []
    together_ms: list[float] = []

    def body(tokens: int, output_tokens: int) -> dict[str, Any]:
        prompt = random.integers(*vocabulary, size=tokens).tolist()
        return completion_body(model, prompt, output_tokens, "calibration")

    try:
        async with engine_session(timeout_s) as session:
            for number in range(repeats + 1):
                # Nobody else is served while these are, so they run one after another.
                single = await completed(session, url, body(1, decode))
                long_run = await completed(session, url, body(long, 1))
                runs = await completed_together(
                    session, url, [body(1, decode) for _ in range(_TOGETHER)]
                )
                if number == 0:
                    continue
                long_ms.append(_ttft_ms(long_run))
                single_ms.append(_tpot_ms(single))
                together_ms.append(median(_tpot_ms(run) for run in runs))
    except (StreamError, aiohttp.ClientError, OSError) as error:
        raise CalibrationError(
            f"the engine at {url} cannot be calibrated ({type(error).__name__}: {error}); "
            "see its log"
        ) from None
    step_ms = min(single_ms)
    return ServiceModel(
        prefill_ms_per_token=min(long_ms) / long,
        # Tokens delivered together would measure as 0; the model needs a cost above it.
        decode_step_ms=max(0.001, step_ms),
        decode_sequence_ms=max(0.0, (min(together_ms) - step_ms) / (_TOGETHER - 1)),
    )


def _ttft_ms(run: Arrivals) -> float:
    assert run.ttft_ms is not None  # a complete answer has a first token
    return run.ttft_ms


def _tpot_ms(run: Arrivals) -> float:
    assert run.last_token_ms is not None  # likewise
    return (run.last_token_ms - _ttft_ms(run)) / (run.tokens - 1)
