"""NSGF++ at toy size: parts that train in any order, alone or together; resuming to the bit; an NFE that is what was called; couplings; what is refused."""
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import warnings

import ot
import pytest
import torch
from conftest import rewrite
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb import matching
from nsgf_nb.matching import NSGFConfig, TrainConfig, _Run
from nsgf_nb.nsgfpp import PARTS, PhasePredictor, StraightConfig, StraightFlow, _partners
from nsgf_nb.sinkhorn import cost

SMALL = dict(train_steps=4, batch_size=8, channels=4, mult=(1, 2), lr=1e-3, clip=1.)
FIRST = NSGFConfig(**SMALL, steps=3, flow_steps=2, reach=.5, blur=1., minibatch=64, pool_size=64)
CLOCK = TrainConfig(**SMALL)
LAST = StraightConfig(**SMALL, steps=2)


def generator(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))
def images(n=40, *shape, seed=0): return torch.rand(n, *(shape or (1, 8, 8)), generator=generator(seed))*2 - 1
def tiny(**settings): return NSGFPlusPlus(FIRST, CLOCK, LAST, device="cpu", **settings)
def weights(model): return {f"{name}.{k}": t for name in PARTS if getattr(model, name).net is not None for k, t in getattr(model, name).net.state_dict().items()}
def bits(model): return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in weights(model).values())).hexdigest()


def nearest(x, y): return torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1)


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


def stirred(model, seed=1):
    "The model with other weights: those after a few steps hardly do anything yet."
    g = generator(seed)
    for name in PARTS:
        for p in getattr(model, name).net.parameters(): p.add_(.15*torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def plain(): return tiny().fit(images(), progress=False)            # never changed


@pytest.fixture(scope="module")
def model(): return stirred(tiny().fit(images(), progress=False))


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path/"m.safetensors")
    return tmp_path/"m.safetensors"


# ---- three parts

def test_one_call_trains_all_three(plain):
    assert [type(getattr(plain, name)) for name in PARTS] == [NSGF, PhasePredictor, StraightFlow]
    for name in PARTS: assert getattr(plain, name).losses.shape == (4,) and getattr(plain, name).losses.isfinite().all()
    x = plain.sample(5)
    assert x.shape == (5, 1, 8, 8) and x.dtype == torch.float32 and x.isfinite().all() and not x.requires_grad
    assert same(plain, tiny().fit(images(), progress=False)) and not same(plain, tiny(seed=1).fit(images(), progress=False))


@pytest.mark.parametrize("orders", (("straight", "predictor", "sinkhorn"), (("predictor", "straight"), "sinkhorn"), (["straight"], ["sinkhorn", "predictor"])), ids=str)
def test_parts_train_alone_and_in_any_order(plain, orders):
    model = tiny()
    for parts in orders: model.fit(images(), parts, progress=False)
    assert same(model, plain)


def test_parts_train_in_processes_that_share_a_folder(plain, tmp_path):
    code = f"""if True:
        import sys, torch
        torch.set_num_threads({torch.get_num_threads()})
        from nsgf_nb.nsgfpp import *
        from nsgf_nb.matching import NSGFConfig, TrainConfig
        data = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))*2 - 1
        NSGFPlusPlus({FIRST!r}, {CLOCK!r}, {LAST!r}, device="cpu").fit(data, sys.argv[1:], {str(tmp_path)!r}, progress=False)"""
    both = [subprocess.Popen([sys.executable, "-c", code, *parts]) for parts in (("straight",), ("predictor", "sinkhorn"))]
    assert [p.wait(300) for p in both] == [0, 0]
    assert sorted(p.name for p in tmp_path.glob("*.checkpoint")) == [f"{name}.checkpoint" for name in sorted(PARTS)]
    model = tiny()
    with pytest.MonkeyPatch.context() as patch:
        def fail(self): raise AssertionError("trains what is trained already")
        patch.setattr(_Run, "step", fail)
        model.fit(images(), folder=tmp_path, progress=False)
    assert same(model, plain) and all(torch.equal(getattr(model, p).losses, getattr(plain, p).losses) for p in PARTS)


# ---- a training that was stopped

def stopping(monkeypatch, after, where=_Run, what="step"):
    "Ctrl-C at call number `after`; checkpoints are written at every step."
    calls, inner = [], getattr(where, what)
    def wrapped(self, *args):
        if len(calls) == after: raise KeyboardInterrupt
        calls.append(1)
        return inner(self, *args)
    monkeypatch.setattr(where, what, wrapped)
    fit = matching.fit
    monkeypatch.setattr(matching, "fit", lambda *args, **kw: fit(*args, **kw | dict(every=-1.)))


