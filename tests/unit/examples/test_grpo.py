"""Packing computes what one row per sample computes, and the loss goes where it should."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from examples.grpo_arithmetic.buffer import Group, Sample
from examples.grpo_arithmetic.endpoint import Completion, Span
from examples.grpo_arithmetic.grpo import (
    CLIP_HIGH_RATIO,
    CLIP_LOW_RATIO,
    advantages,
    clipped_loss,
    logprobs,
    micro_batches,
    pack,
)
from examples.grpo_arithmetic.task import Grade, Problem
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def group(prompt: list[int], answers: list[list[int]]) -> Group:
    samples = []
    for i, answer in enumerate(answers):
        spans = (Span(0, 0, len(answer)),)
        values = tuple(-1.0 - 0.1 * i for _ in answer)
        completion = Completion(f"s{i}", tuple(answer), values, spans, "stop", 1)
        samples.append(Sample(completion, Grade(i / 10, False)))
    return Group("g", Problem(11, 22), tuple(prompt), tuple(samples))


GROUPS = [
    group([5, 6, 7, 8], [[9, 10, 11], [12], [13, 14, 15, 16]]),
    group([20, 21], [[22, 23], [24, 25, 26]]),
]


def alone(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
    """The reference: one plain causal row, every position scored."""
    ids = torch.tensor([[*prompt, *answer]])
    scores = model(input_ids=ids).logits[0].float().log_softmax(-1)
    start = len(prompt) - 1
    return [float(scores[start + i, token]) for i, token in enumerate(answer)]


def test_packed_log_probabilities_equal_those_of_separate_rows(model: torch.nn.Module) -> None:
    with torch.no_grad():
        got = logprobs(model, pack(GROUPS))
        expected = [
            value
            for g in GROUPS
            for s in g.samples
            for value in alone(model, g.prompt_ids, s.completion.token_ids)
        ]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_every_token_keeps_its_behaviour_log_probability_and_advantage() -> None:
    packed = pack(GROUPS)
    flat = [(g, i, s) for g in GROUPS for i, s in enumerate(g.samples)]
    tokens = [t for _, _, s in flat for t in s.completion.token_ids]
    behaviour = [v for _, _, s in flat for v in s.completion.logprobs]
    expected = [
        advantages(g.rewards)[i] for g, i, s in flat for _ in range(len(s.completion.token_ids))
    ]
    assert packed.target_N.tolist() == tokens
    assert packed.behaviour_logprob_N.tolist() == pytest.approx(behaviour)
    assert packed.advantage_N.tolist() == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_advantages_are_centred_and_keep_the_order_of_the_rewards(rewards: list[float]) -> None:
    values = advantages(rewards)
    assert sum(values) == pytest.approx(0, abs=1e-6)
    ranked = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(values[a] <= values[b] for a, b in itertools.pairwise(ranked))


def test_a_step_along_the_gradient_makes_the_better_answer_likelier(
    model: torch.nn.Module,
) -> None:
    import copy

    mine = copy.deepcopy(model)
    packed = pack([group([5, 6, 7], [[9, 10], [11, 12]])])
    before = logprobs(mine, packed)
    on_policy = replace(packed, behaviour_logprob_N=before.detach())
    loss = clipped_loss(before, on_policy, step_tokens=4)
    assert loss.clipped_tokens == 0
    assert loss.behaviour_kl_sum == pytest.approx(0, abs=1e-6)
    loss.total.backward()
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        after = logprobs(mine, packed)
    worse, better = slice(0, 2), slice(2, 4)
    assert after[better].sum() > before[better].sum()
    assert after[worse].sum() < before[worse].sum()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        (1 + CLIP_HIGH_RATIO + 0.01, 1.0, True),
        (1 + CLIP_HIGH_RATIO - 0.01, 1.0, False),
        (1 + CLIP_HIGH_RATIO + 0.01, -1.0, False),
        (1 - CLIP_LOW_RATIO - 0.01, -1.0, True),
        (1 - CLIP_LOW_RATIO + 0.01, -1.0, False),
        (1 - CLIP_LOW_RATIO - 0.01, 1.0, False),
    ],
)
def test_only_what_went_too_far_in_its_own_direction_is_clipped(
    ratio: float, advantage: float, is_clipped: bool
) -> None:
    packed = replace(
        pack([group([5], [[9], [10]])]),
        behaviour_logprob_N=torch.zeros(1),
        advantage_N=torch.tensor([advantage]),
    )
    logprob_N = torch.tensor([ratio]).log().requires_grad_()
    loss = clipped_loss(logprob_N, packed, step_tokens=1)
    loss.total.backward()
    assert loss.clipped_tokens == int(is_clipped)
    assert logprob_N.grad is not None
    assert (float(logprob_N.grad) == 0.0) is is_clipped
    assert loss.behaviour_kl_sum > 0


def test_the_losses_of_micro_batches_add_up_to_that_of_the_step(model: torch.nn.Module) -> None:
    def total(groups: list[Group]) -> float:
        packed = pack(groups)
        with torch.no_grad():
            return float(clipped_loss(logprobs(model, packed), packed, step_tokens=13).total)

    assert total(GROUPS) == pytest.approx(total(GROUPS[:1]) + total(GROUPS[1:]), abs=1e-5)


def test_micro_batches_keep_the_order_and_the_bound_where_one_group_fits() -> None:
    groups = [group([1] * n, [[2, 3], [4]]) for n in (3, 9, 4, 30, 2)]
    batches = [list(batch) for batch in micro_batches(groups, tokens=20)]
    assert [g for batch in batches for g in batch] == groups
    sizes = [[len(g.prompt_ids) + 1 for g in batch] for batch in batches]
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 20 for batch in sizes)
    assert len(batches) < len(groups)
