"""What the processes of a run do together: each takes its share, and all get the results."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks(NamedTuple):
    """This process among all; by default it is the only one."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """joins lists of all ranks, in their order; all must call it"""

    def part_size(self, count: int, most: int) -> int:
        """How many of `count` items make a part, at most `most`, so that all ranks have some of them."""
        return min(most, -(-count // self.world))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What `function` makes of each item, in their order, on all ranks; each rank calls it for its share.

        Results are pickled. ValueError: that of any rank, on all.
        """
        for first in range(0, len(items), self.world):
            own = items[first + self.rank : first + self.rank + 1]  # none in the last round of some ranks
            for result in self.gather([_result_or_error(function, item) for item in own]):
                if isinstance(result, ValueError):
                    raise result
                yield result


ONE_RANK = Ranks()


def _result_or_error(function: Callable[[Item], Result], item: Item) -> Result | ValueError:
    try:
        return function(item)
    except ValueError as error:
        return error
