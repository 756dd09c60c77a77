"""Tasks made of one set of images, against what they say they do, image by image."""

from __future__ import annotations

import pytest
import torch

from metamask_ext.data import ColoredImages, PermutedImages, RotatedImages

TASKS = {"permuted": PermutedImages(3, pixels=81, seed=4), "rotated": RotatedImages(36), "colored": ColoredImages(4, seed=2)}


def test_permutation_moves_every_pixel_as_it_says():
    tasks = PermutedImages(5, pixels=12, seed=1)
    assert tasks.names == [f"permutation-{task}" for task in range(5)]
    images = torch.rand(7, 1, 3, 4)
    for task in range(5):
        order = tasks.permutations[task].tolist()
        assert sorted(order) == list(range(12))
        got = tasks(images, task)
        assert got.shape == images.shape
        for pixel, source in enumerate(order):
            assert torch.equal(got.flatten(1)[:, pixel], images.flatten(1)[:, source])
    assert len({tuple(row) for row in tasks.permutations.tolist()}) == 5


def test_permutations_by_seed():
    few, many, other = PermutedImages(2, seed=3), PermutedImages(9, seed=3), PermutedImages(2, seed=4)
    assert torch.equal(few.permutations, many.permutations[:2]) and not torch.equal(few.permutations, other.permutations)


@pytest.mark.parametrize(("task", "turns"), [(0, 0), (9, 1), (18, 2), (27, 3)])
def test_quarter_turns_are_exact(task, turns):
    images = torch.rand(3, 2, 28, 28, dtype=torch.float64)
    tasks = RotatedImages()
    assert tasks.names[task] == f"rotation-{90 * turns}" and len(tasks.names) == 36
    # rot90 turns counter-clockwise, as the images are shown.
    torch.testing.assert_close(tasks(images, task), torch.rot90(images, turns, (2, 3)), atol=1e-12, rtol=0)


def test_ten_degrees_against_bilinear_sampling_by_hand():
    size = 9
    image = torch.rand(size, size, dtype=torch.float64)
    got = RotatedImages()(image[None, None], 1)[0, 0]
    cos, sin = torch.deg2rad(torch.tensor(10.0, dtype=torch.float64)).cos(), torch.deg2rad(torch.tensor(10.0).double()).sin()
    middle = (size - 1) / 2
    for row in range(size):
        for column in range(size):
            right, up = column - middle, middle - row
            # Turned back, clockwise.
            x, y = middle + float(cos * right + sin * up), middle - float(cos * up - sin * right)
            wanted = 0.0
            for r in range(size):
                for c in range(size):
                    wanted += max(0.0, 1 - abs(y - r)) * max(0.0, 1 - abs(x - c)) * float(image[r, c])
            assert abs(float(got[row, column]) - wanted) < 1e-9


def test_colors_by_hand():
    tasks = ColoredImages(3, seed=5)
    assert tasks.names == ["color-0", "color-1", "color-2"] and len(tasks.colors.unique(dim=0)) == 3
    assert float(tasks.colors.min()) >= 0 and float(tasks.colors.max()) < 1
    image = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=torch.float64)
    for task, color in enumerate(tasks.colors.tolist()):
        got = tasks(image[None, None], task)
        assert got.shape == (1, 3, 2, 2) and got.dtype == torch.float64
        for channel, shade in enumerate(color):
            # Paper has the colour, ink is white, grey is between them.
            wanted = torch.tensor([[shade, 1.0], [0.5 + 0.5 * shade, 0.25 + 0.75 * shade]], dtype=torch.float64)
            torch.testing.assert_close(got[0, channel], wanted)


def test_colors_by_seed():
    few, many, other = ColoredImages(2, seed=3), ColoredImages(500, seed=3), ColoredImages(2, seed=4)
    assert torch.equal(few.colors, many.colors[:2]) and not torch.equal(few.colors, other.colors)
    # 1,500 uniform numbers: standard deviation of the mean 0.0075; five of them
    assert abs(float(many.colors.mean()) - 0.5) < 0.038


@pytest.mark.parametrize("kind", TASKS)
def test_mixed_batch_is_each_image_by_itself(kind):
    tasks, images = TASKS[kind], torch.rand(6, 1, 9, 9)
    before = images.clone()
    chosen = torch.tensor([2, 0, 1, 2, 2, 0])
    wanted = torch.cat([tasks(images[index : index + 1], task) for index, task in enumerate(chosen.tolist())])
    torch.testing.assert_close(tasks(images, chosen), wanted)
    assert torch.equal(images, before) and not torch.equal(wanted, images.expand_as(wanted))
    assert tasks(images[:0], chosen[:0]).shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (-1, ValueError, "task must be in 0..{last}, got -1"),
        (36, ValueError, "task must be in 0..{last}, got 36"),
        (torch.tensor([0, 40]), ValueError, "task must be in 0..{last}, got 40"),
        (torch.tensor([0.0, 1.0]), TypeError, "task must be int64 .* got torch.float32"),
        (torch.tensor([0]), ValueError, r"task must be \[2\], one for each image, got shape \[1\]"),
        ("rotation-0", TypeError, "task must be an integer or an int64 tensor, got str"),
    ],
)
def test_bad_tasks(kind, task, error, message):
    tasks = TASKS[kind]
    with pytest.raises(error, match=message.replace("{last}", str(len(tasks.names) - 1))):
        tasks(torch.rand(2, 1, 9, 9), task)


def test_bad_images_and_numbers():
    with pytest.raises(ValueError, match=r"images must have 81 pixels each, got shape \[2, 1, 8, 8\]"):
        TASKS["permuted"](torch.rand(2, 1, 8, 8), 0)
    for images in (torch.rand(2, 81), torch.rand(2, 1, 8, 9), torch.ones(2, 1, 9, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be floating point \[B, C, n, n\], got"):
            TASKS["rotated"](images, 0)
    for images in (torch.rand(2, 3, 9, 9), torch.rand(2, 9, 9), torch.ones(2, 1, 9, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be floating point \[B, 1, height, width\], got"):
            TASKS["colored"](images, 0)
    for kind in TASKS.values():
        with pytest.raises(TypeError, match="images must be a tensor, got list"):
            kind([[0.0]], 0)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        PermutedImages(0)
    for make in (RotatedImages, ColoredImages):
        with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
            make(0)
    with pytest.raises(ValueError, match="at most a full turn, got 37 tasks 10 degrees apart"):
        RotatedImages(37)
