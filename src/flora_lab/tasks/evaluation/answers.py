"""How a generated answer is compared with the right one: by its number, the option that it names, or its words."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

# as MetaMathQA and GSM8K introduce a final answer; the last one counts
FINAL = re.compile(r"The (?:final )?answer is:? |#### ")
DIGITS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
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


def plain(text: str) -> str:
    """As VQA compares answers: in small letters, without articles and punctuation, numbers to ten as digits."""
    letters = re.sub(r"[^\w\s']", " ", re.sub(r"(?<=\d)[,](?=\d)", "", text.lower().replace("’", "'")))
    return " ".join(DIGITS.get(word, word) for word in letters.split() if word not in ("a", "an", "the"))


ANSWERS: dict[str, Callable[[str], float | str | None]] = {
    "number": number,
    "option": option,
    "text": words,
    "vqa": words,
}

EXPECTED = {
    "number": "'#### 3' or 'The answer is 3'",
    "option": "one such as 'true' or 'answer2'",
    "text": "a text",
    "vqa": "a text",
}


def need(kind: str, answer: str) -> None:
    """Raise ValueError if a row's answer is none that generated ones can be compared with."""
    if ANSWERS[kind](answer) is None:
        raise ValueError(f"task.evaluate={kind} finds none in its answer, {answer!r:.80}; expected {EXPECTED[kind]}")


def votes(predicted: str, right: str) -> float:
    """VQA accuracy (Antol et al. 2015): the share of three people who gave the answer, at most 1, over all choices of
    one person to leave out. ``right``: their answers, line by line; a single one is right or wrong."""
    answers, answer = [plain(line) for line in right.splitlines() if line.strip()], plain(predicted)
    if len(answers) == 1:
        return float(answer == answers[0])
    others = [answers[:left] + answers[left + 1 :] for left in range(len(answers))]
    return sum(min(some.count(answer) / 3, 1.0) for some in others) / len(others)


def accuracy(kind: str, predicted: list[str], right: list[str]) -> float:
    """The share of predicted texts with the right answer; an answer that can't be found is wrong."""
    if kind == "vqa":
        return sum(votes(one, other) for one, other in zip(predicted, right, strict=True)) / len(predicted)
    pairs = [(ANSWERS[kind](one), ANSWERS[kind](other)) for one, other in zip(predicted, right, strict=True)]
    return sum(one is not None and one == other for one, other in pairs) / len(pairs)
