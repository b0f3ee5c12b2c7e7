"""Files as a person's system makes them: permissions by the umask, and links that are followed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import toy, toy_config
from PIL import Image

from ldm.imaging import save_image
from ldm.io.atomic import save_tensors, sync, write_tensors, write_text
from ldm.io.model_dir import latest_model, write_manifest
from ldm.training import checkpoint

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(os.name == "nt", reason="has no umask")
@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_all_that_is_written_has_the_permissions_of_the_umask(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "new/a.safetensors", {"x": torch.zeros(3)})
        (tmp_path / "new/.a.safetensors").touch(0o600)  # of a run that was killed
        write_tensors(tmp_path / "new/a.safetensors", {"x": torch.zeros(3)})
        save_tensors(tmp_path / "new/b.safetensors", {"x": torch.zeros(3)})
        write_text(tmp_path / "new/a.json", "{}")
        save_image(Image.new("RGB", (4, 4)), tmp_path / "new/a.png")
        toy(toy_config(tmp_path / "run", steps=3))
    finally:
        os.umask(before)
    written = [path for name in ("new", "run") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "run").rglob("*"))
    for path in written:
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows; a file that cannot be opened is an error."""
    write_text(tmp_path / "a", "x")
    flags: list[int] = []

    def refuse(path: Path, flag: int) -> int:
        flags.append(flag)
        raise PermissionError(path)

    monkeypatch.setattr(os, "open", refuse)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "a")
    assert flags[1] & os.O_RDWR  # Windows flushes no file that is open for reading


def test_latest_follows_links_once(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "disk/vae"
    runs.mkdir()
    write_manifest(elsewhere / "model", "vae", {})
    (runs / "vae").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(runs, target_is_directory=True)
    assert latest_model("vae", runs, script="x") == runs / "vae/model"
    with pytest.raises(ValueError, match="no finished pipeline"):
        latest_model("pipeline", runs, script="x")


def test_checkpoints_behind_links(tmp_path: Path) -> None:
    """The folder of all, and one of them, which is pruned without what it points to."""
    run, elsewhere = tmp_path / "run", tmp_path / "disk"
    elsewhere.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere, target_is_directory=True)
    toy(toy_config(run, steps=3))
    (elsewhere / "step-000003").rename(tmp_path / "old")
    (elsewhere / "step-000003").symlink_to(tmp_path / "old", target_is_directory=True)
    assert toy(toy_config(run, resume="latest", keep_checkpoints=1)).step == 8
    assert [path.name for path in elsewhere.iterdir()] == ["step-000008"]
    assert checkpoint.find_corruption(tmp_path / "old") is None


def test_scripts_import_nothing_that_their_help_does_not_need() -> None:
    """Each of these takes seconds to import."""
    heavy = {"open_clip", "torchvision", "transformers", "diffusers", "matplotlib", "torch._dynamo", "tensorboard"}
    names = ", ".join(sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "launch"))
    code = f"import sys; import {names}; print(*({heavy!r} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "\n", done
