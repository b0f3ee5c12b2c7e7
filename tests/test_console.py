"""No console ends a run or hides its error: another code page, a pipe that closed, a disk that is full, nothing."""

import io
import os
import sys
from pathlib import Path

import check_data
import pytest

from ldm.cli import harmless_stream

ROOT = Path(__file__).parents[1]


def stream_to(descriptor: int, *, buffered: bool = True, encoding: str = "cp1252") -> io.TextIOWrapper:
    """What Python makes of a descriptor, also with `python -u`."""
    raw = io.FileIO(descriptor, "w")
    return io.TextIOWrapper(io.BufferedWriter(raw) if buffered else raw, encoding, "strict", write_through=not buffered)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437", "utf-8"])
def test_what_a_code_page_lacks_is_escaped(encoding: str, tmp_path: Path) -> None:
    file = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    stream = harmless_stream(stream_to(file, encoding=encoding))
    print("broken 猫.jpg \udcff", file=stream, flush=True)
    shown = (tmp_path / "out").read_bytes()
    assert shown == ("broken 猫.jpg" if encoding == "utf-8" else r"broken \u732b.jpg").encode() + b" \\udcff\n"
    assert harmless_stream(stream) is stream


@pytest.mark.parametrize("buffered", [True, False])
def test_a_pipe_that_closed_takes_all(buffered: bool) -> None:
    reader, writer = os.pipe()
    stream = harmless_stream(stream_to(writer, buffered=buffered))
    os.close(reader)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)


def test_a_console_that_is_not_there_takes_all() -> None:
    print("猫 \udcff", file=harmless_stream(None), flush=True)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_every_script_has_such_streams(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a report goes to one, and an error, a warning and the bar to the other."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, name, stream_to(writer))
    (tmp_path / "猫.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="error: .*none 猫"):
        check_data.main([str(tmp_path / "none 猫")])
    check_data.main([str(tmp_path)])
    print("猫" * 100_000, file=getattr(sys, name), flush=True)
