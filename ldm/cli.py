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

from ldm.config import Config, explain_errors, merge, read_yaml


class ScriptConfig(Config):
    """What every script has: the YAML file that its other values come from."""

    config: Path | None = None
    """YAML file of values; flags on the command line override it"""

    def values_below(self) -> dict[str, Any]:
        """Values of what neither the file nor the command line sets, where they follow from what these do set."""
        return {}


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
    """Read the values of files and override them from the command line; exits with a message on a fault."""
    args = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        values, source = values_below_flags(cls, args, default)
        try:
            config = tyro.cli(cls, args=args, default=cls.from_dict(values, source=source), description=description)
            if not (below := config.values_below()):
                return config
            return tyro.cli(cls, args=args, default=cls.from_dict(merge(below, values), source=source))
        except ValidationError as error:
            raise ValueError("\n".join(explain_errors(cls, error.errors(), "command line"))) from None


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


def values_below_flags(cls: type[ScriptConfig], args: list[str], default: Path | None) -> tuple[dict[str, Any], str]:
    """What the command line overrides, and where it is from: `--config FILE`, or `default`.

    With `--resume` it is RUN/config.yaml of the run that goes on, where values in `--config FILE` count more.
    """
    flags = _early_flags(args)
    path = flags.config or default
    values = {**(read_yaml(path) if path else {}), "config": path}
    if flags.resume is None or "resume" not in cls.model_fields:
        return values, str(path)
    run = _resumed_run(flags, Path(values.get("run") or cls.model_fields["run"].default))
    file = run / "config.yaml"
    try:
        own = read_yaml(file)
    except ValueError as error:
        if flags.config:  # which may be all of its settings
            return values, str(path)
        problem = error if file.is_file() else f"--resume {flags.resume}: there is no {file}"
        remedy = "name the run to resume with --run, pass its recipe with --config, or start without --resume"
        raise ValueError(f"{problem}; {remedy}") from None
    return {"config": None, **merge(own, values if flags.config else {}), "run": str(run)}, str(file)


def _resumed_run(flags: argparse.Namespace, default: Path) -> Path:
    """The folder of the run whose settings go on: that of `--run`, or, where it has none, of the checkpoint."""
    run, saved = Path(flags.run or default), Path(flags.resume)
    if flags.resume == "latest" or (flags.run and (run / "config.yaml").is_file()):
        return run
    return (saved if len(saved.parts) > 2 else saved.absolute()).parent.parent


def config_flag(args: list[str]) -> Path | None:
    """The file that `--config` names, if it is there."""
    path: Path | None = _early_flags(args).config
    return path


def _early_flags(args: list[str]) -> argparse.Namespace:
    """The flags that say which file has the other values."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, kind in (("config", Path), ("run", Path), ("resume", str)):
        parser.add_argument(f"--{name}", type=kind, nargs="?")
    return parser.parse_known_args(args)[0]
