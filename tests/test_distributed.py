"""Two ranks train what one rank trains."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cache_latents
import pytest
import ranks
import torch
from helpers import contents, copy_stages_before, latent_flags, losses, tensors_of, train
from ranks import FSDP, Harm, free_port, launch, rank_environment
from safetensors.torch import load_file
from torch import Tensor

from ldm.data.sources import shapes
from ldm.data.sources.base import hash_split
from ldm.training.checkpoint import load_checkpoint

MODULE = {"clip": "clip", "vae": "vae", "ldm": "unet"}
environment = pytest.fixture(scope="module", autouse=True)(rank_environment)


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("clip", []),
        ("vae", ["--grad-accum-steps", "2"]),
        ("ldm", ["--grad-accum-steps", "2"]),
        ("vae", FSDP),
        ("ldm", [*FSDP, "--grad-accum-steps", "2"]),
    ],
    ids=["clip", "vae", "ldm", "vae-sharded", "ldm-sharded"],
)
def test_two_processes_equal_one(stage: str, flags: list[str], tiny_runs: Path, tmp_path: Path) -> None:
    """Same losses to 1e-5, weights and averages; with weights sharded over both, the finished model is whole again."""
    copy_stages_before(stage, tiny_runs, tmp_path)
    one, two = tiny_runs / stage, tmp_path / stage
    if "--fsdp" in flags:
        one = tmp_path / f"one/{stage}"
        copy_stages_before(stage, tiny_runs, one.parent)
        train(stage, one, "--fsdp")
    launch(stage, two, 2, flags)
    assert close(losses(one), losses(two))
    logs = [json.loads((run / "log.jsonl").read_text().splitlines()[-1]) for run in (one, two)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    name, step = MODULE[stage], "checkpoints/step-000004"
    groups = [name, f"{name}_ema", f"{name}_optimizer"]
    ones, twos = (load_checkpoint(run / step)[0] for run in (one, two))
    assert all(ones[group].keys() == twos[group].keys() for group in groups)
    assert all(distance(ones[group], twos[group]) < 1e-4 for group in groups[:2])
    if stage != "clip":
        assert distance(*(load_file(run / f"model/{name}.safetensors") for run in (one, two))) < 1e-4
    sizes = [file.stat().st_size for file in (two / step).glob("*.safetensors")]
    if "--fsdp" in flags:
        assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)


def test_ranks_find_each_other_without_a_gpu(tmp_path: Path) -> None:
    """As torchrun starts them where nothing asks for the CPU."""
    output = launch("clip", tmp_path / "clip", 2, [], environment={"ACCELERATE_USE_CPU": "false"})
    assert output.count("configuration: ") == 1 and (tmp_path / "clip/model/model.json").is_file()


def test_a_disk_that_is_full_for_one_process_stops_both(tmp_path: Path) -> None:
    output = launch("vae", tmp_path / "vae", 2, ["--fsdp"], harm=Harm("full", 1, 3), codes=[1, 1])
    assert output.count("step-000004 could not be written (") == 2 and "File too large" in output
    assert "free some space and restart with --run" in output and "--resume latest, from step-000002" in output
    assert [path.name for path in (tmp_path / "vae/checkpoints").iterdir()] == ["step-000002"]


def test_two_processes_encode_what_one_does(tiny_runs: Path, tmp_path: Path) -> None:
    """To the byte, in every file; each writes about half of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    cache_latents.main(["--out", str(one), *latent_flags(tiny_runs)])
    launch("cache_latents", two, 2, latent_flags(tiny_runs))
    assert contents(one) == contents(two) and len(contents(two)) == 8 + 4 + 2


def test_a_disk_that_is_full_for_one_process_stops_encoding(tiny_runs: Path, tmp_path: Path) -> None:
    """What the other one wrote stays, and a second call ends as one without a full disk."""
    flags, one, two = latent_flags(tiny_runs), tmp_path / "one", tmp_path / "two"
    output = launch("cache_latents", two, 2, flags, harm=Harm("full", 1, 0), codes=[1, 1])
    assert "safetensors could not be written" in output and "free some space and try again" in output
    assert "see the output of the other ranks, then start cache_latents.py again" in output
    assert "Traceback" not in output and not list(two.glob(".*"))
    cache_latents.main(["--out", str(one), *flags])
    assert contents(two).items() < contents(one).items() and contents(two)
    cache_latents.main(["--out", str(two), *flags])
    assert contents(two) == contents(one)


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    output = launch("clip", tmp_path / "clip", 2, ["--fsdp"], codes=[1, 1])
    assert "--fsdp: model.logit_scale is a single number" in output and "leave out --fsdp" in output


