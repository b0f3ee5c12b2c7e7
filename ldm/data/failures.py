"""Images that cannot be read: each is replaced by another one of its set, counted, and reported on all ranks."""

from collections.abc import Callable, Iterator, Sequence

import torch

from ldm import rng
from ldm.data.config import DataConfig
from ldm.data.sources.base import Decoded, ImageTextSource
from ldm.data.sources.shard import ShardReadError
from ldm.data.transforms import View

MAX_FALLBACKS = 32  # images that are tried before a data set counts as unreadable
MAX_LISTED = 5  # images that an error names


class FallbackReader:
    """Reads the images of a source; one that cannot be read is replaced by another, the same at every call.

    ValueError when none of the first images can be read, and later when more than `max_unreadable` cannot.
    """

    def __init__(self, source: ImageTextSource, config: DataConfig) -> None:
        self.source, self.config = source, config
        # In shared memory, so that the main process sees what its loading processes met.
        self._unreadable = torch.zeros(len(source.names), dtype=torch.bool).share_memory_()
        self._synced: set[int] = set()  # those that all ranks know
        self._check_first()

    def read(self, index: int, view: View) -> tuple[int, Decoded]:
        """What a view shows of an image, or of the one that replaces it; and which one that is."""
        for candidate in self._candidates(index):
            try:
                return candidate, self._read(candidate, view)
            except ShardReadError:
                raise
            except ValueError:
                self._unreadable[candidate] = True
                self._check_cap()
        raise ValueError(f"{self.config.source}: {MAX_FALLBACKS} images in a row cannot be read, {self._remedy()}")

    def resolve(self, index: int) -> int:
        """The image itself, or the one that replaces it, as far as known without reading."""
        return next(self._candidates(index), index)

    def unreadable(self) -> list[str]:
        """`name: error` of every image that could not be read so far, by this process or its loading processes."""
        return self._describe(self._indices())

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Exchange with all ranks what could not be read; `gather` concatenates the lists of all of them.

        ValueError, on every rank, when that is more than the configuration allows.
        """
        has_new = int(self._unreadable.sum()) > len(self._synced)  # else their list, which may be long, is not needed
        new = gather(sorted(set(self._indices()) - self._synced) if has_new else [])
        self._synced |= set(new)
        self._unreadable[new] = True
        self._check_cap()

    def _read(self, index: int, view: View) -> Decoded:
        return self.source.read(index, view, channels=self.config.channels, side=self.config.resolution)

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

    def _describe(self, indices: Sequence[int]) -> list[str]:
        """`name: error` of images; the name alone of one that would have to be downloaded again."""
        errors = [self._error(i) or "readable by now" if self.source.is_local(i) else None for i in indices]
        names = [self.source.names[i] for i in indices]
        return [f"{name}: {error}" if error else name for name, error in zip(names, errors, strict=True)]

    def _error(self, index: int) -> str | None:
        try:
            self._read(index, View((1, 1)))
        except ShardReadError:
            raise
        except ValueError as error:
            return str(error)
        return None

    def _check_first(self) -> None:
        """Cheap where the first image can be read."""
        first = range(min(MAX_FALLBACKS, len(self._unreadable)))
        if all(self._error(index) for index in first):
            listed = "; ".join(self._describe(first[:MAX_LISTED]))
            raise ValueError(
                f"{self.config.source}: none of the first {len(first)} images can be read ({listed}); "
                "repair them or choose another --data.source"
            )

    def _check_cap(self) -> None:
        count, total, cap = int(self._unreadable.sum()), len(self._unreadable), self.config.max_unreadable
        if count and count > cap * total:
            raise ValueError(
                f"{self.config.source}: {count} of {total:,} images ({count / total:.1%}) cannot be read, "
                f"above the {cap:.1%} that data.max_unreadable allows: {self._remedy()}"
            )

    def _remedy(self) -> str:
        listed = "; ".join(self._describe(self._indices()[:MAX_LISTED]))
        return f"{listed}; repair or remove them, or raise --data.max-unreadable"
