"""Waiting threads sleep soon: libgomp reads how soon from the environment, once, when torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses libgomp on Linux alone")
@pytest.mark.parametrize(
    ("script", "own", "expected"),
    [
        ("train_vae", {}, "3000"),
        ("launch", {}, "3000"),
        ("txt2img", {}, "3000"),
        ("train_vae", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("train_vae", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_it_is_set_before_torch_is_loaded_where_a_person_has_not(
    script: str, own: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", WATCH, str(SCRIPTS / f"{script}.py")]
    environment["PYTHONPATH"] = str(SCRIPTS.parent)
    done = subprocess.run(command, env={**environment, **own}, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", done.stderr
