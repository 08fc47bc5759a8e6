"""Word problems with numbers below 20, made here by a rule: text to learn from where there is no other.

A problem is a story of one or two steps, and its answer does the steps in turn, as GSM8K's answers do:

    Ann has 7 figs, gets 5, gives 3. How many?
    7+5=12, 12-3=9. The answer is: 9
"""

from __future__ import annotations

import random

ARITHMETIC = {"arithmetic-1": 1, "arithmetic-2": 2}  # a path: the steps of its problems
COUNT, MOST = 3000, 19
NAMES, THINGS = ("Ann", "Ben", "Eve", "Tom"), ("cups", "eggs", "figs", "pens")


def problems(steps: int) -> list[dict[str, str]]:
    """Different problems, always the same."""
    draw, made = random.Random(steps), {}
    while len(made) < COUNT:
        made.update([_problem(draw, steps)])
    return [{"prompt": prompt, "completion": completion} for prompt, completion in made.items()]


def _problem(draw: random.Random, steps: int) -> tuple[str, str]:
    number = draw.randint(2, MOST - 2)
    story, working = f"{draw.choice(NAMES)} has {number} {draw.choice(THINGS)}", []
    for _ in range(steps):
        gets = number < 2 or (number < MOST and draw.random() < 0.5)
        change = draw.randint(1, MOST - number) if gets else draw.randint(1, number)
        after = number + change if gets else number - change
        story += f", {'gets' if gets else 'gives'} {change}"
        working.append(f"{number}{'+' if gets else '-'}{change}={after}")
        number = after
    return f"{story}. How many?\n", f"{', '.join(working)}. The answer is: {number}"
