"""Look at a set of images before training on it: sizes, unreadable files, duplicates, captions, a contact sheet."""

from ldm.cli import command
from ldm.data.inspect import CheckDataConfig, TokenLimit, check_data
from ldm.text.conditioner import planned_tokenizer
from ldm.text.tokenizer import Tokenizer


def check(config: CheckDataConfig) -> None:
    """Print the report."""
    for line in check_data(config, token_limit(config)):
        print(line)


def token_limit(config: CheckDataConfig) -> TokenLimit | None:
    """What the text tower of the training reads, if it has one."""
    given = config.max_tokens
    tokenizer, origin = (Tokenizer(given), "--max-tokens") if given else planned_tokenizer(config.config)
    if tokenizer is None:
        return None
    return TokenLimit(tokenizer.context_length, lambda caption: len(tokenizer.encode(caption)) + 2, origin)


main = command(CheckDataConfig, check, __doc__)

if __name__ == "__main__":
    main()
