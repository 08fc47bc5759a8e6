"""How a generated answer is compared with the right one: by its number, the option that it names, or its words."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

# as MetaMathQA and GSM8K introduce a final answer; the last one counts
FINAL = re.compile(r"The (?:final )?answer is:? |#### ")
OPTIONS = re.compile(r"true|false|(?:solution|answer|ending|option)[1-5]")  # as commonsense-170k spells them


def number(text: str) -> float | str | None:
    """What follows "The answer is" or "####": a number, a fraction or, if it is neither, text; None if nothing does.

    The rule is that of PEFT's method comparison, so that accuracies on GSM8K can be compared.
    """
    parts = FINAL.split(text.strip().rstrip(".!?"))
    if len(parts) < 2:
        return None
    answer = parts[-1].strip().split("\n")[0].strip(" .!?$%")
    numerator, slash, denominator = answer.partition("/")
    try:
        return float(Decimal(numerator.strip()) / (Decimal(denominator.strip()) if slash else 1))
    except (ArithmeticError, InvalidOperation):
        return answer


def option(text: str) -> str | None:
    """The first option that the text names."""
    match = OPTIONS.search(text)
    return match and match[0]


def words(text: str) -> str | None:
    """The text without differences in white space."""
    return " ".join(text.split()) or None


ANSWERS: dict[str, Callable[[str], float | str | None]] = {"number": number, "option": option, "text": words}


def accuracy(kind: str, predicted: list[str], right: list[str]) -> float:
    """The share of predicted texts with the right answer; an answer that can't be found is wrong."""
    pairs = [(ANSWERS[kind](one), ANSWERS[kind](other)) for one, other in zip(predicted, right, strict=True)]
    return sum(one is not None and one == other for one, other in pairs) / len(pairs)