KINDS = {
    "NSGF": lambda **kw: NSGF(FIRST, device="cpu", **kw), "predictor": lambda **kw: PhasePredictor(CLOCK, device="cpu", **kw),
    "straight": lambda **kw: StraightFlow(LAST, device="cpu", **kw), "straight, OT": lambda **kw: StraightFlow(LAST, device="cpu", coupling="ot", **kw),
    "with flips and dropout": lambda **kw: StraightFlow(LAST, device="cpu", flip=True, dropout=.2, **kw),
}
MLPS = {"NSGF": lambda **kw: KINDS["NSGF"](channels=0, width=8, depth=1, **kw), "straight": lambda **kw: KINDS["straight"](channels=0, width=8, depth=1, **kw)}
RESUMED = [*(pytest.param(k, id=name) for name, k in KINDS.items()), *(pytest.param(k, id=f"{name}, MLP") for name, k in MLPS.items())]


@pytest.mark.parametrize("make", RESUMED)
@pytest.mark.parametrize("data", (images(), lambda n: torch.rand(n, 1, 8, 8)*2 - 1), ids=("tensor", "function"))
def test_a_stopped_training_goes_on_to_the_bit(monkeypatch, tmp_path, make, data):
    whole = make(train_steps=7).fit(data, progress=False)
    path, part = tmp_path/"a.checkpoint", None
    for after in (2, 3):                                          # stopped twice
        with monkeypatch.context() as patch:
            stopping(patch, after)
            part = make(train_steps=7)
            with pytest.raises(KeyboardInterrupt, match="stopped after [25] of 7 steps"): part.fit(data, progress=False, checkpoint=path)
    assert len(part.losses) == 5 and not torch.equal(part.losses, whole.losses)
    part = make(train_steps=7).fit(data, progress=False, checkpoint=path)
    assert torch.equal(part.losses, whole.losses)
    assert all(torch.equal(p, q) for p, q in zip(part.net.state_dict().values(), whole.net.state_dict().values()))


def test_a_checkpoint_does_not_change_the_training(plain, tmp_path):
    assert same(tiny().fit(images(), folder=tmp_path, progress=False), plain)


def test_a_stopped_pool_begins_again(monkeypatch, tmp_path, plain):
    with monkeypatch.context() as patch:
        stopping(patch, 0, matching.TrajectoryPool, "flows")
        with pytest.raises(KeyboardInterrupt): tiny().fit(images(), folder=tmp_path, progress=False)
    assert list(tmp_path.glob("*.checkpoint")) == []
    assert same(tiny().fit(images(), folder=tmp_path, progress=False), plain)


def test_a_torn_checkpoint_is_refused_by_name(tmp_path):
    tiny().fit(images(), "predictor", tmp_path, False)
    path = tmp_path/"predictor.checkpoint"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="predictor.checkpoint is not a whole safetensors file"): tiny().fit(images(), "predictor", tmp_path, False)


def test_a_model_is_no_checkpoint(saved, tmp_path):
    tiny().predictor.fit(images(), progress=False).save(tmp_path/"predictor.checkpoint")
    with pytest.raises(ValueError, match="predictor.checkpoint is no checkpoint of a training run"): tiny().fit(images(), "predictor", tmp_path, False)


def reshaped(x): return x.expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("part, settings, data, words", (
    ("straight", dict(lr=2e-3), images(), r"lr=0\.001, not 0\.002: name another file, or remove it"),
    ("straight", dict(coupling="ot"), images(), "coupling='independent', not 'ot'"),
    ("straight", dict(train_steps=5, flip=True), images(), "train_steps=4, not 5.*flip=False, not True"),
    ("straight", dict(seed=1), images(), "seed=0, not 1"),
    ("straight", dict(mult=(1,)), images(), r"mult=\[1, 2\], not \[1\]"),
    ("predictor", dict(channels=8), images(), "channels=4, not 8"),
    ("sinkhorn", dict(reach=.4), images(), "reach=0.5, not 0.4"),
    ("straight", {}, .5*images(), "data=.*scale"),
    ("straight", {}, images(seed=3), "data=.*scale"),
    ("straight", {}, reshaped(images()), r"data='\(1, 8, 8\).*not '\(3, 8, 8\)"),
    pytest.param("straight", {}, -images(), "data="),
), ids=lambda v: str(v) if isinstance(v, (dict, str)) else None)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path, part, settings, data, words):
    tiny().fit(images(), part, tmp_path, False)
    old = (tmp_path/f"{part}.checkpoint").read_bytes()
    with pytest.raises(ValueError, match=f"{part}.checkpoint is a checkpoint of another run, with .*{words}"): tiny(**settings).fit(data, part, tmp_path, False)
    assert (tmp_path/f"{part}.checkpoint").read_bytes() == old


