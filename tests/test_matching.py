"""NSGF as its users meet it: data of every kind, bad input, determinism, files, interruption. All models are tiny."""
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from nsgf_nb import NSGF
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.matching import Fitted, NSGFConfig, as_sampler, find_device, fit
from nsgf_nb.models import MLP

TINY = NSGFConfig(steps=4, pool_size=256, minibatch=32, blur=.3, train_steps=20, batch_size=64, width=16, depth=1)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def tiny(data=None, source=None, **settings): return NSGF(TINY, device="cpu", **settings).fit(normal(100, 2) if data is None else data, source, progress=False)


@pytest.fixture(scope="module")
def model(): return tiny(normal(200, 2)*torch.tensor([2., .5]) + 3)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path/"model.safetensors")
    return tmp_path/"model.safetensors"


# ---- what comes in

BAD = {
    "empty": (torch.zeros(0, 2), ValueError, r"non-empty tensor .* got shape \(0, 2\)"),
    "one point": (torch.zeros(1, 2), ValueError, "at least 2 samples, got 1"),
    "one-dimensional": (torch.zeros(5), ValueError, r"must be of shape \(n, \*shape\), got \(5,\); numbers go in as \(n, 1\)"),
    "no features": (torch.zeros(5, 0), ValueError, r"got shape \(5, 0\)"),
    "ints": (torch.zeros(5, 2, dtype=torch.int32), TypeError, r"floating-point numbers, got torch.int32: convert it with {}\.float\(\)"),
    "bools": (torch.zeros(5, 2, dtype=torch.bool), TypeError, r"got torch.bool: convert it with {}\.float\(\)"),
    "nan": (torch.tensor([[0., 0.], [0., math.nan], [math.inf, 0.]]), ValueError, r"2 NaN or infinite values among 6, the first at index \(1, 1\)"),
    "numpy": (torch.zeros(5, 2).numpy(), TypeError, "must be a tensor, a map-style Dataset or a function .* got ndarray"),
    "list": ([[0., 0.], [1., 1.]], TypeError, "got list"),
    "none": ("data", TypeError, "got str"),
    "function of numpy": (lambda n: torch.zeros(n, 2).numpy(), TypeError, "must be a torch.Tensor, got ndarray"),
    "function of ints": (lambda n: torch.zeros(n, 2, dtype=torch.int64), TypeError, "floating-point numbers, got torch.int64"),
    "function of nan": (lambda n: torch.full((n, 2), math.nan), ValueError, r"NaN or infinite values among \d+, the first at index \(0, 0\)"),
    "function of too few": (lambda n: torch.zeros(3, 2), ValueError, r"must return \d+ samples, got shape \(3, 2\)"),
    "function of vectors": (lambda n: torch.zeros(n), ValueError, "numbers go in as"),
    "dataset of one": (TensorDataset(torch.zeros(1, 2)), ValueError, "at least 2 samples, got 1"),
    "empty dataset": (TensorDataset(torch.zeros(0, 2)), ValueError, "must .*(non-empty|at least 2 samples)"),
    "dataset of ints": (TensorDataset(torch.zeros(5, 2, dtype=torch.uint8)), TypeError, r"convert it with {}\.float\(\)"),
}
bad_data = pytest.mark.parametrize("bad, error, words", BAD.values(), ids=BAD.keys())


@bad_data
def test_bad_data_is_refused_by_name(bad, error, words):
    with pytest.raises(error, match="^data.*" + words.format("data")): tiny(bad)


@bad_data
def test_bad_source_is_refused_by_name(bad, error, words):
    with pytest.raises(error, match="^source.*" + words.format("source")): tiny(source=bad)


class Stream(IterableDataset):
    def __iter__(self): return iter(normal(10, 2))


class Unequal(Dataset):
    def __len__(self): return 3
    def __getitem__(self, i): return torch.zeros(i + 1)


class Named(Unequal):
    def __getitem__(self, i): return {"image": torch.zeros(2)}


def test_iterable_datasets_are_refused():
    with pytest.raises(TypeError, match="data must be a tensor, a map-style Dataset or a function .* got Stream"): tiny(Stream())


@pytest.mark.parametrize("bad", (Unequal(), Named()), ids=("samples of unequal shape", "samples in dicts"))
def test_datasets_that_are_no_samples_are_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="data"): as_sampler(bad, torch.Generator())


