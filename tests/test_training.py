"""Networks, settings, the trainer and its loop: bad input, memory, averages, resuming."""
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from nsgf_nb import cuda_graphs
from nsgf_nb.mlp import MLP, FourierFeatures
from nsgf_nb.settings import replace_settings
from nsgf_nb.training import (
    Loop,
    TrainConfig,
    Trainer,
    averaging_weight,
    check_loss,
    find_device,
    learning_rate,
    make_network,
    seeded,
    update_average,
)
from nsgf_nb.unet import UNet


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(spoil=None):
    "Batches without end; from number `spoil` on their targets are NaN."
    i = 0
    while True:
        x = normal(8, 2, seed=i)
        bad = spoil is not None and i >= spoil
        yield x, torch.zeros(8), x*(math.nan if bad else 1)
        i += 1


def small_trainer(source=None, steps=30, **options):
    with seeded(0):
        return Trainer(MLP(width=8, depth=1), source or batches(), steps, **options)


def run(trainer):
    return Loop()(trainer, progress=False)


# ---- networks

@pytest.mark.parametrize("shape", ((1,), (2,), (50,), (1, 8, 8)))
def test_mlp_maps_samples_of_any_shape_to_velocities(shape):
    net = MLP(shape, width=16, depth=2)
    x = normal(5, *shape)
    assert net(x, torch.rand(5)).shape == x.shape
    assert_close(net(x, .25), net(x, torch.full((5,), .25)))


def test_mlp_names_the_shape_that_it_expects():
    with pytest.raises(ValueError, match=r"^x .*\(B, 2\).*\(3, 5\)"):
        MLP()(torch.zeros(3, 5), 0.)


def test_fourier_features_are_the_formula():
    x = normal(4, 2)
    omega = normal(2, 3, seed=1)
    expected = torch.cat([x, (x @ omega).sin(), (x @ omega).cos()], 1)
    assert torch.equal(FourierFeatures(omega)(x), expected)


def test_frequencies_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = MLP(seed=3).embed_x.omega
    torch.manual_seed(2)
    assert torch.equal(first, MLP(seed=3).embed_x.omega)
    assert not torch.equal(first, MLP(seed=4).embed_x.omega)


def test_channels_choose_the_unet():
    assert isinstance(make_network(TrainConfig(), (2,)), MLP)
    assert isinstance(make_network(TrainConfig(channels=8, mult=(1, 2)), (1, 8, 8)), UNet)


# ---- settings

@pytest.mark.parametrize("settings, error, words", (
    (dict(train_steps=-1), ValueError, "train_steps.*0.*-1"),
    (dict(train_steps=2.5), TypeError, "train_steps.*int.*2.5"),
    (dict(batch_size=-1), ValueError, "batch_size.*-1"),
    (dict(lr=0.), ValueError, "lr.*0"),
    (dict(lr=math.nan), ValueError, "lr.*nan"),
    (dict(lr=math.inf), ValueError, "lr.*inf"),
    (dict(lr="a"), TypeError, "lr.*float.*'a'"),
    (dict(lr=True), TypeError, "lr.*True"),
    (dict(ema=1.), ValueError, "ema.*1.0"),
    (dict(dropout=-.1), ValueError, "dropout.*-0.1"),
    (dict(mult=(1, 0)), ValueError, r"mult.*\(1, 0\)"),
    (dict(flip=1), TypeError, "flip.*bool.*1"),
    (dict(seed=.5), TypeError, "seed.*int.*0.5"),
))
def test_bad_settings_raise_an_error_that_names_them(settings, error, words):
    with pytest.raises(error, match="^" + words):
        TrainConfig(**settings)


def test_settings_are_frozen_and_replaced():
    config = TrainConfig(mult=[1, 2])  # as JSON has it
    assert config.mult == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
    assert replace_settings(config, dict(width=3), "NSGF").width == 3
    with pytest.raises(TypeError, match="epochs.*NSGF.*train_steps"):
        replace_settings(config, dict(epochs=3), "NSGF")


@pytest.mark.parametrize("device", ("cuda:99", "gpu", "nowhere:0"))
def test_a_device_that_does_not_exist(device):
    with pytest.raises(ValueError, match=f"^device '{device}'"):
        find_device(device)


# ---- steps

