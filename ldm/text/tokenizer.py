"""TODO."""

import hashlib
import importlib.util
import json
import logging
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)


def make_tokenizer(length: int, **settings: Any) -> Any:
    """open_clip's tokenizer for `length` tokens.

    It keeps what it encoded, since training sees every caption many times, and tells once what it must cut off.
    """
    tokenizer = _tokenizer_module().SimpleTokenizer(context_length=length, **settings)
    room = length - 2  # start and end token
    tokenizer.encode_all = tokenizer.encode

    @lru_cache(2**16)
    def encode_once(prompt: str) -> list[int]:
        ids = tokenizer.encode_all(prompt)
        if len(ids) > room:
            rest = tokenizer.decode(ids[room:]).strip()
            log.warning("prompt has %d tokens, the limit is %d; ignored: %r", len(ids), room, rest)
        return ids

    tokenizer.encode = encode_once
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids of a text: the vocabulary, in order, and the limit."""
    told = json.dumps([sorted(tokenizer.encoder.items()), tokenizer.context_length])
    return hashlib.sha256(told.encode()).hexdigest()


def _tokenizer_module() -> ModuleType:
    """open_clip's tokenizer without the rest of open_clip, whose import takes seconds that no prompt needs."""
    if "open_clip.tokenizer" in sys.modules:
        return sys.modules["open_clip.tokenizer"]
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    spec = importlib.util.spec_from_file_location(
        "_open_clip_tokenizer", Path(package.submodule_search_locations[0]) / "tokenizer.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
