"""Image experiments on tiny budgets: network calls, results, sheets, files, commands."""
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

from nsgf_nb import NSGF, NSGFPlusPlus, SinkhornGenerator
from nsgf_nb.bench import image_experiments
from nsgf_nb.bench.classifiers import Autoencoder
from nsgf_nb.bench.image_experiments import (
    IMAGE_EXPERIMENTS,
    METHODS,
    ImageExperiment,
    load_model,
    run_images,
    save_sheet,
)
from nsgf_nb.bench.image_quality import measure_images, sample_images
from nsgf_nb.bench.protocol import to_json
from nsgf_nb.files import pretrained_path, read_json
from nsgf_nb.flow_matching import FlowMatching, FlowMatchingConfig
from nsgf_nb.image_metrics import Classifier, nearest_image
from nsgf_nb.images import load_images
from nsgf_nb.nsgf import NSGFConfig
from nsgf_nb.nsgfpp import PARTS
from nsgf_nb.training import TrainConfig

NET = dict(batch_size=8, channels=4, mult=(1, 2), clip=1.)
SMALL = dict(NET, train_steps=2)
RESULTS = Path(__file__).resolve().parent.parent/"nbs"/"results"
few_points = pytest.mark.filterwarnings("ignore:.*points for .* features")


def images(n=40, shape=(1, 8, 8), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))*2 - 1


@pytest.fixture(scope="module")
def both():
    sinkhorn = NSGFConfig(**SMALL, sample_steps=5, pool_steps=1, t_end=.5, blur=1., minibatch=64,
                          pool_size=64)
    straight = FlowMatchingConfig(**SMALL, sample_steps=5)
    model = NSGFPlusPlus(sinkhorn, TrainConfig(**SMALL), straight, device="cpu")
    return model.fit(images(), progress=False)


@pytest.fixture(scope="module")
def straight():
    return FlowMatching(**SMALL, sample_steps=7, device="cpu").fit(images(), progress=False)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


# ---- experiments

@pytest.mark.parametrize("data", ("digits", "mnist", "mnist-paper", "cifar10", "cifar10-minutes",
                                  "digits-classes", "mnist-classes"))
def test_all_methods_share_network_and_budget(data):
    e = IMAGE_EXPERIMENTS[data]
    assert e.method == "nsgf"
    for method in METHODS:
        name = data if method == "nsgf" else f"{data}-{method}"
        other = IMAGE_EXPERIMENTS[name]
        assert other.method == method and dataclasses.replace(other, method="nsgf") == e
        model = other.model(seed=3, device="cpu")
        if method.startswith("nsgfpp"):
            configs = [model.sinkhorn.config, model.straight.config]
        else:
            configs = [model.config]
        assert sum(config.train_steps for config in configs) == e.train_steps
        assert {config.seed for config in configs} == {3}
        for key in ("channels", "mult", "blocks", "attention", "batch_size", "patch", "flip"):
            assert {getattr(config, key) for config in configs} == {
                getattr(e.model(device="cpu").config, key)}


@few_points
@pytest.mark.filterwarnings("ignore:the samples are less diverse")
def test_one_call(tmp_path):
    e = IMAGE_EXPERIMENTS["digits-one-call"]
    assert e.nfe == (1,) and not e.nfe_euler
    result = run_images("digits-one-call", e, 0, tmp_path, device="cpu", quick=True, progress=False)
    assert list(result["measured"]["nfe"]) == ["1"]
    folder = tmp_path/"digits-one-call"/"seed0"
    assert {"sheet.png", "nearest.png", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    model = load_model(folder/"model.safetensors", "cpu")
    assert isinstance(model, SinkhornGenerator)
    assert sample_images(model, 3, 1).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="steps must be 1"):
        sample_images(model, 3, 5)


