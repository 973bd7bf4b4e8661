"""UNet and TimePredictor: shapes, sizes that they refuse, the paper's parameter counts, rows that do not mix, bf16, gradients; training with torch.compile."""
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nsgf_nb.long_runs import Checkpoint
from nsgf_nb.matching import _load_run, _Run, fit
from nsgf_nb.models import Attention, MLP, ResBlock, TimePredictor, UNet

SMALL = dict(channels=8, mult=(1, 2))


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def images(*shape, seed=0): return normal(*shape, seed=seed).clamp(-1, 1)
def count(net): return sum(p.numel() for p in net.parameters())


def awake(net, seed=1):
    "The same network, with no weight zero: as if it had been trained."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.add_(.1*torch.randn(p.shape, generator=g))
    return net.eval()


# ---- shapes and sizes

@pytest.mark.parametrize("shape, settings", (
    ((1, 8, 8), {}), ((3, 8, 8), {}), ((1, 8, 12), {}), ((4, 2, 6), {}), ((1, 5, 7), dict(mult=(2,))), ((3, 16, 16), dict(mult=(1, 2, 2), blocks=2)), ((1, 28, 28), dict(mult=(1, 2, 2))),
    ((3, 16, 16), dict(mult=(2, 1), attention=(16, 8))), ((1, 16, 16), dict(patch=2)), ((3, 16, 16), dict(patch=4, blocks=3)), ((1, 8, 8), dict(channels=16, mult=(1,))),
    ((1, 16, 8), dict(channels=24, mult=(1, 3), attention=(16,))), ((1, 8, 8), dict(channels=10)), ((1, 8, 8), dict(channels=2)), ((1, 8, 8), dict(dropout=.5)),
), ids=str)
def test_velocities_are_like_images(shape, settings):
    net = awake(UNet(shape, **{**SMALL, **settings}))
    x = images(3, *shape)
    v = net(x, torch.tensor([0., .5, 1.]))
    assert v.shape == x.shape and v.dtype == torch.float32 and v.isfinite().all() and v.std() > 0
    assert_close(net(x, .5), net(x, torch.full((3,), .5)))
    assert (net(x, .2) - net(x, .8)).abs().max() > 1e-3           # it knows the time …
    assert (net(x, .2) - net(-x, .2)).abs().max() > 1e-3          # … and the image


@pytest.mark.parametrize("settings", (dict(channels=6), dict(channels=18, mult=(1,)), dict(channels=34, mult=(1,))), ids=str)
def test_any_even_number_of_channels(settings): UNet((1, 8, 8), **{**SMALL, **settings})(images(2, 1, 8, 8), .5)


def test_an_odd_number_of_channels_works_or_is_refused_by_name():
    try: net = UNet((1, 8, 8), channels=5, mult=(1,))
    except ValueError as e: assert "channels" in str(e)
    else: net(images(2, 1, 8, 8), .5)


@pytest.mark.parametrize("shape, settings, words", (
    ((1, 7, 8), {}, "images are 7×8, but a UNet with 2 levels and patch=1 needs height and width to be multiples of 2: pad or resize them, or take fewer levels"),
    ((1, 8, 9), {}, "8×9.*multiples of 2"), ((1, 28, 30), dict(mult=(1, 2, 2)), "28×30.*3 levels.*multiples of 4"), ((1, 12, 12), dict(patch=4), "12×12.*patch=4.*multiples of 8"),
    ((2,), {}, r"a UNet needs images of shape \(C, H, W\), got samples of shape \(2,\)"), ((8, 8), {}, r"got samples of shape \(8, 8\)"), ((1, 1, 8, 8), {}, r"got samples of shape \(1, 1, 8, 8\)"),
), ids=str)
def test_odd_sizes_are_refused(shape, settings, words):
    with pytest.raises(ValueError, match=words): UNet(shape, **{**SMALL, **settings})


