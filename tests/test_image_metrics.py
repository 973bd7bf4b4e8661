"""Classifiers, Fréchet distance, precision and recall, FID and IS: closed forms, parity with torchmetrics, bad input."""
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from nsgf_nb import image_metrics
from nsgf_nb.image_metrics import Classifier, class_histogram, frechet_distance, inception_scores, make_classifier, precision_recall, train_classifier
from nsgf_nb.long_runs import Terminated

def needs(package): return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is missing: no parity test")
parity, standard = needs("torchmetrics"), needs("torch_fidelity")


def normal(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
def images(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))*2 - 1


def with_moments(n, mean, cov, seed=0):
    "n points with exactly this mean and (unbiased) covariance."
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    return mean + z @ torch.linalg.cholesky(cov).T


def stripes(n, seed=0):
    "Three classes that a small network learns at once: dark, bright above, bright on the left; with some noise."
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    x = -torch.ones(n, 1, 8, 8)
    x[labels == 1, :, :4] = .8
    x[labels == 2, :, :, :4] = .8
    return (x + .1*torch.randn(x.shape, generator=g)).clamp(-1, 1), labels


# Fréchet distance

def test_frechet_of_gaussians_that_do_not_commute():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    m1, m2, c1, c2 = normal(5, seed=2), normal(5, seed=3), a @ a.T + torch.eye(5), b @ b.T + torch.eye(5)
    x, y = with_moments(40, m1, c1), with_moments(60, m2, c2, seed=1)
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    assert frechet_distance(x, y) == pytest.approx(float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2*root), rel=1e-9)


def test_frechet_of_diagonal_gaussians():
    "Axis by axis it is (m1 - m2)² + (s1 - s2)², with the unbiased variance."
    m, s, t = torch.tensor([1., -2., .5]).double(), torch.tensor([1., 2., 3.]).double(), torch.tensor([2., .5, 3.]).double()
    x, y = with_moments(10, m, s.square().diag()), with_moments(25, 0*m, t.square().diag(), seed=1)
    assert frechet_distance(x, y) == pytest.approx(float(m.square().sum() + (s - t).square().sum()), rel=1e-9)


def test_frechet_is_symmetric_and_zero_for_the_same():
    x, y = normal(50, 4), 1 + normal(70, 4, seed=1)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert 0 <= frechet_distance(x, x) < 1e-12
    assert 0 <= frechet_distance(x, x[torch.randperm(50, generator=torch.Generator().manual_seed(0))]) < 1e-12


@pytest.mark.filterwarnings("ignore:.*singular")
def test_frechet_of_singular_covariances():
    "Where a determinant would vanish: 10 points in 30 dimensions, moved and stretched."
    x = normal(10, 30)
    assert frechet_distance(x, x) < 1e-10
    assert frechet_distance(x, x + 2) == pytest.approx(120, rel=1e-9)
    assert frechet_distance(x - x.mean(0), 3*(x - x.mean(0))) == pytest.approx(4*float(x.var(0).sum()), rel=1e-7)


@pytest.mark.parametrize("size", (1, 7, 64, 1000))
def test_batches_do_not_matter(size):
    x, y = normal(100, 5), 1 + 2*normal(80, 5, seed=1)
    whole = frechet_distance(x, y, batch_size=1000)
    assert frechet_distance(x, y, batch_size=size) == pytest.approx(whole, rel=1e-10)
    assert frechet_distance(iter(x.split(size)), [(b, "labels") for b in y.split(size)]) == pytest.approx(whole, rel=1e-10)


def test_frechet_far_from_the_origin():
    "Streaming does not subtract large squares: features of size 10⁶ with deviation 1, to ten digits."
    x, y = normal(500, 3), 2*normal(500, 3, seed=1)
    near = frechet_distance(x, y)
    assert frechet_distance(x + 1e6, y + 1e6, batch_size=50) == pytest.approx(near, rel=1e-8)