@few_points
@pytest.mark.filterwarnings("ignore:the samples are less diverse")
def test_features_of_a_classifier_of_its_own(tmp_path, monkeypatch):
    e = dataclasses.replace(IMAGE_EXPERIMENTS["digits-one-call"], feature_width=8)
    run = partial(run_images, "digits-one-call", e, 0, tmp_path, device="cpu", quick=True,
                  progress=False)
    result = run()
    assert result["phases"]["straight"]["features"] > 0
    path = tmp_path/"digits-one-call"/"seed0"/"classifier-width4.safetensors"
    own = Classifier.load(path)
    assert own.config["width"] == 4  # of a smoke test
    x = load_images("digits")[:10]
    assert not torch.allclose(own(x), Classifier.from_pretrained("digits")(x))
    # what is there is not trained again
    monkeypatch.setattr(image_experiments, "train_features", None)
    again, before = (r["measured"]["nfe"]["1"]["frechet"] for r in (run(), result))
    assert again == before
    with pytest.raises(ValueError, match="labels must be given"):
        run(data=x.repeat(20, 1, 1, 1))


@few_points
@pytest.mark.filterwarnings("ignore:the samples are less diverse")
def test_features_without_labels(tmp_path):
    e = IMAGE_EXPERIMENTS["digits-one-call-autoencoder"]
    x = load_images("digits")[:400]
    result = run_images("a", e, 0, tmp_path, device="cpu", data=x, quick=True, progress=False)
    assert result["phases"]["straight"]["features"] > 0
    path = tmp_path/"a"/"seed0"/"autoencoder-width4.safetensors"
    assert Autoencoder.load(path)(x[:3]).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="Autoencoder"):
        Classifier.load(path)


@few_points
@pytest.mark.filterwarnings("ignore:the samples are less diverse")
def test_maps_and_moments_of_one_call(tmp_path):
    net = IMAGE_EXPERIMENTS["mnist-one-call"].net
    e = dataclasses.replace(IMAGE_EXPERIMENTS["digits-one-call"], net=net, moment_weight=.7)
    result = run_images("maps", e, 0, tmp_path, device="cpu", quick=True, progress=False)
    assert result["protocol"]["net"]["maps"] == 4
    model = load_model(tmp_path/"maps"/"seed0"/"model.safetensors", "cpu")
    assert model.config.maps == 4 and model.sample(3).shape == (3, 1, 8, 8)


@few_points
@pytest.mark.filterwarnings("ignore:the samples are less diverse")
@pytest.mark.parametrize("name", ("mnist-classes-one-call", "digits-classes-ot-cfm"))
def test_a_quick_run_has_all_classes(tmp_path, name):
    e = dataclasses.replace(IMAGE_EXPERIMENTS[name], data="digits")
    result = run_images("classes", e, 0, tmp_path, device="cpu", quick=True, progress=False)
    (measured,) = result["measured"]["nfe"].values()
    assert 0 <= measured["agreement"] <= 1
    model = load_model(tmp_path/"classes"/"seed0"/"model.safetensors", "cpu")
    assert model.sample(3, condition=[7, 0, 7]).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method, coupling", (
    ("nsgf", "population"), ("nsgf-minibatch", "minibatch"), ("fm", "independent"),
    ("ot-cfm", "ot"), ("fm-population", "population"),
))
def test_couplings(method, coupling):
    e = dataclasses.replace(IMAGE_EXPERIMENTS["digits"], method=method)
    assert e.model(device="cpu").config.coupling == coupling


@pytest.mark.parametrize("method, couplings", (
    ("nsgfpp", ("minibatch", "independent")), ("nsgfpp-flow", ("population", "population")),
))
def test_both_variants_of_nsgfpp(method, couplings):
    e = dataclasses.replace(IMAGE_EXPERIMENTS["digits"], method=method)
    model = e.model(device="cpu")
    sinkhorn, straight = model.sinkhorn.config, model.straight.config
    assert (sinkhorn.coupling, straight.coupling) == couplings
    assert sinkhorn.sample_steps <= 5 and sinkhorn.lr == e.sinkhorn_lr*straight.lr
    assert ("predictor" in model.parts) == (method == "nsgfpp")


# ---- network calls

def calls(model, *arguments, **options):
    rows = []
    hooks = []
    parts = model.parts.values() if isinstance(model, NSGFPlusPlus) else [model]

    def count(net, arguments):
        rows.append(len(arguments[0]))
    for part in parts:
        hooks.append(part.net.register_forward_pre_hook(count))
    x = sample_images(model, *arguments, **options)
    for hook in hooks:
        hook.remove()
    return x, sum(rows)