def test_a_checkpoint_from_another_source_is_refused(tmp_path):
    StraightFlow(LAST, device="cpu").fit(images(), progress=False, checkpoint=tmp_path/"c")
    with pytest.raises(ValueError, match="checkpoint of another run, with .*source"):
        StraightFlow(LAST, device="cpu").fit(images(), images(seed=1), progress=False, checkpoint=tmp_path/"c")


def test_checkpoints_of_one_part_do_not_serve_another(tmp_path):
    tiny().fit(images(), "predictor", tmp_path, False)
    with pytest.raises(ValueError, match="model='PhasePredictor', not 'StraightFlow'"):
        StraightFlow(LAST, device="cpu").fit(images(), progress=False, checkpoint=tmp_path/"predictor.checkpoint")


def test_other_sampling_steps_are_no_other_training(tmp_path, plain):
    tiny().fit(images(), folder=tmp_path, progress=False)
    assert same(tiny(steps=7).fit(images(), folder=tmp_path, progress=False), plain)


# ---- sampling

def counting(model):
    "Hooks that count the rows that go through each network; a dict, and a function that removes them."
    rows, hooks = dict.fromkeys(PARTS, 0), []
    def hook(name):
        def count(net, given): rows[name] += len(given[0])
        return count
    for name in PARTS: hooks.append(getattr(model, name).net.register_forward_pre_hook(hook(name)))
    return rows, lambda: [h.remove() for h in hooks]


@pytest.mark.parametrize("kw, first, last", (
    ({}, 3, 2), (dict(steps=4), 3, 4), (dict(steps=1, sinkhorn_steps=1), 1, 1), (dict(method="midpoint"), 3, 4), (dict(method="heun", steps=3, sinkhorn_steps=5), 5, 6),
    (dict(step_size=.2), 3, None), (dict(step_size=.3, method="heun"), 3, None), (dict(trajectory=True), 3, 2), (dict(trajectory=True, step_size=.15, method="midpoint"), 3, None),
), ids=str)
def test_nfe_is_what_was_called(model, kw, first, last):
    rows, remove = counting(model)
    x, nfe = model.sample(20, return_nfe=True, **kw)
    remove()
    assert nfe.shape == (20,) and not nfe.is_floating_point() and nfe.sum() == sum(rows.values())
    assert rows["sinkhorn"] == 20*first and rows["predictor"] == 20
    if last: assert nfe.tolist() == [first + 1 + last]*20
    assert x.shape[-4:] == (20, 1, 8, 8) and x.isfinite().all()
    plain = model.sample(20, **kw)
    assert torch.equal(plain, x)


def test_nfe_of_many_samples_that_go_in_several_batches(model, monkeypatch):
    monkeypatch.setattr(matching, "_rows", lambda model: 7)
    rows, remove = counting(model)
    kw = dict(step_size=.1, trajectory=True)
    xs, nfe = model.sample(30, return_nfe=True, **kw)
    remove()
    assert nfe.sum() == sum(rows.values())
    monkeypatch.undo()
    assert_close(xs, model.sample(30, **kw), atol=1e-4, rtol=1e-4)


def test_nfe_follows_each_images_own_time(model):
    x0 = torch.cat([normal(8, 1, 8, 8), 3*images(8)])
    way = model.sinkhorn.sample(x0=x0)
    tau = model.predictor(way)
    x, nfe = model.sample(x0=x0, step_size=.01, return_nfe=True)
    assert tau.std() > .005                                       # else it says nothing
    n = nfe - 4                                                    # steps no wider than .01, and not one more than that takes
    assert ((1 - tau)/n <= .01001).all() and ((1 - tau) > .00999*(n - 1)).all() and len(set(nfe.tolist())) > 1


