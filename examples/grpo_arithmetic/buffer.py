"""Which finished groups the trainer takes, and which are let go, with the reason.

Pure.  The endpoint is kept busy while the trainer computes, so there are often more groups than a
step needs: the freshest are taken, and what waits too long is let go and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import pvariance

from examples.grpo_arithmetic.endpoint import Completion
from examples.grpo_arithmetic.task import Grade, Problem


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded completion."""

    completion: Completion
    grade: Grade


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one problem that came back."""

    group_id: str
    problem: Problem
    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def oldest_version(self) -> int:
        return min(sample.completion.oldest_version for sample in self.samples)

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(sample.grade.reward for sample in self.samples)

    @property
    def is_flat(self) -> bool:
        """All rewards are equal: every advantage is zero, and there is nothing to learn."""
        return len(set(self.rewards)) < 2


@dataclass(slots=True)
class Dropped:
    """Groups that were not trained on, by reason."""

    stale: int = 0
    """Older than the staleness bound when the trainer looked."""
    flat: int = 0
    surplus: int = 0
    """Fresh, but the buffer was full of fresher ones."""


@dataclass(frozen=True, slots=True)
class Choice:
    """``taken`` is empty when there are not enough groups yet."""

    taken: tuple[Group, ...]
    kept: tuple[Group, ...]
    dropped: Dropped = field(default_factory=Dropped)


def choose(
    groups: Sequence[Group], *, version: int, max_staleness: int, count: int, capacity: int
) -> Choice:
    """Take the ``count`` freshest groups with something to learn, or none if there are fewer.

    Args:
        groups: in the order of their end.
        version: the newest that was published; a group of it has staleness 0.
        max_staleness: in versions; by the oldest token of a group.
        capacity: how many may wait; at least ``count``.
    """
    dropped = Dropped()
    fresh: list[Group] = []
    for group in groups:
        if version - group.oldest_version > max_staleness:
            dropped.stale += 1
        elif group.is_flat:
            dropped.flat += 1
        else:
            fresh.append(group)
    # Stable: among groups of one version, the one that ended last is the freshest.
    fresh.sort(key=lambda group: group.oldest_version)
    if len(fresh) < count:
        return Choice((), tuple(fresh), dropped)
    taken, rest = fresh[-count:], fresh[:-count]
    kept = rest[max(0, len(rest) - capacity) :]
    dropped.surplus = len(rest) - len(kept)
    return Choice(tuple(taken), tuple(kept), dropped)


def most_telling(group: Group, count: int) -> Group:
    """The ``count`` samples of a group whose rewards differ most (PODS, arXiv 2504.13818).

    Sampling is cheap where idle compute is harvested and training is not, so more is sampled
    than trained on.  The subset of greatest variance is always some of the lowest rewards and
    the rest of the highest.
    """
    if len(group.samples) <= count:
        return group
    ranked = sorted(group.samples, key=lambda sample: sample.grade.reward)
    subsets = [ranked[:low] + ranked[len(ranked) - count + low :] for low in range(count + 1)]
    best = max(subsets, key=lambda subset: pvariance([s.grade.reward for s in subset]))
    return replace(group, samples=tuple(best))
