"""Image experiments on a budget of moments: an NFE that is spent to the call, what a result holds, sheets, files of any kind, and the `nsgf` command."""
import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb import image_experiment as ie
from nsgf_nb import image_metrics
from nsgf_nb.data import load_images
from nsgf_nb.files import shipped
from nsgf_nb.image_experiment import IMAGE_EXPERIMENTS, ImageExperiment, load_model, measure_images, run_images, sample_images, save_sheet
from nsgf_nb.matching import NSGFConfig, TrainConfig
from nsgf_nb.nsgfpp import PARTS, StraightConfig, StraightFlow

SMALL = dict(train_steps=2, batch_size=8, channels=4, mult=(1, 2), clip=1.)


def images(n=40, *shape, seed=0): return torch.rand(n, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(seed))*2 - 1


@pytest.fixture(scope="module")
def both():
    return NSGFPlusPlus(NSGFConfig(**SMALL, steps=5, flow_steps=1, reach=.5, blur=1., minibatch=64, pool_size=64), TrainConfig(**SMALL), StraightConfig(**SMALL), device="cpu").fit(images(), progress=False)


@pytest.fixture(scope="module")
def straight(): return StraightFlow(StraightConfig(**SMALL, steps=7), device="cpu").fit(images(), progress=False)


@pytest.fixture(scope="module")
def digits(): return load_images("digits")


# ---- experiments

def test_experiments_are_whole():
    for data in ("digits", "mnist", "mnist-paper", "cifar10"):
        a, b, c = (IMAGE_EXPERIMENTS[data + suffix] for suffix in ("", "-fm", "-ot-cfm"))
        assert (a.method, b.method, c.method) == ("nsgf++", "fm", "ot-cfm")
        assert dataclasses.replace(b, method="") == dataclasses.replace(a, method="") == dataclasses.replace(c, method="")         # the same network and budget
        for e in (b, c): assert e.model(device="cpu").config.train_steps == a.train_steps
        m = a.model(seed=3, device="cpu")
        assert m.sinkhorn.config.train_steps + m.straight.config.train_steps == a.train_steps and m.sinkhorn.config.steps <= 5
        assert {getattr(m, p).config.seed for p in PARTS} == {3}
        for name in ("channels", "mult", "blocks", "attention", "batch_size", "patch", "flip"):
            assert len({getattr(x, name) for x in (m.sinkhorn.config, m.straight.config, b.model(device="cpu").config)}) == 1
        assert m.sinkhorn.config.lr == a.faster*m.straight.config.lr == a.faster*b.model(device="cpu").config.lr
        assert a.data.startswith("cifar") == m.straight.config.flip                          # flips for CIFAR-10 alone
    assert IMAGE_EXPERIMENTS["digits-ot-cfm"].model(device="cpu").config.coupling == "ot" and IMAGE_EXPERIMENTS["digits-fm"].model(device="cpu").config.coupling == "independent"


# ---- samples at a number of calls

def calls(model, *args, **kw):
    rows, hooks = [], []
    parts = [getattr(model, p) for p in PARTS] if isinstance(model, NSGFPlusPlus) else [model]
    for p in parts: hooks.append(p.net.register_forward_pre_hook(lambda net, given: rows.append(len(given[0]))))
    x = sample_images(model, *args, **kw)
    for h in hooks: h.remove()
    return x, sum(rows)


@pytest.mark.parametrize("nfe", (3, 4, 5, 6, 10, 11, 20, 60))
def test_nsgfpp_spends_what_it_is_given(both, nfe): assert calls(both, 6, nfe)[1] == 6*nfe


@pytest.mark.parametrize("nfe", (1, 2, 5, 60))
def test_straight_flows_spend_what_they_are_given(straight, nfe): assert calls(straight, 6, nfe)[1] == 6*nfe


def test_without_nfe_it_is_the_models_own(both, straight):
    assert calls(both, 4)[1] == 4*(5 + 1 + 5) and calls(straight, 4)[1] == 4*7


@pytest.mark.parametrize("nfe", (0, 1, 2))
def test_too_few_calls_are_refused(both, straight, nfe):
    with pytest.raises(ValueError, match=f"nfe must be at least 3 for NSGF.*got {nfe}"): sample_images(both, 2, nfe)
    if nfe == 0:
        with pytest.raises(ValueError, match="steps must be at least 1"): sample_images(straight, 2, nfe)


def test_samples_are_clamped_and_seeded(both, straight):
    for model in (both, straight):
        x = sample_images(model, 30, 5, seed=2)
        assert x.shape == (30, 1, 8, 8) and x.abs().max() <= 1 and x.device.type == "cpu"
        assert torch.equal(x, sample_images(model, 30, 5, seed=2)) and not torch.equal(x, sample_images(model, 30, 5, seed=3))


