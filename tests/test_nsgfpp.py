"""NSGF++ at toy size: parts in any order, Algorithm 3, counted network calls, files, bad input."""
import dataclasses
import json
import math

import pytest
import torch
from conftest import rewrite
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb.flow_matching import FlowMatching, FlowMatchingConfig
from nsgf_nb.nsgf import NSGFConfig
from nsgf_nb.nsgfpp import PARTS, TimePredictor
from nsgf_nb.training import Loop, TrainConfig

SMALL = dict(train_steps=4, batch_size=8, channels=4, mult=(1, 2), lr=1e-3, clip=1.)
SINKHORN = NSGFConfig(**SMALL, sample_steps=3, pool_steps=2, t_end=.5, blur=1., minibatch=64,
                      pool_size=64)
PREDICTOR = TrainConfig(**SMALL)
STRAIGHT = FlowMatchingConfig(**SMALL, sample_steps=2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n=40, shape=(1, 8, 8), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))*2 - 1


def tiny(**settings):
    return NSGFPlusPlus(SINKHORN, PREDICTOR, STRAIGHT, device="cpu", **settings)


def fitted(data=None, **settings):
    return tiny(**settings).fit(images() if data is None else data, progress=False)


def weights(model):
    return {f"{name}.{key}": tensor for name, part in model.parts.items() if part.net is not None
            for key, tensor in part.net.state_dict().items()}


def same(a, b):
    a = weights(a)
    b = weights(b)
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain():
    return fitted()


@pytest.fixture(scope="module")
def model():
    "A model with larger weights: those after a few steps hardly move anything."
    model = fitted()
    generator = torch.Generator().manual_seed(1)
    for part in model.parts.values():
        for p in part.net.parameters():
            p.add_(.15*torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path/"m.safetensors")
    return tmp_path/"m.safetensors"


# ---- three parts

def test_one_call_trains_all_three(plain):
    assert [type(part) for part in plain.parts.values()] == [NSGF, TimePredictor, FlowMatching]
    for part in plain.parts.values():
        assert part.losses.shape == (4,) and part.losses.isfinite().all()
    x = plain.sample(5)
    assert x.shape == (5, 1, 8, 8) and x.dtype == torch.float32 and not x.requires_grad
    assert same(plain, fitted()) and not same(plain, fitted(seed=1))


ORDERS = (("straight", "predictor", "sinkhorn"), (("predictor", "straight"), "sinkhorn"))


@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_parts_train_alone_and_in_any_order(plain, orders):
    model = tiny()
    for parts in orders:
        model.fit(images(), parts, progress=False)
    assert same(model, plain)


@pytest.mark.parametrize("parts", ("straigt", ["sinkhorn", "clock"]), ids=str)
def test_unknown_parts_are_refused_before_anything_is_trained(parts):
    model = tiny()
    with pytest.raises(ValueError, match="parts.*sinkhorn, predictor, straight.*(straigt|clock)"):
        model.fit(images(), parts, progress=False)
    assert weights(model) == {}


def test_each_part_can_have_a_loop_of_its_own(plain):
    class Counting(Loop):
        calls = 0

        def __call__(self, trainer, progress=True, desc="training"):
            Counting.calls += 1
            return super().__call__(trainer, progress, desc)
    model = tiny().fit(images(), progress=False, loops=dict(straight=Counting()))
    assert Counting.calls == 1 and same(model, plain)


def test_the_predictor_learns_the_time():
    settings = dict(train_steps=150, batch_size=64, channels=8, lr=5e-3, device="cpu")
    data = images(200)*torch.linspace(.1, 1, 8)
    predictor = TimePredictor(**settings).fit(data, progress=False)
    x, t, _ = next(predictor.batches(data))
    predicted = predictor(predictor.standardizer.to_data(x))
    assert (predicted - t).abs().mean() < .15
    assert predicted.min() >= 0 and predicted.max() <= 1


# ---- sampling

class CountRows:
    "Counts the rows that go through each network, while it is open."
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.rows = dict.fromkeys(PARTS, 0)
        self.hooks = []
        for name, part in self.model.parts.items():
            def count(net, arguments, name=name):
                self.rows[name] += len(arguments[0])
            self.hooks.append(part.net.register_forward_pre_hook(count))
        return self.rows

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("options, sinkhorn, straight", (
    ({}, 3, 2), (dict(steps=4), 3, 4), (dict(steps=1, sinkhorn_steps=1), 1, 1),
    (dict(method="midpoint"), 3, 4), (dict(method="heun", steps=3, sinkhorn_steps=5), 5, 6),
    (dict(step_size=.2), 3, None), (dict(step_size=.3, method="heun"), 3, None),
    (dict(trajectory=True), 3, 2),
), ids=str)
def test_nfe_is_what_was_called(model, options, sinkhorn, straight):
    with CountRows(model) as rows:
        x, nfe = model.sample(20, return_nfe=True, **options)
    assert nfe.shape == (20,) and nfe.sum() == sum(rows.values())
    assert rows["sinkhorn"] == 20*sinkhorn and rows["predictor"] == 20
    if straight:
        assert nfe.tolist() == [sinkhorn + 1 + straight]*20
    assert x.isfinite().all() and torch.equal(model.sample(20, **options), x)