def test_frechet_in_half_and_single_precision():
    "Features may be of any floating-point type; the statistics are float64."
    x, y = normal(200, 6).bfloat16(), 1 + normal(200, 6, seed=1).bfloat16()
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x.double(), y.double()), rel=1e-12)
    assert frechet_distance(x, y, lambda b: b.bfloat16()) == pytest.approx(frechet_distance(x.double(), y.double()), rel=1e-12)


def test_frechet_uses_the_features_and_no_gradients():
    x, y = normal(50, 4).requires_grad_(), normal(60, 4, seed=1)
    seen = []
    def twice(b):
        seen.append((len(b), torch.is_grad_enabled()))
        return 2*b[:, :2]
    assert frechet_distance(x, y, twice, batch_size=25) == pytest.approx(4*frechet_distance(x[:, :2], y[:, :2]), rel=1e-9)
    assert seen == [(25, False), (25, False), (25, False), (25, False), (10, False)]
    assert torch.is_grad_enabled()


def test_frechet_falls_like_one_over_n():
    "The bias between two samples of one Gaussian with covariance 1 is F(F + 5)/2N to first order."
    values = [frechet_distance(normal(1000, 8, seed=2*k), normal(1000, 8, seed=2*k + 1)) for k in range(60)]
    assert sum(values)/60 == pytest.approx(8*13/2/1000, rel=.1)


def test_frechet_refuses():
    x = normal(20, 3)
    with pytest.raises(ValueError, match="y must hold at least 2 points .* got 1"): frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="x must hold at least 2 points .* got 0"): frechet_distance(iter([]), x)
    with pytest.raises(ValueError, match="y must have as many features as x, 3, got 4"): frechet_distance(x, normal(20, 4))
    with pytest.raises(ValueError, match=r"features must return \(20, F\) for 20 points, got \(20, 3, 1\)"): frechet_distance(x, x, lambda b: b[..., None])
    with pytest.raises(ValueError, match="features of y has 60 NaN"): frechet_distance(x, 2*x, lambda b: b.where(b[0] == x[0], math.nan))
    with pytest.raises(TypeError, match="y must hold floating-point numbers"): frechet_distance(x, x.int())
    with pytest.raises(TypeError, match="x must be a tensor, or an iterable of batches, got int"): frechet_distance(3, x)
    with pytest.raises(TypeError, match="a batch of y must be a torch.Tensor, got str"): frechet_distance(x, ["digits"])