@pytest.mark.parametrize("net", (UNet((1, 8, 8), **SMALL), TimePredictor((1, 8, 8), 4)), ids=("UNet", "TimePredictor"))
@pytest.mark.parametrize("shape", ((2, 1, 8, 4), (2, 3, 8, 8), (1, 8, 8), (2, 64), (2, 1, 16, 16)), ids=str)
def test_images_of_another_shape_are_refused(net, shape):
    with pytest.raises(ValueError, match=r"x must be of shape \(B, 1, 8, 8\), got \("): net(torch.zeros(shape), .5)


def attended(net):
    "Heights of the maps at which a network attends, one for each layer of attention that is run."
    heights = []
    hooks = [m.register_forward_hook(lambda m, i, o: heights.append(o.shape[2])) for m in net.modules() if isinstance(m, Attention)]
    net(torch.zeros(1, *net.shape), 0.)
    for h in hooks: h.remove()
    return sorted(heights)


@pytest.mark.parametrize("attention, settings, heights", (
    ((), {}, [4]), ((16,), {}, [4] + [16]*3), ((8,), {}, [4] + [8]*3), ((4, 16), {}, [4]*4 + [16]*3), ((8,), dict(patch=2), [2] + [8]*3), ((16,), dict(blocks=2), [4] + [16]*5),
))
def test_attention_is_where_it_was_asked_for_and_in_the_middle(attention, settings, heights):
    assert attended(UNet((1, 16, 16), 8, (1, 1, 1), attention=attention, **settings)) == heights


def test_attention_is_softmax_over_all_pixels():
    a, x = awake(Attention(8, head=4)), normal(2, 8, 3, 5)
    q, k, v = a.qkv(a.norm(x)).flatten(2).split(8, 1)              # (B, 8, 15)
    out = []
    for h in (slice(0, 4), slice(4, 8)): out.append(v[:, h] @ ((q[:, h].mT @ k[:, h])/2).softmax(-1).mT)
    assert a.heads == 2 and Attention(6, head=4).heads == 1
    assert_close(a(x), x + a.out(torch.cat(out, 1).view(2, 8, 3, 5)))


def test_a_residual_block_starts_as_its_skip():
    x, e = normal(2, 8, 4, 4), normal(2, 5)
    assert torch.equal(ResBlock(8, 8, 5)(x, e), x)
    b = ResBlock(8, 12, 5)
    assert_close(b(x, e), b.skip(x))


