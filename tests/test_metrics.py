"""Distances of features, against closed forms and torchmetrics, and the intervals around them."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from ldm.evaluation.estimates import RESAMPLES, bootstrap_ci, bootstrap_counts, mean_ci
from ldm.evaluation.features import Extractor
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.metrics import (
    compare_features,
    gaussian_kernel,
    missing_metrics,
    neighbour_radii,
    polynomial_kernel,
    squared_mmd,
)
from ldm.evaluation.quality import clip_score


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def with_moments(x: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Features with exactly this mean, and the covariance root.T @ root."""
    x = x.double() - x.double().mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T @ root + mean


def test_frechet_distance_of_normal_distributions() -> None:
    """For commuting covariances it is |m - n|^2 + sum (a - b)^2 with their standard deviations a and b."""
    turn = torch.linalg.qr(normal(4, 4, 0).double()).Q
    a, b = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([1.5, 0.2, 0.0, 3.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    one = with_moments(normal(50, 4, 1), torch.zeros(4).double(), a.diag() @ turn.T)
    other = with_moments(normal(70, 4, 2), mean, b.diag() @ turn.T)
    assert frechet_distance(one, other) == pytest.approx(float(mean.square().sum() + (a - b).square().sum()))
    assert frechet_distance(one, one.flip(0)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two images of each set, not 1 and 70"):
        frechet_distance(one[:1], other)


class Identity(nn.Module):
    """Features that are there already, for torchmetrics."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :12]


@pytest.mark.parametrize("count", [9, 60])
def test_frechet_distance_is_that_of_torchmetrics(count: int) -> None:
    """Also of fewer images than dimensions."""
    real, other = normal(40, 12, 3), normal(count, 12, 4) * 1.3 + 0.2
    metric = FrechetInceptionDistance(Identity(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(real.reshape(-1, 3, 2, 2), real=True)
    metric.update(other.reshape(-1, 3, 2, 2), real=False)
    assert frechet_distance(real, other) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    real, other = normal(40, 12, 5).double(), normal(40, 12, 6).double() + 0.3
    ones = torch.ones(1, 40, dtype=torch.float64)
    found = squared_mmd(real, other, polynomial_kernel, ones, ones)
    assert found.item() == pytest.approx(poly_mmd(real, other).item(), rel=1e-9)


def test_cmmd_of_two_points_is_its_closed_form() -> None:
    """Jayasumana et al. 2024: 1000 times the squared MMD of unit vectors, under a Gaussian kernel of deviation 10."""
    real, other = torch.eye(4)[:1].expand(12, -1), 3 * torch.eye(4)[1:2].expand(12, -1)
    found = compare_features(real, other, name="{}_x")["cmmd_x"]
    assert found.value == pytest.approx(1000 * 2 * (1 - math.exp(-2 / (2 * 10**2))), rel=1e-6)


def test_clip_score_is_a_hundred_times_the_cosine_where_that_is_positive() -> None:
    """Hessel et al. 2021, with the weight 100 of torchmetrics."""
    texts = {"same": [2.0, 0.0], "aslant": [3.0, 4.0], "opposite": [-1.0, 0.0]}
    tower = cast(Extractor, SimpleNamespace(text=lambda captions: torch.tensor([texts[each] for each in captions])))
    found = clip_score(tower, torch.tensor([[5.0, 0.0]]).expand(3, -1), list(texts))
    assert found.value == pytest.approx((100 + 60 + 0) / 3) and found.samples == 3


def test_weights_of_a_kernel_distance_repeat_samples() -> None:
    """A sample drawn twice is not compared with itself: the sum over all other pairs is what is left."""
    a, b = normal(5, 3, 7).double(), normal(6, 3, 8).double()
    counts = torch.tensor([[2.0, 0, 1, 1, 1]], dtype=torch.float64)
    picked = [0, 0, 2, 3, 4]
    kernel = gaussian_kernel(a[picked], a[picked])
    pairs = torch.tensor([[i != j for j in picked] for i in picked])
    cross = gaussian_kernel(a[picked], b).mean()
    within = gaussian_kernel(b, b)
    expected = kernel[pairs].mean() + within[~torch.eye(6, dtype=torch.bool)].mean() - 2 * cross
    ones = torch.ones(1, 6, dtype=torch.float64)
    assert squared_mmd(a, b, gaussian_kernel, counts, ones).item() == pytest.approx(expected.item(), rel=1e-9)


def test_equal_distributions_are_at_distance_zero_on_average_and_within_their_intervals() -> None:
    """Of KID and CMMD, whose estimates have no bias; the intervals are of 95 %."""
    trials = [compare_features(normal(60, 64, i), normal(50, 64, 1000 + i), name="{}_x") for i in range(60)]
    for name in ("kid_x", "cmmd_x"):
        values = torch.tensor([trial[name].value for trial in trials])
        assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
        assert sum(trial[name].low <= 0 <= trial[name].high for trial in trials) >= 51
    assert "fd_x" not in trials[0], "60 images are too few for 64 dimensions"


def test_pairs_are_left_out_and_resampled_together() -> None:
    """An image and its reconstruction are no two samples: their distance is 0 on average, with a narrow interval."""
    found = []
    for i in range(20):
        real = normal(50, 8, i)
        close = real + 0.3 * normal(50, 8, 100 + i)
        found.append([compare_features(real, close / 1.09**0.5, name="{}", paired=pair) for pair in (True, False)])
    paired, single = ([one[i]["kid"] for one in found] for i in (0, 1))
    values = torch.tensor([e.value for e in paired])
    assert abs(values.mean()) < 3 * values.std() / 20**0.5
    assert sum(e.value for e in single) / 20 < -2 * values.std() / 20**0.5, "without: below 0"
    assert sum(e.high - e.low for e in paired) < 0.6 * sum(e.high - e.low for e in single)


def test_bootstrap_of_a_mean() -> None:
    """Is the normal interval, nearly; a statistic that resampling moves upwards is not moved."""
    values = normal(200, 1, 9)[:, 0].double()
    counts = bootstrap_counts(200, "here")
    assert counts.shape == (1 + RESAMPLES, 200) and (counts.sum(1) == 200).all() and (counts[0] == 1).all()
    found, expected = bootstrap_ci(counts @ values / 200, 200), mean_ci(values.tolist())
    assert found.value == pytest.approx(expected.value) and found.samples == 200
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.15)
    moved = counts @ values / 200
    moved[1:] += 5
    assert bootstrap_ci(moved, 200).high < found.high + 1


def test_covered_modes() -> None:
    """Samples of one of two modes are precise and leave half out; far ones are nothing, equal ones everything."""
    one, two = normal(100, 8, 10), normal(100, 8, 11) + 50
    both = torch.cat([one, two])
    half = compare_features(both, normal(200, 8, 12), name="{}_x")
    assert half["precision_x"].value > 0.7 and half["density_x"].value == pytest.approx(1, abs=0.25)
    assert 0.3 < half["recall_x"].value <= 0.5 and 0.4 < half["coverage_x"].value <= 0.5
    assert half["recall_x"].samples == half["precision_x"].samples == 200
    far = compare_features(both, both + 1000, name="r{}_x")
    assert all(far[f"r{name}_x"].value == 0 for name in ("precision", "recall", "density", "coverage"))
    same = compare_features(both, both.clone(), name="{}_x")
    assert all(same[f"{name}_x"].value == 1 for name in ("precision", "recall", "coverage"))
    assert same["density_x"].value == pytest.approx(6 / 5), "each of the balls of 5 neighbours holds its own centre"


def test_neighbours() -> None:
    line = torch.tensor([0.0, 1, 3, 7])[:, None]
    assert neighbour_radii(line, 1).tolist() == [1, 1, 2, 4] and neighbour_radii(line, 3).tolist() == [7, 6, 4, 7]


def test_metrics_say_how_many_images_they_need() -> None:
    real, other = normal(40, 32, 13), normal(5, 32, 14)
    told = missing_metrics(real, other)
    assert told["fd"] == "fd: at least 33 images of each set are needed, one more than the 32 dimensions of its " \
        "features; there are 5"  # fmt: skip
    assert told["kid and cmmd"].startswith("kid and cmmd: at least 10 images of each set are needed")
    assert told["precision, recall, density and coverage"].endswith(
        "at least 6 images of each set are needed; there are 5"
    )
    assert not compare_features(real, other, name="{}_x")
    ten = compare_features(real, normal(10, 32, 14), name="{}_x")
    assert {"kid_x", "cmmd_x", "recall_x"} < set(ten) and "fd_x" not in ten
    assert all(e.low <= e.value <= e.high for e in ten.values())
    assert not missing_metrics(real, real)
