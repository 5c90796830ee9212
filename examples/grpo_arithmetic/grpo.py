"""The arithmetic of GRPO: advantages, packing and the clipped loss.  Plain torch, no I/O.

Axes: N scored tokens, B rows (one per group), S positions of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from examples.grpo_arithmetic.buffer import Group
from torch import Tensor

CLIP_LOW_RATIO, CLIP_HIGH_RATIO = 0.2, 0.28
"""Asymmetric, as in DAPO (arXiv 2503.14476, 3.1): room for rare right answers to grow."""
ADVANTAGE_EPSILON = 1e-4
PADDING, PROMPT = -1, 0
"""Segments of a row; sample i of the group is segment i + 1."""


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better than its group each sample is, in standard deviations of the group."""
    mean, deviation = fmean(rewards), pstdev(rewards)
    return [(reward - mean) / (deviation + ADVANTAGE_EPSILON) for reward in rewards]


@dataclass(frozen=True, slots=True)
class Packed:
    """Groups as rows: the prompt once, then every sample without its last token.

    A sample sees the prompt and itself.  With prompts of 19 tokens and samples of 4, this is
    less than a third of the tokens of one row per sample, with the same result.
    """

    token_ids_B_S: Tensor
    position_B_S: Tensor
    may_attend_B_1_S_S: Tensor
    """True where the query (third axis) may look at the key (fourth)."""
    source_row_N: Tensor
    source_position_N: Tensor
    """Where the hidden state stands that predicts each scored token."""
    target_N: Tensor
    behaviour_logprob_N: Tensor
    """Of the engine that wrote the token, with the weights it had."""
    advantage_N: Tensor


def pack(groups: Sequence[Group]) -> Packed:
    """Lay out whole groups; all samples of a group share its row."""
    tokens: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    rows: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    logprobs: list[float] = []
    values: list[float] = []
    for row, group in enumerate(groups):
        length = len(group.prompt_ids)
        row_tokens, row_positions = list(group.prompt_ids), list(range(length))
        row_segments = [PROMPT] * length
        for index, (sample, advantage) in enumerate(
            zip(group.samples, advantages(group.rewards), strict=True)
        ):
            ids = sample.completion.token_ids
            start = len(row_tokens)
            rows += [row] * len(ids)
            sources += [length - 1, *range(start, start + len(ids) - 1)]
            targets += ids
            logprobs += sample.completion.logprobs
            values += [advantage] * len(ids)
            row_tokens += ids[:-1]
            row_positions += range(length, length + len(ids) - 1)
            row_segments += [index + 1] * (len(ids) - 1)
        tokens.append(row_tokens)
        positions.append(row_positions)
        segments.append(row_segments)
    segment_B_S = _rectangle(segments, PADDING)
    return Packed(
        token_ids_B_S=_rectangle(tokens, 0),
        position_B_S=_rectangle(positions, 0),
        may_attend_B_1_S_S=_visible(segment_B_S)[:, None],
        source_row_N=torch.tensor(rows),
        source_position_N=torch.tensor(sources),
        target_N=torch.tensor(targets),
        behaviour_logprob_N=torch.tensor(logprobs),
        advantage_N=torch.tensor(values),
    )


def _rectangle(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _visible(segment_B_S: Tensor) -> Tensor:
    size = segment_B_S.shape[1]
    query, key = segment_B_S[:, :, None], segment_B_S[:, None, :]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    # Padding sees itself: a row of the softmax with nothing in it would be NaN.
    return causal & ((key == PROMPT) | (key == query))


def logprobs(model: torch.nn.Module, packed: Packed) -> Tensor:
    """Log probability of each scored token under ``model``, at temperature 1; float32, axis N.

    ``model`` is a causal language model of transformers with ``.model`` and ``.lm_head``.
    """
    hidden_B_S_H = model.model(
        input_ids=packed.token_ids_B_S,
        position_ids=packed.position_B_S,
        attention_mask=packed.may_attend_B_1_S_S,
        use_cache=False,
    ).last_hidden_state
    scored_N_H = hidden_B_S_H[packed.source_row_N, packed.source_position_N]
    scores = model.lm_head(scored_N_H).float()
    chosen_N = scores.gather(1, packed.target_N[:, None])[:, 0]
    return chosen_N - torch.logsumexp(scores, dim=1)


@dataclass(frozen=True, slots=True)
class Loss:
    """``total`` is differentiable; the rest describes the same tokens, summed."""

    total: Tensor
    clipped_tokens: int
    behaviour_kl_sum: float
    """Estimate of KL(behaviour || current): how far training is from what the engines ran."""


def clipped_loss(logprob_N: Tensor, packed: Packed, *, step_tokens: int) -> Loss:
    """PPO's clipped objective against the behaviour log probabilities of the engines.

    Args:
        step_tokens: of the whole step, so that the losses of its micro-batches add up to the
            mean over tokens.
    """
    log_ratio_N = logprob_N - packed.behaviour_logprob_N
    ratio_N = log_ratio_N.exp()
    limited_N = ratio_N.clamp(1 - CLIP_LOW_RATIO, 1 + CLIP_HIGH_RATIO)
    free, limited = ratio_N * packed.advantage_N, limited_N * packed.advantage_N
    total = -torch.minimum(free, limited).sum() / step_tokens
    detached = log_ratio_N.detach()
    # The estimator k3 (exp(x) - 1 - x) is never negative, unlike the plain difference.
    kl = (detached.exp() - 1 - detached).sum().item()
    return Loss(total, int((limited < free).sum().item()), float(kl))


def micro_batches(groups: Sequence[Group], *, tokens: int) -> Iterator[Sequence[Group]]:
    """Runs of groups whose rows, padded to the longest of the run, hold about ``tokens``."""
    batch: list[Group] = []
    longest = 0
    for group in groups:
        size = len(group.prompt_ids) + sum(len(s.completion.token_ids) - 1 for s in group.samples)
        if batch and (len(batch) + 1) * max(longest, size) > tokens:
            yield batch
            batch, longest = [], 0
        batch.append(group)
        longest = max(longest, size)
    if batch:
        yield batch