@pytest.mark.parametrize("source", (normal(50, 3), lambda n: normal(n, 3), normal(50, 1, 2), TensorDataset(normal(50, 3))), ids=("tensor", "function", "shape", "Dataset"))
def test_source_and_data_of_different_shape_are_refused(source):
    with pytest.raises(ValueError, match=r"source must be of shape \(n, 2\), got \(\d+, (3|1, 2)\)"): tiny(source=source)


def test_the_same_sample_in_every_form():
    x, labels = normal(64, 1, 4, 4), torch.arange(64)
    class Images(Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return x[i], int(labels[i])
    class Alone(Images):
        def __getitem__(self, i): return x[i].numpy()
    class Lists(Images):
        def __getitem__(self, i): return [x[i], "label"]
    expected = tiny(x).sample(3)
    assert expected.shape == (3, 1, 4, 4)
    for data in (TensorDataset(x), TensorDataset(x, labels), Images(), Alone(), Lists(), torch.utils.data.Subset(Images(), range(64))):
        assert torch.equal(tiny(data).sample(3), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_floats_of_any_precision_go_in(dtype):
    data = normal(100, 2).to(dtype)
    x = tiny(data).sample(5)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(x, tiny(data.float()).sample(5), check_dtype=False, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", ((1,), (5,), (3, 2, 2)))
@pytest.mark.parametrize("n", (2, 3, 100))
def test_any_shape_and_few_samples(shape, n):
    x = tiny(normal(n, *shape)).sample(6, trajectory=True)
    assert x.shape == (5, 6, *shape) and x.isfinite().all()


def test_one_point_repeated_is_data():
    assert tiny(torch.full((10, 2), 5.)).sample(5).isfinite().all()


def test_data_that_carry_a_graph():
    data, source = normal(100, 2).requires_grad_(), normal(100, 2, seed=1).requires_grad_()
    x = tiny(data, source).sample(x0=source[:5])
    assert not x.requires_grad and torch.equal(x, tiny(data.detach(), source.detach()).sample(x0=source[:5].detach()))


def test_an_epoch_deals_everything_once():
    draw = as_sampler(torch.arange(10.)[:, None], torch.Generator().manual_seed(0))
    epochs = draw(30).view(3, 10)
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs) and not torch.equal(epochs[0], epochs[1])


# ---- settings

@pytest.mark.parametrize("settings, error, words", (
    (dict(blur=0.), ValueError, "blur must be a positive number, got 0.0"), (dict(blur=-1), ValueError, "blur must be a positive number, got -1"),
    (dict(blur=math.nan), ValueError, "blur must be"), (dict(blur="a"), TypeError, "blur must be of type float, got 'a'"),
    (dict(blur=True), TypeError, "blur must be of type float, got True"), (dict(blur_unit="cm"), ValueError, "blur_unit must be one of std, data, got 'cm'"),
    (dict(steps=0), ValueError, "steps must be at least 1, got 0"), (dict(steps=-1), ValueError, "steps must be at least 1, got -1"),
    (dict(steps=2.5), TypeError, "steps must be of type int, got 2.5"), (dict(train_steps=0), ValueError, "train_steps must be at least 1"),
    (dict(batch_size=0), ValueError, "batch_size"), (dict(minibatch=0), ValueError, "minibatch"), (dict(lr=0.), ValueError, "lr must be"),
    (dict(ema=1.), ValueError, r"ema must lie in \[0, 1\), got 1.0"), (dict(seed=.5), TypeError, "seed must be of type int"),
    (dict(stepz=3), TypeError, "stepz"),
))
def test_bad_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words): NSGF(**settings)


@pytest.mark.parametrize("device", ("cuda:99", "gpu", "nowhere:0"))
def test_a_device_that_does_not_exist(device, saved):
    for call in (lambda: find_device(device), lambda: NSGF(device=device), lambda: NSGF.load(saved, device=device)):
        with pytest.raises(ValueError, match=f"^device '{device}' cannot be used here: .") as e: call()
        assert "\n" not in str(e.value)


def test_whole_numbers_are_numbers_too():
    assert NSGF(blur=1, lr=1).config == NSGF(blur=1., lr=1.).config


def test_config_is_frozen_and_settings_replace_it():
    with pytest.raises(dataclasses.FrozenInstanceError): TINY.steps = 3
    assert NSGF(TINY, steps=7).config == dataclasses.replace(TINY, steps=7) and TINY.steps == 4


# ---- sampling

@pytest.mark.parametrize("kw, error, words", (
    (dict(n=0), ValueError, "n must be an integer of at least 1, got 0"), (dict(n=-1), ValueError, "n must be"), (dict(n=2.), ValueError, "n must be"),
    (dict(n=True), ValueError, "n must be"), (dict(), ValueError, "n must be .* got None"), (dict(n=3, steps=0), ValueError, "steps must be at least 1, got 0"),
    (dict(x0=torch.zeros(3, 5)), ValueError, r"x0 must be of shape \(n, 2\), got \(3, 5\)"), (dict(x0=torch.zeros(0, 2)), ValueError, "x0 must be a non-empty"),
    (dict(x0=torch.zeros(3, 2).long()), TypeError, r"x0\.float\(\)"), (dict(x0=torch.full((3, 2), math.nan)), ValueError, "x0 has 6 NaN"),
))
def test_bad_sample_calls_are_refused(model, kw, error, words):
    with pytest.raises(error, match=words): model.sample(**kw)


def test_a_model_without_network_says_so(tmp_path):
    for call in (lambda: NSGF().sample(3), lambda: NSGF().save(tmp_path/"m"), lambda: NSGF()(torch.zeros(3, 2), 0.)):
        with pytest.raises(RuntimeError, match=r"no network yet: call fit\(data\), or load\(path\)"): call()
    assert list(tmp_path.iterdir()) == []


def test_trajectories_and_steps(model):
    for steps in (None, 1, 7):
        xs = model.sample(9, steps=steps, trajectory=True)
        assert xs.shape == ((steps or 4) + 1, 9, 2) and xs.dtype == torch.float32 and not xs.requires_grad
        assert torch.equal(xs[-1], model.sample(9, steps=steps))
        assert torch.equal(xs, model.sample(x0=xs[0], steps=steps, trajectory=True)) or torch.allclose(xs, model.sample(x0=xs[0], steps=steps, trajectory=True), atol=1e-5)
    assert not torch.equal(model.sample(9, steps=1), model.sample(9, steps=7))
    assert torch.equal(model.sample(9, seed=3), model.sample(9, seed=3)) and not torch.equal(model.sample(9, seed=3), model.sample(9, seed=4))


def test_trajectories_are_euler_steps_of_the_field_in_the_datas_unit(model):
    xs = model.sample(9, trajectory=True)
    for k in range(4): assert_close(xs[k + 1], xs[k] + model(xs[k], k/4)/4, atol=1e-5, rtol=1e-5)
    assert_close(model(xs[0], torch.full((9,), .5)), model(xs[0], .5))


def test_large_samples_are_split_without_a_trace(model):
    x0 = normal(10_000, 2)
    whole = model.sample(x0=x0)
    assert whole.shape == x0.shape
    assert_close(whole, torch.cat([model.sample(x0=x) for x in x0.split(3000)]), atol=1e-5, rtol=1e-5)
    assert model.sample(5000, trajectory=True).shape == (5, 5000, 2)
    assert torch.equal(model.sample(5000, trajectory=True)[-1], model.sample(5000))


@pytest.mark.parametrize("source", (normal(50, 2), TensorDataset(normal(50, 2)), lambda n: torch.randn(n, 2)), ids=("tensor", "Dataset", "function"))
def test_samples_from_a_given_source_follow_the_seed(source):
    moved = tiny(source=source)
    assert torch.equal(moved.sample(9, seed=3), moved.sample(9, seed=3))
    assert not torch.equal(moved.sample(9, seed=3), moved.sample(9, seed=4))


# ---- learning

def test_fifty_dimensions_are_learned():
    mean, std = torch.linspace(-20, 20, 50), torch.linspace(.5, 1.5, 50)
    data = normal(4000, 50)*std + mean
    x = NSGF(device="cpu", blur=.5, pool_size=2**13, train_steps=400, batch_size=512, width=96, depth=2).fit(data, progress=False).sample(2000)
    assert (x.mean(0) - mean).abs().max() < .25
    assert (x.std(0)/std - 1).abs().mean() < .15


def test_blur_in_the_datas_unit_is_the_relative_one(monkeypatch):
    data, blurs, init = 40*normal(200, 2) + 7, [], TrajectoryPool.__init__
    def watched(self, capacity, shape, steps=5, blur=.05, *args, **kw): blurs.append(blur); init(self, capacity, shape, steps, blur, *args, **kw)
    monkeypatch.setattr(TrajectoryPool, "__init__", watched)
    relative = tiny(data)
    scale = relative.coordinates.scale.item()
    absolute = tiny(data, blur=.3*scale, blur_unit="data")
    assert 35 < scale < 45 and blurs == pytest.approx([.3, .3])
    assert_close(relative.sample(20), absolute.sample(20), atol=1e-2, rtol=0)
    assert not torch.allclose(relative.sample(20), tiny(data, blur=3.).sample(20), atol=.1)


@pytest.mark.parametrize("scale", (1e-4, 1e4))
def test_scale_and_offset_do_not_matter(scale):
    x = normal(100, 2)
    assert_close((tiny(scale*x + 3*scale).sample(20)/scale - 3), tiny(x).sample(20), atol=2e-2, rtol=0)


def test_pool_respects_its_memory():
    pools, init = [], TrajectoryPool.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrajectoryPool, "__init__", lambda self, *args, **kw: (init(self, *args, **kw), pools.append(self))[0])
        tiny(normal(100, 200), pool_size=2**16, pool_mb=20, train_steps=1, blur=5.)
    assert pools[0].states.numel()*4 <= 20*2**20