def test_nfe_follows_each_images_own_time(model):
    x0 = torch.cat([normal(8, 1, 8, 8), 3*images(8)])
    tau = model.predictor(model.sinkhorn.sample(x0=x0))
    _, nfe = model.sample(x0=x0, step_size=.01, return_nfe=True)
    assert tau.std() > .005  # otherwise this says nothing
    steps = nfe - 4
    assert ((1 - tau)/steps <= .01001).all() and ((1 - tau) > .00999*(steps - 1)).all()
    assert len(set(nfe.tolist())) > 1


@pytest.mark.parametrize("time_power", (1., 2.))
def test_sampling_is_algorithm_3(model, time_power):
    x0 = normal(6, 1, 8, 8)
    x = x0
    for k in range(3):
        x = x + model.sinkhorn(x, k/3)/3
    tau = model.predictor(x)
    times = [tau + (1 - tau)*(k/4)**time_power for k in range(5)]
    for now, then in zip(times, times[1:]):
        x = x + (then - now).view(-1, 1, 1, 1)*model.straight(x, now)
    samples = model.sample(x0=x0, steps=4, time_power=time_power)
    assert_close(samples, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", ({}, dict(step_size=.07), dict(method="heun", step_size=.2)),
                         ids=str)
def test_a_batch_is_its_samples_alone(model, options):
    x0 = torch.cat([normal(3, 1, 8, 8), 3*images(3)])
    whole, nfe = model.sample(x0=x0, return_nfe=True, **options)
    for i in range(6):
        alone, calls = model.sample(x0=x0[i:i+1], return_nfe=True, **options)
        assert calls.item() == nfe[i].item()
        assert_close(alone, whole[i:i+1], atol=1e-4, rtol=1e-4)


def test_trajectories_begin_at_the_noise_and_end_at_the_image(model):
    x0 = normal(5, 1, 8, 8)
    states = model.sample(x0=x0, trajectory=True, steps=4)
    assert states.shape == (3 + 4 + 1, 5, 1, 8, 8)
    assert_close(states[0], x0)
    assert_close(states[3], model.sinkhorn.sample(x0=x0))
    assert_close(states[-1], model.sample(x0=x0, steps=4))