@pytest.mark.parametrize("stretch", (1., 2.))
def test_it_is_algorithm_3(model, stretch):
    x = x0 = normal(6, 1, 8, 8)
    for k in range(3): x = x + model.sinkhorn(x, k/3)/3
    tau = model.predictor(x)
    t = [tau + (1 - tau)*(k/4)**stretch for k in range(5)]
    for now, then in zip(t, t[1:]): x = x + (then - now).view(-1, 1, 1, 1)*model.straight(x, now)
    assert_close(model.sample(x0=x0, steps=4, stretch=stretch), x, atol=1e-4, rtol=1e-4)
    assert_close(model.sample(6, seed=3), model.sample(x0=model.sinkhorn.coordinates.to_data(normal(6, 1, 8, 8, seed=3))), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kw", ({}, dict(step_size=.07), dict(method="heun", step_size=.2), dict(trajectory=True)), ids=str)
def test_a_batch_is_its_samples_alone(model, kw):
    x0 = torch.cat([normal(3, 1, 8, 8), 3*images(3)])
    whole, nfe = model.sample(x0=x0, return_nfe=True, **kw)
    for i in range(6):
        alone, n = model.sample(x0=x0[i:i+1], return_nfe=True, **kw)
        assert n.item() == nfe[i].item()
        if "trajectory" not in kw: assert_close(alone, whole[i:i+1], atol=1e-4, rtol=1e-4)
        else: assert_close(alone, whole[:, i:i+1], atol=1e-4, rtol=1e-4)


def test_trajectories_begin_at_the_noise_and_end_at_the_image(model):
    x0 = normal(5, 1, 8, 8)
    xs = model.sample(x0=x0, trajectory=True, steps=4)
    assert xs.shape == (3 + 4 + 1, 5, 1, 8, 8)
    assert_close(xs[0], x0); assert_close(xs[-1], model.sample(x0=x0, steps=4)); assert_close(xs[3], model.sinkhorn.sample(x0=x0))


def test_samples_follow_the_seed_and_leave_torchs_generator(model):
    state = torch.get_rng_state()
    assert torch.equal(model.sample(4, seed=2), model.sample(4, seed=2)) and not torch.equal(model.sample(4, seed=2), model.sample(4, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_adaptive_sampling_counts_too(model):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is missing: no test of method='dopri5'")
    rows, remove = counting(model)
    x, nfe = model.sample(4, method="dopri5", return_nfe=True)
    remove()
    assert nfe.sum() == sum(rows.values()) and x.isfinite().all()
    assert_close(x, model.sample(4, method="heun", steps=200), atol=.02, rtol=.02)


# ---- the straight flow and its couplings

def test_plans_are_close_to_the_exact_matching():
    x, y = normal(64, 20), normal(64, 20, seed=1) + .5
    exact = ot.emd2([], [], cost(x, y).numpy().astype("float64"))
    found = sum((.5*(x - y[_partners(x, y, .5, generator(s))]).square().sum(1)).mean().item() for s in range(10))/10
    independent = cost(x, y).mean().item()
    assert exact*.97 < found < exact + .1*(independent - exact)


def test_partners_of_one_batch_are_about_uniform_and_drawn_from_the_plan():
    x, y = normal(16, 3), normal(16, 3, seed=1)
    drawn = torch.stack([_partners(x, y, 1., generator(s)) for s in range(400)])             # (400, 16)
    P = torch.stack([(drawn == j).double().mean(0) for j in range(16)], 1)                   # rows: how often each y is drawn
    plan = torch.as_tensor(ot.sinkhorn([], [], cost(x, y).double().numpy(), 1., stopThr=1e-9, numItermax=5000))*16
    assert (P - plan).abs().max() < .1                             # 4 standard errors
    assert (P.sum(0) - 1).abs().max() < .25                        # every y as often as another
    assert torch.equal(_partners(x, y, 1., generator(5)), _partners(x, y, 1., generator(5)))


def pairs(coupling, data, n=64, batches=4, **kw):
    "x_0 and x_1 of some batches of a StraightFlow, as found from x_t, t and x_1 − x_0."
    model, found = StraightFlow(LAST, device="cpu", coupling=coupling, batch_size=n, **kw), []
    k, draw_x, draw_y, sources = matching._samplers(model, data, None)
    stream = model._batches(k, draw_x, draw_y, sources, False)
    for _ in range(batches):
        x, t, v = next(stream)
        assert x.shape == v.shape == (n, *data.shape[1:]) and t.shape == (n,) and (0 <= t).all() and (t < 1).all()
        w = t.view(-1, *[1]*(x.ndim - 1))
        found.append((x - w*v, x + (1 - w)*v))
    return k, found


def test_couplings_differ_and_keep_their_marginals():
    data = images(64)
    cost_of = {}
    for coupling in ("independent", "ot"):
        k, found = pairs(coupling, data)
        cost_of[coupling] = sum((x - y).square().flatten(1).sum(1).mean().item() for x, y in found)/len(found)
        x, y = (torch.cat(z) for z in zip(*found))
        assert abs(x.mean()) < .05 and abs(x.std() - 1) < .05     # N(0, I)
        y = k.to_data(y)
        near = nearest(y, data)
        assert near.values.max() < 1e-4                            # images of the data
        seen = torch.bincount(near.indices, minlength=64)/4
        assert (seen == 1).all() if coupling == "independent" else (seen - 1).abs().mean() < .6
    assert cost_of["ot"] < .9*cost_of["independent"] and cost_of["independent"] == pytest.approx(128, rel=.05)


def test_flips_only_mirror():
    data = torch.zeros(3, 1, 8, 8)
    data[0, 0, :, 0], data[1, 0, 2, 1], data[2, 0, 5, 6] = 1., .7, -.5
    mirrored = data.flip(-1)
    k, found = pairs("independent", data, n=60, flip=True)
    near = nearest(k.to_data(torch.cat([y for _, y in found])), torch.cat([data, mirrored]))
    assert near.values.max() < 1e-4
    seen = torch.bincount(near.indices, minlength=6)
    assert seen.sum() == 240 and all(25 < n < 55 for n in seen.tolist())
    k, found = pairs("independent", data, n=60)
    assert nearest(k.to_data(torch.cat([y for _, y in found])), data).values.max() < 1e-4


def test_points_cannot_be_mirrored():
    with pytest.raises((ValueError, TypeError), match="flip"): NSGF(FIRST, device="cpu", channels=0, flip=True).fit(normal(50, 2), progress=False)


def test_the_flow_of_a_gaussian_is_learned():
    """For data N(m, s²) and independent noise E[x_1 − x_0 | x_t] is linear in x_t, and what no field can match has a known variance:
    the loss tends to its mean over t, and the samples to the data. In coordinates where s = 1: 1/(t² + (1 − t)²), whose mean over t is π/2."""
    data = 3 + 2*normal(4000, 2)
    model = StraightFlow(StraightConfig(train_steps=400, batch_size=512, width=32, depth=2, lr=5e-3), device="cpu").fit(data, progress=False)
    assert model.losses[-100:].mean().item() == pytest.approx(math.pi/2, rel=.05)
    x = model.sample(4000, steps=20)
    assert (x.mean(0) - 3).abs().max() < .15 and (x.std(0)/2 - 1).abs().max() < .08
    z = torch.tensor([[1., -1.]])
    for t in (.2, .8):
        exact = z*(2*t - 1)/(t**2 + (1 - t)**2)                    # of standard normal to standard normal
        found = model.coordinates.to_model(model.coordinates.to_data(z) + model(model.coordinates.to_data(z), t)) - z
        assert_close(found, exact, atol=.15, rtol=0)


def test_the_clock_reads_the_time():
    data, clock = images(30)*0 + images(1), PhasePredictor(TrainConfig(train_steps=150, batch_size=64, channels=8, lr=5e-3), device="cpu")
    clock.fit(torch.cat([data, -data]), progress=False)
    x = torch.cat([data, -data])
    for t in (.1, .5, .9): assert clock((1 - t)*normal(60, 1, 8, 8)*clock.coordinates.scale + t*x).mean().item() == pytest.approx(t, abs=.12)
    with pytest.raises(TypeError): clock(x, .5)


# ---- what is refused

@pytest.mark.parametrize("data, error, words", (
    (images(10, 8, 8), ValueError, r"data must be images \(N, C, H, W\), got shape \(10, 8, 8\)"), (normal(10, 2).clamp(-1, 1), ValueError, r"got shape \(10, 2\)"),
    (images(10, 1, 1, 8, 8), ValueError, r"got shape \(10, 1, 1, 8, 8\)"), (torch.zeros(10, 1, 8, 8, dtype=torch.uint8), TypeError, r"data.*uint8.*data\.float\(\)"),
    (255*images(10).abs(), ValueError, r"data must lie in \[-1, 1\], got values from .* to 2[45]\d.*; bytes go in as x\.float\(\)/127\.5 - 1"),
    (images(10)*1.1, ValueError, r"data must lie in \[-1, 1\]"), (images(10, 1, 7, 8), ValueError, "images are 7×8.*multiples of 2"), (images(10, 1, 8, 9), ValueError, "images are 8×9"),
    (torch.full((10, 1, 8, 8), math.nan), ValueError, "data has 640 NaN or infinite values"), (images(1), ValueError, "data must hold at least 2 samples, got 1"),
    (lambda n: images(n, 8), ValueError, r"data must be images \(N, C, H, W\)"), (lambda n: 2*images(n), ValueError, r"data must lie in \[-1, 1\]"),
    (TensorDataset(images(10, 8, 8)), ValueError, r"data must be images \(N, C, H, W\)"), (TensorDataset(2*images(10)), ValueError, r"data must lie in \[-1, 1\]"),
    (TensorDataset(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10)), TypeError, r"data\.float\(\)"),
))
def test_what_are_no_images_is_refused_by_name(data, error, words):
    model = tiny()
    with pytest.raises(error, match=words): model.fit(data, progress=False)
    assert model.sinkhorn.net is None


class Arrays(Dataset):
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i].numpy(), i


class Dicts(Arrays):
    def __getitem__(self, i): return {"image": self.x[i]}


@pytest.mark.parametrize("data, error, words", (
    (images(10).numpy(), TypeError, "data must be a tensor.*got ndarray"), ("mnist", TypeError, "data must be a tensor.*got str"), (None, TypeError, "data must be a tensor.*got NoneType"),
    (images(0, 1, 8, 8), ValueError, "data must be a non-empty"), ([images(2)], TypeError, "data must be a tensor.*got list"), (Dicts(images(10)), ValueError, "data"),
    (lambda n: images(n).numpy(), TypeError, "data.*got ndarray"), (TensorDataset(images(0, 1, 8, 8)), ValueError, "data"),
    (TensorDataset(torch.cat([images(9), 2*images(1)])), ValueError, r"data must lie in \[-1, 1\]"),
), ids=("numpy", "name", "None", "empty", "list", "dicts", "function of numpy", "empty Dataset", "Dataset whose last image is out of range"))
def test_other_things_are_refused_by_name_too(data, error, words):
    with pytest.raises(error, match=words): tiny().fit(data, "predictor", progress=False)


def test_datasets_of_arrays_are_data(): assert same(tiny().fit(Arrays(images()), progress=False), tiny().fit(images(), progress=False))


def test_datasets_and_functions_are_data(plain):
    assert same(tiny().fit(TensorDataset(images(), torch.arange(40)), progress=False), plain)
    assert tiny().fit(lambda n: images(n), "predictor", progress=False).predictor.losses.shape == (4,)


@pytest.mark.parametrize("parts", ("straigt", ["sinkhorn", "clock"], ("all",)), ids=str)
def test_unknown_parts(parts):
    with pytest.raises(ValueError, match="parts must be among sinkhorn, predictor, straight, got '(straigt|clock|all)'"): tiny().fit(images(), parts, progress=False)


def test_unknown_parts_are_refused_before_anything_is_trained():
    model = tiny()
    with pytest.raises(ValueError, match="parts must be among"): model.fit(images(), ("predictor", "clock"), progress=False)
    assert model.predictor.net is None


@pytest.mark.parametrize("settings, error, words", (
    (dict(stepz=3), TypeError, "'stepz' is no setting of NSGF\\+\\+; known are .*batch_size.*coupling.*reach"), (dict(coupling="best"), ValueError, "coupling must be one of independent, ot, got 'best'"),
    (dict(reach=1.5), ValueError, r"reach must lie in \(0, 1\]"), (dict(lr="fast"), TypeError, "lr must be of type float"), (dict(dropout=1.), ValueError, r"dropout must lie in \[0, 1\)"),
    (dict(mult=(1, 0)), ValueError, "mult must hold positive integers"), (dict(attention=16), TypeError, "attention must be of type tuple"), (dict(patch=0), ValueError, "patch must be at least 1"),
    (dict(channels=-1), ValueError, "channels must be at least 0"), (dict(bf16=1), TypeError, "bf16 must be of type bool"), (dict(clip=-1.), ValueError, "clip must be at least 0"),
    (dict(coupling_blur=0.), ValueError, "coupling_blur must be a positive number"),
), ids=str)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words): tiny(**settings)


