"""UNet and TimeNet: shapes, sizes that they refuse, the paper's parameter counts, gradients."""
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.unet import Attention, ResBlock, TimeNet, UNet

SMALL = dict(channels=8, mult=(1, 2))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(net, seed=1):
    "The same network with no weight zero, as if it had been trained."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(.1*torch.randn(p.shape, generator=g))
    return net.eval()


def small_unet():
    return awake(UNet((1, 8, 8), **SMALL, attention=(4,)))


def small_time_net():
    return awake(TimeNet((1, 8, 8), 4))


both = pytest.mark.parametrize("make", (small_unet, small_time_net))


@pytest.mark.parametrize("shape, settings", (
    ((1, 8, 8), {}),
    ((3, 8, 8), {}),
    ((1, 8, 12), {}),
    ((4, 2, 6), {}),
    ((1, 5, 7), dict(mult=(2,))),
    ((3, 16, 16), dict(mult=(1, 2, 2), blocks=2)),
    ((3, 16, 16), dict(mult=(2, 1), attention=(16, 8))),
    ((1, 16, 8), dict(channels=24, mult=(1, 3), attention=(16,))),
    ((1, 16, 16), dict(patch=2)),
    ((3, 16, 16), dict(patch=4, blocks=3)),
    *(((1, 8, 8), dict(channels=channels)) for channels in (2, 6, 10, 18, 34)),
), ids=str)
def test_velocities_are_like_images_and_depend_on_image_and_time(shape, settings):
    net = awake(UNet(shape, **{**SMALL, **settings}))
    x = normal(3, *shape).clamp(-1, 1)
    v = net(x, torch.tensor([0., .5, 1.]))
    assert v.shape == x.shape
    assert v.dtype == torch.float32
    assert v.isfinite().all()
    assert v.std() > 0
    assert_close(net(x, .5), net(x, torch.full((3,), .5)))
    assert (net(x, .2) - net(x, .8)).abs().max() > 1e-3
    assert (net(x, .2) - net(-x, .2)).abs().max() > 1e-3


@pytest.mark.parametrize("make", (UNet, TimeNet))
@pytest.mark.parametrize("channels", (0, 1, 5))
def test_channels_must_be_even(make, channels):
    with pytest.raises(ValueError, match=f"channels.*{channels}"):
        make((1, 8, 8), channels=channels)


@pytest.mark.parametrize("shape, settings, match", (
    ((1, 7, 8), {}, "7×8.*2 levels.*patch=1.*multiples of 2"),
    ((1, 8, 9), {}, "8×9.*multiples of 2"),
    ((1, 28, 30), dict(mult=(1, 2, 2)), "28×30.*3 levels.*multiples of 4"),
    ((1, 12, 12), dict(patch=4), "12×12.*patch=4.*multiples of 8"),
    ((2,), {}, r"\(2,\)"),
    ((8, 8), {}, r"\(8, 8\)"),
    ((1, 1, 8, 8), {}, r"\(1, 1, 8, 8\)"),
), ids=str)
def test_sizes_of_which_no_network_can_be_made(shape, settings, match):
    with pytest.raises(ValueError, match=match):
        UNet(shape, **{**SMALL, **settings})


@both
@pytest.mark.parametrize("shape", ((2, 1, 8, 4), (2, 3, 8, 8), (1, 8, 8), (2, 64)), ids=str)
def test_images_of_another_shape(make, shape):
    with pytest.raises(ValueError, match=r"x .*\(B, 1, 8, 8\), got \("):
        make()(torch.zeros(shape), .5)


@pytest.mark.parametrize("attention, settings, heights", (
    ((), {}, [4]),
    ((16,), {}, [4] + [16]*3),
    ((4, 16), {}, [4]*4 + [16]*3),
    ((8,), dict(patch=2), [2] + [8]*3),
    ((16,), dict(blocks=2), [4] + [16]*5),
))
def test_attention_is_where_it_was_asked_for_and_in_the_middle(attention, settings, heights):
    net = UNet((1, 16, 16), 8, (1, 1, 1), attention=attention, **settings)
    seen = []
    for m in net.modules():
        if isinstance(m, Attention):
            m.register_forward_hook(lambda m, args, out: seen.append(out.shape[2]))
    net(torch.zeros(1, 1, 16, 16), 0.)
    assert sorted(seen) == heights


