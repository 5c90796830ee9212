"""The rollout engine as the loop drives it, ten times a second."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rowen.daemon.rollout import RolloutEngine
from rowen.executor.engine import EngineSpec
from rowen.executor.supervisor import EngineStartError


@pytest.mark.parametrize("error", [EngineStartError("no core"), RuntimeError("a bug of ours")])
def test_a_start_that_fails_in_any_way_is_not_repeated_at_the_loops_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    starts: list[float] = []

    async def keep_running(*, ready_deadline_s: float) -> None:
        starts.append(ready_deadline_s)
        raise error

    async def loop() -> None:
        spec = EngineSpec(name="rollout", role="rollout", model=tmp_path)
        engine = RolloutEngine(spec, tmp_path)
        monkeypatch.setattr(engine._supervisor, "keep_running", keep_running)
        for _ in range(5):
            engine.want()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert str(error) in (engine.problem or "")
        assert engine.describe()["retry_in_s"] > 60

    asyncio.run(loop())
    assert len(starts) == 1