def test_frechet_warns_of_few_points():
    with pytest.warns(UserWarning, match="y has 6 points for 6 features"): frechet_distance(normal(20, 6), normal(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(normal(20, 6), normal(7, 6))


@parity
def test_frechet_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    net = Classifier.from_pretrained("digits")
    class Features(nn.Module):
        num_features = 64
        def forward(self, x): return net.features(x)
    fid, x, y = FrechetInceptionDistance(Features()), images(150, 1, 8, 8), images(200, 1, 8, 8, seed=1)**3
    with torch.no_grad():
        for b in x.split(40): fid.update(b, real=False)
        for b in y.split(40): fid.update(b, real=True)
    ours = frechet_distance(x, y, net.features)
    assert ours > .01 and fid.compute().item() == pytest.approx(ours, rel=1e-4) # torchmetrics answers in float32


# precision and recall

def test_precision_recall_by_hand():
    real = torch.tensor([[0., 0.], [1., 0.], [0., 1.], [9., 9.], [9., 8.], [8., 9.]])
    one_mode = torch.tensor([[.2, .2], [.5, .1], [.1, .4], [50., 50.]])
    # k = 2: real balls reach 1 from (0, 0) and √2 from (1, 0), (0, 1); those of the first three generated points reach
    # 0.32, 0.5 and 0.5, and hold (0, 0) alone
    assert precision_recall(one_mode[:3], real, k=2) == (1, pytest.approx(1/6))
    assert precision_recall(real, one_mode[:3], k=2) == (pytest.approx(1/6), 1)
    assert precision_recall(one_mode, real, k=2)[0] == .75 # (50, 50) lies nowhere


def test_precision_recall_counts_the_kth_neighbour():
    real, x = torch.tensor([[0.], [1.], [3.], [7.]]), torch.tensor([[-1.], [-1.5], [-2.5], [20.]])
    # distance to the k-th nearest other: k=1: 1, 1, 2, 4; k=2: 3, 2, 3, 6; k=3: 7, 6, 4, 7
    assert [precision_recall(x, real, k=k)[0] for k in (1, 2, 3)] == [.25, .75, .75]
    assert [precision_recall(real, x, k=k)[1] for k in (1, 2, 3)] == [.25, .75, .75]


def test_precision_recall_of_the_same_law_and_of_others():
    x, y = normal(400, 3), normal(500, 3, seed=1)
    p, r = precision_recall(x, y)
    assert p > .8 and r > .8
    assert precision_recall(x + 100, y) == (0, 0)
    p, r = precision_recall(.1*x, y)           # all in the middle
    assert p > .95 and r < .1


@pytest.mark.parametrize("chunk, batch", ((1, 7), (64, 500), (10_000, 1)))
def test_precision_recall_in_chunks_is_the_definition(chunk, batch):
    x, y, k = normal(60, 2), .8*normal(90, 2, seed=1) + 1, 3
    def inside(a, b):                          # the share of a inside some ball of b
        reach = torch.cdist(b, b).sort(1).values[:, k]
        return (torch.cdist(a, b) <= reach).any(1).double().mean().item()
    assert 0 < inside(x, y) < 1 and 0 < inside(y, x) < 1
    assert precision_recall(x, y, k=k, chunk=chunk, batch_size=batch) == pytest.approx((inside(x, y), inside(y, x)))
    assert precision_recall(2*x, 2*y, lambda b: b/2, k) == pytest.approx((inside(x, y), inside(y, x)))


def test_precision_recall_refuses():
    x = normal(5, 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be from 1 to 4, the smaller set less one, got {k}"): precision_recall(x, normal(9, 2), k=k)
    with pytest.raises(ValueError, match="y must have as many features as x, 2, got 3"): precision_recall(x, normal(9, 3))


# classifiers

@pytest.mark.parametrize("shape", ((1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9)))
def test_classifier_shapes(shape):
    net = Classifier(shape, classes=7, width=4)
    assert net.features(images(3, *shape)).shape == (3, 16) and net(images(3, *shape)).shape == (3, 7)
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


def test_classifier_refuses():
    net = Classifier((1, 8, 8), width=4)
    for ask in (net, net.features):
        with pytest.raises(ValueError, match=r"x must be images of shape \(B, 1, 8, 8\), got \(5, 1, 28, 28\)"): ask(images(5, 1, 28, 28))
        with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(1, 8, 8\)"): ask(images(1, 8, 8))
        with pytest.raises(TypeError, match=r"torch\.uint8: convert it with x\.float\(\)"): ask(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"values in \[-1, 1\], got -1.* to 1\.01: clamp samples first, x\.clamp\(-1, 1\)"): ask((1.01*torch.linspace(-1, 1, 64)).view(1, 1, 8, 8))
        with pytest.raises(ValueError, match="x has 1 NaN"): ask(torch.zeros(1, 1, 8, 8).masked_fill(torch.arange(64).view(1, 1, 8, 8) == 5, math.nan))
        ask(torch.full((1, 1, 8, 8), 1.00005)) # rounding


def test_training_learns_and_repeats():
    x, labels = stripes(300)
    state = torch.get_rng_state()
    net, same, other = (train_classifier(x, labels, width=4, epochs=8, batch_size=50, shift=1, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and net.head.out_features == 3
    test, truth = stripes(200, seed=1)
    assert (net(test).argmax(1) == truth).float().mean() > .98
    assert (net.body[1].running_mean != 0).all() # batch statistics were learned
    assert torch.equal(net(test), same(test)) and not torch.equal(net(test), other(test))


def test_weights_and_order_follow_the_seed(monkeypatch):
    x, labels = stripes(100)
    fresh = image_metrics._seeded_classifier
    def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
    with torch.random.fork_rng(devices=[]):
        first = weights(fresh(x, labels, 4, 0))
        torch.rand(1)                          # whatever was drawn meanwhile
        assert torch.equal(weights(fresh(x, labels, 4, 0)), first) and not torch.equal(weights(fresh(x, labels, 4, 1)), first)
    monkeypatch.setattr(image_metrics, "_seeded_classifier", lambda x, labels, width, seed: fresh(x, labels, width, 0))
    a, b, c = (weights(train_classifier(x, labels, width=4, epochs=1, batch_size=20, shift=0, seed=s, progress=False)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_stopped_classifier_goes_on_to_the_bit(monkeypatch, tmp_path):
    x, labels = stripes(100)
    kw, shifted, calls = dict(width=4, epochs=3, batch_size=20, shift=1, progress=False), image_metrics._shifted, []
    whole = train_classifier(x, labels, **kw)
    def stop(*args):
        calls.append(1)
        if len(calls) == 7: os.kill(os.getpid(), signal.SIGTERM)            # in the middle of the second epoch
        return shifted(*args)
    with monkeypatch.context() as patch:
        patch.setattr(image_metrics, "_shifted", stop)
        with pytest.raises(Terminated, match="stopped after 7 of 15 steps"): train_classifier(x, labels, **kw, checkpoint=tmp_path/"c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = train_classifier(x, labels, **kw, checkpoint=tmp_path/"c")
    assert all(torch.equal(u, v) for u, v in zip(again.state_dict().values(), whole.state_dict().values()))
    with pytest.raises(ValueError, match="c is a checkpoint of another run, with shift=1, not 0|with shift"): train_classifier(x, labels, **kw | dict(shift=0), checkpoint=tmp_path/"c")


def test_shifts_move_each_image_its_own_way():
    x = torch.arange(1., 10).view(1, 1, 3, 3).repeat(400, 1, 1, 1)/9
    moved = image_metrics._shifted(x, 1, torch.Generator().manual_seed(0))
    kinds = {tuple(m.flatten().tolist()) for m in moved}
    assert len(kinds) == 9 and tuple(x[0].flatten().tolist()) in kinds
    pushed = torch.full((3, 3), -1.)
    pushed[1:, 1:] = x[0, 0, :2, :2]
    assert tuple(pushed.flatten().tolist()) in kinds
    assert torch.equal(image_metrics._shifted(x, 0, torch.Generator()), x)


def test_training_refuses():
    x, labels = stripes(20)
    for bad in (labels[:5], labels.float(), labels - 1):
        with pytest.raises(ValueError, match="labels must be 20 integers from 0"): train_classifier(x, bad, progress=False)
    with pytest.raises(ValueError, match="x must have values in"): train_classifier(2*x, labels, progress=False)
    with pytest.raises(ValueError, match="name must be one of digits, mnist, cifar10, got 'moons'"): make_classifier("moons", (x, labels), (x, labels))


def test_made_classifier_comes_back_with_its_story(tmp_path, monkeypatch):
    monkeypatch.setitem(image_metrics._SETTINGS, "digits", dict(epochs=6, batch_size=50, width=4))
    net = make_classifier("digits", stripes(300), stripes(700, seed=1), progress=False)
    test, truth = stripes(700, seed=1)
    assert net.about["test_accuracy"] == (net(test).argmax(1) == truth).double().mean().item() > .9
    net.save(tmp_path/"c.safetensors")
    again = Classifier.load(tmp_path/"c.safetensors")
    assert torch.equal(again(test), net(test)) and again.about == net.about and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    again.save(tmp_path/"d.safetensors")
    assert (tmp_path/"c.safetensors").read_bytes() == (tmp_path/"d.safetensors").read_bytes()
    assert json.loads((tmp_path/"c.safetensors.json").read_text())["command"] == "nsgf train classifier-digits --seed 0"


def test_load_refuses_what_is_no_classifier(tmp_path):
    from nsgf_nb.files import load_tensors, save_tensors
    path = tmp_path/"c.safetensors"
    Classifier((1, 8, 8), width=4).save(path)
    tensors, about = load_tensors(path)
    about.pop("format")
    for change, words in ((dict(model="NSGF"), "holds a model of type 'NSGF', not 'Classifier'"),
                          (dict(config=dict(about["config"], width=5)), "does not describe a whole Classifier: .*size mismatch"),
                          (dict(config=dict(depth=3)), "does not describe a whole Classifier"),
                          (dict(config=dict(about["config"], shape=[])), "does not describe a whole Classifier")):
        save_tensors(path, tensors, {**about, **change})
        with pytest.raises(ValueError, match=words): Classifier.load(path)
    save_tensors(path, {k: t for k, t in tensors.items() if k != "head.bias"}, about)
    with pytest.raises(ValueError, match="head.bias"): Classifier.load(path)
    with pytest.raises(FileNotFoundError): Classifier.load(tmp_path/"nowhere")
    with pytest.raises(ValueError, match="classifier-moons"): Classifier.from_pretrained("moons")


@pytest.mark.parametrize("name, shape, least", (("digits", (1, 8, 8), .98), ("mnist", (1, 28, 28), .992)))
def test_shipped_classifiers(name, shape, least):
    net = Classifier.from_pretrained(name)
    assert net.config["shape"] == list(shape) and net.about["test_accuracy"] >= least
    assert {k: net.about[k] for k in ("data", "seed", "settings")} == dict(data=name, seed=0, settings=image_metrics._SETTINGS[name])
    assert {"training_images", "test_images", "command"} <= set(net.about)
    assert net.features(images(2, *shape)).shape == (2, 64)
    path = image_metrics.shipped(f"classifier-{name}")
    assert path.stat().st_size < 1_000_000
    assert all(t.dtype in (torch.float32, torch.int64) for t in net.state_dict().values())


def test_shipped_digits_classifier_is_as_good_as_it_says():
    from nsgf_nb.data import load_images
    x, labels = load_images("digits", "test", labels=True)
    net = Classifier.from_pretrained("digits")
    assert (net(x).argmax(1) == labels).double().mean().item() == pytest.approx(net.about["test_accuracy"], abs=1.5/len(x))
    assert len(x) == net.about["test_images"] and len(load_images("digits", "train")) == net.about["training_images"]


def test_class_histogram_counts_the_confident():
    p = torch.tensor([[.95, .05, 0], [.9, .06, .04], [.5, .5, 0], [.01, .01, .98], [.2, .79, .01], [.97, .02, .01]])
    logits = (p + 1e-9).log()
    rows = torch.arange(6.)[:, None]
    def net(b): return logits[b[:, 0].long()]
    assert class_histogram(rows, net, .9 - 1e-6, batch_size=4).tolist() == [3, 0, 1]
    assert class_histogram(iter(rows.split(1)), net, .7).tolist() == [3, 1, 1]
    assert class_histogram(rows, net, 0.).sum() == 6
    assert class_histogram(rows, net, .999).tolist() == [0, 0, 0]


# FID and IS

class Fake(nn.Module):
    "Something in the place of Inception: 6 features and 5 logits of uint8 images."
    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        z = images.float().flatten(2)/255
        f = torch.cat([z.mean(2), z.std(2)], 1)
        return f, 8*f[:, :5]


def is_by_hand(logits, parts):
    scores = []
    for part in logits.double().softmax(1).chunk(parts):
        scores.append((part*(part.log() - part.mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std().item()


@parity
def test_fid_and_is_are_their_formulas(capsys):
    x, y = images(120, 3, 8, 8)*torch.rand(120, 3, 1, 1, generator=torch.Generator().manual_seed(5)), images(90, 3, 8, 8, seed=1)*.5
    state = torch.get_rng_state()
    made = inception_scores(x, y.split(17), split="test", batch_size=32, extractor=Fake())
    assert torch.equal(state, torch.get_rng_state())
    f, logits = Fake()(image_metrics._bytes("x", x))
    assert made.fid == pytest.approx(frechet_distance(f, Fake()(image_metrics._bytes("y", y))[0]), rel=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = is_by_hand(logits[torch.randperm(120)], 10)
    assert made.inception_score == pytest.approx(mean, rel=1e-5) and made.deviation == pytest.approx(deviation, rel=1e-4)
    assert made.protocol == "Fake, not the standard network; 120 images against 90 of split 'test'"
    assert str(made) in capsys.readouterr().out
    assert inception_scores(x, y, extractor=Fake(), progress=False)[:3] == pytest.approx(made[:3], rel=1e-6)


@parity
def test_grey_images_are_repeated():
    x, y = images(40, 1, 8, 8), images(40, 1, 8, 8, seed=1)
    grey = inception_scores(x, y, extractor=Fake(), progress=False)
    assert grey[:3] == inception_scores(x.expand(-1, 3, -1, -1), y.repeat(1, 3, 1, 1), extractor=Fake(), progress=False)[:3]


def test_eight_bits_come_back_exactly():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for x in (levels.float()/127.5 - 1, levels.float()/255*2 - 1, (levels.float()/255 - .5)/.5):
        assert torch.equal(image_metrics._bytes("x", x), levels.expand(1, 3, 16, 16))
    assert image_metrics._bytes("x", torch.tensor([-1.0001, 1.0001]).view(2, 1, 1, 1))[:, 0].flatten().tolist() == [0, 255]


@parity
def test_inception_scores_refuse():
    x = images(20, 3, 8, 8)
    with pytest.raises(ValueError, match="y must hold at least 10 images, got 4"): inception_scores(x, x[:4], extractor=Fake(), progress=False)
    with pytest.raises(ValueError, match="x must have 1 or 3 channels, got 2"): inception_scores(x[:, :2], x, extractor=Fake(), progress=False)
    with pytest.raises(ValueError, match=r"y must have values in \[-1, 1\], .* clamp samples first, y\.clamp"): inception_scores(x, 2*x, extractor=Fake(), progress=False)


@pytest.mark.parametrize("missing", ("torchmetrics", "torch_fidelity"))
def test_missing_packages_are_named(missing, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == missing: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'FID and IS need torchmetrics and torch-fidelity \(.*: pip install "nsgf_nb\[images\]"'):
        inception_scores(images(20, 3, 8, 8), images(20, 3, 8, 8))


def test_unreachable_weights_say_what_to_put_where(tmp_path, monkeypatch):
    import socket
    from urllib.error import URLError
    seen = []
    def unreachable(url, *args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        raise URLError("no route")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(RuntimeError) as e: image_metrics._weights()
    assert image_metrics._WEIGHTS in str(e.value) and str(tmp_path/"checkpoints") in str(e.value) and "no route" in str(e.value)
    assert 0 < seen[0] <= 15 and socket.getdefaulttimeout() is None # it does not wait for long
    broken = tmp_path/"checkpoints"/"weights-inception-2015-12-05-6726825d.pth"
    assert list(broken.parent.iterdir()) == []
    broken.write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match="is broken.*delete it"): image_metrics._weights()


@standard
def test_weights_are_those_of_torch_fidelity():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    assert image_metrics._WEIGHTS == URL_INCEPTION_V3


@standard
def test_standard_network_is_used(tmp_path, monkeypatch):
    "With random weights under the right name: two features are asked of the real network, once for each batch."
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    monkeypatch.setattr(inception, "load_state_dict_from_url", None)
    monkeypatch.setattr(inception.torch, "load", lambda *args, **kwargs: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    monkeypatch.setattr(image_metrics, "_weights", lambda: tmp_path/"weights.pth")
    net, x = image_metrics._inception(), image_metrics._bytes("x", images(2, 1, 8, 8))
    f, logits = net(x)
    assert f.shape == (2, 2048) and logits.shape == (2, 1008)
    net.fc.bias.fill_(7)
    assert torch.equal(net(x)[1], logits)      # the score is made of logits without the bias


def test_importing_is_light():
    code = "import sys, nsgf_nb.image_metrics; print(sorted({'torchmetrics', 'torch_fidelity', 'torchvision', 'scipy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