def test_settings_reach_all_parts_that_have_them():
    model = tiny(seed=3, reach=.25, coupling="ot", steps=6)
    assert [getattr(model, p).config.seed for p in PARTS] == [3]*3 and model.sinkhorn.config.reach == .25 and model.straight.config.coupling == "ot"
    assert model.sinkhorn.config.steps == model.straight.config.steps == 6 and FIRST.seed == 0


def test_configs_of_the_wrong_kind():
    for configs, words in (((CLOCK,), "config must be a NSGFConfig, got TrainConfig"), ((FIRST, CLOCK, CLOCK), "config must be a StraightConfig, got TrainConfig"), ((LAST, CLOCK, FIRST), "config must be a NSGFConfig, got StraightConfig")):
        with pytest.raises(TypeError, match=words): NSGFPlusPlus(*configs, device="cpu")


@pytest.mark.parametrize("config", (FIRST, LAST), ids=("NSGFConfig", "StraightConfig"))
def test_the_clock_takes_no_config_of_another_part(config):
    with pytest.raises(TypeError, match="config must be a TrainConfig"): NSGFPlusPlus(FIRST, config, LAST, device="cpu")


@pytest.mark.parametrize("config", ("mnist", {}, 5), ids=str)
def test_what_is_no_config_is_refused_by_name(config):
    with pytest.raises(TypeError, match="config must be a NSGFConfig"): NSGFPlusPlus(config, device="cpu")