def test_learning_rate_rises_and_falls():
    rates = [learning_rate(i, 1000, 1.) for i in range(1000)]
    peak = rates.index(max(rates))
    assert 90 < peak < 105 and max(rates) > .97
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("kind", (float, torch.tensor))
def test_moving_average_forgets_its_first_steps(kind):
    net = nn.Linear(1, 1, bias=False)
    net.register_buffer("count", torch.zeros(()))
    average = AveragedModel(net)
    expected = None
    for n, value in enumerate((5., 1., 2., 4.)):
        net.weight.data.fill_(value)
        net.count += 1
        update_average(average, net, kind(averaging_weight(n, .999)))
        decay = (1 + n)/(10 + n)  # n updates lie behind
        expected = value if n == 0 else decay*expected + (1 - decay)*value
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.count == 4 and average.n_averaged == 4


def test_without_averaging_the_average_is_the_network():
    trainer = small_trainer(ema=0.)
    run(trainer)
    for p, q in zip(trainer.net.parameters(), trainer.average.parameters()):
        assert torch.equal(p, q)


def test_the_loop_returns_the_average_and_all_losses():
    trainer = small_trainer()
    result = run(trainer)
    assert result.losses.shape == (30,) and not result.losses.requires_grad
    assert result.interrupted is None and result.seconds > 0
    assert result.net is trainer.average.module
    assert any(not torch.equal(p, q)
               for p, q in zip(result.net.parameters(), trainer.net.parameters()))


def test_the_trainer_learns():
    losses = run(small_trainer(steps=300, lr=.01)).losses
    assert losses[-20:].mean() < .1*losses[:20].mean()


def test_clipping_bounds_the_gradient():
    trainer = small_trainer(((100*x, t, u) for x, t, u in batches()), clip=.5)
    next(trainer)
    norm = torch.cat([p.grad.flatten() for p in trainer.net.parameters()]).norm()
    assert norm <= .5 + 1e-5


def test_any_loss_can_be_minimised():
    def loss(net, x, label):
        return nn.functional.cross_entropy(net(x), label)

    def labelled():
        i = 0
        while True:
            x = normal(64, 2, seed=i)
            yield x, (x[:, 0] > 0).long()
            i += 1
    with seeded(0):
        trainer = Trainer(nn.Linear(2, 2), labelled(), 200, lr=.05, loss=loss)
    net = run(trainer).net
    x = normal(500, 2, seed=999)
    assert ((net(x).argmax(1) == (x[:, 0] > 0)).float().mean()) > .95


def test_batches_that_end_too_early_are_reported():
    few = (batch for batch, _ in zip(batches(), range(3)))
    with pytest.raises(RuntimeError, match="batches.* 3 of 30"):
        run(small_trainer(few))


# ---- a step as a CUDA graph; a CPU puts it through a stand-in for the recording

def record_calls(monkeypatch):
    "A replay calls the function again; what was called, in order."
    calls = []

    def on_side_stream(function, *inputs):
        calls.append("warm-up")
        return function(*inputs)

    def record(function, *inputs):
        calls.append("recording")
        output = torch.full((), math.nan)

        def replay():
            calls.append("replay")
            output.copy_(function(*inputs))
        return replay, output
    monkeypatch.setattr(cuda_graphs, "on_side_stream", on_side_stream)
    monkeypatch.setattr(cuda_graphs, "record", record)
    return calls


def test_replayed_steps_are_the_same_steps(monkeypatch):
    eager = run(small_trainer(clip=1.))
    calls = record_calls(monkeypatch)
    trainer = small_trainer(clip=1., graph=True)
    replayed = run(trainer)
    assert calls == ["warm-up"]*3 + ["recording"] + ["replay"]*27
    assert_close(replayed.losses, eager.losses)
    for p, q in zip(replayed.net.parameters(), eager.net.parameters()):
        assert_close(p, q)
    rate = trainer.optimiser.param_groups[0]["lr"]
    assert rate.item() == pytest.approx(learning_rate(29, 30, 2e-3))


def test_a_replayed_training_resumes(monkeypatch):
    calls = record_calls(monkeypatch)
    whole = small_trainer(graph=True)
    run(whole)
    source = batches()
    stopped = small_trainer(source, graph=True)
    for _ in range(10):
        next(stopped)
    resumed = small_trainer(source, graph=True)
    resumed.load_state_dict({name: u.clone() for name, u in stopped.state_dict().items()})
    assert_close(run(resumed).losses, whole.losses)
    recordings = calls.count("recording")
    resumed.load_state_dict({name: u.clone() for name, u in stopped.state_dict().items()})
    for _ in range(10):  # not by the recording of what was there before
        next(resumed)
    assert calls.count("recording") == recordings + 1


def test_another_forward_is_not_replayed(monkeypatch):
    calls = record_calls(monkeypatch)
    trainer = small_trainer(graph=True)
    trainer.forward = lambda x, t: trainer.net(x, t)  # data-parallel training sets another one
    run(trainer)
    assert calls == []


