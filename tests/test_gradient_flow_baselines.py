"""EPT, JKO-Flow and the sliced-Wasserstein flow: closed forms, one convention for all, files, determinism, bad input."""
import math
import os
import signal

import pytest
import torch
from conftest import rewrite
from safetensors.torch import load_file
from torch.testing import assert_close

from nsgf_nb.data import sample_2d, source_2d
from nsgf_nb.long_runs import Terminated
from nsgf_nb.gradient_flow_baselines import EPT, EPTConfig, JKOFlow, JKOFlowConfig, SlicedWassersteinFlow, SWFConfig, _Chain, _Potential, _push, _SLOPES
from nsgf_nb.matching import NSGFConfig
from nsgf_nb.metrics import sw2

TINY = {
    EPT: EPTConfig(stages=4, steps=4, train_steps=9, batch_size=32, width=8, depth=2, particles=64),
    JKOFlow: JKOFlowConfig(stages=2, steps=4, train_steps=7, batch_size=32, width=8, depth=2, particles=64, time_steps=2),
    SlicedWassersteinFlow: SWFConfig(stages=3, steps=3, directions=4, quantiles=16, particles=64),
}
each_method = pytest.mark.parametrize("cls", TINY, ids=lambda cls: cls.__name__)
each_learner = pytest.mark.parametrize("cls", [EPT, JKOFlow], ids=lambda cls: cls.__name__)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def tiny(cls, data=None, source=None, config=None, density=None, **settings):
    more = {} if density is None else dict(log_density=density)
    return cls(config or TINY[cls], device="cpu", **settings).fit(normal(200, 2)*2 + 3 if data is None else data, source, progress=False, **more)


# ---- one convention for all

@each_method
def test_a_fitted_model_has_what_others_have(cls):
    model = tiny(cls)
    assert len(model.losses) == model.config.train_steps and model.losses.isfinite().all()
    assert set(model.seconds) == {"training"} and model.source == "normal" and model.given is None
    assert not any(p.requires_grad for p in model.net.parameters())
    x = normal(5, 2)
    assert model.net(x, 0.).shape == (5, 2) and model.net(x, torch.full((5,), .7)).shape == (5, 2)
    assert model.sample(6).shape == (6, 2)
    assert model.sample(6, steps=5, trajectory=True).shape == (6, 6, 2)
    assert torch.equal(model.sample(6, steps=5, trajectory=True)[-1], model.sample(6, steps=5))


@each_method
def test_each_row_has_its_own_time(cls):
    model = tiny(cls)
    x, t = normal(40, 2), torch.linspace(0, 1, 40)[normal(40).argsort()]
    alone = torch.cat([model.net(x[i:i + 1], t[i].item()) for i in range(40)])
    assert_close(model.net(x, t), alone)
    assert (model.net(x, 0.) - model.net(x, .99)).abs().max() > 1e-4      # and the time makes a difference


class Push(torch.nn.Module):
    def __init__(self, k): super().__init__(); self.k = k
    def forward(self, x, s): return torch.full_like(x, self.k) + 1e-3*s[:, None]