def test_a_clock_with_default_settings_is_made_or_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try: PhasePredictor(device="cpu", train_steps=1, batch_size=4).fit(images(), progress=False)
        except ValueError as e: assert "channels" in str(e)


@pytest.mark.parametrize("kw, error, words", (
    (dict(n=0), ValueError, "n must be an integer of at least 1"), ({}, ValueError, "n must be .* got None"), (dict(n=2, steps=0), ValueError, "steps must be at least 1"),
    (dict(n=2, sinkhorn_steps=0), ValueError, "steps must be at least 1"), (dict(n=2, method="rk4"), ValueError, "method must be one of"), (dict(n=2, step_size=2.), ValueError, "step_size must lie"),
    (dict(x0=torch.zeros(3, 3, 8, 8)), ValueError, r"x0 must be of shape \(n, 1, 8, 8\), got \(3, 3, 8, 8\)"), (dict(x0=torch.zeros(3, 1, 8, 8).long()), TypeError, r"x0\.float\(\)"),
    (dict(n=5, x0=torch.zeros(3, 1, 8, 8)), ValueError, "n must be the number of rows of x0, 3"),
), ids=str)
def test_bad_sample_calls(model, kw, error, words):
    with pytest.raises(error, match=words): model.sample(**kw)


def test_a_model_that_is_not_whole_says_so(tmp_path):
    half = tiny().fit(images(), "sinkhorn", progress=False)
    for call in (lambda: tiny().sample(3), lambda: half.sample(3), lambda: half.save(tmp_path/"m")):
        with pytest.raises(RuntimeError, match="no network yet"): call()
    assert list(tmp_path.iterdir()) == []


