"""A shard, its rows, and how its file is opened on any file system."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ldm.data.sources.base import one_line

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class Shard(NamedTuple):
    """A file of a data set."""

    url: str
    content_hash: str


class ShardRow(NamedTuple):
    """One image of a shard; `error` says why it cannot be used."""

    image: bytes | None
    captions: list[str]
    error: str | None


class ShardReadError(ValueError):
    """A whole shard that cannot be read or cached, which no other image replaces."""


def is_tar(url: str) -> bool:
    """Whether a file is a tar, by its name."""
    return url.lower().endswith(TAR_SUFFIXES)


def open_url(url: str) -> Any:
    """A file on any file system, to be read from begin to end."""
    from datasets.utils.file_utils import xopen  # fsspec's open, which tries again where the network fails

    streamed = url.startswith(("http", "hf:")) and is_tar(url)
    return xopen(url, "rb", **({"block_size": 0} if streamed else {}))  # 0: in one request


@contextlib.contextmanager
def shard_errors(url: str) -> Iterator[None]:
    """Turn whatever reading a shard raises into a ShardReadError that names it."""
    try:
        yield
    except (GeneratorExit, ShardReadError):
        raise
    except Exception as error:  # file systems and formats raise errors of many types
        raise ShardReadError(
            f"{url} cannot be read ({reason(error)}); repair it, or remove it from --data.source"
        ) from None


def reason(error: Exception) -> str:
    """An error's text on one line, or its type where it has none."""
    return one_line(error) or type(error).__name__
