"""Classifier, Fréchet distance, precision and recall, FID and IS: parity and bad input."""
import hashlib
import math
import socket
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from urllib.error import URLError

import pytest
import torch
from torch import nn

from nsgf_nb.files import load_tensors, pretrained_path, save_tensors
from nsgf_nb.image_metrics import (
    Classifier,
    class_histogram,
    frechet_distance,
    inception_scores,
    precision_recall,
)
from nsgf_nb.images import load_images


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is missing")


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))*2 - 1


def with_moments(n, mean, covariance, seed=0):
    "n points with exactly this mean and (unbiased) covariance."
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    return mean + white @ torch.linalg.cholesky(covariance).T


# Fréchet distance

def test_frechet_of_gaussians_that_do_not_commute():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    m1, m2 = normal(5, seed=2), normal(5, seed=3)
    C1, C2 = a @ a.T + torch.eye(5), b @ b.T + torch.eye(5)
    x, y = with_moments(40, m1, C1), with_moments(60, m2, C2, seed=1)
    root = torch.linalg.eigvals(C1 @ C2).sqrt().real.sum()
    expected = (m1 - m2).square().sum() + C1.trace() + C2.trace() - 2*root
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*singular")
def test_frechet_of_singular_covariances():
    "10 points in 30 dimensions, moved and stretched."
    x = normal(10, 30)
    centred = x - x.mean(0)
    assert frechet_distance(x, x) < 1e-10
    assert frechet_distance(x, x + 2) == pytest.approx(120, rel=1e-9)
    assert frechet_distance(centred, 3*centred) == pytest.approx(4*float(x.var(0).sum()), rel=1e-7)


@pytest.mark.parametrize("size", (1, 7, 64, 1000))
def test_batches_do_not_matter(size):
    x, y = normal(100, 5), 1 + 2*normal(80, 5, seed=1)
    whole = frechet_distance(x, y, batch_size=1000)
    assert frechet_distance(x, y, batch_size=size) == pytest.approx(whole, rel=1e-10)
    labelled = [(batch, "labels") for batch in y.split(size)]
    assert frechet_distance(iter(x.split(size)), labelled) == pytest.approx(whole, rel=1e-10)


def test_frechet_far_from_the_origin():
    "Features of size 10⁶ with deviation 1: streaming does not subtract large squares."
    x, y = normal(500, 3), 2*normal(500, 3, seed=1)
    far = frechet_distance(x + 1e6, y + 1e6, batch_size=50)
    assert far == pytest.approx(frechet_distance(x, y), rel=1e-8)


def test_frechet_of_features_in_half_precision():
    "Features may have any floating-point type; the statistics are float64."
    x, y = normal(200, 6).bfloat16(), 1 + normal(200, 6, seed=1).bfloat16()
    exact = frechet_distance(x.double(), y.double())
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-12)


def test_frechet_uses_the_features_and_no_gradients():
    x, y = normal(50, 4).requires_grad_(), normal(60, 4, seed=1)
    calls = []
    def twice(batch):
        calls.append((len(batch), torch.is_grad_enabled()))
        return 2*batch[:, :2]
    expected = 4*frechet_distance(x[:, :2], y[:, :2])
    assert frechet_distance(x, y, twice, batch_size=25) == pytest.approx(expected, rel=1e-9)
    assert calls == [(size, False) for size in (25, 25, 25, 25, 10)]
    assert torch.is_grad_enabled()


def test_frechet_refuses():
    x = normal(20, 3)
    with pytest.raises(ValueError, match="y must hold at least 2 .*1$"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="x must hold at least 2 .*0$"):
        frechet_distance(iter([]), x)
    with pytest.raises(ValueError, match="y .*features.* 3, got 4"):
        frechet_distance(x, normal(20, 4))
    with pytest.raises(ValueError, match=r"features .*\(20, F\).*\(20, 3, 1\)"):
        frechet_distance(x, x, lambda batch: batch[..., None])
    with pytest.raises(ValueError, match="features of y has 60 NaN"):
        frechet_distance(x, 2*x, lambda batch: batch.where(batch[0] == x[0], math.nan))
    with pytest.raises(TypeError, match="y .*int32"):
        frechet_distance(x, x.int())
    with pytest.raises(TypeError, match="x .*int$"):
        frechet_distance(3, x)
    with pytest.raises(TypeError, match="batch of y .*str"):
        frechet_distance(x, ["digits"])