def broken(after):
    "Batches whose targets are NaN from step `after` on."
    for i in range(10_000):
        x = normal(8, 2, seed=i)
        yield x, torch.zeros(8), x*(math.nan if i >= after else 1)


@pytest.mark.parametrize("after, steps", ((0, 10), (0, 200), (60, 200), (10, 30)))
def test_a_loss_that_is_no_number_stops_the_fit(after, steps):
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step {after}: try a smaller learning rate \(lr\)"):
        fit(MLP(width=8, depth=1), broken(after), steps, progress=False)


def test_fit_averages_and_counts():
    net = MLP(width=8, depth=1)
    batches = ((x, torch.zeros(8), x) for x in (normal(8, 2, seed=i) for i in range(30)))
    done = fit(net, batches, 30, progress=False)
    assert isinstance(done, Fitted) and done.losses.shape == (30,) and not done.interrupted and done.seconds > 0
    assert done.net is not net and not done.losses.requires_grad
    assert any(not torch.equal(p, q) for p, q in zip(done.net.parameters(), net.parameters()))


# ---- determinism

def test_fit_sample_and_load_leave_torchs_global_generator(saved):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    tiny(lambda n: torch.randn(n, 2), source=lambda n: torch.rand(n, 2)).sample(5, seed=7)
    NSGF.load(saved).sample(5)
    with pytest.raises(ValueError): tiny(lambda n: torch.randn(n - 1, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_numpys_and_pythons_generators_are_left_too(saved):
    import random
    import numpy
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    tiny().sample(5)
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist())


@pytest.mark.parametrize("data", (normal(100, 2), lambda n: torch.randn(n, 2)), ids=("tensor", "function of the global generator"))
def test_same_seed_same_bits(data):
    torch.manual_seed(1)
    a = tiny(data)
    torch.manual_seed(2); torch.rand(3)
    b, c = tiny(data), tiny(data, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.net.state_dict().values(), b.net.state_dict().values()))
    assert torch.equal(a.losses, b.losses) and torch.equal(a.sample(50, trajectory=True), b.sample(50, trajectory=True))
    assert not torch.equal(a.sample(50), c.sample(50))