# ---- measurements

class Stub:
    "A model whose samples are what it was given, in another order for each seed; it writes down what it was asked for."
    def __init__(self, x): self.x, self.asked = x, []
    def sample(self, n, steps=None, seed=0):
        self.asked.append((n, steps, seed))
        return self.x[torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))[:n]]


E = ImageExperiment("digits", {}, 1, samples=300, draws=2, nfe=(5, 60))


def test_real_images_are_as_good_as_real_ones(digits):
    model = Stub(load_images("digits", "test"))
    e = dataclasses.replace(E, samples=len(model.x))               # 299
    r = measure_images(e, model, digits, seed=1)
    assert set(r) == {"features", "samples", "split", "floor", "real", "nfe"} and list(r["nfe"]) == ["5", "60"]
    assert r["features"].startswith("classifier-digits, test accuracy 0.9") and r["samples"] == len(model.x) and r["split"] == "train" and len(r["floor"]["values"]) == 3
    for found in r["nfe"].values():
        assert set(found) == {"frechet", "precision", "recall", "histogram", "confident", "nearest", "images_per_second"}
        assert set(found["frechet"]) == {"values", "mean", "se", "ratio", "ratio_se"} and len(found["frechet"]["values"]) == 2
        assert .6 < found["frechet"]["ratio"] < 2                  # other images than those of training, though
        assert abs(found["precision"] - r["real"]["precision"]) < .12 and abs(found["recall"] - r["real"]["recall"]) < .12 and r["real"]["precision"] > .7
        assert len(found["histogram"]) == 10 and min(found["histogram"]) > 20 and found["confident"] == sum(found["histogram"])/(2*e.samples) > .9
        assert .05 < found["nearest"] < .4
    assert len({seed for _, _, seed in model.asked}) == 2 and min(seed for _, _, seed in model.asked) == 1_001_000      # the same noise for each NFE
    assert [steps for _, steps, _ in model.asked] == [5, 5, 60, 60]
    json.dumps(r, allow_nan=False)


def test_copies_and_noise_are_found_out(digits):
    copies = measure_images(dataclasses.replace(E, nfe=(5,)), Stub(digits), digits)["nfe"]["5"]
    assert copies["nearest"] < 1e-3                                # by cdist's rounding
    noise = measure_images(dataclasses.replace(E, nfe=(5,)), Stub(images(2000)), digits)["nfe"]["5"]
    assert noise["frechet"]["ratio"] > 5 and noise["recall"] < .3 and noise["nearest"] > .4
    ones = measure_images(dataclasses.replace(E, nfe=(5,)), Stub(digits[load_images("digits", labels=True)[1] == 1].repeat(3, 1, 1, 1)), digits)["nfe"]["5"]
    assert ones["histogram"][1] > .9*600 and ones["recall"] < .3 and ones["frechet"]["ratio"] > 5


def test_too_few_images_for_the_protocol(digits):
    with pytest.raises(ValueError, match=r"samples must be at most half the 1,498 training images, got 750"): measure_images(dataclasses.replace(E, samples=750), Stub(digits), digits)


def test_a_result_of_one_draw_is_json(digits):
    json.dumps(measure_images(dataclasses.replace(E, draws=1, nfe=(5,)), Stub(digits), digits), allow_nan=False)


def test_nearest_images():
    data = images(50)
    distance, which = ie._nearest(torch.cat([data[[7, 3]], data[[5]] + .1]), data)
    assert which.tolist() == [7, 3, 5] and distance[:2].max() < 2e-3 and distance[2].item() == pytest.approx(.1, rel=1e-2)


# ---- sheets

