"""Units by quantiles: there and back, atoms, ranges, densities, files, refusals."""
import numpy
import pytest
import torch
from conftest import rewrite
from torch.testing import assert_close

from nsgf_nb import NSGF
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.units import QuantileStandardizer, Standardizer

TINY = dict(train_steps=4, batch_size=32, width=8, depth=1, device="cpu")


def table(n=2000, dtype=torch.float64):
    "Heavy tails, zeros for half of the rows, five whole numbers, a constant."
    rng = numpy.random.default_rng(0)
    rain = numpy.where(rng.random(n) < .5, 0., rng.gamma(2., 3., n))
    columns = [rng.standard_t(2, n), rain, rng.integers(0, 5, n), numpy.full(n, 3.)]
    return torch.tensor(numpy.stack(columns, 1), dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_there_and_back(dtype):
    x = table(dtype=dtype)
    standardizer = Standardizer.of(x, "cpu", "quantile")
    z = standardizer.to_model(x)
    assert z.shape == (2000, 3) and z.dtype == torch.float32 and z.isfinite().all()
    assert_close(standardizer.to_data(z), x, rtol=1e-5, atol=1e-4)
    placed = standardizer.place(x, torch.Generator().manual_seed(0))
    assert_close(standardizer.to_data(placed), x, rtol=1e-5, atol=1e-4)
    assert (placed.mean(0).abs() < .07).all() and ((placed.std(0) - 1).abs() < .07).all()
    order = x[:, 0].argsort()
    assert (z[order, 0].diff() >= 0).all()
    assert standardizer.fingerprint == Standardizer.of(x, "cpu", "feature").fingerprint


def test_normal_draws_become_the_data():
    x = table()
    standardizer = QuantileStandardizer.of(x, "cpu")
    y = standardizer.to_data(5*torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    assert set(y[:, 2].tolist()) == {0, 1, 2, 3, 4} and (y[:, 3] == 3).all()
    assert (y.max(0)[0] <= x.max(0)[0]).all() and (y.min(0)[0] >= x.min(0)[0]).all()
    y = standardizer.to_data(torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    for k in range(3):
        levels = x[:, k].quantile(torch.linspace(.05, .95, 10).double())
        shares = [(column[:, None] <= levels).double().mean(0) for column in (x[:, k], y[:, k])]
        assert_close(shares[0], shares[1], atol=.02, rtol=0)


def test_many_rows_keep_a_bounded_number_of_knots():
    x = torch.randn(20_000, 1, dtype=torch.float64)
    standardizer = QuantileStandardizer.of(x, "cpu")
    assert standardizer.x.shape == (1, 4096)
    assert_close(standardizer.to_data(standardizer.to_model(x)), x, atol=1e-4, rtol=1e-4)


def test_atoms_survive_where_knots_are_left_out():
    rng = numpy.random.default_rng(0)
    rain = numpy.where(rng.random(30_000) < .5, 0., rng.gamma(2., 3., 30_000))
    x = torch.tensor(numpy.stack([rain, rng.integers(0, 3, 30_000)], 1))
    standardizer = QuantileStandardizer.of(x, "cpu")
    assert standardizer.x.shape[1] <= 4096 + 2000
    y = standardizer.to_data(torch.randn(30_000, 2, generator=torch.Generator().manual_seed(0)))
    assert (y[:, 0] == 0).double().mean().item() == pytest.approx(.5, abs=.01)
    assert set(y[:, 1].tolist()) == {0, 1, 2}
    beyond = torch.full((1, 2), 9.)
    assert standardizer.velocity_to_data(torch.ones(1, 2), beyond).isfinite().all()


def test_velocities_follow_the_chain_rule():
    x = table(500)[:, :1]
    standardizer = QuantileStandardizer.of(x, "cpu")
    z = torch.tensor([[-.5], [.1], [1.3]])
    v = torch.tensor([[2.], [1.], [-1.]])
    ahead = standardizer.to_data(z + 1e-6*v) - standardizer.to_data(z - 1e-6*v)
    fine = QuantileStandardizer(standardizer.x, standardizer.z, standardizer.mean,
                                standardizer.scale)
    assert_close(fine.velocity_to_data(v, z), ahead/2e-6, rtol=.2, atol=0)
    model = FlowMatching(**TINY, scale="quantile").fit(table(), progress=False)
    y = table()[:9].requires_grad_()
    model(y, .5).sum().backward()
    assert y.grad.isfinite().all()


def test_the_density_has_mass_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 1, generator=generator, dtype=torch.float64).exp()
    model = FlowMatching(**TINY | dict(train_steps=300, width=32, depth=2, ema=.9),
                         scale="quantile").fit(x, progress=False)
    low, high = x.min().item(), x.max().item()
    edges = torch.linspace(low, high, 4001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1])/2)[:, None]
    mass = model.log_prob(middle, steps=20).exp().sum()*(high - low)/4000
    assert mass.item() == pytest.approx(1, abs=.05)
    repeated = FlowMatching(**TINY, scale="quantile").fit(table(), progress=False)
    with pytest.raises(ValueError, match="log_prob needs columns without repeated values"):
        repeated.log_prob(table()[:5])


