"""Images that cannot be read: each is replaced by another one of its set, counted, and reported on all ranks."""

from collections.abc import Callable, Iterator

import torch

from ldm import rng
from ldm.data.config import DataConfig
from ldm.data.sources.base import Decoded, ImageTextSource, ShardReadError
from ldm.data.transforms import View

MAX_FALLBACKS = 32  # images that are tried before a data set counts as unreadable
MAX_LISTED = 5  # images that an error names


class FallbackReader:
    """Reads the images of a source; one that cannot be read is replaced by another, the same at every call.

    ValueError when more than `max_unreadable` cannot be read, or many in a row.
    """

    def __init__(self, source: ImageTextSource, config: DataConfig) -> None:
        self.source, self.config = source, config
        # In shared memory, so that the main process sees what its loading processes met.
        self._unreadable = torch.zeros(len(source.names), dtype=torch.bool).share_memory_()
        self._synced: set[int] = set()  # those that all ranks know

    def read(self, index: int, view: View) -> tuple[int, Decoded]:
        """What a view shows of an image, or of the one that replaces it; and which one that is."""
        for candidate in self._candidates(index):
            image = self._read(candidate, view)
            if not isinstance(image, str):
                return candidate, image
            self._unreadable[candidate] = True
            self._check_cap()
        raise ValueError(f"{self.config.source}: {MAX_FALLBACKS} images in a row cannot be read, {self._remedy()}")

    def resolve(self, index: int) -> int:
        """The image itself, or the one that replaces it, as far as known without reading."""
        return next(self._candidates(index), index)

    def unreadable(self, limit: int | None = None) -> list[str]:
        """`name: error` of every image that could not be read so far; no error where it must be downloaded again."""
        lines = []
        for index in self._indices()[:limit]:
            lines.append(self.source.names[index])
            if self.source.is_local(index):
                image = self._read(index, View((1, 1)))
                lines[-1] += f": {image if isinstance(image, str) else 'readable by now'}"
        return lines

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Exchange what could not be read; `gather` joins lists of all ranks. ValueError on all of them: too many."""
        new = gather(sorted(set(self._indices()) - self._synced))
        self._synced |= set(new)
        self._unreadable[new] = True
        self._check_cap()

    def _read(self, index: int, view: View) -> Decoded | str:
        """What a view shows of an image, or why it cannot be read."""
        try:
            return self.source.read(index, view, channels=self.config.channels, side=self.config.resolution)
        except ShardReadError:
            raise
        except ValueError as error:
            return str(error)

    def _candidates(self, index: int) -> Iterator[int]:
        """`index`, then those that replace it, without the ones that are known to be unreadable."""
        near, everything = self.source.fallback_candidates(index), range(len(self._unreadable))
        for attempt in range(MAX_FALLBACKS):
            others = near if attempt < MAX_FALLBACKS // 2 else everything
            candidate = others[rng.fold_seed("stand-in", index, attempt) % len(others)] if attempt else index
            if not self._unreadable[candidate]:
                yield candidate

    def _indices(self) -> list[int]:
        return self._unreadable.nonzero().flatten().tolist()

    def _check_cap(self) -> None:
        count, total, cap = int(self._unreadable.sum()), len(self._unreadable), self.config.max_unreadable
        if count > cap * total:
            raise ValueError(
                f"{self.config.source}: {count} of {total:,} images ({count / total:.1%}) cannot be read, "
                f"above the {cap:.1%} that data.max_unreadable allows: {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"{'; '.join(self.unreadable(MAX_LISTED))}; repair or remove them, or raise --data.max-unreadable"
