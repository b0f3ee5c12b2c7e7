"""Alignment of the U-Net's features with those of an image tower."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, copy_stages_before, examine_tiny, logged, losses, signal_at, tensors_of, train
from ranks import FSDP, launch, rank_environment
from safetensors.torch import load_file

from ldm.config import CONFIGS, read_yaml, write_yaml
from ldm.data.batch_sampler import SampleKey
from ldm.planning.planner import MachineSpec, num_features, recipe_stages
from ldm.stages.diffusion import DiffusionStage, TrainLDMConfig
from ldm.text.image_tower import ImageTower
from ldm.text.weights import public_architecture
from ldm.training.stage import Stage
from ldm.unet.alignment import alignment_distance

ALIGNED = ["--align-weight", "0.5"]
environment = pytest.fixture(scope="module", autouse=True)(rank_environment)


@pytest.fixture(scope="module")
def aligned(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a U-Net that was aligned, beside those of its text tower and its VAE."""
    folder = tmp_path_factory.mktemp("aligned")
    copy_stages_before("ldm", tiny_runs, folder)
    train("ldm", folder / "ldm", *ALIGNED)
    return folder / "ldm"


def test_the_distance_is_that_of_directions_and_the_target_is_pooled() -> None:
    features, target = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 8, 8)
    pooled = target.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    distances = alignment_distance(torch.stack([3 * pooled[0], -pooled[1], features[2]]), target)
    unit = [torch.nn.functional.normalize(x, dim=0) for x in (features[2], pooled[2])]
    torch.testing.assert_close(distances, torch.stack([torch.tensor(0.0), torch.tensor(2.0),
                               1 - (unit[0] * unit[1]).sum(0).mean()]), atol=1e-6, rtol=1e-5)  # fmt: skip


def test_the_model_is_a_unet_like_any_other_and_learned_otherwise(aligned: Path, tiny_runs: Path) -> None:
    unet, other = (load_file(run / "model/unet.safetensors") for run in (aligned, tiny_runs / "ldm"))
    assert unet.keys() == other.keys() and any(not torch.equal(unet[name], other[name]) for name in unet)
    alignment = logged(aligned, "alignment")
    assert 0.5 < alignment[1] < 1.5 and alignment[4] < alignment[1]


def test_a_resumed_run_is_bit_equal(aligned: Path, tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    with pytest.raises(SystemExit):
        train("ldm", tmp_path / "ldm", *ALIGNED, on_step=signal_at(2))
    with pytest.raises(SystemExit, match=r"image_tower_sha256 .* they must match to resume"):
        train("ldm", tmp_path / "ldm", "--align-weight", "0", "--resume", "latest")
    train("ldm", tmp_path / "ldm", *ALIGNED, "--resume", "latest")
    assert_same(tensors_of(aligned, 4), tensors_of(tmp_path / "ldm", 4))


@pytest.mark.parametrize("flags", [["--grad-accum-steps", "2"], FSDP], ids=["accumulated", "sharded"])
def test_two_processes_equal_one(flags: list[str], aligned: Path, tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    launch("ldm", tmp_path / "ldm", 2, [*ALIGNED, *flags])
    assert losses(tmp_path / "ldm") == pytest.approx(losses(aligned), rel=1e-5)
    assert logged(tmp_path / "ldm", "alignment") == pytest.approx(logged(aligned, "alignment"), rel=1e-4)
    one, two = (load_file(run / "model/unet.safetensors") for run in (aligned, tmp_path / "ldm"))
    assert all((one[name] - two[name]).norm() < 1e-3 * one[name].norm() for name in one)


def test_features_are_those_of_the_images_also_where_latents_are_cached(tiny_runs: Path, tmp_path: Path) -> None:
    tower = ImageTower.load(f"local-dir:{tiny_runs}/clip/model")
    copy_stages_before("ldm", tiny_runs, tmp_path)
    stages: dict[str, Any] = {}

    def keep(stage: Stage) -> Stage:
        stages["ldm"] = stage
        return stage

    found = []
    for flag in ("--cache-latents", "--no-cache-latents"):
        train("ldm", tmp_path / flag, *ALIGNED, flag, "--steps", "1", wrap=keep)
        stage: DiffusionStage = stages["ldm"]
        batch: Any = {name: value[None] for name, value in stage.data[SampleKey(3, 0, 0)].items() if name != "caption"}
        assert ("features" in batch) == (flag == "--cache-latents")
        found.append(stage.image_features(batch))
    assert torch.equal(found[1], tower(batch["image"])[-1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
    gray: Any = {"image": batch["image"].mean(1, keepdim=True)}
    assert torch.equal(stage.image_features(gray), tower(gray["image"].expand(-1, 3, -1, -1))[-1])


def test_a_doctor_finds_nothing(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    checks = examine_tiny("ldm", tmp_path / "ldm", *ALIGNED)
    assert {check.name for check in checks if not check.ok} <= {"time to finish"}, "which is too short here"


def test_a_plan_counts_the_image_tower_and_its_features(tmp_path: Path) -> None:
    """96 x 4 x 4 numbers an image beside the latents; what is cached costs no FLOP in a step."""
    machine = MachineSpec(gpus=0, usable_bytes=10**12, device=None, tflops=1.0)
    plan = recipe_stages(CONFIGS / "characters", 64, machine, 9056)[-1]
    assert plan.latent_bytes == 8 * 20 * 16 * 16 + 4 * 96 * 4 * 4
    values = read_yaml(CONFIGS / "characters/ldm.yaml")
    write_yaml(tmp_path / "ldm.yaml", TrainLDMConfig.from_dict({**values, "align_weight": 0}, source="ldm.yaml"))
    for stage in ("clip", "vae"):
        shutil.copy(CONFIGS / f"characters/{stage}.yaml", tmp_path)
    without = recipe_stages(tmp_path, 64, machine, 9056)[-1]
    assert without.latent_bytes == 8 * 20 * 16 * 16
    aligned, alone = plan.cost(2), without.cost(2)
    assert aligned.parameters - alone.parameters == 256 * 96 + 96, "the projection"
    assert aligned.frozen_bytes > alone.frozen_bytes + 4 * 100_000, "the image tower"
    assert aligned.flop - alone.flop == 3 * 2 * 2 * 4 * 4 * 256 * 96, "the projection, forward and backward"


@pytest.mark.parametrize(("name", "count"), [("ViT-B-32", 768 * 7 * 7), ("RN50", 2048 * 7 * 7)])
def test_features_of_published_towers_are_counted(name: str, count: int) -> None:
    assert num_features(public_architecture(name, kind="image")) == count


def test_what_cannot_be_aligned(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)

    def refused(message: str, *flags: str) -> None:
        with pytest.raises(SystemExit, match=message):
            train("ldm", tmp_path / "ldm", *ALIGNED, *flags)

    none = ["--text.model", "none", "--unet.context-dim", "0", "--unet.pooled-dim", "0"]
    refused("align_weight: without a text.model there is no CLIP to align to; leave it at 0", *none)
    refused("align_weight: cached latents have no images; leave it at 0, or", "--cached-latents", str(tmp_path))
    shutil.copytree(CONFIGS.with_name("models") / "characters/text", tmp_path / "text")
    refused("align_weight 0.5: image tower .* has no weights in .*: pass a CLIP .*, or leave it at 0", "--text.model",
            f"local-dir:{tmp_path}/text")  # fmt: skip