def test_a_flow_of_tails_and_atoms(tmp_path):
    x = table()
    settings = TINY | dict(train_steps=400, batch_size=256, width=64, depth=2, ema=.99)
    model = NSGF(**settings, scale="quantile", pool_size=2**13).fit(x, progress=False)
    y = model.sample(4000)
    assert (y[:, 1] == 0).double().mean().item() == pytest.approx(.5, abs=.05)
    assert set(y[:, 2].tolist()) <= {0, 1, 2, 3, 4} and (y[:, 3] == 3).all()
    tails = [(u[:, 0].abs() > 4).double().mean().item() for u in (x, y)]
    assert tails[1] == pytest.approx(tails[0], rel=.4)
    model.save(tmp_path/"m.safetensors")
    again = NSGF.load(tmp_path/"m.safetensors", "cpu")
    assert torch.equal(again.sample(50), model.sample(50))
    assert torch.equal(model.set_params(device="cpu").sample(50), again.sample(50))


@pytest.mark.parametrize("name, change, words", (
    ("knots_x", lambda x: x[:2], "knots have shapes"),
    ("knots_z", lambda z: z[:, :5], "knots have shapes"),
    ("knots_x", lambda x: x.flip(1), "knots must be rising"),
    ("knots_z", lambda z: z*torch.nan, "knots must be rising"),
    ("knots_x", lambda x: x.float(), "knots must be rising numbers of type float64")))
def test_files_with_bad_knots(name, change, words, tmp_path):
    path = tmp_path/"m.safetensors"
    model = FlowMatching(**TINY, scale="quantile").fit(table(50), progress=False)
    model.save(path)
    rewrite(path, tensors={name: change(model.standardizer.tensors()[name]).contiguous()})
    with pytest.raises(ValueError, match=words):
        FlowMatching.load(path, "cpu")


def test_what_has_no_quantiles():
    with pytest.raises(ValueError, match=r"scale='quantile' is for tables.*\(9, 1, 8, 8\)"):
        FlowMatching(**TINY, scale="quantile").fit(torch.randn(9, 1, 8, 8), progress=False)
    with pytest.raises(ValueError, match="needs a column that varies"):
        FlowMatching(**TINY, scale="quantile").fit(torch.ones(9, 2), progress=False)


def test_mixed_has_quantiles_where_a_value_is_frequent(tmp_path):
    x = torch.cat([table(), (torch.arange(2000) % 2)[:, None].double()], 1)
    standardizer = Standardizer.of(x, "cpu", "mixed")
    z = standardizer.to_model(x)
    whole = Standardizer.of(x, "cpu", "quantile").to_model(x)
    straight = Standardizer.of(x, "cpu", "feature").to_model(x)
    assert_close(z[:, [0, 3]], straight[:, [0, 3]], rtol=1e-5, atol=1e-6)  # tails, two values
    assert_close(z[:, [1, 2]], whole[:, [1, 2]])  # rain, whole numbers
    assert_close(standardizer.to_data(z), x, rtol=1e-5, atol=1e-4)
    beyond = standardizer.to_data(torch.tensor([[20., 0, 0, 0]]))
    assert beyond[0, 0].item() == pytest.approx((20*x[:, 0].std() + x[:, 0].mean()).item(), rel=.01)
    assert isinstance(Standardizer.of(x[:, [0, 3, 4]], "cpu", "mixed"), Standardizer)
    model = NSGF(**TINY, scale="mixed").fit(x, progress=False)
    model.save(tmp_path/"m.safetensors")
    assert torch.equal(NSGF.load(tmp_path/"m.safetensors", "cpu").sample(50), model.sample(50))


def test_without_frequent_values_mixed_is_feature():
    x = table()[:, [0, 3]]
    own, feature = (Standardizer.of(x, "cpu", scale) for scale in ("mixed", "feature"))
    assert type(own) is Standardizer and torch.equal(own.to_model(x), feature.to_model(x))