def test_frechet_warns_of_few_points():
    with pytest.warns(UserWarning, match="y has 6 points for 6 features"):
        frechet_distance(normal(20, 6), normal(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(normal(20, 6), normal(7, 6))


# precision and recall

def test_precision_recall_counts_the_kth_neighbour():
    "Radii of the real balls: 1, 1, 2, 4 for k = 1; 3, 2, 3, 6 for k = 2; 7, 6, 4, 7 for k = 3."
    real = torch.tensor([[0.], [1.], [3.], [7.]])
    x = torch.tensor([[-1.], [-1.5], [-2.5], [20.]])
    assert [precision_recall(x, real, k=k)[0] for k in (1, 2, 3)] == [.25, .75, .75]
    assert [precision_recall(real, x, k=k)[1] for k in (1, 2, 3)] == [.25, .75, .75]


@pytest.mark.parametrize("chunk, batch_size", ((1, 7), (64, 500), (10_000, 1)))
def test_precision_recall_in_chunks_is_the_definition(chunk, batch_size):
    x, y = normal(60, 2), .8*normal(90, 2, seed=1) + 1
    def inside(a, b):
        "The share of a inside some ball of b."
        radii = torch.cdist(b, b).sort(1).values[:, 3]
        return (torch.cdist(a, b) <= radii).any(1).double().mean().item()
    expected = inside(x, y), inside(y, x)
    assert 0 < min(expected) and max(expected) < 1
    found = precision_recall(x, y, k=3, chunk=chunk, batch_size=batch_size)
    assert found == pytest.approx(expected)
    assert precision_recall(2*x, 2*y, lambda batch: batch/2) == pytest.approx(expected)


def test_precision_recall_refuses():
    x = normal(5, 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be from 1 to 4.*{k}$"):
            precision_recall(x, normal(9, 2), k=k)
    with pytest.raises(ValueError, match="y .*features.* 2, got 3"):
        precision_recall(x, normal(9, 3))


# classifiers

@pytest.mark.parametrize("shape", ((1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9)))
def test_classifier_shapes(shape):
    net = Classifier(shape, classes=7, width=4)
    x = images(3, *shape)
    assert net.features(x).shape == (3, 16)
    assert net(x).shape == (3, 7)
    assert not net.training


def test_features_are_what_the_head_reads_before_its_relu():
    net, x = Classifier((1, 8, 8), width=4), images(30, 1, 8, 8)
    f = net.features(x)
    assert (f < 0).any()
    torch.testing.assert_close(net(x), f.clamp(min=0) @ net.head.weight.T + net.head.bias)


def test_classifier_takes_any_floating_point_type():
    net, x = Classifier((1, 8, 8), width=4), images(3, 1, 8, 8).bfloat16()
    torch.testing.assert_close(net(x), net(x.float()))
    torch.testing.assert_close(net(x.double()), net(x.float()))


@pytest.mark.parametrize("method", ("forward", "features"))
def test_classifier_refuses(method):
    call = getattr(Classifier((1, 8, 8), width=4), method)
    with pytest.raises(ValueError, match=r"x .*\(B, 1, 8, 8\), got \(5, 1, 28, 28\)"):
        call(images(5, 1, 28, 28))
    with pytest.raises(ValueError, match=r"x .*\(B, 1, 8, 8\), got \(1, 8, 8\)"):
        call(images(1, 8, 8))
    with pytest.raises(TypeError, match="x .*uint8"):
        call(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x .*\[-1, 1\].*1\.01.*clamp"):
        call((1.01*torch.linspace(-1, 1, 64)).view(1, 1, 8, 8))
    with pytest.raises(ValueError, match="x has 64 NaN"):
        call(torch.full((1, 1, 8, 8), math.nan))
    call(torch.full((1, 1, 8, 8), 1.00005))  # rounding


def test_a_saved_classifier_comes_back(tmp_path):
    net, x = Classifier((1, 8, 8), width=4), images(5, 1, 8, 8)
    net.about = dict(data="digits", test_accuracy=.5)
    net.save(tmp_path/"a.safetensors")
    again = Classifier.load(tmp_path/"a.safetensors")
    assert torch.equal(again(x), net(x))
    assert again.about == net.about
    assert again.config == net.config
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    again.save(tmp_path/"b.safetensors")
    assert (tmp_path/"a.safetensors").read_bytes() == (tmp_path/"b.safetensors").read_bytes()


def test_half_precision_in_the_file_is_float32_in_the_network(tmp_path):
    path = tmp_path/"half.safetensors"
    net = Classifier((1, 8, 8), width=4)
    half = net.half().state_dict()
    save_tensors(path, half, dict(model="Classifier", config=net.config))
    again = Classifier.load(path)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int64)
        assert torch.equal(tensor, half[name].to(tensor.dtype))


def test_load_refuses_what_is_no_classifier(tmp_path):
    path = tmp_path/"c.safetensors"
    Classifier((1, 8, 8), width=4).save(path)
    tensors, about = load_tensors(path)
    del about["format"]
    config = about["config"]
    for change, match in (
        (dict(model="NSGF"), "'NSGF'"),
        (dict(config=dict(config, width=5)), "complete Classifier.*size mismatch"),
        (dict(config=dict(depth=3)), "complete Classifier.*depth"),
        (dict(config=dict(config, shape=[])), "complete Classifier"),
    ):
        save_tensors(path, tensors, {**about, **change})
        with pytest.raises(ValueError, match=match):
            Classifier.load(path)
    tensors.pop("head.bias")
    save_tensors(path, tensors, about)
    with pytest.raises(ValueError, match="head.bias"):
        Classifier.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Classifier.load(tmp_path/"nowhere")
    with pytest.raises(ValueError, match="classifier-moons"):
        Classifier.from_pretrained("moons")


@pytest.mark.parametrize("name, shape, accuracy", (
    ("digits", (1, 8, 8), .98), ("mnist", (1, 28, 28), .992)))
def test_shipped_classifiers(name, shape, accuracy):
    net = Classifier.from_pretrained(name)
    assert net.config["shape"] == list(shape)
    assert net.about["data"] == name
    assert net.about["test_accuracy"] >= accuracy
    assert {"seed", "settings", "training_images", "test_images", "command"} <= set(net.about)
    assert net.features(images(2, *shape)).shape == (2, 64)
    assert pretrained_path(f"classifier-{name}").stat().st_size < 1_000_000


def test_shipped_digits_classifier_is_as_good_as_it_says():
    x, labels = load_images("digits", "test", labels=True)
    net = Classifier.from_pretrained("digits")
    accuracy = (net(x).argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(net.about["test_accuracy"], abs=1.5/len(x))
    assert len(x) == net.about["test_images"]


def test_class_histogram_counts_the_confident():
    p = torch.tensor([[.95, .05, 0], [.9, .06, .04], [.5, .5, 0],
                      [.01, .01, .98], [.2, .79, .01], [.97, .02, .01]])
    rows = torch.arange(6.)[:, None]
    def classifier(batch):
        return (p + 1e-9).log()[batch[:, 0].long()]
    assert class_histogram(rows, classifier, .9 - 1e-6, batch_size=4).tolist() == [3, 0, 1]
    assert class_histogram(iter(rows.split(1)), classifier, .7).tolist() == [3, 1, 1]
    assert class_histogram(rows, classifier, 0.).sum() == 6
    assert class_histogram(rows, classifier, .999).tolist() == [0, 0, 0]


# FID and IS

class Fake(nn.Module):
    "In the place of Inception: 6 features and 5 logits of uint8 images, which it records."
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        z = images.float().flatten(2)/255
        f = torch.cat([z.mean(2), z.std(2)], 1)
        return f, 8*f[:, :5]


def is_by_hand(logits, parts):
    scores = []
    for part in logits.double().softmax(1).chunk(parts):
        divergence = part*(part.log() - part.mean(0).log())
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std().item()


@needs("torchmetrics")
def test_fid_and_is_are_their_formulas(capsys):
    brightness = torch.rand(120, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    x, y = images(120, 3, 8, 8)*brightness, images(90, 3, 8, 8, seed=1)*.5
    network = Fake()
    state = torch.get_rng_state()
    scores = inception_scores(x, y.split(17), split="test", batch_size=32, extractor=network)
    assert torch.equal(state, torch.get_rng_state())

    generated, real = torch.cat(network.seen).split((120, 90))
    f, logits = Fake()(generated)
    assert scores.fid == pytest.approx(frechet_distance(f, Fake()(real)[0]), rel=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = is_by_hand(logits[torch.randperm(120)], 10)
    assert scores.inception_score == pytest.approx(mean, rel=1e-5)
    assert scores.deviation == pytest.approx(deviation, rel=1e-4)
    for part in ("Fake", "not the standard network", "120 images against 90", "'test'"):
        assert part in scores.protocol
    assert str(scores) in capsys.readouterr().out
    again = inception_scores(x, y, extractor=Fake(), progress=False)
    assert again[:3] == pytest.approx(scores[:3], rel=1e-6)
    assert capsys.readouterr().out == ""


@needs("torchmetrics")
def test_the_network_gets_exact_bytes_in_three_channels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(10, 1, 1, 1)
    for x in (levels.float()/127.5 - 1, levels.float()/255*2 - 1, (levels.float()/255 - .5)/.5):
        network = Fake()
        inception_scores(x, x*1.0001, extractor=network, progress=False)
        assert torch.cat(network.seen).equal(levels.repeat(2, 3, 1, 1))


@needs("torchmetrics")
def test_inception_scores_refuse():
    x = images(20, 3, 8, 8)
    def scores(x, y):
        inception_scores(x, y, extractor=Fake(), progress=False)
    with pytest.raises(ValueError, match="y .*at least 10 .*4$"):
        scores(x, x[:4])
    with pytest.raises(ValueError, match="x .*channels, got 2"):
        scores(x[:, :2], x)
    with pytest.raises(ValueError, match=r"y .*\[-1, 1\].*y\.clamp"):
        scores(x, 2*x)


@pytest.mark.parametrize("missing", ("torchmetrics", "torch_fidelity"))
def test_missing_packages_are_named(missing, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install torchmetrics torch-fidelity"):
        inception_scores(images(20, 3, 8, 8), images(20, 3, 8, 8))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty folder for weights, and a fake torch_fidelity that records how it is called."
    pytest.importorskip("torchmetrics.image.fid")  # before it sees the fake
    pytest.importorskip("torchmetrics.image.inception")
    calls = []
    class Extractor(Fake):
        def __init__(self, *args, **kwargs):
            super().__init__()
            calls.append((args, kwargs))
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path/"checkpoints"/"weights-inception-2015-12-05-6726825d.pth"
    return types.SimpleNamespace(file=file, calls=calls)


def test_unreachable_or_damaged_weights_say_what_to_put_where(hub, monkeypatch):
    timeouts = []
    def unreachable(url, *args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    x = images(20, 3, 8, 8)
    with pytest.raises(RuntimeError, match="no route.*https.*6726825d.pth") as error:
        inception_scores(x, x)
    assert str(hub.file.parent) in str(error.value)
    assert 0 < timeouts[0] <= 15
    assert socket.getdefaulttimeout() is None
    assert list(hub.file.parent.iterdir()) == []
    hub.file.write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match=f"{hub.file.name}.*6726825d.*delete"):
        inception_scores(x, x)


def test_the_standard_network_is_asked_for_features_and_unbiased_logits(hub, monkeypatch):
    hub.file.parent.mkdir()
    hub.file.write_bytes(b"weights")
    digest = types.SimpleNamespace(hexdigest=lambda: "6726825d and more")
    monkeypatch.setattr(hashlib, "sha256", lambda content: digest)
    x, y = images(20, 3, 8, 8), images(20, 3, 8, 8, seed=1)
    scores = inception_scores(x, y, progress=False)
    assert hub.calls == [(("inception-v3-compat", ["2048", "logits_unbiased"]),
                          dict(feature_extractor_weights_path=str(hub.file)))]
    assert "Inception v3 of 2015-12-05" in scores.protocol


@needs("torchmetrics")
@needs("torch_fidelity")
def test_the_real_network_can_be_made_with_these_arguments(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    class Stop(Exception):
        pass
    def stop(self, images):
        raise Stop(self, images)
    (tmp_path/"checkpoints").mkdir()
    (tmp_path/"checkpoints"/inception.URL_INCEPTION_V3.rpartition("/")[2]).write_bytes(b"")
    digest = types.SimpleNamespace(hexdigest=lambda: "6726825d")
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        patch.setattr(hashlib, "sha256", lambda content: digest)
        patch.setattr(inception.torch, "load", lambda *args, **kwargs: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "forward", stop)
        with pytest.raises(Stop) as stopped:
            inception_scores(images(2, 1, 8, 8), images(2, 1, 8, 8), progress=False)
    network, x = stopped.value.args
    features, logits = network(x)
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)


def test_importing_is_light():
    heavy = "{'torchmetrics', 'torch_fidelity', 'torchvision', 'scipy', 'matplotlib'}"
    code = f"import sys, nsgf_nb.image_metrics; print(len({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
