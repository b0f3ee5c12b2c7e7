"""How much detail a reconstruction has, and where an image has most."""

import torch
from sharpness import SIDE, busiest_squares, crops, detail


def test_detail_is_what_a_blur_takes() -> None:
    """None of a flat image, all of it where pixels alternate, and half of that where these are half as far apart."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    checks = ((rows + columns) % 2 * 2.0 - 1).expand(1, 3, 12, 12)
    flat, full, half = (
        detail(image)[..., 1:-1, 1:-1].mean() for image in (torch.ones(1, 3, 12, 12), checks, checks / 2)
    )
    assert flat == 0 and half == full / 2
    torch.testing.assert_close(full, torch.tensor(3 * (1 - 1 / 9)))


def test_the_square_with_most_detail_is_shown() -> None:
    images = torch.zeros(2, 3, 64, 96)
    images[0, :, 20:24, 70:74] = torch.randn(3, 4, 4)
    images[1, :, 5, 5] = 1
    corners = busiest_squares(images)
    (y, x), (top, left) = corners
    assert y <= 20 and y + SIDE >= 24 and x <= 70 and x + SIDE >= 74 and top <= 5 and left <= 5
    assert [crop.size for crop in crops(images, corners)] == [(SIDE, SIDE)] * 2