def test_images_that_one_process_can_not_read_are_counted_by_all(tmp_path: Path) -> None:
    """Each process meets some of them; the list at the end, and the share that is allowed, are of all."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        shapes.render(shapes.scenes("train")[number], 16, seed=number).save(photos / f"{number:02}.png")
    for number in (7, 8, 21, 29):
        (photos / f"{number:02}.png").write_bytes(b"no image")
    read = ["--data.source", str(photos), "--steps", "10", "--log-every", "5"]
    output = launch("clip", tmp_path / "a", 2, [*read, "--data.max-unreadable", "0.5"])
    bad = [index for index in hash_split([f"{i:02}.png" for i in range(40)], "train") if index in (7, 8, 21, 29)]
    assert f"train split: {len(bad)} images could not be read" in output and len(bad) > 2
    assert all(f"{index:02}.png: not a PNG" in output for index in bad)
    output = launch("clip", tmp_path / "b", 2, [*read, "--data.max-unreadable", "0.06"], codes=[1, 1])
    assert "above the 6.0% that data.max_unreadable allows" in output


@pytest.mark.parametrize(("first", "then"), [([], []), (FSDP, FSDP), (FSDP, []), ([], FSDP)])
def test_a_run_that_one_process_stops_goes_on_with_another_number(
    first: list[str], then: list[str], tmp_path: Path
) -> None:
    """SIGUSR1, by which schedulers announce the end, to the second of two: both save the same step.

    What goes on with 1, 3 or 4 processes takes the same global batches and learning rates; losses are equal to 1e-5.
    Weights may be split, or be whole, before and after.
    """
    batch = ["--batch-size", "12", "--lr-schedule", "cosine"]
    train("vae", tmp_path / "whole", *batch, *first[:1])
    codes = [128 + signal.SIGUSR1] * 2
    launch("vae", tmp_path / "stopped", 2, [*batch, *first], harm=Harm("signal", 1, 2), codes=codes)
    saved = sorted(path.name for path in (tmp_path / "stopped/checkpoints").iterdir())
    assert saved[-1] == "step-000003"  # the step after the signal
    assert (tmp_path / "stopped/STOPPED").read_text() == "step 3\n"
    for processes in (1, 3, 4) if first == then else (2,):
        run = tmp_path / str(processes)
        shutil.copytree(tmp_path / "stopped", run)
        flags = [*batch, *then, "--resume", "latest"]
        if processes == 1:
            train("vae", run, *flags)
        else:
            launch("vae", run, processes, flags)
        assert close(losses(tmp_path / "whole"), losses(run), 1e-5 if first == then else 1e-4)
        assert rates(tmp_path / "whole") == rates(run) and not (run / "STOPPED").exists()


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    output = launch("vae", tmp_path / "vae", 2, ["--keep-checkpoints", "9"], harm=Harm("poison", 1, 2))
    assert "vae: non-finite gradient, skipped step 2 (1 skipped so far)" in output
    found = losses(tmp_path / "vae")
    assert sorted(found) == [1, 2, 3, 4] and all(math.isfinite(found[step]) for step in (1, 3, 4))
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "vae", 4).values())


def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    begin = time.monotonic()
    codes = [1, -signal.SIGTERM]
    output = launch("vae", tmp_path / "vae", 2, ["--timeout", "5"], harm=Harm("hang", 1, 2), codes=codes)
    assert "a rank failed or timed out (5 s)" in output and time.monotonic() - begin < 55


def test_two_nodes_equal_one_process(tmp_path: Path) -> None:
    """Two launchers that meet at a port, each with one process, as on two machines; world size 2 is asserted there."""
    train("vae", tmp_path / "whole")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    meeting = ["--master_addr", "localhost", "--master_port", str(free_port())]
    stage = [ranks.__file__, "vae", str(tmp_path / "vae"), "2"]
    nodes = [subprocess.Popen([*command, "--node_rank", str(rank), *meeting, *stage]) for rank in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert close(losses(tmp_path / "whole"), losses(tmp_path / "vae"))


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of two sets of weights, relative: as one vector, for weights whose gradient is zero but for rounding (the bias of
    attention's keys) move by Adam's whole step."""
    assert one.keys() == two.keys()
    ones, twos = (torch.cat([tensors[name].flatten() for name in one]) for tensors in (one, two))
    return ((ones - twos).norm() / ones.norm()).item()


def close(want: dict[int, float], found: dict[int, float], tolerance: float = 1e-5) -> bool:
    return want.keys() == found.keys() and max(abs(found[step] / want[step] - 1) for step in want) < tolerance


def rates(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "loss" in line]