@pytest.mark.parametrize("nfe", (3, 4, 5, 6, 10, 11, 60))
def test_nsgfpp_makes_as_many_calls_as_asked_for(both, nfe):
    assert calls(both, 6, nfe)[1] == 6*nfe


@pytest.mark.parametrize("nfe", (1, 2, 60))
def test_flow_matching_makes_as_many_calls_as_asked_for(straight, nfe):
    assert calls(straight, 6, nfe)[1] == 6*nfe


def test_without_a_number_it_is_the_models_own(both, straight):
    assert calls(both, 4)[1] == 4*(5 + 1 + 5)
    assert calls(straight, 4)[1] == 4*7


def test_too_few_calls(both, straight):
    for nfe in (0, 1, 2):
        with pytest.raises(ValueError, match=f"nfe.*3.*{nfe}"):
            sample_images(both, 2, nfe)
    with pytest.raises(ValueError, match="steps.*0"):
        sample_images(straight, 2, 0)


def test_samples_are_clamped_and_seeded(both, straight):
    for model in (both, straight):
        x = sample_images(model, 30, 5, seed=2)
        assert x.shape == (30, 1, 8, 8) and x.abs().max() <= 1
        assert torch.equal(x, sample_images(model, 30, 5, seed=2))
        assert not torch.equal(x, sample_images(model, 30, 5, seed=3))


# ---- measurements

class Stub:
    "A model whose samples are given images, in an order that depends on the seed."
    def __init__(self, x):
        self.x = x
        self.calls = []

    def sample(self, n, seed=0, x0=None, steps=None, method="euler", time_power=1.):
        self.calls.append((n, steps, seed, method, time_power))
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return self.x[order[:n]]


E = ImageExperiment("digits", {}, 1, samples=300, draws=2, nfe=(5,), nfe_euler=())


def test_real_images_are_as_good_as_real_ones(digits):
    test = load_images("digits", "test")
    model = Stub(test)
    e = dataclasses.replace(E, samples=len(model.x), nfe=(5, 60), nfe_euler=(5,))
    result = measure_images(e, model, digits, seed=1, test=test)
    assert list(result["nfe"]) == ["5", "60"] and list(result["nfe_euler"]) == ["5"]
    assert len(result["floor"]["values"]) == 3
    assert result["samples"] == len(model.x) and result["split"] == "train"
    for measured in result["nfe"].values():
        assert len(measured["frechet"]["values"]) == 2
        assert .6 < measured["frechet"]["ratio"] < 2
        for name in ("precision", "recall"):
            assert abs(measured[name] - result["real"][name]) < .12
        assert measured["confident"] == sum(measured["histogram"])/(2*e.samples) > .9
        assert min(measured["histogram"]) > 20 and .05 < measured["nearest"] < .4
        assert measured["frechet_test"]["mean"] < .1*measured["frechet"]["mean"]  # the same images
        assert measured["nearest"] == pytest.approx(result["real"]["nearest"], rel=.1)
    assert {call[2] for call in model.calls} == {1_001_000, 1_001_001}  # the same for each NFE
    assert [call[1] for call in model.calls] == [5, 5, 60, 60, 5, 5]
    assert [call[3] for call in model.calls] == ["adams"]*4 + ["euler"]*2
    assert {call[4] for call in model.calls} == {2.}
    json.dumps(result, allow_nan=False)


def test_copies_noise_and_lost_modes_are_noticed(digits):
    copies = measure_images(E, Stub(digits), digits)["nfe"]["5"]
    assert copies["nearest"] < 1e-3
    noise = measure_images(E, Stub(images(2000)), digits)["nfe"]["5"]
    assert noise["frechet"]["ratio"] > 5 and noise["recall"] < .3 and noise["nearest"] > .4
    _, labels = load_images("digits", labels=True)
    ones = measure_images(E, Stub(digits[labels == 1].repeat(3, 1, 1, 1)), digits)["nfe"]["5"]
    assert ones["histogram"][1] > .9*600 and ones["recall"] < .3


def test_too_few_images_for_the_protocol(digits):
    with pytest.raises(ValueError, match="samples.*1,498.*750"):
        measure_images(dataclasses.replace(E, samples=750), Stub(digits), digits)