def test_quantiles_far_from_zero_and_a_table_of_constants():
    x = torch.randn(500, 2)*.1 + torch.tensor([1e5, 0.])  # deviations refuse it in float32
    with pytest.raises(ValueError, match="too little for torch.float32"):
        Standardizer.of(x, "cpu", "feature")
    assert (Standardizer.of(x, "cpu", "quantile").to_model(x).std(0) - 1).abs().max() < .05
    still = torch.full((50, 2), 3.)
    assert torch.equal(Standardizer.of(still, "cpu", "mixed").mean, still[0])


def test_columns_beside_keep_their_place():
    x = table()
    numbers = torch.randn(2000, 2, dtype=torch.float64)
    for scale in ("feature", "quantile", "mixed"):
        own = Standardizer.of(x, "cpu", scale)
        joint = own.beside(torch.tensor([.5, 2.], dtype=torch.float64))
        z = joint.to_model(torch.cat([x, numbers], 1))
        assert_close(z, torch.cat([own.to_model(x), numbers/torch.tensor([.5, 2.])], 1).float(),
                     rtol=1e-5, atol=1e-5)
        assert_close(joint.to_data(z)[:, :4], own.to_data(own.to_model(x)))


def test_quantiles_with_numbers_as_condition():
    x = table()
    settings = TINY | dict(train_steps=300, batch_size=256, width=64, depth=2, ema=.99)
    for scale in ("quantile", "mixed"):
        model = FlowMatching(**settings, scale=scale).fit(x[:, 1:], condition=x[:, 0],
                                                          progress=False)
        y = model.sample(1000, condition=0.)
        assert (y[:, 0] == 0).double().mean().item() == pytest.approx(.5, abs=.15)
        assert set(y[:, 1].tolist()) <= {0, 1, 2, 3, 4} and (y[:, 2] == 3).all()


def test_stretched_columns_are_the_formula():
    x = table()
    for scale in ("global", "feature", "quantile", "mixed"):
        own = Standardizer.of(x, "cpu", scale)
        z = own.to_model(x[:200])
        d = z.shape[1]
        factor, shift = torch.linspace(.8, 1.3, d), torch.linspace(-.2, .1, d)
        other = own.stretched(factor, shift)
        assert_close(other.to_data(z), own.to_data(factor*z + shift), rtol=1e-5, atol=1e-4)
        assert_close(other.to_data(other.to_model(x)), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", ("feature", "mixed"))
def test_calibrated_columns_have_the_spread_of_the_data(scale, tmp_path):
    rng = numpy.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))*[1, 10, .1, 1] + 5)
    x = torch.cat([x, table(60)[:, [1, 3]]], 1)
    settings = TINY | dict(train_steps=40, width=32, depth=2, ema=.9)
    model = FlowMatching(**settings, scale=scale).fit(x, progress=False)
    d = model.standardizer.model_shape[0]
    model.standardizer = model.standardizer.stretched(torch.full((d,), .8), torch.full((d,), .3))
    y = model.sample(4000)
    narrow = (y.std(0)/x.std(0))[:4]
    assert model.calibrate(x) is model
    z = model.sample(4000)
    wide = (z.std(0)/x.std(0))[:4]
    assert (wide - 1).abs().max() < .06 < .15 < (narrow - 1).abs().min()
    assert ((z.mean(0) - x.mean(0))[:4].abs() < .06*x.std(0)[:4]).all() and (z[:, 5] == 3).all()
    correlations = [torch.corrcoef(u[:, :4].T) for u in (y, z)]
    assert_close(correlations[0], correlations[1], atol=1e-4, rtol=0)
    model.save(tmp_path/"m.safetensors")
    again = FlowMatching.load(tmp_path/"m.safetensors", "cpu")
    assert torch.equal(again.sample(50), model.sample(50))
    back = model.decode(model.encode(z[:50], steps=50), steps=50)
    assert_close(back[:, :4], z[:50, :4], rtol=1e-2, atol=1e-2)


def test_a_calibrated_density_has_mass_one():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double()*3 + 2
    model = FlowMatching(**TINY | dict(train_steps=150, width=16)).fit(x, progress=False)
    model.calibrate(x)
    edges = torch.linspace(-20, 24, 4001).double()[:, None]
    assert model.log_prob(edges, steps=20).exp().sum().item()*44/4000 == pytest.approx(1, abs=.01)


