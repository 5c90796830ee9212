"""The example against a double of the endpoint that fails in every way it may fail.

The trainer itself runs as its users start it, with a tiny model and the real publisher.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from examples.grpo_arithmetic import rollouts as rollouts_module
from examples.grpo_arithmetic.endpoint import EndpointError
from examples.grpo_arithmetic.options import read_options
from examples.grpo_arithmetic.rollouts import Rollouts, RolloutSettings
from examples.grpo_arithmetic.task import Problem

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0
TRAINER_DEADLINE_S = 120.0
ALPHABET = "0123456789 +=\n"
Reply = Callable[[web.Request, dict[str, Any], int], Awaitable[web.StreamResponse]]


class Characters:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def answer(text: str, version: str = "default", reason: str = "stop") -> web.Response:
    ids = [ord(c) for c in text]
    content = [{"token_id": token, "logprob": -0.5} for token in ids]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    choice = {
        "index": 0,
        "finish_reason": reason,
        "token_ids": ids,
        "logprobs": {"content": content},
        "weight_versions": spans,
    }
    return web.json_response({"choices": [choice]})


class Endpoint:
    """An HTTP server in its own thread; ``reply`` answers the nth attempt of a request id."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.attempts: Counter[str] = Counter()
        self.running = 0
        self.most_running = 0
        self.announced: list[dict[str, Any]] = []
        self.announce_status = 200
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/rowen/v1/versions", self._versions)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        request_id = request.headers["X-Request-Id"]
        self.attempts[request_id] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self.reply(request, await request.json(), self.attempts[request_id])
        finally:
            self.running -= 1

    async def _versions(self, request: web.Request) -> web.StreamResponse:
        self.announced.append(await request.json())
        return web.json_response({}, status=self.announce_status)


def settings(url: str, **changes: Any) -> RolloutSettings:
    values: dict[str, Any] = {
        "endpoint": url,
        "samples_per_group": 4,
        "in_flight_groups": 2,
        "max_staleness": 1,
        "max_tokens": 8,
        "stop_token_id": 10,
        "deadline_s": DEADLINE_S,
    }
    return RolloutSettings(**{**values, **changes})


def never() -> bool:
    return False


def problems() -> Iterator[Problem]:
    return itertools.cycle([Problem(27, 82)])


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """``process`` must live meanwhile, and may take as long as a trainer takes to start."""
    deadline = time.monotonic() + (TRAINER_DEADLINE_S if process else DEADLINE_S)
    while not is_true():
        assert process is None or process.poll() is None, "the process ended"
        assert time.monotonic() < deadline, "not reached within the deadline"
        time.sleep(0.01)


def index_of(request: web.Request) -> int:
    return int(request.headers["X-Request-Id"].rsplit("-", 1)[1])


async def mixed(request: web.Request, body: dict[str, Any], attempt: int) -> web.StreamResponse:
    """One sample in four is right, so that no group is flat."""
    return answer("109\n" if index_of(request) == 0 else "17\n")


def test_broken_connections_aborts_and_errors_are_repeated_with_the_same_id() -> None:
    async def failing(
        request: web.Request, body: dict[str, Any], attempt: int
    ) -> web.StreamResponse:
        which = index_of(request)
        if attempt == 1 and which == 1:
            return web.Response(status=503)
        if attempt == 1 and which == 2:
            return answer("1", reason="abort")
        if attempt == 1 and which == 3:
            assert request.transport is not None
            request.transport.abort()
        return await mixed(request, body, attempt)

    with (
        Endpoint(failing) as endpoint,
        Rollouts(settings(endpoint.url, in_flight_groups=1), Characters(), problems()) as rollouts,
    ):
        rollouts.start()
        (group,) = rollouts.take(version=0, count=1, timeout_s=DEADLINE_S, until=never)
        rollouts.stop()
        assert [s.completion.attempts for s in group.samples] == [1, 2, 2, 2]
        assert [endpoint.attempts[s.completion.request_id] for s in group.samples] == [1, 2, 2, 2]
        assert group.rewards[0] == 1.0
        assert rollouts.counts.lost == 0
        assert rollouts.counts.retries >= 3


