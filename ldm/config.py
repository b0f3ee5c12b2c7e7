"""Configuration: frozen pydantic classes, values from a YAML file, overrides from the command line."""

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.io.atomic import write_text

CONFIGS = next(
    folder for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs") if folder.is_dir()
)  # within an installed package, or next to it in a checkout
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
            raise ValueError("\n".join(explain_errors(cls, error.errors(), source))) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` gives the same object back."""
        return self.model_dump(mode="json")


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


def relative(file: Path) -> Path:
    """A file as it is found from the working directory: relative to it where it is below."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def write_yaml(path: Path, config: Config) -> None:
    """Write the resolved configuration, and in `config` the path of the file it came from."""
    write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None, width=100))


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, in which those of `over` count."""
    nested = {key: merge(values[key], v) for key, v in over.items() if isinstance(v, dict) and values.get(key)}
    return {**values, **over, **nested}


# What differs between two configurations, or what else decides a run or a cache.


def changed_values(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each dotted path in which two nested mappings differ; what one of them lacks is left out."""
    before, now = flatten(before), flatten(now)
    return {key: (before[key], value) for key, value in now.items() if before.get(key, value) != value}


def config_diff(before: dict[str, Any], config: Config) -> str:
    """`key: before -> now` for each setting in which a configuration differs from the values `before`."""
    now = config.model_dump(mode="json", exclude={"config", "resume"})
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed_values(before, now).items())


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """`key theirs, here ours` for each dotted path in which two nested mappings differ."""
    return "; ".join(f"{key} {other}, here {own}" for key, (other, own) in changed_values(theirs, ours).items())


def check_equal(ours: dict[str, Any], theirs: dict[str, Any], where: object, remedy: str) -> None:
    """ValueError names what differs in `theirs`, the values of `where`, or is missing there, and the remedy."""
    missing = [f"no {key}" for key, value in ours.items() if key not in theirs and value is not None]
    if wrong := "; ".join(filter(None, [*missing, differences(ours, theirs)])):
        raise ValueError(f"{where} has {wrong}: {remedy}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose keys are dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def explain_errors(cls: type[BaseModel], faults: Sequence[Any], source: str) -> list[str]:
    """A line for each of pydantic's faults."""
    lines = []
    for fault in faults:
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
