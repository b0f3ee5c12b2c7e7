"""Captions and prompts as words, and as ids: CLIP's byte-pair tokenizer, open_clip's own, without its slow import."""

import hashlib
import importlib.util
import json
import re
import reprlib
import runpy
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, count, groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHED_CAPTIONS = 2**16  # whose ids are kept, as training sees each many times


class Tokenizer:
    """Prompts -> ids of the tower's context length; `settings` are those of open_clip's SimpleTokenizer.

    A caption that is longer is cut and counted: see `report`.

    Of the settings, `additional_special_tokens` are learned ones (textual inversion, Gal et al. 2022), whose ids follow
    all others. They are found in any case; a name whose NAME_1, NAME_2 are learned, too, stands for all of them.
    """

    def __init__(self, context_length: int, *, additional_special_tokens: Sequence[str] = (), **settings: Any) -> None:
        self._bpe = _load_bpe(json.dumps(settings, sort_keys=True))
        self.context_length = context_length
        self.sot_token_id: int = self._bpe.sot_token_id
        self.eot_token_id: int = self._bpe.eot_token_id
        self.learned = {token: len(self._bpe.encoder) + i for i, token in enumerate(additional_special_tokens)}
        self._learned_pattern, self._learned_ids = _learned_pattern(self.learned), _learned_ids(self.learned)
        self.encoder: dict[str, int] = self._bpe.encoder | self.learned
        self.decoder: dict[int, str] = self._bpe.decoder | {index: token for token, index in self.learned.items()}
        self.bpe_ranks: dict[tuple[str, str], int] = self._bpe.bpe_ranks
        self._encode_truncated = lru_cache(CACHED_CAPTIONS)(self._truncate)
        self._read, self._cut, self._first_cut = 0, 0, ""  # counts of captions, and the first that was cut

    def encode(self, prompt: str) -> list[int]:
        """All tokens of a prompt, without start and end token."""
        if not self.learned:
            return self._bpe.encode(prompt)
        parts = self._learned_pattern.split(prompt)
        return [i for part in parts for i in self._learned_ids.get(part.lower()) or self._bpe.encode(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        groups = groupby(ids, key=self._bpe.decoder.__contains__)
        return "".join(
            self._bpe.decode(group) if is_own else " ".join(self.decoder[i] for i in group) + " "
            for is_own, group in groups
        )

    def __call__(self, prompts: list[str]) -> Tensor:
        """Prompts -> (b, context_length) ids on the CPU: start token, prompt, end token, zeros."""
        ids = torch.zeros(len(prompts), self.context_length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._encode_truncated(prompt)
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def read_ahead(self, *splits: Iterable[str]) -> str:
        """Encode all captions before training, unless they are too many to keep: what `report` says of them."""
        distinct = dict.fromkeys(chain(*splits))
        for caption in distinct if len(distinct) <= CACHED_CAPTIONS else ():
            self._encode_truncated(caption)
        return self.report()

    def report(self) -> str:
        """How many of the captions that were read so far were cut, and the first, on one line; "" when none was."""
        if not self._cut:
            return ""
        return (
            f"captions: {self._cut:,} of {self._read:,} have over {self.context_length} tokens and are cut, the first: "
            f"{self._first_cut}; shorten them, or train the text tower with a larger --clip.context-length"
        )

    def _truncate(self, prompt: str) -> list[int]:
        tokens, limit = self.encode(prompt), self.context_length - 2
        self._read += bool(tokens)
        if len(tokens) > limit:
            self._cut += 1
            rest = self.decode(tokens[limit:]).strip()
            self._first_cut = self._first_cut or f"{reprlib.repr(prompt)} without {reprlib.repr(rest)}"
        return [self.sot_token_id, *tokens[:limit], self.eot_token_id]


def _learned_pattern(learned: Iterable[str]) -> re.Pattern[str]:
    """Splits a prompt at learned tokens, and keeps them; the longer ones first, as some begin with others."""
    return re.compile("(" + "|".join(map(re.escape, sorted(learned, key=len, reverse=True))) + ")", re.IGNORECASE)


def _learned_ids(learned: Mapping[str, int]) -> dict[str, list[int]]:
    """From each learned token, in lower case, to its id and those of its NAME_1, NAME_2, ..., as diffusers has them."""
    ids = {}
    for token, index in learned.items():
        more = takewhile(learned.__contains__, (f"{token}_{i}" for i in count(1)))
        ids[token.lower()] = [index, *(learned[name] for name in more)]
    return ids


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides the ids of a text: the vocabulary, in order, and the context length."""
    content = json.dumps([sorted(tokenizer.encoder.items()), tokenizer.context_length])
    return hashlib.sha256(content.encode()).hexdigest()


def split_words(text: str) -> list[str]:
    """The words of a caption or prompt, in lower case."""
    return "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower()).split()


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All distinct words of some captions, sorted: of others, a prompt's user is warned."""
    return sorted({word for caption in captions for word in split_words(caption)})


@lru_cache(4)  # it takes a quarter of a second, and all context lengths can share it
def _load_bpe(settings: str) -> Any:
    """A SimpleTokenizer, run from its file: `import open_clip` would import its models and torchvision, too."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    module = runpy.run_path(str(Path(package.origin).with_name("tokenizer.py")))
    return module["SimpleTokenizer"](**json.loads(settings))
