"""Prompt syntax: weighted parts in brackets, and several prompts joined by AND."""

import re
import reprlib
from typing import NamedTuple

MAX_WEIGHT = 1000  # beyond it hidden states and guidance soon overflow
BRACKETS = {"(": (")", 1.1), "[": ("]", 1 / 1.1)}  # the closing one, and the factor of the weight
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))"
WEIGHT_PATTERN = re.compile(rf":\s*{NUMBER}\s*\)")
AND_WEIGHT_PATTERN = re.compile(rf":\s*{NUMBER}\s*$")
OTHER_SYNTAX = re.compile(  # of web interfaces and their extensions, which is not read here
    r"""<[\w-]+:[^<>]*>                               # <lora:name:0.8>, <hypernet:name:1>, <lyco:name>
    | \b(?:BREAK|AND_[A-Z]+|ADD(?:BASE|COMM|COL|ROW))\b
    | (?<!\\)\[[^\[\]]*:\s*[\d.]+\s*\]               # [from:to:0.5], [to:0.5], [from::10]
    | (?<!\\)\[[^\[\]]*\|[^\[\]]*\]                 # [a|b]
    | (?<!\\)\{[^{}]*\}                              # {a|b}, {a}
    | __[\w*/.-]+__                                 # __wildcard__
    | \bembedding:[^\s,()\[\]]+""",
    re.VERBOSE,
)


class WeightedText(NamedTuple):
    """A part of a prompt and its weight; 1 is neutral."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[WeightedText]:
    r"""Split a prompt into weighted parts, with the syntax of the A1111 web interface.

    `(word)` has weight 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; brackets nest and multiply, an unclosed one ends with
    the prompt, and `\(` is a literal bracket. ValueError: a weight over 1000.
    """
    texts, weights = [""], [1.0]  # texts[i] has weights[i]
    opened: list[tuple[str, int]] = []  # brackets, and the index of the text that each begins with

    def close(factor: float | None = None) -> None:
        bracket, start = opened.pop()
        factor = BRACKETS[bracket][1] if factor is None else factor
        weights[start:] = [weight * factor for weight in weights[start:]]
        texts.append("")
        weights.append(1.0)

    i = 0
    while i < len(prompt):
        char, number = prompt[i], WEIGHT_PATTERN.match(prompt, i)
        if char == "\\" and prompt[i + 1 : i + 2] in (*"()[]\\",):
            texts[-1] += prompt[i + 1]
            i += 1
        elif char in BRACKETS:
            texts.append("")
            weights.append(1.0)
            opened.append((char, len(texts) - 1))
        elif number and opened and opened[-1][0] == "(":
            close(float(number[1]))
            i = number.end() - 1
        elif opened and char == BRACKETS[opened[-1][0]][0]:
            close()
        else:
            texts[-1] += char
        i += 1
    while opened:
        close()
    parts = [WeightedText(text, weight) for text, weight in zip(texts, weights, strict=True) if text]
    return _check_weights(parts or [WeightedText("", 1.0)])


def split_and(prompt: str) -> list[WeightedText]:
    """The prompts that ` AND ` joins, each with its weight: `a cat AND a dog :0.5`. ValueError: a weight over 1000."""
    texts = re.split(r"\bAND\b", prompt)
    if len(texts) == 1:
        return [WeightedText(prompt, 1.0)]
    parts = []
    for text in texts:
        number = AND_WEIGHT_PATTERN.search(text)
        words, weight = (text[: number.start()], float(number[1])) if number else (text, 1.0)
        parts.append(WeightedText(words.strip(), weight))
    return _check_weights(parts)


def strip_weights(prompt: str) -> str:
    """The words of a prompt, without its syntax."""
    return " ".join(part.text for joined in split_and(prompt) for part in parse_weights(joined.text))


def other_syntax(prompt: str) -> list[str]:
    """Parts of a prompt in syntax that other programs know, such as `<lora:x:0.8>` and `BREAK`: here they are words."""
    return OTHER_SYNTAX.findall(prompt)


def _check_weights(parts: list[WeightedText]) -> list[WeightedText]:
    for text, weight in parts:
        if not abs(weight) <= MAX_WEIGHT:  # so that NaN is refused: inf times 0
            raise ValueError(f"prompt has {reprlib.repr(text)} with weight {weight:g}: at most {MAX_WEIGHT} is allowed")
    return parts