def test_same_bits_in_a_fresh_process():
    code = f"""if True:
        import hashlib, torch
        torch.set_num_threads({torch.get_num_threads()})
        from nsgf_nb import NSGF
        from nsgf_nb.matching import NSGFConfig
        model = NSGF({TINY!r}, device="cpu").fit(lambda n: torch.randn(n, 2), progress=False)
        print(hashlib.sha256(model.sample(50).numpy().tobytes()).hexdigest())"""
    here = hashlib.sha256(tiny(lambda n: torch.randn(n, 2)).sample(50).numpy().tobytes()).hexdigest()
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == here


# ---- files

def test_round_trip(model, saved, tmp_path):
    again = NSGF.load(saved)
    assert again.config == model.config and torch.equal(again.sample(20, seed=5), model.sample(20, seed=5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "model.safetensors.json"]
    about = json.loads((tmp_path/"model.safetensors.json").read_text())
    with safe_open(saved, "pt") as f: inside = json.loads(f.metadata()["nsgf_nb"])
    assert len(inside.pop("sha256")) == 64 and inside == about
    assert about["config"]["steps"] == 4 and about["format"] == "nsgf_nb/2" and about["model"] == "NSGF" and about["shape"] == [2]
    again.save(tmp_path/"deep"/"er"/"again.safetensors")
    assert (tmp_path/"deep"/"er"/"again.safetensors").read_bytes() == saved.read_bytes()


def test_a_loaded_model_can_be_fitted_anew(saved):
    assert torch.equal(NSGF.load(saved).fit(normal(100, 2), progress=False).sample(5), tiny().sample(5))


@pytest.mark.parametrize("name", ("model.json", "model"))
def test_any_file_name_comes_back(model, tmp_path, name):
    model.save(str(tmp_path/name))
    assert torch.equal(NSGF.load(str(tmp_path/name)).sample(5), model.sample(5))


def test_a_source_of_its_own_is_asked_for_after_loading(tmp_path):
    moved = tiny(source=lambda n: torch.rand(n, 2))
    moved.save(tmp_path/"m.safetensors")
    again = NSGF.load(tmp_path/"m.safetensors")
    x0 = normal(5, 2)
    assert torch.equal(again.sample(x0=x0), moved.sample(x0=x0))
    with pytest.raises(ValueError, match="trained from a source of its own, which its file does not hold: pass x0"): again.sample(5)


def test_no_pickle_is_written_or_read(saved, tmp_path, monkeypatch):
    import pickle
    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    NSGF.load(saved)
    head = int.from_bytes(saved.read_bytes()[:8], "little")
    assert set(json.loads(saved.read_bytes()[8:8 + head])) >= {"__metadata__", "mean", "scale"}
    monkeypatch.undo()
    torch.save({"mean": torch.zeros(2)}, tmp_path/"pickled.pt")
    with pytest.raises(ValueError, match="not a whole safetensors file"): NSGF.load(tmp_path/"pickled.pt")


def test_a_failed_save_leaves_the_old_file(model, saved, monkeypatch):
    old = saved.read_bytes()
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"): tiny().save(saved)
    assert saved.read_bytes() == old


@pytest.mark.parametrize("keep", (0, 1, 7, 8, 100, -100, -1))
def test_truncated_files(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"): NSGF.load(saved)


@pytest.mark.parametrize("content", (b"\x93NUMPY\x01\x00" + b"v"*200, b"hello", bytes(range(256))*20, b"\xff"*64))
def test_foreign_bytes(tmp_path, content):
    (tmp_path/"m").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole safetensors file"): NSGF.load(tmp_path/"m")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path/"none", tmp_path, str(tmp_path)):
        with pytest.raises(OSError, match="no model file at"): NSGF.load(path)


def test_foreign_safetensors(saved):
    save_file(load_file(saved), saved)
    with pytest.raises(ValueError, match="is a safetensors file, but not one of nsgf_nb"): NSGF.load(saved)
    save_file({"a": torch.zeros(2)}, saved, {"nsgf_nb": "[1, 2]"})
    with pytest.raises(ValueError, match="is a safetensors file, but not one of nsgf_nb"): NSGF.load(saved)
    save_file({"a": torch.zeros(2)}, saved, {"nsgf_nb": "{"})
    with pytest.raises(ValueError, match="model.safetensors is"): NSGF.load(saved)


@pytest.mark.parametrize("about, words", (
    (dict(format="nsgf_nb/3"), "has format 'nsgf_nb/3'; this version of nsgf_nb reads 'nsgf_nb/2'"), (dict(format=None), "has format None"),
    (dict(model="NSGFPlusPlus"), "holds a model of type 'NSGFPlusPlus', not 'NSGF'"), (dict(config=None), "does not describe a whole NSGF"),
    (dict(config={"weigh": 3}), "does not describe a whole NSGF"), (dict(config={"steps": 0}), "does not describe a whole NSGF: steps must be at least 1"),
    (dict(config=[1]), "does not describe a whole NSGF"), (dict(shape=None), "does not describe a whole NSGF"), (dict(shape=[3]), "does not describe a whole NSGF"),
    (dict(shape=[-2]), "does not describe a whole NSGF"), (dict(shape="ab"), "does not describe a whole NSGF"), (dict(shape=[]), "does not describe a whole NSGF"),
    (dict(source=None), "does not describe a whole NSGF"),
), ids=str)
def test_tampered_descriptions(saved, about, words):
    rewrite(saved, about)
    with pytest.raises(ValueError, match=words): NSGF.load(saved)


@pytest.mark.parametrize("tensors", (
    {"mean": None}, {"scale": None}, {"mean": torch.zeros(3)}, {"scale": torch.ones(3)}, {"net.layers.0.weight": None},
    {"net.layers.0.weight": torch.zeros(2, 2)}, {"net.more": torch.zeros(2)}, {"net.embed_x.omega": torch.zeros(2, 5)},
    {"net.layers.0.bias": torch.zeros(16, dtype=torch.int8)}, {"net.layers.0.bias": torch.zeros(16).half()}, {"mean": torch.zeros(2).long()},
), ids=lambda t: " ".join(f"{k} {None if v is None else (*v.shape, str(v.dtype))}" for k, v in t.items()))
def test_tampered_tensors(saved, tensors):
    rewrite(saved, tensors=tensors)
    with pytest.raises(ValueError, match="does not describe a whole NSGF"): NSGF.load(saved)


@pytest.mark.parametrize("change", (dict(width=10**7), dict(depth=10**6), dict(shape=[10**9])), ids=str)
def test_a_boastful_description_allocates_nothing(saved, monkeypatch, change):
    "10**14 weights are refused by comparing shapes; a million layers, before they are built."
    built, init = [], torch.nn.Linear.__init__
    def counted(self, *args, **kw):
        built.append(args)
        assert len(built) < 1000, "builds the network before comparing it with the tensors"
        init(self, *args, **kw)
        assert self.weight.device.type == "meta"
    monkeypatch.setattr(torch.nn.Linear, "__init__", counted)
    shape = change.pop("shape", [2])
    rewrite(saved, dict(shape=shape, config={**dataclasses.asdict(TINY), **change}))
    with pytest.raises(ValueError, match="does not describe a whole NSGF"): NSGF.load(saved)


# ---- interruption

def interrupting(monkeypatch, method, after):
    "Ctrl-C in the pool's `method`, at its call number `after`."
    calls, inner = [], getattr(TrajectoryPool, method)
    def wrapped(self, *args):
        calls.append(1)
        if len(calls) > after: raise KeyboardInterrupt
        return inner(self, *args)
    monkeypatch.setattr(TrajectoryPool, method, wrapped)


def test_interrupted_training_keeps_a_usable_model(monkeypatch, tmp_path):
    interrupting(monkeypatch, "batch", 7)
    model, state = NSGF(TINY, device="cpu"), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="stopped after 7 of 20 steps; the model keeps what it has learned"):
        model.fit(normal(100, 2), progress=False)
    assert len(model.losses) == 7 and torch.equal(state, torch.get_rng_state())
    x = model.sample(5)
    assert x.isfinite().all()
    model.save(tmp_path/"m.safetensors")
    assert torch.equal(NSGF.load(tmp_path/"m.safetensors").sample(5), x)


def test_interrupted_pool_leaves_no_model(monkeypatch):
    interrupting(monkeypatch, "flows", 0)
    model = NSGF(TINY, device="cpu")
    with pytest.raises(KeyboardInterrupt): model.fit(normal(100, 2), progress=False)
    with pytest.raises(RuntimeError, match="no network yet"): model.sample(5)


@pytest.mark.parametrize("how", ("interrupted", "bad source"))
def test_a_second_fit_that_does_not_get_far_leaves_the_first(monkeypatch, how):
    "Network and coordinates belong together."
    model = tiny()
    before = model.sample(5)
    if how == "interrupted": interrupting(monkeypatch, "flows", 0)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        model.fit(100*normal(100, 2) + 1000, normal(9, 3) if how == "bad source" else None, progress=False)
    assert torch.equal(model.sample(5), before)


def test_fit_ends_at_ctrl_c():
    def batches():
        for i in range(3): yield normal(8, 2, seed=i), torch.zeros(8), normal(8, 2, seed=i)
        raise KeyboardInterrupt
    done = fit(MLP(width=8, depth=1), batches(), 10, progress=False)
    assert done.interrupted and len(done.losses) == 3