def test_a_request_that_is_refused_stops_the_trainer_with_the_endpoints_words() -> None:
    async def refusing(
        request: web.Request, body: dict[str, Any], attempt: int
    ) -> web.StreamResponse:
        return web.Response(status=400, text="max_tokens is too large")

    with (
        Endpoint(refusing) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        rollouts.start()
        with pytest.raises(EndpointError, match="HTTP 400: max_tokens is too large"):
            rollouts.take(version=0, count=1, timeout_s=DEADLINE_S, until=never)
        assert set(endpoint.attempts.values()) == {1}


def test_what_is_never_answered_is_counted_as_lost_and_the_others_are_kept() -> None:
    async def one_fails(
        request: web.Request, body: dict[str, Any], attempt: int
    ) -> web.StreamResponse:
        if index_of(request) == 3:
            return web.Response(status=503)
        return await mixed(request, body, attempt)

    with (
        Endpoint(one_fails) as endpoint,
        Rollouts(
            settings(endpoint.url, in_flight_groups=1, deadline_s=0.3), Characters(), problems()
        ) as rollouts,
    ):
        rollouts.start()
        (group,) = rollouts.take(version=0, count=1, timeout_s=DEADLINE_S, until=never)
        assert len(group.samples) == 3
        assert rollouts.counts.lost == 1


def test_the_endpoint_is_kept_busy_up_to_the_bound_while_nobody_takes() -> None:
    with (
        Endpoint(mixed) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        rollouts.start()
        wait_until(lambda: len(endpoint.attempts) > 40)
        taken = rollouts.take(version=0, count=3, timeout_s=DEADLINE_S, until=never)
        assert len(taken) == 3
        assert endpoint.most_running <= 2 * 4
        assert rollouts.dropped.surplus > 0
        rollouts.stop()
        wait_until(lambda: endpoint.running == 0)


def test_groups_that_are_too_old_end_in_a_sentence_that_says_so() -> None:
    with (
        Endpoint(mixed) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        rollouts.start()
        with pytest.raises(EndpointError, match="no more than 1 versions behind 2 came"):
            rollouts.take(version=2, count=1, timeout_s=0.3, until=never)
        assert rollouts.dropped.stale > 0


def test_an_evaluation_counts_only_answers_of_its_version() -> None:
    async def switching(
        request: web.Request, body: dict[str, Any], attempt: int
    ) -> web.StreamResponse:
        assert body["sampling_params"]["temperature"] == 1.0
        # Four requests still meet the old weights, which are always wrong.
        is_old = len(endpoint.attempts) <= 4
        return answer("17\n", "2") if is_old else answer("109\n", "3")

    with (
        Endpoint(switching) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        result = rollouts.evaluate(
            [Problem(27, 82)] * 3, repeats=2, version=3, deadline_s=DEADLINE_S
        ).result()
    assert (result.samples, result.missed) == (6, 0)
    assert result.reward_mean == result.right_ratio == 1.0
    assert len(endpoint.attempts) == 6 + 4


def test_an_evaluation_without_its_version_has_no_mean_instead_of_another_versions() -> None:
    with (
        Endpoint(mixed) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        result = rollouts.evaluate([Problem(27, 82)], repeats=2, version=9, deadline_s=0.3).result()
    assert (result.samples, result.missed, result.reward_mean) == (0, 2, None)


def test_a_version_is_announced_until_heard_and_again_for_an_endpoint_that_forgot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollouts_module, "REANNOUNCE_S", 0.3)
    with (
        Endpoint(mixed) as endpoint,
        Rollouts(settings(endpoint.url), Characters(), problems()) as rollouts,
    ):
        endpoint.announce_status = 503
        rollouts.announce(1, "127.0.0.1", 4000)
        wait_until(lambda: len(endpoint.announced) >= 2)
        endpoint.announce_status = 200
        heard = len(endpoint.announced)
        wait_until(lambda: len(endpoint.announced) >= heard + 2)
        rollouts.announce(2, "127.0.0.1", 4000)
        wait_until(lambda: endpoint.announced[-1]["version"] == 2)
    assert json.loads(json.dumps(endpoint.announced[0])) == {
        "version": 1,
        "host": "127.0.0.1",
        "port": 4000,
        "run": endpoint.announced[0]["run"],
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of one token per character."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-sums")
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    # "." does not match a line end, which Split therefore leaves as a piece of its own.
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class _NeverHeard(list[dict[str, Any]]):
    def append(self, item: dict[str, Any]) -> None:
        """The engines stay where they are."""


class Guesser:
    """Writes random numbers of the newest version announced, as an engine of its own would."""

    def __init__(self) -> None:
        self.endpoint = Endpoint(self.reply)
        self._random = random.Random(1)

    async def reply(
        self, request: web.Request, body: dict[str, Any], attempt: int
    ) -> web.StreamResponse:
        assert body["sampling_params"]["stop_token_ids"] == [ALPHABET.index("\n")]
        version = self.endpoint.announced[-1]["version"] if self.endpoint.announced else 0
        ids = [self._random.randrange(10) for _ in range(3)] + [ALPHABET.index("\n")]
        content = [{"token_id": token, "logprob": -2.6} for token in ids]
        spans = [{"version": str(version), "start": 0, "end": len(ids)}]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "token_ids": ids,
            "logprobs": {"content": content},
            "weight_versions": spans,
        }
        return web.json_response({"choices": [choice]})


def start_trainer(url: str, model: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.grpo_arithmetic.train", "--endpoint", url]
    command += ["--model", str(model), "--out", str(out), "--groups-per-step", "2"]
    command += ["--samples-per-group", "6", "--train-samples-per-group", "4"]
    command += ["--evaluation-problems", "4", *options]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def read_events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]


def test_the_trainer_evaluates_trains_publishes_and_sums_up(
    model_folder: Path, tmp_path: Path
) -> None:
    out, guesser = tmp_path / "run" / "events.jsonl", Guesser()
    with guesser.endpoint as endpoint:
        trainer = start_trainer(endpoint.url, model_folder, out, "--steps", "3", "--lr", "1e-3")
        _, errors = trainer.communicate(timeout=TRAINER_DEADLINE_S)
    assert trainer.returncode == 0, errors
    events = read_events(out)
    kinds = [e["event"] for e in events]
    assert kinds == ["start", "evaluation", *(["step"] * 3), "evaluation", "summary"]
    steps = [e for e in events if e["event"] == "step"]
    assert [s["version"] for s in steps] == [1, 2, 3]
    assert all(s["samples"] == 8 and s["sampled"] == 12 for s in steps)
    assert all(s["tokens"] == 4 * s["samples"] for s in steps)
    assert all(0 <= s["staleness_max"] <= 2 for s in steps)
    assert all(s["changed"] > 0 and s["delta_bytes"] > 0 for s in steps)
    assert {a["version"] for a in endpoint.announced} == {0, 1, 2, 3}
    assert [e["version"] for e in events if e["event"] == "evaluation"] == [0, 3]
    summary = events[-1]
    assert (summary["ended"], summary["steps"], summary["lost"]) == ("done", 3, 0)
    assert summary["evaluation_samples"] == 8
    assert 0 <= summary["reward_first"] < 1
    assert summary["full_bytes"] == sum(s["full_bytes"] for s in steps)


@pytest.mark.parametrize(
    ("number", "ended", "last_events"),
    [
        (signal.SIGTERM, "stopped", ["step", "summary"]),
        (signal.SIGUSR1, "done", ["step", "evaluation", "summary"]),
    ],
)
def test_a_signal_ends_the_trainer_cleanly_with_its_summary(
    model_folder: Path, tmp_path: Path, number: int, ended: str, last_events: list[str]
) -> None:
    out, guesser = tmp_path / "events.jsonl", Guesser()
    with guesser.endpoint as endpoint:
        trainer = start_trainer(endpoint.url, model_folder, out, "--steps", "100000")
        wait_until(lambda: out.exists() and '"event": "step"' in out.read_text(), trainer)
        trainer.send_signal(number)
        _, errors = trainer.communicate(timeout=TRAINER_DEADLINE_S)
        wait_until(lambda: endpoint.running == 0)
    assert trainer.returncode == 0, errors
    events = read_events(out)
    assert [e["event"] for e in events][-len(last_events) :] == last_events
    summary = events[-1]
    assert summary["ended"] == ended
    assert summary["steps"] >= 1
    assert summary["reward_first"] is not None
    assert (summary["reward_last"] is not None) is ("evaluation" in last_events)


def test_an_endpoint_with_other_weights_ends_the_trainer_with_a_sentence(
    model_folder: Path, tmp_path: Path
) -> None:
    out, guesser = tmp_path / "events.jsonl", Guesser()
    with guesser.endpoint as endpoint:
        endpoint.announced = _NeverHeard([{"version": 9}])
        trainer = start_trainer(endpoint.url, model_folder, out, "--evaluation-deadline-s", "0.5")
        _, errors = trainer.communicate(timeout=TRAINER_DEADLINE_S)
    assert trainer.returncode == 1
    assert "no answer by the checkpoint's weights (version 0) came from" in errors
    assert "Traceback" not in errors
    summary = read_events(out)[-1]
    assert (summary["ended"], summary["steps"], summary["reward_first"]) == ("error", 0, None)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--model", "/nowhere", "--model is '/nowhere', which holds no config.json"),
        ("--endpoint", "127.0.0.1:80", "--endpoint is '127.0.0.1:80': give a URL like http"),
        ("--steps", "0", "--steps is 0: give at least 1"),
        ("--lr", "-1", "--lr is -1: give more than 0"),
        ("--train-samples-per-group", "7", "is 7 and --samples-per-group is 6: train on no more"),
    ],
)
def test_wrong_use_ends_with_code_2_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, sentence: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--endpoint", "http://127.0.0.1:80", "--model", str(tmp_path), "--out", "x"]
    arguments += ["--samples-per-group", "6", "--train-samples-per-group", "2"]
    with pytest.raises(SystemExit) as ended:
        read_options([*arguments, option, value])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
