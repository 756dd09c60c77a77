"""magnet: the loss by hand and beside the definition, its clusters and batches, and the quick run."""

from __future__ import annotations

import math

import pytest
import torch
from support.experiments import check_claims, check_resumes, check_written, quick_run

from metamask_ext.experiments.papers.magnet.loss import Clusters, magnet_loss
from metamask_ext.experiments.papers.magnet.settings import LossSettings

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("magnet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("magnet")


@pytest.fixture(scope="module")
def metrics(folder):
    pytest.importorskip("pytorch_metric_learning")
    return quick_run("magnet", folder)


def test_loss_by_hand():
    """Two clusters of two points on a line: at -1 and 1, and at 3 and 5. All squared distances to the own mean are 1."""
    embeddings = torch.tensor([[[-1.0], [1.0]], [[3.0], [5.0]]], dtype=torch.float64)
    variance = 4 / 3
    # From each point to the mean of the other cluster: 5 and 3, 3 and 5.
    losses = [max(0.0, (1 - far**2) / (2 * variance) + 4.0) for far in (5, 3, 3, 5)]
    found, by_cluster = magnet_loss(embeddings, torch.tensor([0, 1]), alpha=4.0)
    assert float(found) == pytest.approx(sum(losses) / 4)
    assert by_cluster.tolist() == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_loss_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 1, 0, 2])

    def definition(points: torch.Tensor) -> torch.Tensor:
        means = [points[m].mean(0) for m in range(4)]
        variance = sum((points[m, d] - means[m]).square().sum() for m in range(4) for d in range(3)) / 11
        total = torch.zeros((), dtype=torch.float64)
        for m in range(4):
            for d in range(3):
                own = (-(points[m, d] - means[m]).square().sum() / (2 * variance) - 0.7).exp()
                others = [
                    (-(points[m, d] - means[other]).square().sum() / (2 * variance)).exp()
                    for other in range(4)
                    if classes[other] != classes[m]
                ]
                total = total + (-(own / sum(others)).log()).clamp_min(0)
        return total / 12

    found, _ = magnet_loss(embeddings, classes, 0.7)
    torch.testing.assert_close(found, definition(embeddings))
    (gradient,), (wanted,) = (torch.autograd.grad(value, embeddings) for value in (found, definition(embeddings)))
    torch.testing.assert_close(gradient, wanted)


def test_clusters_that_are_points():
    """No variance at all: finite, and so is the gradient."""
    embeddings = torch.tensor([[[0.0, 0.0]] * 3, [[1.0, 0.0]] * 3], requires_grad=True)
    loss, _ = magnet_loss(embeddings, torch.tensor([0, 1]), 1.0)
    loss.backward()
    assert math.isfinite(float(loss)) and bool(embeddings.grad.isfinite().all())


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((2, 3), [0, 1], r"embeddings must be \[M, D, E\] with at least two samples, and classes \[M\], got \[2, 3\] and \[2\]"),
        ((2, 3, 4), [0, 1, 2], r"got \[2, 3, 4\] and \[3\]"),
        ((2, 3, 4), [1, 1], r"classes must be of at least two values, got \[1, 1\]"),
    ],
)
def test_refused(shape, classes, message):
    with pytest.raises(ValueError, match=message):
        magnet_loss(torch.zeros(shape), torch.tensor(classes), 1.0)


def _four_corners() -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of two well separated clusters of ten points each."""
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 3.0], [10.0, 3.0]])
    points = corners.repeat_interleave(10, 0) + 0.01 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    return points, torch.tensor([0] * 20 + [1] * 20)


def test_clusters():
    points, classes = _four_corners()
    clusters = Clusters(classes, LossSettings(k=2, m=2, d=4), torch.Generator().manual_seed(0))
    clusters.refresh(points)
    assert sorted(clusters.of_class.tolist()) == [0, 0, 1, 1]
    assert torch.equal(clusters.classify(points), classes)
    for _ in range(20):
        chosen, rows = clusters.draw()
        assert clusters.of_class[chosen].unique().numel() == 2 and rows.shape == (2, 4)
        # The nearest of another class is 3 away, the other 10.4.
        assert float((clusters.means[chosen[0]] - clusters.means[chosen[1]]).norm()) == pytest.approx(3, abs=0.1)
        for cluster, members in zip(chosen, rows):
            assert float((points[members] - clusters.means[cluster]).abs().max()) < 0.1


def test_seeds_follow_the_losses():
    points, classes = _four_corners()
    clusters = Clusters(classes, LossSettings(k=2, m=2, d=4), torch.Generator().manual_seed(0))
    clusters.refresh(points)
    for _ in range(200):
        clusters.note(torch.tensor([0, 1, 3]), torch.zeros(3))
    assert {int(clusters.draw()[0][0]) for _ in range(30)} == {2}


def test_fewer_points_than_clusters():
    clusters = Clusters(torch.tensor([0, 0, 1]), LossSettings(k=5, m=3, d=2), torch.Generator().manual_seed(0))
    clusters.refresh(torch.tensor([[0.0], [1.0], [5.0]]))
    assert clusters.of_class.tolist() == [0, 0, 1] and clusters.draw()[1].shape[1] == 2


def test_claims(metrics):
    check_claims(metrics)


def test_written(metrics, folder):
    check_written(folder / "magnet", metrics, ["magnet.png"])


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "magnet", metrics, "softmax.json")