@pytest.mark.parametrize("K", [1, 3, 10, 29, 100])
@pytest.mark.parametrize("of", [1, 2, 5])
def test_every_euler_step_meets_its_stage(K, of):
    chain, steps = _Chain([Push(k) for k in range(K)], (1,)), K*of
    for k in range(steps):
        v = chain(torch.zeros(2, 1), torch.tensor([k/steps, k/steps], dtype=torch.float32))/K
        assert_close(v, torch.full((2, 1), k//of + 1e-3*(k % of)/of), atol=2e-5, rtol=1e-6)


def test_ten_steps_of_a_hundred_stages_take_every_tenth_with_ten_times_the_step():
    model = tiny(SlicedWassersteinFlow, stages=100)
    z = model.coordinates.to_model(x := normal(7, 2))
    for k in range(10): z = z + 10*model.net.stages[10*k](z, 0.)
    assert_close(model.sample(x0=x, steps=10), model.coordinates.to_data(z), rtol=1e-4, atol=1e-4)


@each_method
def test_the_field_in_the_data_unit(cls):
    model, x = tiny(cls), normal(5, 2) + 3
    assert_close(model(x, .3), model.net(model.coordinates.to_model(x), .3)*model.coordinates.scale)


@each_method
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_any_flat_shape(cls, shape):
    model = tiny(cls, normal(100, *shape))
    assert model.sample(4).shape == (4, *shape)
    with pytest.raises(ValueError, match="x must be of shape"): model.net(torch.zeros(2, 7), 0.)


@each_method
def test_data_of_any_kind_and_unit(cls):
    gen = torch.Generator().manual_seed(0)
    for data in (lambda n: sample_2d("moons", n, gen), torch.utils.data.TensorDataset(normal(50, 2)), normal(50, 2).double()*1e-4 + 7):
        assert tiny(cls, data).sample(3).isfinite().all()


# ---- determinism and files

@each_method
def test_one_seed_one_model(cls):
    before = torch.get_rng_state()
    one, two, other = tiny(cls), tiny(cls), tiny(cls, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b in zip(one.net.state_dict().items(), two.net.state_dict().values()): assert torch.equal(a, b), name
    assert not torch.equal(one.sample(5), other.sample(5))
    assert torch.equal(one.losses, two.losses)


@each_method
def test_a_saved_model_comes_back_whole(cls, tmp_path):
    model = tiny(cls, normal(100, 2).double() + 5)
    model.save(tmp_path/"model.safetensors")
    again = cls.load(tmp_path/"model.safetensors", device="cpu")
    assert again.config == model.config
    assert torch.equal(again.sample(9, seed=3), model.sample(9, seed=3))
    for other in set(TINY) - {cls}:
        with pytest.raises(ValueError, match="holds a model of type"): other.load(tmp_path/"model.safetensors")


def test_a_file_without_a_stage_is_refused(tmp_path):
    tiny(EPT).save(tmp_path/"part.safetensors")
    rewrite(tmp_path/"part.safetensors", tensors={k: None for k in load_file(tmp_path/"part.safetensors") if k.startswith("net.stages.3.")})
    with pytest.raises(ValueError, match="does not describe a whole EPT"): EPT.load(tmp_path/"part.safetensors")


def test_a_sliced_flow_of_one_stage_comes_back_whatever_the_depth(tmp_path):
    model = tiny(SlicedWassersteinFlow, stages=1, depth=7, width=99, train_steps=5000)
    assert (model.config.depth, model.config.width, model.config.train_steps) == (1, 1, 1)
    model.save(tmp_path/"model.safetensors")
    assert torch.equal(SlicedWassersteinFlow.load(tmp_path/"model.safetensors", device="cpu").sample(4), model.sample(4))


@each_learner
def test_interrupted_training_keeps_the_finished_stages(cls, monkeypatch):
    teach, seen = cls._teach, []
    def some(self, *a):
        for loss in teach(self, *a):
            if len(seen) == 5: raise KeyboardInterrupt
            seen.append(1)
            yield loss
    monkeypatch.setattr(cls, "_teach", some)
    model = cls(TINY[cls], device="cpu")
    with pytest.raises(KeyboardInterrupt, match="stopped after 5 of"): model.fit(normal(200, 2), progress=False)
    x, learned = normal(5, 2), range(2) if cls is EPT else [1]       # JKO-Flow learns from the data's end
    moving = [k for k in range(model.config.stages) if model.net.stages[k](x, torch.zeros(5)).abs().max() > 0]
    assert moving == list(learned) and model.sample(3).isfinite().all() and len(model.losses) == 5


@each_method
def test_a_stopped_training_goes_on_to_the_bit(cls, monkeypatch, tmp_path):
    "SIGTERM in the middle of a stage: it is finished, and the same call goes on with the next."
    data, teach, seen = normal(300, 2), cls._teach, []
    whole = cls(TINY[cls], device="cpu").fit(data, progress=False)
    def some(self, *a):
        for loss in teach(self, *a):
            seen.append(1)
            if len(seen) == 2: os.kill(os.getpid(), signal.SIGTERM)
            yield loss
    with monkeypatch.context() as patch:
        patch.setattr(cls, "_teach", some)
        with pytest.raises(Terminated, match="stopped after [0-9]+ of"): cls(TINY[cls], device="cpu").fit(data, progress=False, checkpoint=tmp_path/"c")
    assert 0 < len(load_file(tmp_path/"c")["losses"]) < len(whole.losses)
    again = cls(TINY[cls], device="cpu").fit(data, progress=False, checkpoint=tmp_path/"c")
    assert torch.equal(again.losses, whole.losses) and all(torch.equal(u, v) for u, v in zip(again.net.state_dict().values(), whole.net.state_dict().values()))
    with pytest.raises(ValueError, match="c is a checkpoint of another run, with data="): cls(TINY[cls], device="cpu").fit(data + 1, progress=False, checkpoint=tmp_path/"c")


# ---- EPT

def test_slopes_are_derivatives_of_the_divergences():
    generators = dict(kl=lambda r: r*r.log(), js=lambda r: r*r.log() - (r + 1)*((r + 1)/2).log(), pearson=lambda r: (r - 1)**2)
    assert set(generators) == set(_SLOPES)
    r = torch.linspace(.1, 5, 50, dtype=torch.float64, requires_grad=True)
    for name, f in generators.items():
        slope, = torch.autograd.grad(f(r).sum(), r)
        gap = slope - _SLOPES[name](r.log())
        assert_close(gap, gap[0].expand(50), msg=name)               # the same up to a constant


def test_kl_flow_between_gaussians_is_a_translation():
    data = normal(4000, 2)*.5 + torch.tensor([4., -2.])
    far = (lambda n, g=torch.Generator().manual_seed(5): torch.randn(n, 2, generator=g)*.5 + torch.tensor([3.5, -2.]))
    model = EPT(device="cpu", stages=1, steps=1, train_steps=400, batch_size=256, width=32, depth=2, step=.3, penalty=1e-3).fit(data, far, progress=False)
    z = normal(500, 2, seed=3)
    v = model.net(z + torch.tensor([-.5, 0.]), 0.)                   # in the model's unit: s·m with m = (1, 0), the distance of the means
    assert_close(v.mean(0), torch.tensor([.3, 0.]), atol=.05, rtol=0)


@pytest.mark.parametrize("divergence", ["kl", "js", "pearson"])
def test_each_divergence_pulls_towards_the_data(divergence):
    source = lambda n, g=torch.Generator().manual_seed(5): torch.randn(n, 2, generator=g) - .5
    step = dict(kl=.2, js=.4, pearson=.04)[divergence]
    model = EPT(device="cpu", stages=5, steps=5, train_steps=250, batch_size=128, width=32, depth=2, step=step, last=step, divergence=divergence)
    model.fit(normal(1000, 2) + .5, source, progress=False)
    xs = model.sample(1000, trajectory=True)
    assert (xs[-1].mean(0) - xs[0].mean(0)).min() > .15


# ---- JKO-Flow

def wild(D, width=16, depth=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        phi = _Potential(D, JKOFlowConfig(width=width, depth=depth)).double()
        for p in phi.parameters(): torch.nn.init.normal_(p, std=.3)
    return phi


@pytest.mark.parametrize("D", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_laplacian_is_the_divergence_of_the_gradient(D, depth):
    phi = wild(D, depth=depth)
    x, s = normal(6, D).double().requires_grad_(), torch.linspace(0, 1, 6, dtype=torch.float64)
    slope, _, laplacian = phi.derivatives(x, s)
    H = torch.stack([torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0] for i in range(D)], 1)
    assert_close(H, H.mT)
    assert_close(laplacian, H.diagonal(dim1=1, dim2=2).sum(1))


def test_log_det_is_that_of_the_jacobian():
    phi, x = wild(2), normal(4, 2).double()
    z, log_det, cost, _ = _push(phi, x, 16)
    J = torch.stack([torch.autograd.functional.jacobian(lambda u: _push(phi, u[None], 16)[0][0], u) for u in x])
    assert_close(log_det, torch.linalg.slogdet(J)[1], atol=1e-5, rtol=1e-5)
    assert (cost >= (z - x).square().sum(1)/2 - 1e-6).all()          # Jensen: no way is shorter than the straight one


def test_a_quadratic_potential_is_a_scaling():
    phi = wild(2)
    for p in phi.parameters(): p.data.zero_()
    phi.quadratic.weight.data[0, 0] = 1.                             # Φ = ½x₁²: dx₁/ds = −x₁
    z, log_det, cost, _ = _push(phi, torch.tensor([[2., 3.]], dtype=torch.float64), 20)
    assert_close(z, torch.tensor([[2/math.e, 3.]], dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert_close(log_det.item(), -1., atol=1e-6, rtol=0)
    assert_close(cost.item(), 1 - math.exp(-2), atol=1e-5, rtol=0)   # ∫ ½ (2e^{-s})² ds


def test_sampling_goes_back_the_way_of_training():
    model = tiny(JKOFlow, train_steps=60)
    y = normal(50, 2, seed=9)
    z = y
    for stage in reversed(model.net.stages): z = _push(stage, z, 16)[0]
    assert (z - y).abs().max() > .05
    back = model.sample(x0=model.coordinates.to_data(z), steps=200)
    assert_close(model.coordinates.to_model(back), y, atol=3e-2, rtol=0)


def log_blob(x): return -((x + 2)/1.5).square().sum(1)/2 - math.log(2*math.pi*1.5**2)
def blob(n, g=torch.Generator().manual_seed(3)): return torch.randn(n, 2, generator=g)*1.5 - 2


def mass(model, low=-9., high=11., n=120):
    side = torch.linspace(low, high, n)
    return model.log_prob(torch.cartesian_prod(side, side)).exp().sum().item()*((high - low)/(n - 1))**2


@pytest.mark.parametrize("source, density", [(None, None), (blob, log_blob)], ids=["normal", "given"])
def test_the_density_of_the_model_has_mass_one(source, density):
    model = tiny(JKOFlow, train_steps=60, source=source, density=density)
    assert abs(mass(model) - 1) < .02


def test_at_rest_the_density_is_that_of_the_source():
    model = tiny(JKOFlow, source=blob, density=log_blob)
    for p in model.net.parameters(): p.data.zero_()
    x = normal(20, 2)
    assert_close(model.log_prob(x), log_blob(x), atol=1e-4, rtol=1e-4)
    assert_close(model.sample(x0=x), x, atol=1e-5, rtol=1e-5)


def test_jko_flow_wants_the_density_of_a_given_source(tmp_path):
    with pytest.raises(ValueError, match="^log_density must come with source"): tiny(JKOFlow, source=blob)
    with pytest.raises(ValueError, match="^log_density must be None where source is None"): tiny(JKOFlow, density=log_blob)
    with pytest.raises(TypeError, match="^log_density must be a function"): tiny(JKOFlow, source=blob, density=3.)
    with pytest.raises(ValueError, match=r"^log_density must return a tensor \(16,\) for 16 points, got \(16, 2\)"): tiny(JKOFlow, source=blob, density=lambda x: x)
    with pytest.raises(ValueError, match="^log_density must be finite .* got -inf"): tiny(JKOFlow, source=blob, density=lambda x: x[:, 0].abs()*-math.inf)
    model = tiny(JKOFlow, source=blob, density=log_blob)
    model.save(tmp_path/"model.safetensors")
    again = JKOFlow.load(tmp_path/"model.safetensors", device="cpu")
    with pytest.raises(ValueError, match="set model.log_density"): again.log_prob(torch.zeros(3, 2))
    again.log_density = log_blob
    assert_close(again.log_prob(x := normal(5, 2)), model.log_prob(x))


# ---- sliced-Wasserstein flow

def test_one_full_step_on_a_line_is_optimal_transport():
    x = normal(64, 1)*2 - 3
    y = normal(64, 1, seed=1).exp()
    model = tiny(SlicedWassersteinFlow, y, source=x, stages=1, directions=1, quantiles=64, particles=64)
    assert_close(model.sample(x0=x, steps=1).sort(0).values, y.sort(0).values, atol=1e-5, rtol=1e-5)
    assert (model.sample(x0=x.sort(0).values, steps=1).diff(dim=0) >= -1e-6).all()        # in order


def test_a_full_frame_is_the_full_move():
    y = normal(512, 3)
    model = tiny(SlicedWassersteinFlow, y + torch.tensor([1., 2., 3.]), source=y, stages=1, directions=6, quantiles=512, particles=512)
    W = model.net.stages[0].weight.view(2, 3, 3)
    assert_close(W @ W.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    assert_close(model.sample(x0=y, steps=1), y + torch.tensor([1., 2., 3.]), atol=1e-4, rtol=0)      # a translation, in one step
    half = tiny(SlicedWassersteinFlow, y + torch.tensor([1., 2., 3.]), source=y, stages=1, directions=6, quantiles=512, particles=512, step=.5)
    assert_close(half.sample(x0=y, steps=1), y + torch.tensor([.5, 1., 1.5]), atol=1e-4, rtol=0)


def test_beyond_the_last_quantile_everything_shifts_alike():
    model = tiny(SlicedWassersteinFlow, normal(64, 1), stages=1, directions=1)
    v = model.net(torch.tensor([[50.], [60.], [-50.], [-60.]]), 0.)
    assert v[0] == v[1] and v[2] == v[3] and v.isfinite().all()


def test_repeated_points_are_no_division_by_zero():
    assert tiny(SlicedWassersteinFlow, torch.ones(50, 2), source=torch.zeros(50, 2) + 3).sample(x0=torch.zeros(4, 2)).isfinite().all()


# ---- what comes in

@each_method
def test_bad_data_is_refused_by_name(cls):
    for bad, error, words in [(torch.zeros(0, 2), ValueError, "^data.*non-empty"), (torch.zeros(5, 2, dtype=torch.int64), TypeError, r"^data.*convert it with data\.float\(\)"),
                              (torch.full((5, 2), math.nan), ValueError, "^data has 10 NaN"), ([[0.]], TypeError, "^data must be a tensor.*got list")]:
        with pytest.raises(error, match=words): tiny(cls, bad)
    with pytest.raises(ValueError, match=r"^source must be of shape \(n, 2\), got \(\d+, 3\)"): tiny(cls, source=normal(50, 3), density=log_blob if cls is JKOFlow else None)
    with pytest.raises(TypeError, match=f"config must be a {cls.Config.__name__}, got NSGFConfig"): cls(NSGFConfig())
    with pytest.raises(TypeError, match="'blur' is no setting"): cls(blur=3.)
    with pytest.raises(ValueError, match="channels must be 0, got 8"): cls(channels=8)
    with pytest.raises(ValueError, match="stages must be at least 1"): cls(stages=0)
    with pytest.raises(TypeError, match="stages must be of type int"): cls(stages="many")
    with pytest.raises(RuntimeError, match=r"call fit\(data\)"): cls().sample(3)


@each_learner
def test_every_stage_gets_an_optimiser_step(cls):
    with pytest.raises(ValueError, match="train_steps must be at least 1 for each of 20 stages, got 19"): cls(stages=20, train_steps=19)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="divergence must be one of kl, js, pearson, got 'tv'"): EPTConfig(divergence="tv")
    for name in ("step", "last", "penalty"):
        with pytest.raises(ValueError, match=f"{name} must be a positive number"): EPTConfig(**{name: 0.})
    with pytest.raises(ValueError, match="alpha must be a positive number, got -1"): JKOFlowConfig(alpha=-1.)
    with pytest.raises(ValueError, match="quantiles must be at least 2, got 1"): SWFConfig(quantiles=1)


# ---- they work

SMALL = {
    EPT: dict(stages=20, train_steps=500, batch_size=256, width=48, depth=2, step=1., last=.05, particles=4096),
    JKOFlow: dict(stages=2, train_steps=160, batch_size=128, width=32, particles=4096, alpha=10., time_steps=2),
    SlicedWassersteinFlow: dict(stages=20, particles=4096, quantiles=128, directions=8),
}


@each_method
@pytest.mark.parametrize("target", ["moons", "8gaussians-moons"])
def test_sw2_falls_clearly(cls, target):
    gen, given = torch.Generator().manual_seed(0), target == "8gaussians-moons"
    angle = torch.arange(8)*(math.pi/4)
    means = 5*torch.stack([angle.cos(), angle.sin()], 1)
    def log_density(x): return torch.logsumexp(-(x[:, None] - means).square().sum(-1)/.2, 1) - math.log(8*2*math.pi*.1)
    model = cls(device="cpu", **SMALL[cls])
    model.fit(lambda n: sample_2d(target, n, gen), (lambda n: source_2d(target, n, gen)) if given else None, False, **(dict(log_density=log_density) if given and cls is JKOFlow else {}))
    x0 = source_2d(target, 4000, 1) if given else None
    xs, y = model.sample(None if given else 4000, steps=20, x0=x0, trajectory=True), sample_2d(target, 4000, 2)
    before, after = sw2(xs[0], y), sw2(xs[-1], y)
    assert after < (.25 if cls is SlicedWassersteinFlow else .6)*before, f"SW2 {before:.2f} -> {after:.2f}"
