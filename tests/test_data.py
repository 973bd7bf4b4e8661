"""The 2D targets: parity with scikit-learn, seeds, bad input, and the two plots."""
import math

import pytest
import torch

from nsgf_nb.data import TARGETS, sample_2d, show_paths, show_points, source_2d

draws = pytest.mark.parametrize("draw", (sample_2d, source_2d))
targets = pytest.mark.parametrize("name", TARGETS)


def moments(x):
    "Mean, covariance and third moments: enough to tell two of these laws apart."
    x = torch.as_tensor(x, dtype=torch.float64)
    c = x - x.mean(0)
    return torch.cat([x.mean(0), c.T.cov().flatten(), torch.einsum("ni,nj,nk->ijk", c, c, c).flatten()/len(c)])


def test_moons_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = 3*datasets.make_moons(200_000, noise=.05, random_state=0)[0] - 1
    torch.testing.assert_close(moments(sample_2d("moons", 200_000)), moments(theirs), atol=.15, rtol=.02)


def test_scurve_is_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = 1.5*datasets.make_s_curve(200_000, noise=.05, random_state=0)[0][:, [0, 2]]
    torch.testing.assert_close(moments(sample_2d("scurve", 200_000)), moments(theirs), atol=.06, rtol=.02)


def test_the_modes_of_8gaussians():
    y = sample_2d("8gaussians", 80_000)
    mode = (torch.atan2(y[:, 1], y[:, 0])*4/math.pi).round().long() % 8
    assert (mode.bincount(minlength=8)/80_000 - 1/8).abs().max() < .006
    for k in range(8):
        centre = 5*torch.tensor([math.cos(k*math.pi/4), math.sin(k*math.pi/4)])
        torch.testing.assert_close(y[mode == k].mean(0), centre, atol=.02, rtol=0)
        torch.testing.assert_close(y[mode == k].var(0), torch.tensor([.1, .1]), atol=.01, rtol=0)


def test_the_cells_of_checkerboard():
    y = sample_2d("checkerboard", 80_000)
    i, j = ((y + 4)/2).floor().long().T
    assert ((4*i + j).bincount(minlength=16)[[0, 2, 5, 7, 8, 10, 13, 15]]/80_000 - 1/8).abs().max() < .006


@draws
@targets
def test_seeds(draw, name):
    "One seed, the same numbers to the bit; a generator is advanced; torch's own generator and default dtype do not matter."
    before = torch.get_rng_state()
    x = draw(name, 100, seed=3)
    assert x.shape == (100, 2) and x.dtype == torch.float32 and x.isfinite().all()
    g = torch.Generator().manual_seed(3)
    first, second = draw(name, 100, g), draw(name, 100, g)
    assert not torch.equal(first, second) and not torch.equal(x, draw(name, 100, seed=4))
    assert torch.equal(before, torch.get_rng_state())
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(1)
        assert torch.equal(x, draw(name, 100, seed=3)) and draw(name, 100, seed=3).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_sources():
    assert torch.equal(source_2d("8gaussians-moons", 9, torch.Generator().manual_seed(0)), sample_2d("8gaussians", 9, 0))
    assert torch.equal(sample_2d("8gaussians-moons", 9), sample_2d("moons", 9))
    for name in TARGETS[:4]:
        torch.testing.assert_close(source_2d(name, 100_000).T.cov(), torch.eye(2), atol=.025, rtol=0)


@draws
def test_bad_input(draw):
    with pytest.raises(ValueError, match="unknown target 'moon': .*8gaussians, moons, scurve, checkerboard, 8gaussians-moons; did you mean 'moons'"):
        draw("moon", 10)
    with pytest.raises(ValueError, match="8gaussians-moons$"): # nothing close: nothing suggested
        draw("xyz", 10)
    for n in (0, -5):
        with pytest.raises(ValueError, match=f"n: expected at least 1 point, got {n}"):
            draw("moons", n)


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def test_show_points(plt):
    x, y = source_2d("moons", 1500), sample_2d("moons", 1500).requires_grad_()
    ax = show_points(x, y, y + 1, labels=["source", "target", "model"], title="three")
    assert [len(c.get_offsets()) for c in ax.collections] == [1000]*3 and ax.get_title() == "three"
    assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 3
    assert ax.get_aspect() == 1 and all("data units" in label for label in (ax.get_xlabel(), ax.get_ylabel()))
    mine = plt.subplots()[1]
    assert show_points(y, ax=mine, limit=10) is mine and len(mine.collections[0].get_offsets()) == 10
    with pytest.raises(ValueError, match=r"show_points: expected a tensor of shape \(n, 2\), got shape \(5, 3\)"):
        show_points(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="2 labels for 1 clouds"):
        show_points(y, labels=["source", "target"])


def test_show_paths(plt):
    xs = torch.linspace(0, 1, 6)[:, None, None]*torch.ones(1, 300, 2)
    ax = show_paths(xs, paths=50)
    assert len(ax.collections[0].get_segments()) == 5*50
    assert ax.collections[0].get_array()[[0, -1]].tolist() == pytest.approx([.1, .9]) # the middles of the first and last step
    assert len(ax.figure.axes) == 2 and ax.figure.axes[1].get_ylabel() == "$t$"
    assert len(show_paths(xs, ax=plt.subplots()[1], colorbar=False).figure.axes) == 1
    with pytest.raises(ValueError, match=r"show_paths: expected a tensor of shape \(steps\+1, n, 2\), got shape \(5, 2\)"):
        show_paths(torch.zeros(5, 2))