def test_a_single_draw_has_no_error_and_is_json(digits):
    result = measure_images(dataclasses.replace(E, draws=1), Stub(digits), digits)
    assert result["nfe"]["5"]["frechet"]["se"] is None
    json.dumps(result, allow_nan=False)


def test_nearest_images():
    data = images(50)
    distance, index = nearest_image(torch.cat([data[[7, 3]], data[[5]] + .1]), data)
    assert index.tolist() == [7, 3, 5]
    assert distance[:2].max() < 2e-3 and distance[2].item() == pytest.approx(.1, rel=1e-2)


# ---- sheets and files

@pytest.mark.parametrize("x", (images(64), images(7, (3, 8, 8)), images(1), 3*images(4)),
                         ids=("64", "colour", "one", "out of range"))
def test_sheets(tmp_path, x):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    save_sheet(x, tmp_path/"x.png", "title")
    content = (tmp_path/"x.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 300_000
    assert plt.get_fignums() == before


def test_a_file_says_what_it_is(tmp_path, monkeypatch, both, straight):
    monkeypatch.chdir(tmp_path)
    points = NSGF(train_steps=1, pool_size=64, minibatch=64, width=8, depth=1, device="cpu")
    points.fit(images(20, (2,)), progress=False)
    for model in (points, both, straight):
        model.save("m.safetensors")
        assert type(load_model("m.safetensors", "cpu")) is type(model)
    both.predictor.save("predictor.safetensors")
    Path("plain").write_bytes(b"hello")
    refused = (("predictor.safetensors", "TimePredictor.*NSGF, FlowMatching, NSGFPlusPlus"),
               (pretrained_path("classifier-digits"), "'Classifier'"), ("plain", "plain"),
               ("imagenet", "imagenet.*"))
    for path, words in refused:
        with pytest.raises(ValueError, match=words):
            load_model(path)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_model("none.safetensors")


# ---- whole runs

def small(experiment, **changes):
    return dataclasses.replace(experiment, net=NET, train_steps=8, samples=64, draws=2, nfe=(5,),
                               nfe_euler=(3,), **changes)


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{path} holds {c}"))


@few_points
def test_a_run_in_one_go_and_in_parts(tmp_path, digits, capsys):
    e = small(IMAGE_EXPERIMENTS["digits-nsgfpp"])
    result = run_images("digits", e, out=tmp_path/"one", device="cpu", data=digits)
    folder = tmp_path/"one"/"digits"/"seed0"
    written = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "result.json", "sheet.png", "way.png", "nearest.png",
            *(f"{part}.checkpoint" for part in PARTS)} <= written
    assert strict_json(folder/"result.json") == json.loads(json.dumps(result))
    assert result["training_images"] == 1498 and set(result["phases"]) == set(PARTS)
    splits = result["measured"]["splits"]["5"]
    assert list(splits) == ["1", "2", "3"]
    assert splits["2"] == result["measured"]["nfe"]["5"]["frechet"]["mean"]  # the usual division
    for phase in result["phases"].values():
        assert phase["training"] > 0 and phase["parameters"] > 0 and math.isfinite(phase["loss"])
    out = capsys.readouterr().out
    assert re.search(r"^   5 NFE  [\d.]+  ratio [\d.]+", out, re.M) and str(folder) in out

    again = dict(out=tmp_path/"two", device="cpu", data=digits, progress=False)
    for parts in (["straight"], ["sinkhorn"]):
        assert run_images("digits", e, parts=parts, **again) is None
        assert "waits for" in capsys.readouterr().out
    in_parts = run_images("digits", e, parts=["predictor"], **again)
    assert in_parts["measured"]["nfe"]["5"]["frechet"] == result["measured"]["nfe"]["5"]["frechet"]
    one, two = (load_model(tmp_path/way/"digits/seed0/model.safetensors", "cpu")
                for way in ("one", "two"))
    assert torch.equal(one.sample(5), two.sample(5))