def test_classes():
    net, x, t = awake(UNet((1, 8, 8), **SMALL, classes=10)), images(3, 1, 8, 8), torch.tensor([.1, .5, .9])
    a, b = (net(x, t, torch.tensor(label)) for label in ([1, 1, 1], [1, 1, 2]))
    assert_close(a[:2], b[:2])
    assert not torch.allclose(a[2], b[2], atol=1e-3)
    with pytest.raises(ValueError, match="label must be given to a network with classes, and to no other"): net(x, t)
    with pytest.raises(ValueError, match="label must be given"): UNet((1, 8, 8), **SMALL)(x, t, torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("settings, parameters", (
    (dict(shape=(1, 28, 28), channels=32, mult=(1, 2, 2), blocks=1), 1_140_929),
    (dict(shape=(3, 32, 32), channels=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=.1), 38_307_203),
), ids=("MNIST", "CIFAR-10"))
def test_parameters_of_the_papers_networks(settings, parameters):
    with torch.device("meta"): assert count(UNet(**settings)) == parameters


# ---- what a field must be

def test_it_starts_at_zero_everywhere():
    net = UNet((3, 8, 8), **SMALL, attention=(8,)).eval()
    assert net(images(2, 3, 8, 8), .3).abs().max() == 0


@pytest.mark.parametrize("net", (awake(UNet((1, 8, 8), **SMALL, attention=(4,))), awake(TimePredictor((1, 8, 8), 4))), ids=("UNet", "TimePredictor"))
def test_rows_do_not_mix(net):
    x, t = images(6, 1, 8, 8), torch.linspace(0, 1, 6)
    with torch.no_grad():
        whole, order = net(x, t), torch.tensor([3, 0, 5, 1, 4, 2])
        for i in range(6): assert_close(net(x[i:i+1], t[i:i+1])[0], whole[i], atol=1e-5, rtol=1e-5)
        assert_close(net(x[order], t[order]), whole[order], atol=1e-5, rtol=1e-5)
        other = x.clone(); other[1:] = 1e3
        assert_close(net(other, t)[0], whole[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", (lambda: UNet((1, 8, 8), **SMALL, attention=(4,)), lambda: TimePredictor((1, 8, 8), 8)), ids=("UNet", "TimePredictor"))
def test_bf16_agrees(make):
    net, x, t = awake(make()), images(4, 1, 8, 8), torch.linspace(0, 1, 4)
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16): rough = net(x, t)
    assert (rough.float() - exact).norm() < .05*exact.norm()
    assert not torch.equal(rough.float(), exact)                   # it was run in bf16


def test_dropout_is_for_training_only():
    net, x = awake(UNet((1, 8, 8), **SMALL, dropout=.5)), images(2, 1, 8, 8)
    assert torch.equal(net(x, .5), net(x, .5))
    assert not torch.equal(net.train()(x, .5), net(x, .5))


def test_float32_networks_work_whatever_torchs_default():
    net, before = UNet((1, 8, 8), **SMALL), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try: assert net(images(2, 1, 8, 8).float(), .5).dtype == torch.float32
    finally: torch.set_default_dtype(before)


def test_a_network_in_float64():
    net = UNet((1, 8, 8), **SMALL).double()
    assert net(images(2, 1, 8, 8).double(), .5).dtype == torch.float64


@pytest.mark.parametrize("net", (UNet((1, 8, 8), **SMALL, attention=(4,), blocks=2, classes=3), UNet((3, 8, 8), channels=8, mult=(1, 1), patch=2), TimePredictor((1, 8, 8), 4)),
                         ids=("UNet with classes", "UNet in patches", "TimePredictor"))
def test_every_parameter_learns(net):
    "The zeros at the start let the gradient through one layer further at each step: three in all."
    x, t, opt = images(4, *net.shape), torch.linspace(.1, .9, 4), torch.optim.SGD(net.parameters(), .1)
    label = (torch.tensor([0, 1, 2, 0]),) if hasattr(net, "label") else ()
    for _ in range(4):
        opt.zero_grad()
        v = net(x, t, *label)
        (v - normal(*v.shape, seed=5)).square().mean().backward()
        opt.step()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0]
    assert silent == []


# ---- the clock

@pytest.mark.parametrize("shape", ((1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 5, 9), (2, 1, 1), (1, 4, 64)), ids=str)
def test_predicted_times(shape):
    net = awake(TimePredictor(shape, 4))
    for scale in (1, 1e4):
        t = net(scale*normal(7, *shape))
        assert t.shape == (7,) and t.dtype == torch.float32 and (0 <= t).all() and (t <= 1).all()
    assert net(normal(7, *shape)).std() > 0 and torch.equal(net(normal(2, *shape), torch.ones(2)), net(normal(2, *shape)))


def test_a_clock_learns_to_tell_noise_from_images():
    torch.manual_seed(0)
    net, g = TimePredictor((1, 8, 8), 4), torch.Generator().manual_seed(0)
    def batches():
        while True:
            t = torch.rand(64, generator=g)
            yield torch.randn(64, 1, 8, 8, generator=g)*(1 - t.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1), t, t
    losses = fit(net, batches(), 100, lr=1e-2, progress=False).losses
    assert losses[-10:].mean() < .02 < losses[0]                   # 1/12 is the variance of t


# ---- torch.compile, of which training must not depend

def batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 1, 8, 8, generator=g)
        yield x, torch.rand(8, generator=g), -x


