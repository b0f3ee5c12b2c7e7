"""What a prompt can say beside its words: how much a part weighs, and that several prompts hold at once."""

import re
import reprlib
from typing import NamedTuple

MAX_WEIGHT = 1000  # beyond which states and guidance soon have no finite numbers
BRACKET_FACTOR, BRACKETS = 1.1, {"(": ")", "[": "]"}
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))"
WEIGHT_PATTERN = re.compile(rf":\s*{NUMBER}\s*\)")
AND_WEIGHT_PATTERN = re.compile(rf":\s*{NUMBER}\s*$")


class WeightedText(NamedTuple):
    """A piece of a prompt and what it weighs; 1 is usual."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[WeightedText]:
    r"""Parts by weight, in the form of the A1111 web interface.

    `(word)` weighs 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; brackets nest and multiply, one that stays open goes on to
    the end, and `\(` is a bracket to be read. ValueError: a weight over 1000.
    """
    texts, weights = [""], [1.0]  # texts[i] weighs weights[i]
    opened: list[tuple[str, int]] = []  # brackets, and the text that each begins with

    def close(factor: float) -> None:
        _, start = opened.pop()
        weights[start:] = [weight * factor for weight in weights[start:]]
        texts.append("")
        weights.append(1.0)

    place = 0
    while place < len(prompt):
        sign, given = prompt[place], WEIGHT_PATTERN.match(prompt, place)
        if sign == "\\" and prompt[place + 1 : place + 2] in (*"()[]\\",):
            texts[-1] += prompt[place + 1]
            place += 1
        elif sign in BRACKETS:
            texts.append("")
            weights.append(1.0)
            opened.append((sign, len(texts) - 1))
        elif given and opened and opened[-1][0] == "(":
            close(float(given[1]))
            place = given.end() - 1
        elif opened and sign == BRACKETS[opened[-1][0]]:
            close(_factor(opened[-1][0]))
        else:
            texts[-1] += sign
        place += 1
    while opened:
        close(_factor(opened[-1][0]))
    parts = [WeightedText(text, weight) for text, weight in zip(texts, weights, strict=True) if text]
    return _check_weights(parts or [WeightedText("", 1.0)])


def split_and(prompt: str) -> list[WeightedText]:
    """The prompts that ` AND ` joins, each with its weight: `a cat AND a dog :0.5`."""
    parts = []
    for text in re.split(r"\bAND\b", prompt):
        given = AND_WEIGHT_PATTERN.search(text)
        parts.append(
            WeightedText((text[: given.start()] if given else text).strip(), float(given[1]) if given else 1.0)
        )
    return _check_weights(parts) if len(parts) > 1 else [WeightedText(prompt, 1.0)]


def strip_weights(prompt: str) -> str:
    """The words alone."""
    return " ".join(part.text for joined in split_and(prompt) for part in parse_weights(joined.text))


def _check_weights(parts: list[WeightedText]) -> list[WeightedText]:
    for text, weight in parts:
        if not abs(weight) <= MAX_WEIGHT:  # or it is inf times 0
            raise ValueError(f"prompt has {reprlib.repr(text)} with weight {weight:g}: at most {MAX_WEIGHT} is allowed")
    return parts


def _factor(bracket: str) -> float:
    return BRACKET_FACTOR if bracket == "(" else 1 / BRACKET_FACTOR
