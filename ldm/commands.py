"""The commands that a person types next: as this program was started, with the flags that are needed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from ldm.config import CONFIGS, changed_values, read_yaml

SCRIPTS = CONFIGS.with_name("scripts")  # in a checkout, and in an installed package


@cache
def started_with() -> tuple[str, ...]:
    """The launcher and the script of this program, without the script's flags; () where no script of ours was started.

    Kept from the first call on, as a launcher may end before this program.
    """
    count = len(sys.argv) - 1
    words = sys.orig_argv[: len(sys.orig_argv) - count]
    if not words or _script_name(words[-1]) is None:
        return ()
    with suppress(psutil.Error, OSError):
        parent = psutil.Process(os.getppid()).cmdline()
        if parent[-count - 1 :] == sys.orig_argv[-count - 1 :]:  # a launcher, which was given the same script and flags
            words = parent[: len(parent) - count]
    if len(words) > 1 and not words[1].endswith(".py") and Path(words[1]).is_file():  # a console script, by its Python
        words = words[1:]
    return tuple(Path(word).name if shutil.which(Path(word).name) == word else word for word in words)


def _script_name(word: str) -> str | None:
    """The script that a word of a command line names, by path, module or console command."""
    name = re.split(r"[/\\.]", word.removesuffix(".py"))[-1].removeprefix("ldm-").replace("-", "_")
    return name if (SCRIPTS / f"{name}.py").is_file() else None


def script_command(script: str, *, launched: bool = True) -> str:
    """The command that starts another script as this one was started, by its launcher only where it is `launched`."""
    words = list(started_with())
    if not words:
        return f"{'accelerate launch' if launched else 'python'} scripts/{script}.py"
    own = str(_script_name(words[-1]))
    dashes = own not in words[-1]  # a console command
    if dashes:
        own, script = own.replace("_", "-"), script.replace("_", "-")
    words[-1] = script.join(words[-1].rsplit(own, 1))
    if not launched:
        module = "-m" in words[-2:-1]
        words = words[-1:] if dashes else ["python", *words[-1 - module :]]
    return quote(*words)


def resume_command(run: Path) -> str:
    """The command that goes on with a run; its flags alone where no script of ours was started."""
    return quote(*started_with(), "--run", run.as_posix(), "--resume", "latest")


def command_to_train(config: Any, stage: str, default: Path) -> str:
    """The command that trains another stage of the recipe of `config`, next to its run, on the data of its flags."""
    recipe = config.config.with_name(f"{stage}.yaml") if config.config and config.config != default else None
    flags, own = [], default
    if recipe and recipe.is_file():
        flags, own = ["--config", recipe.as_posix()], config.config
    data = type(config.data)(**read_yaml(own).get("data", {}))
    given = changed_values(data.to_dict(), config.data.to_dict())
    needless = {"random_flip"} | ({"bucket_step"} if stage == "clip" else set())  # cached latents, squares of CLIP
    flags += to_flags({f"data.{key}": value for key, (_, value) in given.items() if key not in needless})
    if stage == "vae" and config.data.channels == 1:
        flags += ["--vae.image-channels", "1"]
    return f"{script_command(f'train_{stage}')} {quote(*flags, '--run', (config.run.parent / stage).as_posix())}"


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that set values, by their dotted path."""
    words: list[str] = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def quote(*words: str) -> str:
    """Words as one line for the shell of this system."""
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)