class Broken(nn.Module):
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x, t): raise self.error


def unfit(monkeypatch, how, error):
    def at_once(net): raise error
    monkeypatch.setattr(torch, "compile", at_once if how == "at once" else lambda net: Broken(error))




@pytest.mark.parametrize("how, error", (
    ("when run", RuntimeError("no compiler here\nand more")),
    pytest.param("when run", AssertionError()),
    pytest.param("at once", RuntimeError("torch.compile is not supported on Python 3.99+")),
), ids=("when run", "without a message", "at once"))
def test_training_goes_on_where_torch_compile_fails(monkeypatch, how, error):
    unfit(monkeypatch, how, error)
    net = UNet((1, 8, 8), **SMALL)
    with pytest.warns(UserWarning, match="torch.compile does not work here, training goes on without it: ") as told:
        done = fit(net, batches(), 5, progress=False, compile=True)
    assert len(told) == 1 and "\n" not in str(told[0].message) and (str(error).split("\n")[0] or type(error).__name__) in str(told[0].message)
    assert done.losses.shape == (5,) and done.losses.isfinite().all()


def test_a_compiled_network_is_trained(monkeypatch):
    seen = []
    class Fast(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x, t): seen.append(1); return self.net(x, t)
    monkeypatch.setattr(torch, "compile", Fast)
    net = UNet((1, 8, 8), **SMALL)
    before = [p.clone() for p in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = fit(net, batches(), 5, progress=False, compile=True)
    assert len(seen) == 6 and any(not torch.equal(p, q) for p, q in zip(net.parameters(), before))   # once to see whether it works
    assert not isinstance(done.net, Fast) and done.net.state_dict().keys() == net.state_dict().keys()


def test_a_finished_training_is_taken_up_with_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda net: net)
    kw = dict(progress=False, compile=True, checkpoint=tmp_path/"c")
    a = fit(UNet((1, 8, 8), **SMALL), batches(), 3, **kw)
    b = fit(UNet((1, 8, 8), **SMALL), iter(()), 3, **kw)
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters())) and torch.equal(a.losses, b.losses)


# ---- training

def test_bf16_training_learns_in_float32_weights():
    torch.manual_seed(0)
    def data():
        g = torch.Generator().manual_seed(0)
        while True: yield torch.randn(16, 1, 8, 8, generator=g), torch.rand(16, generator=g), torch.full((16, 1, 8, 8), .5)
    done = fit(UNet((1, 8, 8), **SMALL), data(), 30, lr=5e-3, bf16=True, progress=False)
    assert all(p.dtype == torch.float32 for p in done.net.parameters()) and done.losses.dtype == torch.float32
    assert done.losses[-5:].mean() < .1 < done.losses[0]


def test_clip_bounds_the_gradient(monkeypatch):
    norms, inner = [], torch.optim.AdamW.step
    def step(self, *args, **kw):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return inner(self, *args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    def data():
        for x, t, target in batches(): yield x, t, 100*target
    fit(MLP((1, 8, 8), 8, 1), data(), 3, progress=False)
    assert min(norms) > 1
    norms.clear()
    fit(MLP((1, 8, 8), 8, 1), data(), 3, clip=.5, progress=False)
    assert len(norms) == 3 and max(norms) < .5001


def test_moments_come_back_in_the_layout_of_the_weights(tmp_path):
    kw = dict(progress=False, checkpoint=tmp_path/"c")
    fit(UNet((1, 8, 8), **SMALL), batches(), 3, **kw)
    run = _Run(UNet((1, 8, 8), **SMALL), batches(), dict(steps=3, lr=2e-3, ema=.999, clip=0., bf16=False), {})
    _load_run(run, Checkpoint(tmp_path/"c"))
    for p, s in run.opt.state.items(): assert p.stride() == s["exp_avg"].stride() == s["exp_avg_sq"].stride()
