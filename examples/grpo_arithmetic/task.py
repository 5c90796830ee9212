"""Two-digit addition: the problems, how they are asked, and what an answer is worth.

Pure and seeded.  The evaluation problems are the same in every run, and are never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EVALUATION_SEED = 1234
"""Fixes which problems are held out, whatever the seed of the run."""

EXAMPLE = "12 + 25 = 37\n"
"""One solved sum before the question.  Without it, the 135 M model writes text after ``=``
(1 in 100 right); with it, it is right 1 time in 10 when sampled, 1 in 3 when greedy."""

NUMBER_CREDIT = 0.1
"""For a number of up to four digits and nothing else."""
DIGITS_CREDIT = 0.4
"""Times the share of the three decimal places that are right, when the sum is wrong."""

_ANSWER = re.compile(r" ?(\d{1,4})\n")


@dataclass(frozen=True, slots=True)
class Problem:
    """``left + right``, both of two digits."""

    left: int
    right: int

    @property
    def answer(self) -> int:
        return self.left + self.right

    @property
    def prompt(self) -> str:
        return f"{EXAMPLE}{self.left} + {self.right} = "


@dataclass(frozen=True, slots=True)
class Grade:
    """``reward`` is in [0, 1] and is 1 exactly when the answer is right."""

    reward: float
    is_right: bool


def grade(text: str, problem: Problem) -> Grade:
    """What ``text``, all that the model wrote, is worth as an answer.

    A right answer is the sum, then a line end.  The partial credit makes the reward dense enough
    for a few steps of training: a model that is right once in ten is often right in two digits.
    A number of four digits is never right, and earns the credit for a number alone.
    """
    found = _ANSWER.fullmatch(text)
    if found is None:
        return Grade(0.0, False)
    given = found[1]
    if len(given) > 3:
        return Grade(NUMBER_CREDIT, False)
    pairs = zip(given.zfill(3), f"{problem.answer:03d}", strict=True)
    right_digits = sum(mine == true for mine, true in pairs)
    # "041" is no way to write 41.
    if given == str(problem.answer):
        return Grade(1.0, True)
    return Grade(NUMBER_CREDIT + DIGITS_CREDIT * min(right_digits, 2) / 3, False)


def split(evaluation_count: int) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """The held-out problems and those to train on: disjoint, the same in every run.

    Raises:
        ValueError: no problem would be left on one of the sides.
    """
    problems = [Problem(left, right) for left in range(10, 100) for right in range(10, 100)]
    if not 0 < evaluation_count < len(problems):
        raise ValueError(
            f"evaluation_count is {evaluation_count}: give 1 to {len(problems) - 1}, "
            f"there are {len(problems)} two-digit additions in all"
        )
    random.Random(EVALUATION_SEED).shuffle(problems)
    return problems[:evaluation_count], problems[evaluation_count:]


def endless(problems: Sequence[Problem], seed: int) -> Iterator[Problem]:
    """The problems in a seeded order, again in another order when all have been asked."""
    order = random.Random(seed)
    while True:
        yield from order.sample(problems, len(problems))
