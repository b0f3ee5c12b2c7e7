"""The command line of all scripts: parse, run, and end with a short message where a person must change something."""

import argparse
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tyro
from pydantic import ValidationError

from ldm.config import Config, explain_errors, read_yaml


class ScriptConfig(Config):
    """What every script has: the YAML file that its other values come from."""

    config: Path | None = None
    """YAML file of values; flags on the command line override it"""


Script = TypeVar("Script", bound=ScriptConfig)


def command(
    cls: type[Script], action: Callable[[Script], int | None], description: str | None, *, default: Path | None = None
) -> Callable[..., None]:
    """The `main(argv=None)` of a script: reads its configuration, acts on it and exits with the status or a message."""

    def main(argv: Sequence[str] | None = None) -> None:
        sys.stdout, sys.stderr = harmless_stream(sys.stdout), harmless_stream(sys.stderr)
        config = parse_cli(cls, argv, default=default, description=str(description))
        with exit_on_user_error():
            status = action(config)
        if status:
            raise SystemExit(status)

    return main


class HarmlessFile(io.FileIO):
    """The descriptor of a stream, to which writing never fails: where the other end is gone, all of it is lost."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream  # which closes the descriptor when nothing refers to it

    def write(self, data: Any) -> int:
        """The number of bytes, whether they were written or not."""
        with suppress(OSError):
            if (written := super().write(data)) is not None:  # of a pipe that takes no more at this moment
                return written
        return len(memoryview(data))


def harmless_stream(stream: TextIO | None) -> TextIO:
    """A stream for stdout or stderr that ends no run and hides no error.

    What its encoding lacks is written as backslash escapes, and nothing fails where a pipe or a terminal is closed.
    """
    if stream is None:  # it was closed before the start
        return open(os.devnull, "w", errors="backslashreplace")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
        raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer
        if type(raw) is io.FileIO:  # not the console of Windows
            stream.flush()
            file = HarmlessFile(stream)
            buffer = file if raw is stream.buffer else io.BufferedWriter(file)
            flags = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            return io.TextIOWrapper(buffer, stream.encoding, stream.errors, **flags)  # type: ignore[arg-type]
    return stream


def parse_cli(cls: type[Script], argv: Sequence[str] | None, *, default: Path | None, description: str) -> Script:
    """Read `--config FILE` (or `default`) and override it from the command line; exits with a message on a fault."""
    args = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        path = config_flag(args) or default
        values = read_yaml(path) if path else {}
        config = cls.from_dict({**values, "config": path}, source=str(path))
        try:
            return tyro.cli(cls, args=args, default=config, description=description)
        except ValidationError as error:
            raise ValueError("\n".join(explain_errors(cls, error, "command line"))) from None


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError, which says what is wrong and what to do, or a failing disk into a short message, status 1."""
    original = threading.excepthook  # tensorboard's thread hands its error to the main one, which shows it
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else original(args)
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    finally:
        threading.excepthook = original


def config_flag(args: list[str]) -> Path | None:
    """The file that `--config` names, if it is there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")
    path: Path | None = parser.parse_known_args(args)[0].config
    return path


def command_to_train(config: ScriptConfig, stage: str, default: Path) -> str:
    """The command that trains another stage of the recipe of `config`, next to its run."""
    recipe = config.config.with_name(f"{stage}.yaml") if config.config and config.config != default else None
    flag = f" --config {recipe}" if recipe and recipe.is_file() else ""
    return f"accelerate launch scripts/train_{stage}.py{flag} --run {config.run.parent / stage}"  # type: ignore[attr-defined]
