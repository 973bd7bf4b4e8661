"""NSGF as its users meet it: sampling, learning, determinism, files, interruption. Tiny models."""
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import rewrite
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.models import Model
from nsgf_nb.nsgf import NSGFConfig

TINY = NSGFConfig(sample_steps=4, pool_size=256, minibatch=32, blur=.3, train_steps=20,
                  batch_size=64, width=16, depth=1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(data=None, source=None, pool=None, **settings):
    data = normal(100, 2) if data is None else data
    return NSGF(TINY, device="cpu", **settings).fit(data, source, progress=False, pool=pool)


@pytest.fixture(scope="module")
def model():
    return tiny(normal(200, 2)*torch.tensor([2., .5]) + 3)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path/"model.safetensors")
    return tmp_path/"model.safetensors"


# ---- settings

@pytest.mark.parametrize("settings, error, words", (
    (dict(blur=0.), ValueError, "blur.*0"),
    (dict(blur_unit="cm"), ValueError, "blur_unit.*std.*cm"),
    (dict(sample_steps=0), ValueError, "sample_steps.*0"),
    (dict(pool_steps=2.5), TypeError, "pool_steps.*2.5"),
    (dict(t_end=1.5), ValueError, "t_end.*1.5"), (dict(self_term="none"), ValueError, "self_term"),
    (dict(minibatch=0), ValueError, "minibatch"), (dict(stepz=3), TypeError, "'stepz'.*NSGF"),
))
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        NSGF(**settings)


def test_a_config_of_another_model_is_refused():
    with pytest.raises(TypeError, match="config.*NSGFConfig.*int"):
        NSGF(3)


def test_settings_replace_those_of_the_config():
    assert NSGF(TINY, sample_steps=7).config == dataclasses.replace(TINY, sample_steps=7)
    assert NSGF(blur=1, lr=1).config == NSGF(blur=1., lr=1.).config


# ---- sampling

@pytest.mark.parametrize("arguments, error, words", (
    (dict(n=0), ValueError, "^n .*0"), (dict(n=2.), ValueError, "^n .*2.0"),
    (dict(n=True), ValueError, "^n .*True"), (dict(), ValueError, "^n .*None"),
    (dict(n=3, steps=0), ValueError, "^steps.*0"),
    (dict(x0=torch.zeros(3, 5)), ValueError, r"^x0.*\(n, 2\).*\(3, 5\)"),
    (dict(n=4, x0=torch.zeros(3, 2)), ValueError, "^n .*x0.*3.*4"),
    (dict(x0=torch.zeros(0, 2)), ValueError, "^x0"),
    (dict(x0=[["a", "b"]]), TypeError, "^x0.*numbers"),
    (dict(x0=torch.full((3, 2), math.nan)), ValueError, "^x0.*6"),
))
def test_bad_sample_calls(model, arguments, error, words):
    with pytest.raises(error, match=words):
        model.sample(**arguments)


def test_a_model_without_network_says_so(tmp_path):
    new = NSGF(device="cpu")
    calls = (lambda: new.sample(3), lambda: new.save(tmp_path/"m"), lambda: new(normal(3, 2), 0.))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"fit\(data\)"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", (None, 1, 7))
def test_trajectories_end_in_the_samples(model, steps):
    xs = model.sample(9, steps=steps, trajectory=True)
    assert xs.shape == ((steps or 4) + 1, 9, 2)
    assert xs.dtype == torch.float32 and not xs.requires_grad
    assert torch.equal(xs[-1], model.sample(9, steps=steps))
    assert_close(xs, model.sample(x0=xs[0], steps=steps, trajectory=True), atol=1e-5, rtol=0)


def test_samples_follow_the_seed(model):
    assert torch.equal(model.sample(9, seed=3), model.sample(9, seed=3))
    assert not torch.equal(model.sample(9, seed=3), model.sample(9, seed=4))


