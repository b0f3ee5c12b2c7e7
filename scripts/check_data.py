"""Look at a set of images before training on it: sizes, unreadable files, duplicates, captions, a contact sheet."""

from ldm.cli import command
from ldm.data.inspect import CheckDataConfig, check_data
from ldm.text.tokenizer import Tokenizer


def check(config: CheckDataConfig) -> None:
    """Print the report."""
    tokenizer = Tokenizer(config.max_tokens)
    for line in check_data(config, lambda caption: len(tokenizer.encode(caption)) + 2):  # with start and end
        print(line)


main = command(CheckDataConfig, check, __doc__)

if __name__ == "__main__":
    main()
