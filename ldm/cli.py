"""The command line of all scripts: parse, run, and end with a short message where a person must change something."""

import argparse
import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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
        if isinstance(sys.stdout, io.TextIOWrapper):  # shows names of files that are not UTF-8, as errors are shown
            sys.stdout.reconfigure(errors="backslashreplace")
        config = parse_cli(cls, argv, default=default, description=str(description))
        with exit_on_user_error():
            status = action(config)
        if status:
            raise SystemExit(status)

    return main


def parse_cli(cls: type[Script], argv: Sequence[str] | None, *, default: Path | None, description: str) -> Script:
    """Read `--config FILE` (or `default`) and override it from the command line; exits with a message on a fault."""
    args = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        path = config_flag(args) or default
        values = {**(read_yaml(path) if path else {}), "config": path}
        try:
            config = tyro.cli(cls, args=args, default=cls.from_dict(values, source=str(path)), description=description)
            if not (below := config.values_below()):
                return config
            return tyro.cli(cls, args=args, default=cls.from_dict(merge(below, values), source=str(path)))
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