def test_what_cannot_be_calibrated():
    x = table(100)
    model = FlowMatching(**TINY)
    with pytest.raises(RuntimeError, match="no network yet"):
        model.calibrate(x)
    model.fit(x, progress=False)
    with pytest.raises(ValueError, match=r"data must be of shape \(n, 4\)"):
        model.calibrate(x[:, :3])
    conditional = FlowMatching(**TINY).fit(x, condition=[0, 1]*50, progress=False)
    with pytest.raises(ValueError, match="calibrate is for models without conditions"):
        conditional.calibrate(x)
    given = FlowMatching(**TINY).fit(x, x + 1, progress=False)
    with pytest.raises(ValueError, match="without a source"):
        given.calibrate(x)
    still = FlowMatching(**TINY).fit(x, progress=False).calibrate(x[:1].expand(5, 4))
    assert still.sample(9).isfinite().all()
    images = FlowMatching(**TINY).fit(torch.randn(9, 1, 4, 4), progress=False)
    with pytest.raises(ValueError, match="calibrate is for tables"):
        images.calibrate(torch.randn(9, 1, 4, 4))


def test_a_transformer_of_scikit_learn_is_a_scale(tmp_path):
    from sklearn.base import clone
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import QuantileTransformer
    x = table()
    transformer = QuantileTransformer(n_quantiles=500, output_distribution="normal")
    settings = TINY | dict(train_steps=300, batch_size=256, width=64, depth=2, ema=.99)
    model = FlowMatching(**settings, scale=transformer).fit(x, progress=False)
    assert not hasattr(transformer, "quantiles_")  # a copy is fitted
    y = model.sample(4000)
    assert y.shape == (4000, 4) and y.dtype == torch.float64 and (y[:, 3] == 3).all()
    levels = x[:, 0].quantile(torch.linspace(.1, .9, 9).double())  # the column without atoms
    shares = [(u[:, :1] <= levels).double().mean(0) for u in (x, y)]
    assert_close(shares[0], shares[1], atol=.06, rtol=0)
    assert model.sample(5, steps=3, trajectory=True).shape == (4, 5, 4)
    assert "QuantileTransformer" in repr(model)
    assert clone(model).fit(x, progress=False).sample(5).equal(model.sample(5))
    for refused in (lambda: model.log_prob(x[:5]), lambda: model(x[:5], .5),
                    lambda: model.calibrate(x), lambda: model.save(tmp_path/"m.safetensors")):
        with pytest.raises(ValueError, match="whose scale is a QuantileTransformer has no"):
            refused()
    with pytest.raises(ValueError, match="whose scale is a QuantileTransformer"):
        FlowMatching(**TINY, scale=transformer).fit(x, condition=x[:, 0], progress=False)
    with pytest.raises(ValueError, match="a transformer as scale is for tables"):
        NSGF(**TINY, scale=transformer).fit(torch.randn(9, 1, 8, 8), progress=False)
    flat = numpy.random.default_rng(0).normal(size=(500, 2)) @ [[1, 2, 0, 1], [0, 1, 3, 1.]]
    thin = NSGF(**TINY | dict(train_steps=200, width=32, pool_size=2**11),
                scale=PCA(2, whiten=True)).fit(flat, progress=False)
    assert thin.require_shape() == (2,)
    centred = thin.sample(100) - torch.from_numpy(flat.mean(0))
    assert torch.linalg.matrix_rank(centred, tol=1e-3) == 2
    codes = thin.encode(flat[:20], steps=50)
    assert_close(thin.decode(codes, steps=50), torch.from_numpy(flat[:20]), atol=.05, rtol=.05)


def test_a_class_is_no_transformer():
    from sklearn.preprocessing import StandardScaler
    with pytest.raises(TypeError, match="scale must be of type str"):
        NSGF(scale=StandardScaler)


def test_a_training_with_a_transformer_resumes(tmp_path):
    from sklearn.preprocessing import StandardScaler

    from nsgf_nb.runs.checkpoints import LongRun

    class Stopped(LongRun):
        def step(self, trainer, signals):
            super().step(trainer, signals)
            return trainer.step == 2

    settings = TINY | dict(scale=StandardScaler())
    x = table(100)
    FlowMatching(**settings).fit(x, progress=False, loop=Stopped(tmp_path/"run"))
    again = FlowMatching(**settings).fit(x, progress=False, loop=LongRun(tmp_path/"run"))
    assert torch.equal(again.sample(5), FlowMatching(**settings).fit(x, progress=False).sample(5))
    with pytest.raises(ValueError, match="another run, with scale="):
        FlowMatching(**TINY, scale=StandardScaler(with_mean=False)).fit(
            x, progress=False, loop=LongRun(tmp_path/"run"))
