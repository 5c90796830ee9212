"""Trains the model: take fresh groups, update, publish the new weights, tell the endpoint.

    python -m examples.grpo_arithmetic.train --endpoint URL --model FOLDER --out FILE

Ends with 0 when the steps are done, 1 when the endpoint failed, 2 on wrong use.  SIGUSR1 asks it to
finish: the step under way, the last evaluation, 0.  SIGTERM and SIGINT end it at once, also with 0.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from examples.grpo_arithmetic.buffer import Group, most_telling
from examples.grpo_arithmetic.endpoint import EndpointError
from examples.grpo_arithmetic.evaluation import Evaluation
from examples.grpo_arithmetic.events import EventLog
from examples.grpo_arithmetic.options import Options, read_options
from examples.grpo_arithmetic.rollouts import Rollouts, RolloutSettings
from examples.grpo_arithmetic.task import Problem, endless, split

if TYPE_CHECKING:
    from examples.grpo_arithmetic.learner import Learner

    from rowen.weightsync.publisher import Publisher

log = logging.getLogger("grpo_arithmetic")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What signals have asked for; set by their handlers."""

    stop: threading.Event = field(default_factory=threading.Event)
    """End now, without the last evaluation."""
    finish: threading.Event = field(default_factory=threading.Event)
    """Begin no further step."""

    def obey_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop.set())
        signal.signal(signal.SIGUSR1, lambda *_: self.finish.set())

    def either(self) -> bool:
        return self.stop.is_set() or self.finish.is_set()


class Run:
    """One training run, from the first evaluation to the summary."""

    def __init__(
        self, options: Options, events: EventLog, rollouts: Rollouts, wishes: Wishes
    ) -> None:
        self._options = options
        self._events = events
        self._rollouts = rollouts
        self._wishes = wishes
        self._held_out, _ = split(options.evaluation_problems)
        self._started = time.monotonic()
        self._version = 0
        self._first: Evaluation | None = None
        self._last: Evaluation | None = None
        self._published: list[dict[str, Any]] = []
        self._trained_samples = 0

    def run(self) -> None:
        """Train until the steps and the deadline are reached, or a signal asks for the end.

        Raises:
            EndpointError: the endpoint refused, or brought nothing fresh for too long.
        """
        waiting = self._evaluate()
        # The model loads while the first evaluation is sampled.
        from examples.grpo_arithmetic.learner import Learner

        options = self._options
        learner = Learner(options.model, learning_rate=options.lr, threads=options.threads)
        with self._publisher(learner) as publisher:
            # Engines that hold another run's weights go back to the checkpoint's.
            self._rollouts.announce(0, *publisher.address)
            self._rollouts.start()
            self._first = self._note_evaluation(waiting)
            if self._first is None:
                return
            if self._first.samples == 0:
                raise EndpointError(
                    "no answer by the checkpoint's weights (version 0) came from "
                    f"{options.endpoint} in {options.evaluation_deadline_s:g} s; see "
                    f"{options.endpoint}/rowen/v1/versions for what the engines hold"
                )
            while not self._is_done():
                self._step(learner, publisher)
            self._rollouts.stop()
            if self._version > 0:
                self._last = self._note_evaluation(self._evaluate())

    def summary(self, ended: str) -> dict[str, Any]:
        """Of the run so far; the means of `evaluate` are None where none was possible."""
        counts = self._rollouts.counts
        dropped = {f"dropped_{k}_groups": v for k, v in asdict(self._rollouts.dropped).items()}
        return {
            "ended": ended,
            "steps": self._version,
            "reward_first": self._first.reward_mean if self._first else None,
            "reward_last": self._last.reward_mean if self._last else None,
            "right_ratio_first": self._first.right_ratio if self._first else None,
            "right_ratio_last": self._last.right_ratio if self._last else None,
            "evaluation_samples": self._last.samples if self._last else 0,
            "trajectories": counts.finished,
            "tokens": counts.tokens,
            "retries": counts.retries,
            "lost": counts.lost,
            "incomplete_groups": self._rollouts.incomplete_groups,
            **dropped,
            "trained_samples": self._trained_samples,
            "full_bytes": sum(p["full_bytes"] for p in self._published),
            "delta_bytes": sum(p["delta_bytes"] for p in self._published),
            "seconds": time.monotonic() - self._started,
        }

    def _is_done(self) -> bool:
        if self._wishes.either():
            return True
        if self._version < self._options.steps:
            return False
        deadline_s = self._options.deadline_s
        return deadline_s is None or time.monotonic() - self._started >= deadline_s

    def _step(self, learner: Learner, publisher: Publisher) -> None:
        began = time.monotonic()
        groups = self._rollouts.take(
            version=self._version,
            count=self._options.groups_per_step,
            timeout_s=self._options.stall_s,
            until=self._wishes.either,
        )
        waited = time.monotonic()
        kept = [most_telling(group, self._options.train_samples_per_group) for group in groups]
        update = learner.step(kept, is_cancelled=self._wishes.stop.is_set) if kept else None
        if update is None:
            return
        trained = time.monotonic()
        staleness = [self._version - group.oldest_version for group in groups]
        self._version += 1
        published = self._publish(learner, publisher)
        self._trained_samples += update.samples
        rewards = [reward for group in groups for reward in group.rewards]
        ended = time.monotonic()
        self._events.write(
            "step",
            step=self._version,
            version=self._version,
            reward_mean=fmean(rewards),
            right_ratio=fmean(s.grade.is_right for group in groups for s in group.samples),
            sampled=len(rewards),
            **asdict(update),
            staleness_mean=fmean(staleness),
            staleness_max=max(staleness),
            mixed_version_samples=_mixed(groups),
            wait_s=waited - began,
            publish_s=ended - trained,
            step_s=ended - began,
            **published,
        )
        log.info(
            "event=step step=%d reward=%.3f staleness=%.1f changed_ratio=%.4f delta_bytes=%d "
            "wait_s=%.1f train_s=%.1f publish_s=%.1f",
            self._version, fmean(rewards), fmean(staleness), published["changed_ratio"],
            published["delta_bytes"], waited - began, trained - waited, ended - trained,
        )  # fmt: skip

    def _publisher(self, learner: Learner) -> Publisher:
        import torch

        from rowen.weightsync.publisher import Publisher

        model_id = self._options.model_id or self._options.model.name
        # Engines serve bfloat16: what is below its resolution is no change to them.
        return Publisher(model_id, learner.parameters(), dtype=torch.bfloat16)

    def _publish(self, learner: Learner, publisher: Publisher) -> dict[str, Any]:
        published = publisher.publish(learner.parameters(), self._version)
        host, port = publisher.address
        self._rollouts.announce(self._version, host, port)
        fields = {
            "full_bytes": published.full_bytes,
            "delta_bytes": published.delta_bytes,
            "changed": published.changed,
            "changed_ratio": published.changed / published.elements,
            "encode_s": published.encode_s,
        }
        self._published.append(fields)
        return fields

    def _evaluate(self) -> Future[Evaluation]:
        return self._rollouts.evaluate(
            self._held_out,
            repeats=self._options.evaluation_repeats,
            version=self._version,
            deadline_s=self._options.evaluation_deadline_s,
        )

    def _note_evaluation(self, waiting: Future[Evaluation]) -> Evaluation | None:
        """Wait for it, or until ``stop`` is set; then it is withdrawn and there is none."""
        while not self._wishes.stop.is_set():
            try:
                evaluation = waiting.result(timeout=0.2)
            except TimeoutError:
                continue
            except CancelledError:
                return None
            self._events.write("evaluation", **asdict(evaluation))
            log.info(
                "event=evaluation version=%d reward=%s right_ratio=%s samples=%d missed=%d",
                evaluation.version, evaluation.reward_mean, evaluation.right_ratio,
                evaluation.samples, evaluation.missed,
            )  # fmt: skip
            return evaluation
        waiting.cancel()
        return None


