"""What a prompt can say beside its words: how much a part weighs, and that several prompts hold at once."""

import re
import reprlib
from typing import NamedTuple

HEAVIEST = 1000  # beyond which states and guidance soon have no finite numbers
MORE, PAIRS = 1.1, {"(": ")", "[": "]"}
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))"
WEIGHT = re.compile(rf":\s*{NUMBER}\s*\)")
AND_WEIGHT = re.compile(rf":\s*{NUMBER}\s*$")


class Part(NamedTuple):
    """A piece of a prompt and what it weighs; 1 is usual."""

    text: str
    weight: float


def parse(prompt: str) -> list[Part]:
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
        sign, given = prompt[place], WEIGHT.match(prompt, place)
        if sign == "\\" and prompt[place + 1 : place + 2] in (*"()[]\\",):
            texts[-1] += prompt[place + 1]
            place += 1
        elif sign in PAIRS:
            texts.append("")
            weights.append(1.0)
            opened.append((sign, len(texts) - 1))
        elif given and opened and opened[-1][0] == "(":
            close(float(given[1]))
            place = given.end() - 1
        elif opened and sign == PAIRS[opened[-1][0]]:
            close(_factor(opened[-1][0]))
        else:
            texts[-1] += sign
        place += 1
    while opened:
        close(_factor(opened[-1][0]))
    parts = [Part(text, weight) for text, weight in zip(texts, weights, strict=True) if text]
    return _checked(parts or [Part("", 1.0)])


def split(prompt: str) -> list[Part]:
    """The prompts that ` AND ` joins, each with its weight: `a cat AND a dog :0.5`."""
    parts = []
    for text in re.split(r"\bAND\b", prompt):
        given = AND_WEIGHT.search(text)
        parts.append(Part((text[: given.start()] if given else text).strip(), float(given[1]) if given else 1.0))
    return _checked(parts) if len(parts) > 1 else [Part(prompt, 1.0)]


def plain(prompt: str) -> str:
    """The words alone."""
    return " ".join(part.text for joined in split(prompt) for part in parse(joined.text))


def _checked(parts: list[Part]) -> list[Part]:
    for text, weight in parts:
        if not abs(weight) <= HEAVIEST:  # or it is inf times 0
            raise ValueError(f"prompt has {reprlib.repr(text)} with weight {weight:g}: at most {HEAVIEST} is allowed")
    return parts


def _factor(bracket: str) -> float:
    return MORE if bracket == "(" else 1 / MORE