@few_points
@pytest.mark.parametrize("method", ("nsgf", "ot-cfm", "nsgfpp", "nsgfpp-flow"))
def test_a_run_with_classes(tmp_path, digits, capsys, method):
    labels = load_images("digits", labels=True)[1]
    e = dataclasses.replace(small(IMAGE_EXPERIMENTS["digits-classes"], method=method),
                            net=dict(NET, batch_size=16, drop_condition=.1))
    result = run_images("x", e, out=tmp_path, device="cpu", data=digits[:600],
                        labels=labels[:600])
    assert 0 <= result["measured"]["nfe"]["5"]["agreement"] <= 1
    assert "agreement" in capsys.readouterr().out
    model = load_model(tmp_path/"x"/"seed0"/"model.safetensors", "cpu")
    assert model.classes.values == list(range(10))
    assert sample_images(model, 4, 5, condition=3).shape == (4, 1, 8, 8)


def test_shipped_weights_draw_the_class_that_is_asked_for():
    model = load_model("mnist-classes", "cpu")
    asked = torch.arange(10).repeat_interleave(20)
    x = sample_images(model, 200, 5, seed=1, condition=asked)
    assert x.shape == (200, 1, 28, 28)
    classified = Classifier.from_pretrained("mnist")(x).argmax(1)
    assert (classified == asked).double().mean() > .94


@few_points
@pytest.mark.parametrize("method, kind", (
    ("fm", FlowMatching), ("ot-cfm", FlowMatching), ("fm-population", FlowMatching),
    ("nsgf", NSGF), ("nsgf-minibatch", NSGF), ("nsgfpp-flow", NSGFPlusPlus),
))
def test_a_run_of_each_method(tmp_path, digits, method, kind):
    e = small(IMAGE_EXPERIMENTS["digits"], method=method)
    result = run_images("x", e, seed=1, out=tmp_path, device="cpu", data=digits[:300],
                        progress=False)
    assert set(result["measured"]["nfe_euler"]) == {"3"}
    model = load_model(tmp_path/"x/seed1/model.safetensors", "cpu")
    assert type(model) is kind
    strict_json(tmp_path/"x"/"seed1"/"result.json")
    plans = list(tmp_path.glob("plans/*.safetensors"))
    assert len(plans) == (method in ("nsgf", "fm-population", "nsgfpp-flow"))
    if plans:
        assert max(phase.get("couplings", 0) for phase in result["phases"].values()) > 0
        x = sample_images(model, 3, 5)
        again = run_images("y", e, seed=1, out=tmp_path, device="cpu", data=digits[:300],
                           progress=False)  # with the plan that is there
        assert again["measured"]["nfe"]["5"]["frechet"] == result["measured"]["nfe"]["5"]["frechet"]
        assert torch.equal(sample_images(load_model(tmp_path/"y/seed1/model.safetensors"), 3, 5), x)


