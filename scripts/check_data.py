"""Look at a set of images before training on it: sizes, unreadable files, duplicates, captions, a contact sheet."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.data.inspect import CheckDataConfig, check_data
from ldm.text.tokenizer import Tokenizer


def check(config: CheckDataConfig) -> None:
    """Print the report."""
    tokenizer = Tokenizer(config.max_tokens)
    for line in check_data(config, lambda caption: len(tokenizer.encode(caption)) + 2):  # with start and end
        print(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(CheckDataConfig, check, argv, description=__doc__)


if __name__ == "__main__":
    main()