# ---- state, files

def test_fit_leaves_torchs_generator_to_a_function_of_data():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    tiny().fit(lambda n: torch.rand(n, 1, 8, 8)*2 - 1, "predictor", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_leaves_torchs_generator_and_the_data():
    data, state = images(), torch.get_rng_state()
    kept = data.clone()
    tiny(flip=True, dropout=.1).fit(data, progress=False).sample(3)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data, kept)


def test_float64_images_stay_float64():
    model = tiny().fit(images().double(), progress=False)
    x = model.sample(3, trajectory=True)
    assert x.dtype == torch.float64 and model.predictor(x[0]).dtype == torch.float32
    assert_close(x.float(), tiny().fit(images(), progress=False).sample(3, trajectory=True), atol=1e-3, rtol=1e-3)


def test_round_trip(model, saved, tmp_path):
    again = NSGFPlusPlus.load(saved, device="cpu")
    assert bits(again) == bits(model) and torch.equal(again.sample(5, seed=3), model.sample(5, seed=3))
    assert torch.equal(again.sample(5, step_size=.1, method="heun"), model.sample(5, step_size=.1, method="heun"))
    for name in PARTS: assert getattr(again, name).config == getattr(model, name).config
    again.save(tmp_path/"again")
    assert (tmp_path/"again").read_bytes() == saved.read_bytes()
    about = json.loads((tmp_path/"m.safetensors.json").read_text())
    assert about["model"] == "NSGFPlusPlus" and about["sinkhorn"]["config"]["reach"] == .5 and about["straight"]["shape"] == [1, 8, 8]
    assert set(about) == {"format", "model", *PARTS}