def test_attention_is_softmax_over_all_pixels():
    attend = awake(Attention(8, head=4))
    x = normal(2, 8, 3, 5)
    q, k, v = attend.qkv(attend.norm(x)).flatten(2).split(8, 1)  # (B, 8, 15)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = ((q[:, h].mT @ k[:, h])/2).softmax(-1)
        heads.append(v[:, h] @ weights.mT)
    assert_close(attend(x), x + attend.out(torch.cat(heads, 1).view(2, 8, 3, 5)))
    assert Attention(6, head=4).heads == 1


def test_a_residual_block_starts_as_its_skip_and_a_unet_as_zero():
    x, e = normal(2, 8, 4, 4), normal(2, 5)
    assert torch.equal(ResBlock(8, 8, 5)(x, e), x)
    block = ResBlock(8, 12, 5)
    assert torch.equal(block(x, e), block.skip(x))
    assert not UNet((3, 8, 8), **SMALL, attention=(8,))(normal(2, 3, 8, 8), .3).any()


def test_classes():
    net = awake(UNet((1, 8, 8), **SMALL, classes=10))
    x, t = normal(3, 1, 8, 8), torch.tensor([.1, .5, .9])
    a = net(x, t, torch.tensor([1, 1, 1]))
    b = net(x, t, torch.tensor([1, 1, 2]))
    assert_close(a[:2], b[:2])
    assert not torch.allclose(a[2], b[2], atol=1e-3)
    with pytest.raises(ValueError, match="10 classes and 0 numbers: it takes 1 "):
        net(x, t)
    with pytest.raises(ValueError, match="0 classes and 0 numbers: it takes 0 "):
        UNet((1, 8, 8), **SMALL)(x, t, torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("settings, parameters", (
    (dict(shape=(1, 28, 28), channels=32, mult=(1, 2, 2), blocks=1), 1_140_929),
    (dict(shape=(3, 32, 32), channels=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,)),
     38_307_203),
), ids=("MNIST", "CIFAR-10"))
def test_parameters_of_the_papers_networks(settings, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**settings).parameters()) == parameters


@both
@torch.no_grad()
def test_rows_do_not_mix(make):
    net, x, t = make(), normal(6, 1, 8, 8), torch.linspace(0, 1, 6)
    whole = net(x, t)
    for i in range(6):
        assert_close(net(x[i:i+1], t[i:i+1])[0], whole[i], atol=1e-5, rtol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(net(x[order], t[order]), whole[order], atol=1e-5, rtol=1e-5)
    x[1:] = 1e3
    assert_close(net(x, t)[0], whole[0], atol=1e-5, rtol=1e-5)


@both
def test_bf16_agrees(make):
    net, x, t = make(), normal(4, 1, 8, 8), torch.linspace(0, 1, 4)
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, t)
    assert (rough.float() - exact).norm() < .05*exact.norm()
    assert not torch.equal(rough.float(), exact)


def test_dropout_is_for_training_only():
    net, x = awake(UNet((1, 8, 8), **SMALL, dropout=.5)), normal(2, 1, 8, 8)
    assert torch.equal(net(x, .5), net(x, .5))
    assert not torch.equal(net.train()(x, .5), net(x, .5))


def test_the_type_is_the_networks_own():
    net = UNet((1, 8, 8), **SMALL)
    x = normal(2, 1, 8, 8)
    assert UNet((1, 8, 8), **SMALL).double()(x.double(), .5).dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        assert net(x, .5).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("net", (
    UNet((1, 8, 8), **SMALL, attention=(4,), blocks=2, classes=3),
    UNet((3, 8, 8), channels=8, mult=(1, 1), patch=2),
    TimeNet((1, 8, 8), 4),
), ids=("UNet with classes", "UNet in patches", "TimeNet"))
def test_every_parameter_learns(net):
    "The zeros of the start let the gradient through one layer further at each step: three in all."
    x, t = normal(4, *net.shape), torch.linspace(.1, .9, 4)
    labels = [torch.tensor([0, 1, 2, 0])] if getattr(net, "classes", 0) else []
    optimiser = torch.optim.SGD(net.parameters(), .1)
    for _ in range(4):
        optimiser.zero_grad()
        v = net(x, t, *labels)
        (v - normal(*v.shape, seed=5)).square().mean().backward()
        optimiser.step()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("shape", (
    (1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 5, 9), (2, 1, 1), (1, 4, 64)), ids=str)
def test_times_are_between_0_and_1(shape):
    net = awake(TimeNet(shape, 4))
    x = normal(7, *shape)
    for scale in (1, 1e4):
        t = net(scale*x)
        assert t.shape == (7,)
        assert t.dtype == torch.float32
        assert (0 <= t).all() and (t <= 1).all()
    assert net(x).std() > 0
    assert torch.equal(net(x, torch.ones(7)), net(x))