def test_trajectories_are_euler_steps_of_the_field_in_the_datas_unit(model):
    xs = model.sample(9, trajectory=True)
    for k in range(4):
        assert_close(xs[k + 1], xs[k] + model(xs[k], k/4)/4, atol=1e-5, rtol=1e-5)


def test_large_samples_are_split_without_a_trace(model):
    x0 = normal(10_000, 2)
    parts = torch.cat([model.sample(x0=x) for x in x0.split(3000)])
    assert_close(model.sample(x0=x0), parts, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.sample(5000, trajectory=True)[-1], model.sample(5000))


def test_the_config_says_how_to_sample(model):
    x0 = normal(9, 2)
    other = dataclasses.replace(model.config, sample_method="adams", time_power=2.)
    expected = model.sample(x0=x0, method="adams", time_power=2.)
    euler = model.sample(x0=x0)
    before = model.config
    model.config = other
    try:
        assert torch.equal(model.sample(x0=x0), expected)
        assert torch.equal(model.sample(x0=x0, method="euler", time_power=1.), euler)
    finally:
        model.config = before
    assert not torch.equal(expected, euler)
    with pytest.raises(ValueError, match="sample_method must be one of euler, adams.*'rk3'"):
        NSGF(sample_method="rk3")


def test_network_calls_are_counted(model):
    _, nfe = model.sample(5, steps=3, return_nfe=True, method="heun")
    assert nfe.tolist() == [6]*5
    x, nfe = model.sample(x0=normal(2, 2), t_start=torch.tensor([0., .5]), step_size=.25,
                          return_nfe=True)
    assert nfe.tolist() == [4, 2] and x.isfinite().all()


SOURCES = {"tensor": normal(50, 2), "Dataset": TensorDataset(normal(50, 2)),
           "function": lambda n: torch.randn(n, 2)}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_samples_from_a_given_source_follow_the_seed(source):
    moved = tiny(source=source)
    assert torch.equal(moved.sample(9, seed=3), moved.sample(9, seed=3))
    assert not torch.equal(moved.sample(9, seed=3), moved.sample(9, seed=4))


# ---- learning

def test_fifty_dimensions_are_learned():
    mean = torch.linspace(-20, 20, 50)
    std = torch.linspace(.5, 1.5, 50)
    model = NSGF(device="cpu", blur=.5, pool_size=2**13, train_steps=800, batch_size=512,
                 width=96, depth=2)
    x = model.fit(normal(4000, 50)*std + mean, progress=False).sample(2000)
    assert (x.mean(0) - mean).abs().max() < .25
    assert (x.std(0)/std - 1).abs().mean() < .15


@pytest.mark.parametrize("shape", ((1,), (3, 2, 2)))
@pytest.mark.parametrize("n", (2, 100))
def test_any_shape_and_few_samples(shape, n):
    x = tiny(normal(n, *shape)).sample(6, trajectory=True)
    assert x.shape == (5, 6, *shape) and x.isfinite().all()


def test_float64_data_give_float64_samples():
    assert tiny(normal(100, 2).double()).sample(5).dtype == torch.float64


def test_blur_in_the_datas_unit_is_the_relative_one():
    data = 40*normal(200, 2) + 7
    relative = tiny(data, scale="global")
    scale = relative.standardizer.scale.item()
    absolute = tiny(data, blur=.3*scale, blur_unit="data", scale="global")
    with pytest.raises(ValueError, match="blur_unit='data'.*scale='global'"):
        tiny(data, blur=.3*scale, blur_unit="data")
    assert absolute.flow_settings(absolute.standardizer).blur == pytest.approx(.3)
    assert_close(relative.sample(20), absolute.sample(20), atol=1e-2, rtol=0)
    assert not torch.allclose(relative.sample(20), tiny(data, blur=3., scale="global").sample(20),
                              atol=.1)


@pytest.mark.parametrize("scale", (1e-4, 1e4))
def test_scale_and_offset_do_not_matter(scale):
    x = normal(100, 2)
    scaled = tiny(scale*x + 3*scale).sample(20)
    assert_close(scaled/scale - 3, tiny(x).sample(20), atol=2e-2, rtol=0)


