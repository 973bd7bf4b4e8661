"""Training small classifiers: what they learn, seeds, resuming, bad labels."""
import pytest
import torch

from nsgf_nb.bench.classifiers import (
    CLASSIFIERS,
    Autoencoder,
    LayerFeatures,
    make_classifier,
    shift_images,
    train_autoencoder,
    train_classifier,
)
from nsgf_nb.image_metrics import Classifier
from nsgf_nb.images import load_images
from nsgf_nb.runs.checkpoints import LongRun, Terminated
from nsgf_nb.training import Loop


def stripes(n, seed=0):
    "Images of two classes: bright rows above, or below."
    g = torch.Generator().manual_seed(seed)
    x = .2*torch.rand(n, 1, 8, 8, generator=g) - .9
    labels = torch.randint(2, (n,), generator=g)
    for label, rows in ((0, slice(0, 3)), (1, slice(5, 8))):
        x[labels == label, :, rows] += 1.5
    return x, labels


SMALL = dict(width=4, epochs=3, batch_size=20, shift=1, progress=False)


def weights(net):
    return torch.cat([w.flatten().float() for w in net.state_dict().values()])


def test_it_learns_and_follows_the_seed():
    x, labels = stripes(300)
    net = train_classifier(x, labels, **SMALL)
    test, expected = stripes(200, seed=1)
    assert (net(test).argmax(1) == expected).float().mean() > .95
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(weights(net), weights(train_classifier(x, labels, **SMALL)))
    assert not torch.equal(weights(net), weights(train_classifier(x, labels, **SMALL, seed=1)))


def test_an_autoencoder_needs_no_labels(tmp_path):
    x, test = stripes(300)[0], stripes(200, seed=1)[0]
    settings = dict(SMALL, epochs=20)
    net = train_autoencoder(x, **settings)
    assert (net(test) - test).square().mean() < .25*test.var(0).mean()
    assert net.features(test).shape == (200, 16)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(weights(net), weights(train_autoencoder(x, **settings)))
    net.save(tmp_path/"net.safetensors")
    assert torch.equal(Autoencoder.load(tmp_path/"net.safetensors")(test), net(test))
    with pytest.raises(ValueError, match="'Autoencoder'.*'?Classifier"):
        Classifier.load(tmp_path/"net.safetensors")
    with pytest.raises(ValueError, match=r"multiples of 4, got shape \(1, 8, 6\)"):
        train_autoencoder(x[..., :6], **SMALL)


def test_moments_of_layers_beside_the_features():
    classifier, x = Classifier.from_pretrained("digits"), load_images("digits")[:500]
    plain = LayerFeatures(classifier, x)(x)
    expected = classifier.features(x)
    unit = expected.var(0).mean().sqrt()
    assert torch.allclose(plain, expected/unit, atol=1e-4)
    both = LayerFeatures(classifier, x, moment_weight=.5)(x)
    channels = 13*classifier.config["width"]  # of its layers, 1 + 2 + 2 + 4 + 4 times the width
    assert both.shape == (500, plain.shape[1] + 2*channels)
    assert torch.allclose(both[:, :plain.shape[1]], plain)
    deviations = both[:, plain.shape[1]:].std(0)
    assert ((deviations - .5).abs() < 1e-3).sum() > .9*2*channels  # but for channels at rest
    # the mean of the first layer's channels, by hand
    first = classifier.body[:3](x).mean((2, 3))
    expected = .5*first/first.std(0)
    found = both[:, plain.shape[1]:][:, :first.shape[1]]
    assert torch.allclose(found, expected, rtol=.01, atol=1e-3)
    black = torch.full_like(x[:3], -1.).requires_grad_()
    LayerFeatures(classifier, x, moment_weight=.5)(black).sum().backward()
    assert black.grad.isfinite().all()
    assert LayerFeatures(classifier, black.detach(), 1.)(x).isfinite().all()


def test_shifts_move_whole_images_by_at_most_so_much():
    x = torch.full((500, 1, 8, 8), -1.)
    x[:, :, 4, 4] = 1
    moved = shift_images(x, 2, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and (moved == 1).sum() == 500
    places = {tuple(place[2:]) for place in (moved == 1).nonzero().tolist()}
    assert places == {(i, j) for i in range(2, 7) for j in range(2, 7)}
    assert torch.equal(shift_images(x, 0, torch.Generator()), x)


def test_a_stopped_training_resumes_to_the_same_bits(tmp_path):
    class Stopped(LongRun):
        def step(self, trainer, signals):
            if trainer.step == 7:
                signals.append(Terminated)
            return super().step(trainer, signals)
    x, labels = stripes(100)
    whole = train_classifier(x, labels, **SMALL)
    with pytest.raises(Terminated, match="8 of 15"):
        train_classifier(x, labels, **SMALL, loop=Stopped(tmp_path/"c"))
    again = train_classifier(x, labels, **SMALL, loop=LongRun(tmp_path/"c"))
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ValueError, match="shift"):
        train_classifier(x, labels, **{**SMALL, "shift": 0}, loop=LongRun(tmp_path/"c"))


BAD_LABELS = (torch.zeros(20), torch.zeros(19).long(), -torch.ones(20).long(),
              torch.zeros(20, 1).long())


def test_a_checkpoint_of_other_labels_is_not_resumed(tmp_path):
    x, labels = stripes(60)
    path = tmp_path/"training.checkpoint"
    train_classifier(x, labels, **SMALL, loop=LongRun(path))
    with pytest.raises(ValueError, match="another run, with labels"):
        train_classifier(x, 1 - labels, **SMALL, loop=LongRun(path))


@pytest.mark.parametrize("labels", BAD_LABELS, ids=lambda t: f"{tuple(t.shape)} {t.dtype}")
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="^labels.*20"):
        train_classifier(stripes(20)[0], labels, progress=False)


def test_images_out_of_range():
    x, labels = stripes(20)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        train_classifier(3*x, labels, progress=False)


def test_a_named_classifier_knows_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "digits", dict(width=4, epochs=10, batch_size=50))
    net = make_classifier("digits", stripes(300), stripes(700, seed=1), seed=3, progress=False)
    assert net.about["training_images"] == 300 and net.about["test_images"] == 700
    assert net.about["test_accuracy"] > .8 and "--seeds 3" in net.about["command"]
    net.save(tmp_path/"c.safetensors")
    assert Classifier.load(tmp_path/"c.safetensors").about == net.about
    with pytest.raises(ValueError, match="name.*digits.*moons"):
        make_classifier("moons", stripes(10), stripes(10))


def test_an_interrupted_training_is_raised():
    class Interrupted(Loop):
        def __call__(self, trainer, progress=True, desc="training"):
            trainer.batches = iter(())
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train_classifier(*stripes(50), **SMALL, loop=Interrupted())