def _mixed(groups: Iterable[Group]) -> int:
    """Samples whose tokens are of more than one weight version."""
    return sum(len(s.completion.spans) > 1 for group in groups for s in group.samples)


def _settings(options: Options, stop_token_id: int) -> RolloutSettings:
    return RolloutSettings(
        endpoint=options.endpoint,
        samples_per_group=options.samples_per_group,
        in_flight_groups=options.in_flight_groups,
        max_staleness=options.max_staleness,
        max_tokens=options.max_tokens,
        stop_token_id=stop_token_id,
        deadline_s=options.trajectory_deadline_s,
    )


def _problems(options: Options) -> Sequence[Problem]:
    return split(options.evaluation_problems)[1]


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    wishes = Wishes()
    wishes.obey_signals()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    (stop_token_id,) = tokenizer.encode("\n")
    try:
        log_file = EventLog(options.out)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"--out is {str(options.out)!r}: {reason}; give a writable path", file=sys.stderr)
        return 2
    rollouts = Rollouts(
        _settings(options, stop_token_id), tokenizer, endless(_problems(options), options.seed)
    )
    with log_file as events, rollouts:
        events.write("start", **{k: str(v) for k, v in asdict(options).items()})
        run = Run(options, events, rollouts, wishes)
        try:
            run.run()
        except EndpointError as error:
            events.write("summary", **run.summary("error"), error=str(error))
            log.error("event=failed reason=%s", error)
            return 1
        events.write("summary", **run.summary("stopped" if wishes.stop.is_set() else "done"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
