"""Imports run one way: a total table of what each part of `ldm` may import of the others."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"config", "rng", "io", "imaging", "conditioning", "labels", "parts", "precision", "ranks"}
# What each module or package below ldm/ may import of ldm, in addition to itself.
ALLOWED: dict[str, set[str]] = {
    "io": set(),
    "config": {"io"},
    "cli": {"config"},
    "commands": {"config"},
    "rng": {"io"},
    "layers": set(),
    "labels": set(),
    "imaging": {"io", "labels"},
    "conditioning": set(),
    "parts": set(),
    "precision": set(),
    "ranks": set(),
    "medical": set(),
    "diffusion": {"config"},
    "vae": {"config", "layers", "io", "parts"},
    "unet": {"config", "layers", "conditioning"},
    "text": {"config", "io", "layers"},
    "data": BASE - {"conditioning"} | {"cli", "medical"},
    "interop": {"diffusion", "io", "text", "unet", "vae"},
    "pipeline": BASE | {"cli", "diffusion", "interop", "text", "unet", "vae"},
    "training": BASE - {"conditioning"} | {"cli", "commands", "data"},
    "stages": BASE | {"cli", "commands", "data", "diffusion", "pipeline", "text", "training", "unet", "vae"},
    "server": {"cli", "config", "diffusion", "imaging", "io", "labels", "pipeline", "precision"},
    "planning": BASE - {"conditioning"} | {"cli", "commands", "data", "stages", "text", "training", "vae"},
    "evaluation": BASE - {"conditioning"} | {"cli", "data", "diffusion", "pipeline", "planning", "text", "vae"},
}
# Of data, the loop sees what a batch is, and the order and the loading of samples: it knows no data set and no model.
OF_DATA_IN_TRAINING = {"ldm.data.batch_sampler", "ldm.data.loader"}


def imports(path: Path) -> set[str]:
    """All `ldm.*` modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = node.module == "ldm" or (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" if inner else node.module for alias in node.names}
    return {name for name in found if name.startswith("ldm.")}


def test_the_table_is_total() -> None:
    parts = {path.stem for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == ALLOWED.keys()


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part: str) -> None:
    files = list((ROOT / "ldm" / part).rglob("*.py")) or [ROOT / f"ldm/{part}.py"]
    for file in files:
        assert {name.split(".")[1] for name in imports(file)} <= ALLOWED[part] | {part}, file


def test_the_table_has_no_cycle() -> None:
    above = ALLOWED
    while above:
        bottom = {part for part, allowed in above.items() if not allowed & above.keys()}
        assert bottom, above
        above = {part: allowed for part, allowed in above.items() if part not in bottom}


def test_the_loop_knows_no_model_and_no_data_set() -> None:
    for file in (ROOT / "ldm/training").glob("*.py"):
        of_data = {name for name in imports(file) if name.startswith("ldm.data")}
        assert {".".join(name.split(".")[:3]) for name in of_data} <= OF_DATA_IN_TRAINING, file


def test_diffusion_imports_torch_alone() -> None:
    for file in (ROOT / "ldm/diffusion").glob("*.py"):
        outside = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        allowed = {"torch", "ldm", "pydantic", "math", "typing", "collections", "itertools", "functools", "dataclasses"}
        assert outside <= allowed, file


def test_no_script_imports_another() -> None:
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for file in (ROOT / "scripts").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not names & {module.split(".")[0] for module in modules}, file


def test_no_test_imports_another() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("test_"), file


def test_an_installed_package_has_all_modules_and_a_command_for_each_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ldm").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == packages | {"ldm.scripts", "ldm.configs", "ldm.models"}
    commands = {path.stem: f"ldm-{path.stem.replace('_', '-')}" for path in (ROOT / "scripts").glob("*.py")}
    assert project["project"]["scripts"] == {name: f"ldm.scripts.{stem}:main" for stem, name in commands.items()}