def test_single_parts_are_models_too(model, tmp_path):
    for name in PARTS:
        part = getattr(model, name)
        part.save(tmp_path/name)
        again = type(part).load(tmp_path/name, device="cpu")
        assert all(torch.equal(p, q) for p, q in zip(part.net.state_dict().values(), again.net.state_dict().values()))


@pytest.mark.parametrize("about, tensors, words", (
    (dict(model="NSGF"), {}, "holds a model of type 'NSGF', not 'NSGFPlusPlus'"), (dict(sinkhorn=None), {}, "holds a model of type None, not 'NSGF'"),
    (dict(predictor={"model": "PhasePredictor"}), {}, "does not describe a whole PhasePredictor"), ({}, {"straight.mean": None}, "does not describe a whole StraightFlow"),
    ({}, {"predictor.net.last.weight": torch.zeros(1, 3)}, "does not describe a whole PhasePredictor"), ({}, {"sinkhorn.net.first.bias": None}, "does not describe a whole NSGF"),
    ({}, {"sinkhorn.net.first.bias": torch.zeros(4).half()}, "does not describe a whole NSGF"), ({}, {"straight.net.more": torch.zeros(1)}, "does not describe a whole StraightFlow"),
), ids=str)
def test_tampered_files(saved, about, tensors, words):
    rewrite(saved, about, tensors)
    with pytest.raises(ValueError, match=words): NSGFPlusPlus.load(saved)


@pytest.mark.parametrize("text", ([1], "ab", 3), ids=str)
def test_a_part_that_is_no_dict(saved, text):
    rewrite(saved, dict(sinkhorn=text))
    with pytest.raises(ValueError, match="does not describe|holds a model of"): NSGFPlusPlus.load(saved)


@pytest.mark.parametrize("change", (dict(mult=[1]*10**5), dict(blocks=10**6), dict(channels=2**40), dict(patch=10**9), dict(mult=[10**9])), ids=lambda d: str(d)[:30])
def test_a_boastful_description_allocates_nothing(saved, change):
    with safe_open(saved, "pt") as f: text = json.loads(f.metadata()["nsgf_nb"])["straight"]
    rewrite(saved, dict(straight={**text, "config": {**text["config"], **change}}))
    with pytest.raises(ValueError, match="does not describe a whole StraightFlow"): NSGFPlusPlus.load(saved)


def test_files_of_other_models_and_other_classes(saved, tmp_path, model):
    for kind in (NSGF, StraightFlow, PhasePredictor):
        with pytest.raises(ValueError, match=f"holds a model of type 'NSGFPlusPlus', not '{kind.__name__}'"): kind.load(saved)
    model.straight.save(tmp_path/"s")
    for kind, name in ((NSGF, "NSGF"), (NSGFPlusPlus, "NSGFPlusPlus")):
        with pytest.raises(ValueError, match=f"holds a model of type 'StraightFlow', not '{name}'"): kind.load(tmp_path/"s")
    tiny().fit(images(), "predictor", tmp_path, False)
    with pytest.raises(ValueError, match="holds a model of type 'checkpoint', not 'NSGFPlusPlus'"): NSGFPlusPlus.load(tmp_path/"predictor.checkpoint")


def test_weights_of_an_unknown_name():
    with pytest.raises(ValueError, match="no weights named 'imagenet' come with the package; known are .*classifier-digits"): NSGFPlusPlus.from_pretrained("imagenet")
    with pytest.raises(ValueError, match="holds a model of type 'Classifier', not 'NSGFPlusPlus'"): NSGFPlusPlus.from_pretrained("classifier-digits")


def test_loading_needs_no_pickle(saved, monkeypatch):
    import pickle
    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert NSGFPlusPlus.load(saved).sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("settings", (dict(pool_size=128), dict(pool_mb=1)), ids=str)
def test_the_pool_keeps_to_its_bounds(settings):
    "1 MB holds 1365 paths of three states of an 8×8 image."
    kept, build = [], matching._build_pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_build_pool", lambda *args: (kept.append(build(*args)), kept[0])[1])
        NSGF(dataclasses.replace(FIRST, pool_size=2**13), device="cpu", **settings).fit(images(), progress=False)
    assert 64 <= kept[0].capacity <= settings.get("pool_size", 1365)