def test_t_end_stops_the_flows_of_the_pool_on_the_way():
    pool = TrajectoryPool()
    model = tiny(normal(100, 2) + 5, source=normal(100, 2), pool=pool, t_end=.5, blur=.05)
    start, end = pool.states[0], pool.states[-1]
    target = model.standardizer.to_model(normal(100, 2) + 5).mean(0)
    assert_close(end.mean(0), (start.mean(0) + target)/2, atol=.1, rtol=0)


def test_a_pool_is_built_once_and_can_be_shared():
    pool = TrajectoryPool()
    first = tiny(pool=pool)
    states = pool.states.clone()
    second = tiny(pool=pool, lr=1e-4)
    assert torch.equal(pool.states, states)
    assert not torch.equal(first.sample(5), second.sample(5))
    with pytest.raises(ValueError):
        tiny(pool=pool, blur=.7)


def test_the_pool_respects_its_memory():
    pool = TrajectoryPool()
    tiny(normal(100, 200), pool=pool, pool_size=2**16, pool_mb=20, train_steps=1, blur=5.)
    assert pool.states.numel()*4 <= 20*2**20


def test_batches_are_what_fit_learns_from():
    batches = NSGF(TINY, device="cpu").batches(normal(100, 2) + 5)
    x, t, v = next(batches)
    assert x.shape == v.shape == (64, 2) and t.shape == (64,)
    assert x.abs().mean() < 2  # in the model's unit


def test_a_model_must_say_what_it_learns_from():
    with pytest.raises(NotImplementedError, match="Model"):
        Model(device="cpu").fit(normal(10, 2), progress=False)


# ---- determinism