def test_what_cannot_be_recorded_is_said(monkeypatch):
    record_calls(monkeypatch)

    def record(function, *inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(cuda_graphs, "record", record)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing.*graph=False"):
        run(small_trainer(graph=True))


def test_losses_are_read_in_groups_and_none_is_missed():
    trainer = small_trainer(batches(60), 200)
    trainer.read_interval = 50
    with pytest.raises(FloatingPointError, match="nan at step 60"):
        run(trainer)
    assert trainer.step == 100
    trainer = small_trainer(batches(29), 30)
    trainer.read_interval = 50
    with pytest.raises(FloatingPointError, match="nan at step 29"):
        run(trainer)


# ---- what goes wrong

@pytest.mark.parametrize("spoil, steps", ((0, 10), (60, 200), (29, 30)))
def test_a_nan_loss_stops_the_training_one_step_later(spoil, steps):
    trainer = small_trainer(batches(spoil), steps)
    with pytest.raises(FloatingPointError, match=f"nan at step {spoil}.*lr.*clip"):
        run(trainer)
    assert trainer.step <= spoil + 2


def test_check_loss_appends_a_hint():
    check_loss(1., 3)
    with pytest.raises(FloatingPointError, match="inf at step 3.* see here"):
        check_loss(math.inf, 3, "; see here")


def test_out_of_memory_names_a_batch_size_that_fits():
    class Greedy(MLP):
        def forward(self, x, t):
            if len(x) > 20:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, t)
    big = ((torch.zeros(96, 2), torch.zeros(96), torch.zeros(96, 2)) for _ in range(9))
    with pytest.raises(MemoryError, match="batch_size=96 .* 12 would fit"):
        run(Trainer(Greedy(width=8, depth=1), big, 5))


def test_other_errors_of_a_step_pass_through():
    wrong = ((torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 3)) for _ in range(9))
    with pytest.raises(RuntimeError, match="size"):
        run(small_trainer(wrong))


def test_a_compiler_that_fails_is_reported_and_training_continues(monkeypatch):
    def fail(net):
        raise RuntimeError("no compiler\nmore lines")
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(UserWarning, match="torch.compile.*no compiler$"):
        trainer = small_trainer(compile=True)
    assert trainer.forward is trainer.net
    assert len(run(trainer).losses) == 30


def test_a_compiled_network_is_used(monkeypatch):
    calls = []

    def compile(net):
        def compiled(x, t):
            calls.append(len(x))
            return net(x, t)
        return compiled
    monkeypatch.setattr(torch, "compile", compile)
    assert run(small_trainer(compile=True)).losses.isfinite().all()
    assert len(calls) == 31  # one to try it


def test_ctrl_c_returns_what_was_learned():
    def interrupted():
        yield from (batch for batch, _ in zip(batches(), range(3)))
        raise KeyboardInterrupt
    result = run(small_trainer(interrupted()))
    assert result.interrupted is KeyboardInterrupt
    assert len(result.losses) == 3


# ---- resuming

class Draws:
    "Batches whose generator is part of their state, for a network with dropout."
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return self

    def __next__(self):
        x = torch.rand(8, 1, 8, 8, generator=self.generator)
        return x, torch.zeros(8), -x

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def test_a_restored_trainer_continues_to_the_same_bits():
    def new():
        net = UNet((1, 8, 8), 8, (1, 2), dropout=.5)
        return Trainer(net, Draws(), 12, clip=1.)
    with seeded(0):
        whole = new()
        run(whole)
    with seeded(0):
        stopped = new()
        for _ in range(5):
            next(stopped)
        state = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    with seeded(1):
        resumed = new()
        resumed.load_state_dict(state)
        assert resumed.step == 5
        run(resumed)
    assert torch.equal(resumed.losses, whole.losses)
    for p, q in zip(resumed.average.parameters(), whole.average.parameters()):
        assert torch.equal(p, q)


def test_the_state_is_a_flat_dict_of_tensors():
    trainer = small_trainer()
    next(trainer)
    state = trainer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {"losses", "rng", "net.layers.0.weight", "optimiser.0.exp_avg"} <= set(state)


def test_seeded_restores_the_global_generator():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with seeded(7):
        first = torch.rand(3)
    with seeded(7):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


def test_the_bar_shows_the_loss(capsys):
    trainer = small_trainer(steps=60)
    Loop()(trainer, progress=True)
    err = capsys.readouterr().err
    assert "training" in err and "60/60" in err and "loss=" in err
