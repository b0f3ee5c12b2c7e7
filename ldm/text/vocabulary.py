"""The words of captions and prompts, to warn of those that training never saw."""

from collections.abc import Iterable


def split_words(text: str) -> list[str]:
    """The words of a caption or prompt, in lower case."""
    return "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower()).split()


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All distinct words of some captions, sorted."""
    return sorted({word for caption in captions for word in split_words(caption)})
