"""Asks one problem: prompt to tokens, a completion from the endpoint, and its grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from examples.grpo_arithmetic.buffer import Sample
from examples.grpo_arithmetic.endpoint import EndpointClient
from examples.grpo_arithmetic.task import Problem, grade


class Tokenizer(Protocol):
    """The two calls that are needed of a transformers tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Asker:
    """Samples at temperature 1, so that the engines' log probabilities are those of the policy."""

    client: EndpointClient
    tokenizer: Tokenizer
    max_tokens: int
    stop_token_id: int

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(problem.prompt))

    async def ask(
        self,
        problem: Problem,
        *,
        request_id: str,
        headers: Mapping[str, str],
        seed: int | None = None,
    ) -> Sample:
        """One graded completion; errors as `EndpointClient.generate`."""
        sampling: dict[str, Any] = {
            "temperature": 1.0,
            "max_tokens": self.max_tokens,
            "stop_token_ids": [self.stop_token_id],
        }
        if seed is not None:
            sampling["seed"] = seed
        completion = await self.client.generate(
            self.prompt_ids(problem), sampling, request_id=request_id, headers=headers
        )
        return Sample(completion, grade(self.tokenizer.decode(completion.token_ids), problem))
