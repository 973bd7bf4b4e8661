"""The 2D targets: parity with scikit-learn, seeds, bad input, and the three plots."""
import math

import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.targets import (
    TARGETS,
    sample_2d,
    show_paths,
    show_points,
    show_snapshots,
    source_2d,
)

each_draw = pytest.mark.parametrize("draw", (sample_2d, source_2d))


def moments(x):
    "Mean, covariance and third moments: enough to tell two of these laws apart."
    x = torch.as_tensor(x, dtype=torch.float64)
    offset = x - x.mean(0)
    third = torch.einsum("ni,nj,nk->ijk", offset, offset, offset)/len(x)
    return torch.cat([x.mean(0), offset.T.cov().flatten(), third.flatten()])


def test_moons_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = 3*datasets.make_moons(200_000, noise=.05, random_state=0)[0] - 1
    assert_close(moments(sample_2d("moons", 200_000)), moments(theirs), atol=.15, rtol=.02)


def test_points_on_the_moons_are_independent():
    "The number below the mean is binomial; evenly spaced angles would fix it."
    below = [(sample_2d("moons", 1000, seed)[:, 1] < -.25).sum() for seed in range(100)]
    assert torch.stack(below).double().std().item() == pytest.approx(1000**.5/2, rel=.35)


def test_scurve_is_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = 1.5*datasets.make_s_curve(200_000, noise=.05, random_state=0)[0][:, [0, 2]]
    assert_close(moments(sample_2d("scurve", 200_000)), moments(theirs), atol=.06, rtol=.02)


def test_the_modes_of_8gaussians():
    y = sample_2d("8gaussians", 80_000)
    mode = (torch.atan2(y[:, 1], y[:, 0])*4/math.pi).round().long() % 8
    assert (mode.bincount(minlength=8)/80_000 - 1/8).abs().max() < .006
    for k in range(8):
        centre = 5*torch.tensor([math.cos(k*math.pi/4), math.sin(k*math.pi/4)])
        assert_close(y[mode == k].mean(0), centre, atol=.02, rtol=0)
        assert_close(y[mode == k].var(0), torch.tensor([.1, .1]), atol=.01, rtol=0)


def test_the_cells_of_checkerboard():
    y = sample_2d("checkerboard", 80_000)
    column, row = ((y + 4)/2).floor().long().T
    counts = (4*column + row).bincount(minlength=16)
    assert (counts[[0, 2, 5, 7, 8, 10, 13, 15]]/80_000 - 1/8).abs().max() < .006


@each_draw
@pytest.mark.parametrize("name", TARGETS)
def test_seeds(draw, name):
    before = torch.get_rng_state()
    x = draw(name, 100, seed=3)
    assert x.shape == (100, 2) and x.dtype == torch.float32 and x.isfinite().all()
    g = torch.Generator().manual_seed(3)
    assert not torch.equal(draw(name, 100, g), draw(name, 100, g))
    assert not torch.equal(x, draw(name, 100, seed=4))
    assert torch.equal(before, torch.get_rng_state())
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(1)
        again = draw(name, 100, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(x, again) and again.dtype == torch.float32


def test_sources():
    g = torch.Generator().manual_seed(0)
    assert torch.equal(source_2d("8gaussians-moons", 9, g), sample_2d("8gaussians", 9, 0))
    assert torch.equal(sample_2d("8gaussians-moons", 9), sample_2d("moons", 9))
    for name in TARGETS[:4]:
        assert_close(source_2d(name, 100_000).T.cov(), torch.eye(2), atol=.025, rtol=0)


@each_draw
def test_bad_draws(draw):
    with pytest.raises(ValueError, match="'moon'.*8gaussians-moons; did you mean 'moons'"):
        draw("moon", 10)
    with pytest.raises(ValueError, match="'xyz'.*8gaussians-moons$"):  # nothing close
        draw("xyz", 10)
    for n in (0, -5):
        with pytest.raises(ValueError, match=f"n: .*{n}"):
            draw("moons", n)


# ---- plots

@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def sizes(ax):
    return [len(points.get_offsets()) for points in ax.collections]


def test_show_points(plt):
    x, y = source_2d("moons", 1500), sample_2d("moons", 1500).requires_grad_()
    ax = show_points(x, y, y + 1, labels=["source", "target", "model"], title="three")
    assert sizes(ax) == [1000]*3 and ax.get_title() == "three" and ax.get_aspect() == 1
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 3
    assert all("data units" in label for label in (ax.get_xlabel(), ax.get_ylabel()))
    mine = plt.subplots()[1]
    assert show_points(y, ax=mine, limit=10) is mine and sizes(mine) == [10]
    with pytest.raises(ValueError, match=r"show_points.*\(n, 2\).*\(5, 3\)"):
        show_points(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="2 labels for 1"):
        show_points(y, labels=["source", "target"])


def test_show_paths(plt):
    xs = torch.linspace(0, 1, 6)[:, None, None]*torch.ones(1, 300, 2)
    ax = show_paths(xs, paths=50)
    lines = ax.collections[0]
    assert len(lines.get_segments()) == 5*50
    assert lines.get_array()[[0, -1]].tolist() == pytest.approx([.1, .9])  # middles of steps
    assert len(ax.figure.axes) == 2 and ax.figure.axes[1].get_ylabel() == "$t$"
    assert len(show_paths(xs, ax=plt.subplots()[1], colorbar=False).figure.axes) == 1
    with pytest.raises(ValueError, match=r"show_paths.*\(steps\+1, n, 2\).*\(5, 2\)"):
        show_paths(torch.zeros(5, 2))


def test_show_snapshots(plt):
    xs = torch.linspace(0, 1, 6)[:, None, None]*torch.ones(1, 300, 2)
    axs = show_snapshots(xs, sample_2d("moons", 1500), title="flow")
    assert [sizes(ax) for ax in axs] == [[1000, 300]]*5
    at = [ax.collections[1].get_offsets()[0, 0] for ax in axs]
    assert at == pytest.approx([0, .2, .4, .8, 1])  # the nearest of six states
    assert axs[3].get_title() == "$t = 0.75$" and axs[0].get_ylabel().startswith("flow")
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axs}) == 1
    mine = plt.subplots(1, 2)[1]
    given = show_snapshots(xs, times=(0, 1), axs=mine, limit=10)
    assert given == list(mine) and [sizes(ax) for ax in mine] == [[0, 10]]*2


def test_bad_snapshots(plt):
    xs = torch.zeros(6, 10, 2)
    with pytest.raises(ValueError, match=r"show_snapshots.*\(6, 10, 3\)"):
        show_snapshots(torch.zeros(6, 10, 3))
    with pytest.raises(ValueError, match=r"target.*\(10, 3\)"):
        show_snapshots(xs, torch.zeros(10, 3))
    with pytest.raises(ValueError, match="times.*1.5"):
        show_snapshots(xs, times=(0, 1.5))
    with pytest.raises(ValueError, match="axs.*5.*got 2"):
        show_snapshots(xs, axs=plt.subplots(1, 2)[1])