def test_global_generators_are_left_alone(saved):
    import random

    import numpy
    torch.manual_seed(123)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    tiny(lambda n: torch.randn(n, 2), source=lambda n: torch.rand(n, 2)).sample(5, seed=7)
    NSGF.load(saved).sample(5)
    with pytest.raises(ValueError):
        tiny(lambda n: torch.randn(n - 1, 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


DATA = {"tensor": normal(100, 2), "function": lambda n: torch.randn(n, 2)}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_same_seed_same_bits(data):
    torch.manual_seed(1)
    first = tiny(data)
    torch.manual_seed(2)
    second = tiny(data)
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(first.sample(50, trajectory=True), second.sample(50, trajectory=True))
    assert not torch.equal(first.sample(50), tiny(data, seed=1).sample(50))


def digest(model):
    return hashlib.sha256(model.sample(50).numpy().tobytes()).hexdigest()


def test_same_bits_in_a_fresh_process():
    code = f"""if True:
        import hashlib, torch
        torch.set_num_threads({torch.get_num_threads()})
        from nsgf_nb import NSGF
        from nsgf_nb.nsgf import NSGFConfig
        model = NSGF({TINY!r}, device="cpu").fit(lambda n: torch.randn(n, 2), progress=False)
        print(hashlib.sha256(model.sample(50).numpy().tobytes()).hexdigest())"""
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == digest(tiny(lambda n: torch.randn(n, 2)))


# ---- files

def test_round_trip(model, saved, tmp_path):
    again = NSGF.load(saved)
    assert again.config == model.config
    assert torch.equal(again.sample(20, seed=5), model.sample(20, seed=5))
    about = json.loads((tmp_path/"model.safetensors.json").read_text())
    assert about["config"]["sample_steps"] == 4 and about["shape"] == [2]
    again.save(tmp_path/"deep"/"er"/"again.safetensors")
    assert (tmp_path/"deep"/"er"/"again.safetensors").read_bytes() == saved.read_bytes()


def test_half_precision_is_half_the_size_and_computes_in_float32(model, tmp_path):
    wide = tiny(width=64)
    wide.save(tmp_path/"half", half=True)
    wide.save(tmp_path/"full")
    assert (tmp_path/"half").stat().st_size < .7*(tmp_path/"full").stat().st_size
    again = NSGF.load(tmp_path/"half")
    assert {p.dtype for p in again.net.parameters()} == {torch.float32}
    assert_close(again.sample(50), wide.sample(50), atol=1e-2, rtol=1e-2)


def test_a_loaded_model_can_be_fitted_anew(saved):
    again = NSGF.load(saved).fit(normal(100, 2), progress=False)
    assert torch.equal(again.sample(5), tiny().sample(5))


def test_a_given_source_is_not_in_the_file(tmp_path):
    moved = tiny(source=lambda n: torch.rand(n, 2))
    moved.save(tmp_path/"m")
    again = NSGF.load(tmp_path/"m")
    x0 = normal(5, 2)
    assert torch.equal(again.sample(x0=x0), moved.sample(x0=x0))
    with pytest.raises(ValueError, match="x0"):
        again.sample(5)


def test_no_pickle_is_written_or_read(saved, tmp_path, monkeypatch):
    import pickle
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    NSGF.load(saved)
    monkeypatch.undo()
    torch.save({"mean": torch.zeros(2)}, tmp_path/"pickled.pt")
    with pytest.raises(ValueError, match="pickled.pt"):
        NSGF.load(tmp_path/"pickled.pt")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()

    def fail(*args):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny().save(saved)
    assert saved.read_bytes() == old


@pytest.mark.parametrize("keep", (0, 7, 100, -100, -1))
def test_truncated_files(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors"):
        NSGF.load(saved)


@pytest.mark.parametrize("content", (b"\x93NUMPY" + b"v"*200, b"hello", b"\xff"*64))
def test_foreign_bytes(tmp_path, content):
    (tmp_path/"m").write_bytes(content)
    with pytest.raises(ValueError, match="m is not"):
        NSGF.load(tmp_path/"m")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path/"none", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            NSGF.load(path)


def test_foreign_safetensors(saved):
    tensors = load_file(saved)
    for metadata in (None, {"nsgf_nb": "[1, 2]"}, {"nsgf_nb": "{"}):
        save_file(tensors, saved, metadata)
        with pytest.raises(ValueError, match="model.safetensors is"):
            NSGF.load(saved)


@pytest.mark.parametrize("about, words", (
    (dict(format="nsgf_nb/2"), "nsgf_nb/2.*nsgf_nb/3"), (dict(format=None), "format None"),
    (dict(model="NSGFPlusPlus"), "NSGFPlusPlus.*NSGF"), (dict(config=None), "whole NSGF"),
    (dict(config={"weigh": 3}), "whole NSGF"), (dict(config=[1]), "whole NSGF"),
    (dict(config={"sample_steps": 0}), "sample_steps.*0"), (dict(shape=None), "whole NSGF"),
    (dict(shape=[3]), "whole NSGF"), (dict(shape=[-2]), "whole NSGF"),
    (dict(shape="ab"), "whole NSGF"), (dict(source=None), "whole NSGF"),
    (dict(source="else"), "source.*else"),
), ids=str)
def test_tampered_descriptions(saved, about, words):
    rewrite(saved, about)
    with pytest.raises(ValueError, match=words):
        NSGF.load(saved)


TAMPERED = (
    {"mean": None}, {"scale": None}, {"mean": torch.zeros(3)}, {"scale": torch.ones(3)},
    {"mean": torch.zeros(2).long()}, {"net.layers.0.weight": None},
    {"net.layers.0.weight": torch.zeros(2, 2)}, {"net.extra": torch.zeros(2)},
    {"net.embed_x.omega": torch.zeros(2, 5)},
    {"net.layers.0.bias": torch.zeros(16, dtype=torch.int8)},
)


@pytest.mark.parametrize("tensors", TAMPERED, ids=range(len(TAMPERED)))
def test_tampered_tensors(saved, tensors):
    rewrite(saved, tensors=tensors)
    with pytest.raises(ValueError, match="whole NSGF"):
        NSGF.load(saved)


@pytest.mark.parametrize("change", (dict(width=10**7), dict(depth=10**6), dict(shape=[10**9])),
                         ids=str)
def test_a_boastful_description_allocates_nothing(saved, monkeypatch, change):
    "Shapes are compared before memory is taken, the number of layers before they are built."
    built = []
    init = torch.nn.Linear.__init__

    def counted(self, *args, **kwargs):
        built.append(args)
        assert len(built) < 1000
        init(self, *args, **kwargs)
        assert self.weight.device.type == "meta"
    monkeypatch.setattr(torch.nn.Linear, "__init__", counted)
    shape = change.get("shape", [2])
    settings = {name: value for name, value in change.items() if name != "shape"}
    rewrite(saved, dict(shape=shape, config={**dataclasses.asdict(TINY), **settings}))
    with pytest.raises(ValueError, match="whole NSGF"):
        NSGF.load(saved)


# ---- interruption

def interrupt(monkeypatch, method, after):
    "Ctrl-C in the pool's `method`, at its call number `after`."
    calls = []
    inner = getattr(TrajectoryPool, method)

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)
    monkeypatch.setattr(TrajectoryPool, method, wrapped)


def test_interrupted_training_keeps_a_usable_model(monkeypatch, tmp_path):
    interrupt(monkeypatch, "batch", 7)
    model = NSGF(TINY, device="cpu")
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="7 of 20 steps"):
        model.fit(normal(100, 2), progress=False)
    assert len(model.losses) == 7 and torch.equal(state, torch.get_rng_state())
    x = model.sample(5)
    assert x.isfinite().all()
    model.save(tmp_path/"m")
    assert torch.equal(NSGF.load(tmp_path/"m").sample(5), x)


def test_an_interrupted_pool_leaves_no_model(monkeypatch):
    interrupt(monkeypatch, "build", 0)
    model = NSGF(TINY, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        model.fit(normal(100, 2), progress=False)
    with pytest.raises(RuntimeError, match="no network"):
        model.sample(5)


@pytest.mark.parametrize("how", ("interrupted", "bad source"))
def test_a_second_fit_that_fails_early_leaves_the_first_model(monkeypatch, how):
    model = tiny()
    before = model.sample(5)
    if how == "interrupted":
        interrupt(monkeypatch, "build", 0)
    source = normal(9, 3) if how == "bad source" else None
    with pytest.raises((KeyboardInterrupt, ValueError)):
        model.fit(100*normal(100, 2) + 1000, source, progress=False)
    assert torch.equal(model.sample(5), before)


# ---- weights that come with the package

def test_shipped_weights_make_images():
    model = NSGFPlusPlus.from_pretrained("mnist", device="cpu")
    x, nfe = model.sample(4, sinkhorn_steps=2, steps=3, return_nfe=True)
    assert x.shape == (4, 1, 28, 28) and nfe.tolist() == [5]*4
    assert x.abs().mean() > .5  # mostly black and white


def test_shipped_weights_of_another_kind():
    with pytest.raises(ValueError, match="'NSGFPlusPlus'.*not 'NSGF'"):
        NSGF.from_pretrained("mnist")


def test_a_pool_is_no_larger_than_the_states_that_are_drawn(monkeypatch):
    "Unless it is given, for then others may draw from it, too."
    data = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    settings = dict(train_steps=4, batch_size=32, width=8, depth=1, device="cpu", pool_size=2**12,
                    minibatch=32)
    sizes = []
    build = TrajectoryPool.build

    def counted(pool, recipe, *arguments):
        sizes.append(recipe.capacity)
        return build(pool, recipe, *arguments)
    monkeypatch.setattr(TrajectoryPool, "build", counted)
    NSGF(**settings).fit(data, progress=False)
    NSGF(**settings).fit(data, progress=False, pool=TrajectoryPool())
    assert sizes == [4*32, 2**12]
