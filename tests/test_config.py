"""Configuration: YAML and the command line give the same frozen objects, and faults are reported in short lines."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.config import Config, read_yaml, write_yaml


class Part(Config):
    """A nested part."""

    channels: int = Field(64, ge=1)
    """width"""
    kinds: tuple[int, ...] = (1, 2)
    path: Path | None = None
    mode: Literal["fast", "slow"] = "fast"


class Script(ScriptConfig):
    """A script's settings."""

    steps: int = 10
    rate: float = 1e-4
    part: Part = Part()


def run(*argv: str, default: Path | None = None) -> Script:
    return parse_cli(Script, argv, default=default, description="A script.")


def failure(*argv: str, default: Path | None = None) -> str:
    """What a person reads; a chained exception would be shown as a traceback."""
    with pytest.raises(SystemExit) as caught:
        run(*argv, default=default)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert isinstance(caught.value.code, str) and "Traceback" not in caught.value.code
    return caught.value.code


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return path

    return write


def test_round_trip_through_plain_values():
    script = Script(steps=3, part=Part(channels=8, kinds=(4,), path=Path("a/b"), mode="slow"))
    assert Script.from_dict(script.to_dict(), source="test") == script
    assert script.to_dict()["part"] == {"channels": 8, "kinds": [4], "path": "a/b", "mode": "slow"}


def test_round_trip_through_yaml(tmp_path):
    path = tmp_path / "new" / "config.yaml"
    script = Script(config=Path("x.yaml"), rate=3e-5, part=Part(channels=8, path=Path("a")))
    write_yaml(path, script)
    assert Script.from_dict(read_yaml(path), source="test") == script


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Script().steps = 5  # type: ignore[misc]


def test_an_unknown_key_is_answered_with_the_near_one():
    with pytest.raises(ValueError, match=r"f.yaml: part.chanels: unknown key; perhaps you meant channels"):
        Script.from_dict({"part": {"chanels": 3}}, source="f.yaml")
    with pytest.raises(ValueError, match=r"f.yaml: zzz: unknown key; known keys: config, part, rate, steps"):
        Script.from_dict({"zzz": 3}, source="f.yaml")


def test_a_wrong_value_is_reported_with_its_dotted_path():
    with pytest.raises(ValueError, match=r"f.yaml: part.channels: .*greater than or equal to 1 \(got 0\)"):
        Script.from_dict({"part": {"channels": 0}}, source="f.yaml")
    with pytest.raises(ValueError, match=r"f.yaml: part.kinds.1: .*valid integer.* \(got 'x'\)"):
        Script.from_dict({"part": {"kinds": [1, "x"]}}, source="f.yaml")


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        Script.from_dict({"steps": "many", "part": {"mode": "best", "chanels": 1}}, source="f.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["steps", "part.mode", "part.chanels"]


def test_defaults_then_file_then_command_line(file):
    path = file("steps: 20\nrate: 0.5\npart: {channels: 7}\n")
    assert run() == Script()
    assert run(default=path) == run("--config", str(path)) == run(f"--config={path}")
    script = run("--config", str(path), "--part.channels", "9", "--part.kinds", "3", "4", "5")
    assert (script.steps, script.rate) == (20, 0.5)
    assert script.part == Part(channels=9, kinds=(3, 4, 5))
    assert script.config == path


def test_a_file_on_the_command_line_replaces_the_default_file(file, tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("steps: 99\n")
    assert run("--config", str(file("rate: 0.5\n")), default=default).steps == 10
    assert run(default=default).steps == 99


def test_a_missing_file(tmp_path):
    text = failure("--config", str(tmp_path / "none.yaml"))
    assert (
        text
        == f"error: {tmp_path / 'none.yaml'}: no such configuration file; see configs/ for those that ship with ldm"
    )


def test_files_that_are_no_mapping(file):
    assert "not valid YAML" in failure("--config", str(file("a: [1\n")))
    assert "expected `key: value` lines, found list" in failure("--config", str(file("- 1\n")))


def test_a_wrong_file_ends_with_a_message(file):
    path = file("stps: 3\npart: {channels: -1}\n")
    lines = failure(default=path).splitlines()
    assert len(lines) == 2 and all(line.startswith(f"error: {path}: ") for line in lines)
    assert "perhaps you meant steps" in "".join(lines)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--part.channels", "0", "greater than or equal to 1"),
        ("--steps", "many", "--steps"),
        ("--part.mode", "x", "slow"),
    ],
)
def test_a_wrong_value_on_the_command_line(capsys, flag, value, message):
    with pytest.raises(SystemExit) as caught:
        run(flag, value)
    shown = capsys.readouterr()
    assert caught.value.code not in (0, None)
    assert flag.split(".")[-1].strip("-") in shown.err and message in shown.err
    assert "Traceback" not in shown.err


def test_a_wrong_flag_is_answered_with_the_near_one(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--part.chanels", "3")
    shown = capsys.readouterr()
    assert caught.value.code == 2 and "--part.channels" in shown.out + shown.err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag in shown for flag in ("--config", "--steps", "--rate", "--part.channels", "--part.mode"))


def test_errors_for_people():
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise ValueError("first line\nsecond line")
    assert caught.value.code == "error: first line\nerror: second line"
    assert caught.value.__suppress_context__
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("a fault of the program keeps its traceback")