@few_points
def test_a_run_with_compile_compiles_the_network(tmp_path, digits, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    e = small(IMAGE_EXPERIMENTS["digits-fm"])
    e = dataclasses.replace(e, net=dict(NET, compile=True))
    run_images("x", e, out=tmp_path, device="cpu", data=digits, progress=False)
    assert len(compiled) == 1


@pytest.mark.slow
def test_cifar10_at_smoke_size(tmp_path, monkeypatch):
    "The real experiment with --quick: 3×32×32, attention, dropout, flips, two blocks, four levels."
    def no_weights(*arguments, **options):
        raise RuntimeError("the Inception weights could not be fetched")
    monkeypatch.setattr(image_experiments, "inception_scores", no_weights)
    e = IMAGE_EXPERIMENTS["cifar10-nsgfpp"]
    with pytest.warns(UserWarning, match="not measured"):
        result = run_images("cifar10-nsgfpp", e, data=images(70, (3, 32, 32)), out=tmp_path,
                            device="cpu", quick=True, progress=False)
    assert "Inception weights" in result["measured"]["not_measured"]
    assert result["command"] == "nsgf train cifar10-nsgfpp --seeds 0 --quick"
    strict_json(tmp_path/"cifar10-nsgfpp"/"seed0"/"result.json")
    model = load_model(tmp_path/"cifar10-nsgfpp/seed0/model.safetensors", "cpu")
    x, nfe = model.sample(2, return_nfe=True)
    assert x.shape == (2, 3, 32, 32) and nfe.tolist() == [10, 10]
    config = model.straight.config
    assert config.attention == (16,) and config.dropout == .1 and config.flip
    assert model.sinkhorn.config.pool_size <= 2**12


@few_points
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the samples are less diverse", "ignore:.*Inception weights")
def test_one_call_on_cifar10_at_smoke_size(tmp_path, monkeypatch):
    def no_weights(*arguments, **options):
        raise RuntimeError("the Inception weights could not be fetched")
    monkeypatch.setattr(image_experiments, "inception_scores", no_weights)
    e = IMAGE_EXPERIMENTS["cifar10-one-call"]
    data = images(70, (3, 32, 32))
    result = run_images("cifar10-one-call", e, data=data, labels=torch.arange(70) % 10,
                        out=tmp_path, device="cpu", quick=True, progress=False)
    assert "Inception weights" in result["measured"]["not_measured"]
    assert result["phases"]["straight"]["features"] > 0
    model = load_model(tmp_path/"cifar10-one-call/seed0/model.safetensors", "cpu")
    x = model.sample(2)
    assert x.shape == (2, 3, 32, 32) and x.abs().max() <= 1.01
    assert model.config.within_data and model.config.channels == 8


# ---- commands

@pytest.fixture
def nsgf(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return partial(command, "nsgf")


@few_points
def test_train_by_command(nsgf):
    for _ in range(2):  # the second time everything is there already
        code, out, err = nsgf("train", "digits", "--quick", "--out", "tmp")
        assert code == 0 and not err and "wrote tmp/digits/seed0/" in out, (out, err)
    assert type(load_model("tmp/digits/seed0/model.safetensors")) is NSGF


def test_sample_by_command(nsgf, both):
    path = Path("m.safetensors")
    both.save(path)
    code, out, err = nsgf("sample", path, "-n", 9, "-o", "x.npy", "--nfe", 6, "--seed", 3)
    assert code == 0 and not err and "9 images" in out
    x = np.load("x.npy", allow_pickle=False)
    assert (x == sample_images(load_model(path), 9, 6, 3).numpy()).all()
    assert nsgf("sample", path, "-n", 9, "-o", "x.png")[0] == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_commands_that_fail_say_why(nsgf, both):
    both.save("both.safetensors")
    Path("torn.safetensors").write_bytes(Path("both.safetensors").read_bytes()[:-9])
    fails(nsgf("sample", "none.safetensors"), "none.safetensors")
    fails(nsgf("sample", "imagenet"), "imagenet")
    fails(nsgf("sample", "torn.safetensors"), "torn.safetensors")
    fails(nsgf("sample", "both.safetensors", "--nfe", 2), "nfe.*3")
    fails(nsgf("sample", "both.safetensors", "-n", 4, "-o", "x.nothing"), "nothing")
    for name in ("no/where/x.npy", "no/where/x.png"):
        fails(nsgf("sample", "both.safetensors", "-n", 4, "-o", name), name)
    fails(nsgf("evaluate", "both.safetensors"), "both.safetensors")
    fails(nsgf("train", "digits", "--quick", "--device", "cuda:99"), "cuda:99")
    wrong_calls = (("train", "digits", "--parts", "clock"), ("train", "digit"),
                   ("sample", "x", "--nfe", 0))
    for words in wrong_calls:
        assert nsgf(*words)[0] == 2


def test_a_missing_data_set(nsgf, monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", ".")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")

    def offline(*arguments):
        raise OSError("no network")
    monkeypatch.setattr("socket.getaddrinfo", offline)
    fails(nsgf("train", "mnist", "--quick"), "mnist.*NSGF_NB_DATA")


ONE_CALL_SEEDS = {"digits-one-call": 5, "digits-one-call-autoencoder": 2,
                  "digits-one-call-pixels": 2, "mnist-one-call": 2,
                  "mnist-classes-one-call": 2}


@pytest.mark.parametrize("name", ONE_CALL_SEEDS)
def test_results_at_one_call_are_those_of_the_experiments(name):
    paths = sorted((RESULTS/name).glob("seed*/result.json"))
    assert len(paths) == ONE_CALL_SEEDS[name]
    for path in paths:
        result = read_json(path)
        assert not result["provenance"]["commit"].endswith("dirty")
        assert path.parent.name == f"seed{result['seed']}"
        later = dict(autoencoder=False, moment_weight=0.)  # settings that came after some results
        assert later | result["protocol"] == to_json(IMAGE_EXPERIMENTS[name])
