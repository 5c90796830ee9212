"""The step-time model: exact on a line, sane at the edges, follows a change."""

from __future__ import annotations

import pytest

from rowen.executor.step_time import StepTime


def test_nothing_learned_predicts_zero() -> None:
    assert StepTime().predict_ms(100) == 0.0


def test_steps_of_one_size_predict_their_mean_for_any_size() -> None:
    model = StepTime()
    for took_ms in (9.0, 10.0, 11.0):
        model.learn(1, took_ms)
    assert model.predict_ms(1) == pytest.approx(10.0, rel=0.01)
    assert model.predict_ms(500) == model.predict_ms(1)


def test_a_straight_line_is_found_and_extended() -> None:
    model = StepTime()
    for tokens in (1, 8, 64, 300):
        model.learn(tokens, 30.0 + 0.9 * tokens)
    assert model.predict_ms(1000) == pytest.approx(930.0)


def test_the_past_fades() -> None:
    model = StepTime()
    for _ in range(300):
        model.learn(1, 10.0)
    for _ in range(300):
        model.learn(1, 50.0)
    assert model.predict_ms(1) == pytest.approx(50.0, rel=0.01)


def test_a_prediction_is_never_negative() -> None:
    model = StepTime()
    model.learn(100, 1.0)
    model.learn(200, 50.0)
    assert model.predict_ms(1) == 0.0
