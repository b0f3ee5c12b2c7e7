"""Configuration: frozen pydantic classes, values from a YAML file, overrides from the command line."""

import difflib
import os
import reprlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.files import write_text

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # tyro shows pydantic's text for a wrong flag


# What PyYAML raises for a file that is none, also for a tag with a value that is not of its kind.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
SHORT = reprlib.Repr()  # shows a value of a faulty file, which can be of any size
SHORT.maxstring, SHORT.maxother, SHORT.maxlevel = 100, 100, 2


class Config(BaseModel):
    """Base of every configuration class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> Self:
        """Build from plain values; ValueError has one line for each fault, with its dotted path."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(cls, error, source))) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` gives the same object back."""
        return self.model_dump(mode="json")


class ScriptConfig(Config):
    """What every script has: the YAML file that its other values come from."""

    config: Path | None = None
    """YAML file of values; flags on the command line override it"""


Script = TypeVar("Script", bound=ScriptConfig)


def parse(cls: type[Script], argv: Sequence[str] | None, *, default: Path | None, description: str) -> Script:
    """Read `--config FILE` (or `default`) and override it from the command line.

    Exits with a short message when a value is wrong; `--help` lists every flag.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        path = config_flag(args) or default
        values = read_yaml(path) if path else {}
        config = cls.from_dict({**values, "config": path}, source=str(path))
        return tyro.cli(cls, args=args, default=config, description=description)
    except ValidationError as error:
        raise SystemExit(_exit_message("\n".join(_explain(cls, error, "command line")))) from None
    except (ValueError, OSError) as error:
        raise SystemExit(_exit_message(str(error))) from None


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turn a ValueError, which says what is wrong and what to do, or a failing disk into a short message, status 1.

    A thread that writes, as tensorboard has one, hands its error to the main thread, so it is not shown twice.
    """
    shown = threading.excepthook
    threading.excepthook = lambda told: None if issubclass(told.exc_type, OSError) else shown(told)
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(_exit_message(str(error))) from None
    finally:
        threading.excepthook = shown


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError names the file when it is missing or is no mapping."""
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file; see configs/ for those that ship with ldm")
    try:
        values = yaml.safe_load(path.read_bytes())
    except YAML_ERRORS as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def config_flag(args: list[str]) -> Path | None:
    """The file that `--config` names, if it is there."""
    for position, arg in enumerate(args):
        if arg.startswith("--config="):
            return Path(arg.split("=", 1)[1])
        if arg == "--config" and position + 1 < len(args):
            return Path(args[position + 1])
    return None


def write_yaml(path: Path, config: Config) -> None:
    """Write the resolved configuration, without the path of the file it came from."""
    write_text(path, yaml.safe_dump(_resolved(config), sort_keys=False, default_flow_style=None, width=100))


def changes(path: Path, config: Config) -> list[str]:
    """`key: before -> now` for each value that is another one than in the configuration written to `path`."""
    before, now = _flat(read_yaml(path)), _flat(_resolved(config))
    return [
        f"{key}: {before.get(key)} -> {value}"
        for key, value in now.items()
        if key != "resume" and before.get(key) != value
    ]


def _resolved(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "config"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _exit_message(text: str) -> str:
    return "\n".join(f"error: {line}" for line in text.splitlines())


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> list[str]:
    lines = []
    for fault in error.errors():
        where = " ".join(".".join(map(str, fault["loc"])).split())
        if fault["type"] == "extra_forbidden":
            names = _field_names(cls, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1)
            hint = f"perhaps you meant {near[0]}" if near else f"known keys: {', '.join(sorted(names))}"
            lines.append(f"{source}: {where}: unknown key; {hint}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            value = fault["input"]
            shown = f" (got {SHORT.repr(value)})" if isinstance(value, str | int | float | list | tuple | None) else ""
            lines.append(f"{source}: {where + ': ' if where else ''}{message}{shown}")
    return lines


def _field_names(cls: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    current: Any = cls
    for part in loc:
        annotation = current.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        current = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(current.model_fields)