@pytest.mark.parametrize("x", (images(64), images(7, 3, 8, 8), images(1), 3*images(4)), ids=("64", "colours", "one", "out of range"))
def test_sheets(tmp_path, x):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    save_sheet(x, tmp_path/"x.png", "title")
    content = (tmp_path/"x.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 300_000 and plt.get_fignums() == before


# ---- files of any kind

@pytest.fixture
def files(tmp_path, both, straight):
    NSGF(NSGFConfig(train_steps=1, pool_size=64, minibatch=64, width=8, depth=1), device="cpu").fit(images(20, 2), progress=False).save(tmp_path/"points.safetensors")
    both.save(tmp_path/"both.safetensors")
    straight.save(tmp_path/"straight.safetensors")
    both.predictor.save(tmp_path/"predictor.safetensors")
    return tmp_path


def test_a_file_says_what_it_is(files, both):
    for name, kind in (("points", NSGF), ("both", NSGFPlusPlus), ("straight", StraightFlow)):
        assert type(load_model(files/f"{name}.safetensors", "cpu")) is type(load_model(str(files/f"{name}.safetensors"))) is kind
    assert torch.equal(load_model(files/"both.safetensors").sample(3), both.sample(3))


def test_files_that_are_no_models(files, monkeypatch):
    monkeypatch.chdir(files)
    for path, error, words in (("predictor.safetensors", ValueError, "holds a model of type 'PhasePredictor', none of NSGF, StraightFlow, NSGFPlusPlus"),
                               (shipped("classifier-digits"), ValueError, "holds a model of type 'Classifier', none of"), ("none.safetensors", FileNotFoundError, "no model file at none.safetensors"),
                               ("some/where", FileNotFoundError, "no model file at some/where"), ("imagenet", ValueError, "no weights named 'imagenet' come with the package; known are")):
        with pytest.raises(error, match=words): load_model(path)
    (files/"plain").write_bytes(b"hello")
    with pytest.raises(ValueError, match="plain is not a whole safetensors file"): load_model("plain")


# ---- the whole

def small(e, **kw): return dataclasses.replace(e, net=dict(SMALL, train_steps=0) and {k: v for k, v in SMALL.items() if k != "train_steps"}, train_steps=8, samples=64, draws=2, nfe=(5,), **kw)
def strict(path): return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{path.name} holds {c}, which is no JSON"))


@pytest.mark.filterwarnings("ignore:.*points for .* features")
def test_a_run_in_one_go_and_in_parts(tmp_path, digits, capsys):
    e = small(IMAGE_EXPERIMENTS["digits"])
    r = run_images("digits", e, out=tmp_path/"one", device="cpu", data=digits)
    folder, out = tmp_path/"one/digits/seed0", capsys.readouterr().out
    assert {"model.safetensors", "model.safetensors.json", "result.json", "sheet.png", *(f"{p}.checkpoint" for p in PARTS)} <= {p.name for p in folder.iterdir()}
    assert strict(folder/"result.json") == json.loads(json.dumps(r))
    assert r["training_images"] == 1498 and r["protocol"]["samples"] == 64 and set(r["phases"]) == set(PARTS) and r["phases"]["sinkhorn"]["pool"] > 0
    assert all(p["training"] > 0 and p["images_per_second"] > 0 and p["parameters"] > 0 and math.isfinite(p["loss"]) for p in r["phases"].values())
    assert set(r["measured"]["nfe"]) == {"5"} and "made_with" in r and "command" in r
    assert re.search(r"^   5 NFE  [\d.]+  ratio [\d.]+  precision", out, re.M) and f"wrote {folder}/: " in out

    for parts in (["straight"], ["sinkhorn"]):
        assert run_images("digits", e, out=tmp_path/"two", device="cpu", data=digits, parts=parts, progress=False) is None
        assert "waits for: " in capsys.readouterr().out and not (tmp_path/"two/digits/seed0/model.safetensors").exists()
    again = run_images("digits", e, out=tmp_path/"two", device="cpu", data=digits, parts=["predictor"], progress=False)
    assert again["measured"]["nfe"]["5"]["frechet"] == r["measured"]["nfe"]["5"]["frechet"]
    a, b = (load_model(tmp_path/way/"digits/seed0/model.safetensors", "cpu") for way in ("one", "two"))
    assert torch.equal(a.sample(5), b.sample(5))


@pytest.mark.filterwarnings("ignore:.*points for .* features")
@pytest.mark.parametrize("method", ("fm", "ot-cfm"))
def test_a_run_of_a_straight_flow(tmp_path, digits, method):
    r = run_images("x", small(IMAGE_EXPERIMENTS["digits"], method=method), seed=1, out=tmp_path, device="cpu", data=digits, progress=False)
    assert set(r["phases"]) == {"straight"} and type(load_model(tmp_path/"x/seed1/model.safetensors")) is StraightFlow
    strict(tmp_path/"x/seed1/result.json")


@pytest.mark.filterwarnings("ignore:.*points for .* features")
def test_a_run_with_compile(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)
    e = small(IMAGE_EXPERIMENTS["digits-fm"])
    run_images("x", dataclasses.replace(e, net=dict(e.net, compile=True)), out=tmp_path, device="cpu", data=digits, progress=False)


@pytest.fixture
def offline(monkeypatch):
    "No Inception weights, and none to be had."
    def fail(*args): raise RuntimeError("the Inception weights could not be fetched (no network): download https://… elsewhere and put it into …")
    monkeypatch.setattr(image_metrics, "_weights", fail)


def test_cifar10_from_end_to_end_at_smoke_size(tmp_path, offline):
    "The real experiment with --quick: 3×32×32, attention, dropout, flips, two blocks on four levels."
    pool = ie._quick(IMAGE_EXPERIMENTS["cifar10"]).model(device="cpu").sinkhorn.config
    assert pool.pool_size <= 2**12                      # not the 4 GB of the real one
    with pytest.warns(UserWarning, match="^not measured: "):
        r = run_images("cifar10", IMAGE_EXPERIMENTS["cifar10"], data=images(70, 3, 32, 32), out=tmp_path, device="cpu", quick=True, progress=False)
    assert list(r["measured"]) == ["not_measured"] and re.search("(torch-fidelity|torchmetrics|Inception weights).*", r["measured"]["not_measured"])
    folder = tmp_path/"cifar10/seed0"
    strict(folder/"result.json")
    assert r["command"] == "nsgf train cifar10 --seeds 0 --quick" and (folder/"sheet.png").stat().st_size > 1000
    model = load_model(folder/"model.safetensors")
    x, nfe = model.sample(2, return_nfe=True)
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all() and nfe.tolist() == [10, 10]
    assert model.straight.config.attention == (16,) and model.straight.config.dropout == .1 and model.straight.config.flip and model.straight.config.blocks == 2


# ---- the command

@pytest.fixture
def nsgf(command, monkeypatch, tmp_path):
    "Run a command in an empty folder."
    monkeypatch.chdir(tmp_path)
    return partial(command, "nsgf")


@pytest.mark.filterwarnings("ignore:.*points for .* features")
def test_train_by_command(nsgf):
    code, out, err = nsgf("train", "digits", "--quick", "--out", "tmp")
    assert code == 0 and not err and "wrote tmp/digits/seed0/" in out, (out, err)
    assert type(load_model("tmp/digits/seed0/model.safetensors")) is NSGFPlusPlus
    assert nsgf("train", "digits", "--quick", "--out", "tmp")[0] == 0                        # all is there already


@pytest.mark.parametrize("beside", (False, True), ids=("alone", "where it was trained"))
def test_sample_by_command(nsgf, both, beside):
    path = Path("tmp/digits/seed0/model.safetensors")
    both.save(path)
    if beside: (path.parent/"result.json").write_text(json.dumps(dict(experiment="digits", protocol=dataclasses.asdict(E))))
    code, out, err = nsgf("sample", path, "-n", 9, "-o", "x.npy", "--nfe", 6, "--seed", 3)
    assert code == 0 and not err, err
    x = np.load("x.npy", allow_pickle=False)
    assert x.shape == (9, 1, 8, 8) and x.dtype == np.float32 and abs(x).max() <= 1 and "wrote x.npy: 9 images of shape (1, 8, 8)" in out
    assert (x == sample_images(load_model(path), 9, 6, 3).numpy()).all()
    code, out, err = nsgf("sample", path, "-n", 9, "-o", "x.png")
    assert code == 0 and not err and Path("x.png").read_bytes().startswith(b"\x89PNG") and "wrote x.png" in out


def test_commands_that_fail_say_why(nsgf, both, straight):
    both.save("both.safetensors")
    Path("torn.safetensors").write_bytes(Path("both.safetensors").read_bytes()[:-9])
    fails(nsgf("sample", "none.safetensors"), "no model file at none.safetensors")
    fails(nsgf("sample", "imagenet"), "no weights named 'imagenet' come with the package; known are")
    fails(nsgf("sample", "torn.safetensors"), "torn.safetensors is not a whole safetensors file")
    fails(nsgf("sample", "both.safetensors", "--nfe", 2), "nfe must be at least 3")
    fails(nsgf("sample", "both.safetensors", "-n", 4, "-o", "x.nothing"), "nothing")
    fails(nsgf("sample", "both.safetensors", "-n", 4, "-o", "no/where/x.npy"), "no/where/x.npy")
    fails(nsgf("sample", "both.safetensors", "-n", 4, "-o", "no/where/x.png"), "no/where/x.png")
    fails(nsgf("evaluate", "both.safetensors"), "both.safetensors")
    fails(nsgf("train", "digits", "--quick", "--device", "cuda:99"), "device 'cuda:99' cannot be used here")
    for words in (("train", "digits", "--parts", "clock"), ("train", "digit"), ("sample", "x", "--nfe", 0)): assert nsgf(*words)[0] == 2


def test_a_missing_data_set_is_one_line(nsgf, monkeypatch):
    import nsgf_nb.data as data
    monkeypatch.setenv("XDG_CACHE_HOME", "cache"); monkeypatch.delenv("NSGF_NB_DATA", raising=False)
    monkeypatch.setattr(data, "_download", lambda name: "no network")
    fails(nsgf("train", "mnist", "--quick"), "mnist: no train images in .*no network.*NSGF_NB_DATA")
