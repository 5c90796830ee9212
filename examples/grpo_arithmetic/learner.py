"""The model being trained: fp32 master weights, bfloat16 compute, AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from examples.grpo_arithmetic.buffer import Group
from examples.grpo_arithmetic.grpo import clipped_loss, logprobs, micro_batches, pack
from torch import Tensor

MICRO_BATCH_TOKENS = 512
"""One core computes about 200 tokens/s forward and backward at this size; at four times the size
it was three times slower per token, because the activations no longer come from reused memory."""
GRADIENT_NORM_LIMIT = 1.0
ADAM_BETAS = (0.9, 0.95)
"""A second moment of about 20 steps: this run has about ten."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    groups: int
    samples: int
    tokens: int
    gradient_norm: float
    clipped_ratio: float
    """Share of tokens whose ratio was clipped, so that they gave no gradient."""
    behaviour_kl: float
    """Mean over tokens of KL(engine that sampled || model before the step)."""
    train_s: float
    optimizer_s: float


class Learner:
    """Not thread-safe; everything is for the trainer's thread."""

    def __init__(self, folder: Path, *, learning_rate: float, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model.train()
        # No weight decay: it would touch every weight in every step, and make each delta dense.
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=learning_rate,
            betas=ADAM_BETAS,
            weight_decay=0.0,
            fused=True,
        )

    def parameters(self) -> dict[str, Tensor]:
        """The live master weights in float32, by checkpoint name; tied weights appear once."""
        return dict(self._model.named_parameters())

    def step(self, groups: Sequence[Group], *, is_cancelled: Callable[[], bool]) -> Update | None:
        """One GRPO update; None, with the weights as they were, when it was cancelled half-way."""
        started = time.monotonic()
        tokens = sum(len(s.completion.token_ids) for group in groups for s in group.samples)
        clipped, kl = 0, 0.0
        for batch in micro_batches(groups, tokens=MICRO_BATCH_TOKENS):
            if is_cancelled():
                self._optimizer.zero_grad(set_to_none=True)
                return None
            packed = pack(batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logprob_N = logprobs(self._model, packed)
            loss = clipped_loss(logprob_N, packed, step_tokens=tokens)
            loss.total.backward()
            clipped += loss.clipped_tokens
            kl += loss.behaviour_kl_sum
        trained = time.monotonic()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), GRADIENT_NORM_LIMIT)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(
            groups=len(groups),
            samples=sum(len(group.samples) for group in groups),
            tokens=tokens,
            gradient_norm=float(norm),
            clipped_ratio=clipped / tokens,
            behaviour_kl=kl / tokens,
            train_s=trained - started,
            optimizer_s=time.monotonic() - trained,
        )