def test_samples_follow_the_seed_and_leave_torchs_generator(model):
    state = torch.get_rng_state()
    assert torch.equal(model.sample(4, seed=2), model.sample(4, seed=2))
    assert not torch.equal(model.sample(4, seed=2), model.sample(4, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_adaptive_sampling_counts_too(model):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    with CountRows(model) as rows:
        x, nfe = model.sample(4, method="dopri5", return_nfe=True)
    assert nfe.sum() == sum(rows.values())
    assert_close(x, model.sample(4, method="heun", steps=200), atol=.03, rtol=.03)


@pytest.mark.parametrize("arguments, error, words", (
    (dict(n=0), ValueError, "^n "), (dict(), ValueError, "^n "),
    (dict(n=2, steps=0), ValueError, "^steps"),
    (dict(n=2, sinkhorn_steps=0), ValueError, "^steps"),
    (dict(n=2, method="rk3"), ValueError, "method.*rk3"),
    (dict(x0=torch.zeros(2, 3, 8, 8)), ValueError, r"^x0.*\(2, 3, 8, 8\)"),
    (dict(n=2, time_power=0.), ValueError, "time_power"),
))
def test_bad_sample_calls(model, arguments, error, words):
    with pytest.raises(error, match=words):
        model.sample(**arguments)


# ---- what comes in

class Arrays(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i].numpy()


def test_images_in_every_form(plain):
    x = images()
    for data in (TensorDataset(x), TensorDataset(x, torch.arange(40)), Arrays(x)):
        assert same(fitted(data), plain)
    assert fitted(lambda n: torch.rand(n, 1, 8, 8)*2 - 1).sample(2).isfinite().all()


@pytest.mark.parametrize("data, error, words", (
    (torch.zeros(5, 64), ValueError, r"images.*\(5, 64\)"),
    (torch.zeros(5, 8, 8), ValueError, r"\(5, 8, 8\)"),
    (torch.tensor([0., 255.]).expand(4, 1, 8, 2), ValueError, r"\[-1, 1\].*0 to 255.*127\.5"),
    (torch.full((4, 1, 8, 8), 9).byte(), ValueError, r"\[-1, 1\].*9.*127\.5"),
    (torch.full((4, 1, 8, 8), math.nan), ValueError, "NaN"),
    (torch.rand(4, 1, 7, 8), ValueError, "7.*8.*multiples of 2"),
    (lambda n: torch.zeros(n, 64), ValueError, r"\(2, 64\)"),
    ([[[[.1, .2]]], [["a"]]], ValueError, "rows of one shape"),
    (images(1), ValueError, "at least 2"),
))
def test_what_are_no_images(data, error, words):
    with pytest.raises(error, match=words):
        fitted(data)


def test_float64_images_stay_float64():
    assert fitted(images().double()).sample(3).dtype == torch.float64


def test_settings_reach_all_parts_that_have_them():
    model = tiny(lr=5e-4, t_end=.3, path="trigonometric", coupling="population")
    assert {part.config.lr for part in model.parts.values()} == {5e-4}
    assert model.sinkhorn.config.t_end == .3 and model.straight.config.path == "trigonometric"
    assert model.sinkhorn.config.coupling == model.straight.config.coupling == "population"


@pytest.mark.parametrize("settings, error, words", (
    (dict(epochs=3), TypeError, "'epochs'.*NSGF"), (dict(lr=-1.), ValueError, "lr.*-1"),
    (dict(t_end=2.), ValueError, "t_end.*2"),
))
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        tiny(**settings)


def test_configs_of_the_wrong_kind():
    with pytest.raises(TypeError, match="NSGFConfig.*FlowMatchingConfig"):
        NSGFPlusPlus(STRAIGHT, PREDICTOR, STRAIGHT, device="cpu")
    with pytest.raises(TypeError, match="TrainConfig.*NSGFConfig"):
        NSGFPlusPlus(SINKHORN, SINKHORN, STRAIGHT, device="cpu")


def test_a_model_that_is_not_whole_says_so(tmp_path):
    model = tiny().fit(images(), ("sinkhorn", "straight"), progress=False)
    for call in (lambda: model.sample(3), lambda: model.save(tmp_path/"m")):
        with pytest.raises(RuntimeError, match="no network"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_pool_keeps_to_its_bounds():
    from nsgf_nb.flow import TrajectoryPool
    for settings, most in ((dict(pool_size=128), 128), (dict(pool_mb=1), 2**18//(3*64))):
        pool = TrajectoryPool()
        tiny(**settings).fit(images(), "sinkhorn", progress=False, pool=pool)
        assert len(pool) <= most


# ---- files

def test_round_trip(model, saved, tmp_path):
    again = NSGFPlusPlus.load(saved, "cpu")
    assert torch.equal(again.sample(6, seed=3), model.sample(6, seed=3))
    for name in PARTS:
        assert getattr(again, name).config == getattr(model, name).config
    about = json.loads((tmp_path/"m.safetensors.json").read_text())
    assert about["model"] == "NSGFPlusPlus" and about["straight"]["config"]["sample_steps"] == 2
    again.save(tmp_path/"again")
    assert (tmp_path/"again").read_bytes() == saved.read_bytes()


def test_half_precision(model, tmp_path):
    model.save(tmp_path/"half", half=True)
    again = NSGFPlusPlus.load(tmp_path/"half", "cpu")
    assert_close(again.sample(6), model.sample(6), atol=2e-2, rtol=2e-2)
    with safe_open(tmp_path/"half", "pt") as file:
        assert file.get_tensor("straight.net.first.weight").dtype == torch.float16


@pytest.mark.parametrize("about, tensors, words", (
    (dict(straight=None), None, "model of type None"), (dict(sinkhorn=[1]), None, "type None"),
    (dict(model="NSGF"), None, "'NSGF'.*NSGFPlusPlus"),
    (None, {"predictor.net.last.bias": None}, "whole TimePredictor"),
    (None, {"straight.mean": torch.zeros(3)}, "whole FlowMatching"),
), ids=str)
def test_tampered_files(saved, about, tensors, words):
    rewrite(saved, about, tensors)
    with pytest.raises(ValueError, match=words):
        NSGFPlusPlus.load(saved, "cpu")


BOASTS = (dict(mult=[1]*10**5), dict(blocks=10**6), dict(channels=2**40), dict(patch=10**9),
          dict(mult=[10**9]))


@pytest.mark.parametrize("change", BOASTS, ids=range(len(BOASTS)))
def test_a_boastful_description_allocates_nothing(saved, change):
    config = {**dataclasses.asdict(STRAIGHT), **change}
    with safe_open(saved, "pt") as file:
        straight = json.loads(file.metadata()["nsgf_nb"])["straight"]
    rewrite(saved, dict(straight=dict(straight, config=config)))
    with pytest.raises(ValueError, match="whole FlowMatching"):
        NSGFPlusPlus.load(saved, "cpu")


def test_weights_of_an_unknown_name():
    with pytest.raises(ValueError, match="name.*digits.*imagenet"):
        NSGFPlusPlus.from_pretrained("imagenet")
