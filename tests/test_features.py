"""Extractors, which weights they take, and files of features."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.models.inception import Inception3

from ldm.evaluation.features import open_extractor, own_extractor, read_features, use_fid_pooling, write_features
from ldm.io.model_dir import read_json
from ldm.io.tensors import load_weights
from ldm.pipeline import Pipeline
from ldm.text.clip import CLIP

CPU = torch.device("cpu")


def test_the_own_tower_is_found_in_the_model_folder(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It gives the features of the CLIP that was trained, at its size, and is named so wherever it is."""
    own = own_extractor(Pipeline.load(tiny_model, device=CPU))
    assert own == f"local-dir:{tiny_model}/text"
    extractor = open_extractor(own, CPU, own)
    clip = CLIP(read_json(tiny_model / "text/open_clip_config.json")["model_cfg"])
    load_weights(clip.model, tiny_model / "text/open_clip_model.safetensors")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = clip.eval()(images, clip.tokenizer(["a", "a red star"]))
    torch.testing.assert_close(F.normalize(extractor(images), dim=1), expected["image_features"])
    torch.testing.assert_close(F.normalize(extractor.text(["a", "a red star"]), dim=1), expected["text_features"])
    assert extractor(images[:, :1]).shape == (2, 16), "grey images, too"
    assert extractor.suffix == "self" and "16 pixels" in extractor.resize
    trained = open_extractor(f"local-dir:{tiny_runs}/clip/model", CPU)
    assert trained.identity() == extractor.identity()
    shutil.copytree(tiny_model / "text", tmp_path / "published")
    assert open_extractor(f"local-dir:{tmp_path}/published", CPU).suffix == "clip"


def test_images_are_resized_as_the_report_says(tiny_model: Path) -> None:
    extractor = open_extractor(f"local-dir:{tiny_model}/text", CPU)
    large = torch.rand(1, 3, 48, 48)
    small = F.interpolate(large, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(extractor(large * 2 - 1), extractor(small * 2 - 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "local-dir:{folder}",
            r"--extractor local-dir:\S+: image tower .* has no weights in .*: pass a CLIP",
        ),
        ("local-dir:nowhere", "--extractor local-dir:nowhere: image tower .* has no open_clip_config.json: train one"),
        (
            "ViT-B-32",
            "--extractor ViT-B-32: .* set its pretrained tag to one of .*laion400m_e32.* .NAME:TAG",
        ),
        ("ViT-B-32:none", "--extractor ViT-B-32:none: .* to one of .*, not none"),
        ("nothing:x", "--extractor nothing:x: image tower 'nothing' is not in open_clip: pass one"),
        ("inception:{folder}/a.pth", r"a.pth has no weights, there is no such file: download inception_v3"),
        ("inception:{folder}/open_clip_model.safetensors", "does not fit this network"),
        ("hf-hub:org/name", "--extractor hf-hub:org/name: image tower .* download failed .*: check the network"),
    ],
)
def test_an_extractor_without_weights(name: str, message: str, tiny_model: Path, tmp_path: Path) -> None:
    """A text tower alone is none; a published model needs its tag, and Inception its file."""
    shutil.copytree(tiny_model / "text", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "open_clip_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("visual.")}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        open_extractor(name.format(folder=tmp_path), CPU)


def test_inception_reads_torchvision_weights(tmp_path: Path) -> None:
    """Its features are what the classifier reads; older files have no counters of batches."""
    torch.manual_seed(0)
    network = Inception3(init_weights=False).eval()
    torch.save({k: v for k, v in network.state_dict().items() if "batches" not in k}, tmp_path / "inception.pth")
    extractor = open_extractor(f"inception:{tmp_path}/inception.pth", CPU)
    images = torch.rand(1, 3, 299, 299) * 2 - 1
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(extractor(images), network(images))
    assert extractor.suffix == "inception" and "299 pixels" in extractor.resize and extractor.encode_text is None


class Block(torch.nn.Module):
    """What the blocks of Inception do with their last branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch_pool = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1))


def test_pooling_of_the_network_of_fid() -> None:
    """Means without the padding, and maxima in the last block."""
    network = torch.nn.Module()
    network.Mixed_5b, network.Mixed_7c = Block(), Block()
    use_fid_pooling(network)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(network.Mixed_5b(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    for _ in range(2):
        assert torch.equal(network.Mixed_7c(x), F.max_pool2d(x, 3, 1, 1))


def test_features_of_another_extractor_or_of_other_images(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    extractor = open_extractor(f"local-dir:{tiny_runs}/clip/model", CPU)
    features, file, about = torch.randn(4, 16), tmp_path / "real.safetensors", {"images": "abc", "count": "4"}
    write_features(file, features, extractor, about)
    assert torch.equal(read_features(file, extractor, about), features)
    other = open_extractor(f"local-dir:{tiny_runs}/clip/model", CPU)
    with torch.no_grad():
        next(other.network.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"real.safetensors has features of local-dir:\S+, sha256 .* here it is .*"
                       "pass another --features, or the same --extractor"):  # fmt: skip
        read_features(file, other, about)
    with pytest.raises(ValueError, match="images abc; here it is .* images abd: pass another --features"):
        read_features(file, extractor, {**about, "images": "abd"})
    with pytest.raises(ValueError, match="is no file of features: pass one that evaluate.py wrote"):
        read_features(tiny_model / "unet.safetensors", extractor, about)
