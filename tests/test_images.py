"""Images: every layout that loads, where files are looked for, and what is an error."""
import gzip
import hashlib
import os
import pickle
import random
import re
import socket
import struct
import threading
import tracemalloc
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nsgf_nb.images import load_images, show_images

DATA = os.environ.get("NSGF_NB_DATA")
DOWNLOAD = torchvision.datasets.MNIST.download
real = pytest.mark.skipif(not DATA, reason="NSGF_NB_DATA is not set: real images are not tested")
excerpt = pytest.mark.filterwarnings("ignore:.*only .* images in:UserWarning")


@pytest.fixture(autouse=True)
def nothing_there(monkeypatch, tmp_path):
    "No NSGF_NB_DATA, an empty cache, and no network."
    monkeypatch.delenv("NSGF_NB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))

    def offline(*args, **kwargs):
        raise URLError("no network here")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def pixels(x):
    return ((x + 1)*127.5).round().byte()


def idx(x):
    return bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.numpy().tobytes()


def write_mnist(folder, n=7, seed=0, zipped=True):
    "Made-up MNIST files of both splits; the images and labels of the training split."
    folder.mkdir(parents=True, exist_ok=True)
    for part, s in (("train", seed), ("t10k", seed + 1)):
        contents = {"images-idx3": noise(n, 28, 28, seed=s), "labels-idx1": noise(n, seed=s) % 10}
        for kind, x in contents.items():
            name = f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
            (folder/name).write_bytes(gzip.compress(idx(x)) if zipped else idx(x))
    return noise(n, 1, 28, 28, seed=seed), (noise(n, seed=seed) % 10).long()


def save(x, path):
    "An image (C, H, W) of bytes as a file."
    path.parent.mkdir(parents=True, exist_ok=True)
    x = x[0] if len(x) == 1 else x.permute(1, 2, 0).contiguous()
    Image.fromarray(x.numpy()).save(path)


def write_tree(folder, n=2, classes=10, channels=3, side=32, seed=0):
    "An ImageFolder tree; its images and labels in the order in which they are to be read."
    x = noise(n*classes, channels, side, side, seed=seed)
    for i, image in enumerate(x):
        save(image, folder/f"{i//n}"/f"{i % n}.png")
    return x, torch.arange(classes).repeat_interleave(n)


def write_pickles(root, monkeypatch, n=3):
    "Made-up CIFAR-10 in torchvision's layout, with its own MD5 sums in torchvision's lists."
    base = root/"cifar-10-batches-py"
    base.mkdir(parents=True)

    def dump(name, content):
        (base/name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base/name).read_bytes()).hexdigest()]

    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = [noise(n, 3, 32, 32, seed=s) for s in range(6)]
    labels = [(noise(n, seed=s) % 10).tolist() for s in range(6)]
    sums = [dump(name, {"data": x.flatten(1).numpy(), "labels": y})
            for name, x, y in zip(names, images, labels)]
    meta, md5 = dump("batches.meta", {"label_names": list("abcdefghij")})
    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", sums[:5])
    monkeypatch.setattr(cifar10, "test_list", sums[5:])
    monkeypatch.setattr(cifar10, "meta", {"filename": meta, "key": "label_names", "md5": md5})
    return torch.cat(images[:5]), torch.tensor(sum(labels[:5], [])), images[5]


# ---- layouts

def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    is_test = np.arange(1797) % 6 == 5
    for split, part in (("train", ~is_test), ("test", is_test)):
        images, labels = load_images("digits", split, labels=True)
        assert images.dtype == torch.float32 and images.shape[1:] == (1, 8, 8)
        assert np.array_equal((images.flatten(1).numpy() + 1)*8, x[part])
        assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), y[part])
    assert labels.bincount().min() > 20


@excerpt
@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize("folder", ("", "mnist", "MNIST/raw"))
def test_mnist_layouts(tmp_path, folder, zipped):
    expected, y = write_mnist(tmp_path/"d"/folder, zipped=zipped)
    x, labels = load_images("mnist", root=tmp_path/"d", labels=True)
    assert x.dtype == torch.float32 and torch.equal(x, expected/127.5 - 1)
    assert torch.equal(pixels(x), expected) and torch.equal(labels, y)
    test = load_images("mnist", "test", root=str(tmp_path/"d"))
    assert torch.equal(pixels(test)[:, 0], noise(7, 28, 28, seed=1))


@excerpt
def test_mnist_half_unpacked(tmp_path):
    "Labels unpacked, and images unpacked by a browser that kept the ending."
    expected, y = write_mnist(tmp_path)
    labels, images = tmp_path/LABELS, tmp_path/IMAGES
    labels.with_suffix("").write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    images.write_bytes(gzip.decompress(images.read_bytes()))
    x, read = load_images("mnist", root=tmp_path, labels=True)
    assert torch.equal(pixels(x), expected) and torch.equal(read, y)


@excerpt
def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    x, y, test = write_pickles(tmp_path/"d", monkeypatch)
    images, labels = load_images("cifar10", root=tmp_path/"d", labels=True)
    assert torch.equal(pixels(images), x) and torch.equal(labels, y) and images.is_contiguous()
    assert torch.equal(pixels(load_images("cifar10", "test", root=tmp_path/"d")), test)
    base = tmp_path/"d/cifar-10-batches-py"
    (base/"data_batch_3").write_bytes(b"cos\nsystem\n")  # never unpickled
    (base/"batches.meta").unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-py .*MD5.* data_batch_3, batches.meta$"):
        load_images("cifar10", root=tmp_path/"d")


@pytest.mark.parametrize("folder", ("", "cifar10", "cifar10_subset"))
def test_cifar10_as_image_files(tmp_path, folder):
    x, y = write_tree(tmp_path/"d"/folder/"train")
    with pytest.warns(UserWarning, match="cifar10: only 20 of 50,000 train .*train") as caught:
        images, labels = load_images("cifar10", root=tmp_path/"d", labels=True)
    assert caught[0].filename == __file__
    assert torch.equal(pixels(images), x) and torch.equal(labels, y)
    with pytest.raises(FileNotFoundError, match="cifar10: no test images"):
        load_images("cifar10", "test", root=tmp_path/"d")


@excerpt
def test_an_excerpt_comes_last(tmp_path, monkeypatch):
    write_tree(tmp_path/"d/cifar10_subset/train", seed=0)
    tree, _ = write_tree(tmp_path/"d/cifar10/train", seed=1)
    assert torch.equal(pixels(load_images("cifar10", root=tmp_path/"d")), tree)
    whole, _, _ = write_pickles(tmp_path/"d", monkeypatch)
    assert torch.equal(pixels(load_images("cifar10", root=tmp_path/"d")), whole)


@pytest.mark.parametrize("change", ({"classes": 9}, {"side": 28}, {"channels": 1}))
def test_what_is_not_cifar10(tmp_path, change):
    write_tree(tmp_path/"train", **change)
    with pytest.raises(ValueError, match=r"train: .*32 × 32 .*ten class .*shape \("):
        load_images("cifar10", root=tmp_path)


# ---- folders

@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("kind", (str, Path))
def test_folders(tmp_path, channels, kind):
    flat = noise(5, channels, 6, 9)
    for i, image in enumerate(flat):
        save(image, tmp_path/"flat"/f"{i}.PNG")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path/"flat"/name).write_text("not an image")
    assert torch.equal(pixels(load_images(kind(tmp_path/"flat"))), flat)
    x, y = write_tree(tmp_path/"tree", classes=3, channels=channels, side=5)
    for hidden in (".ipynb_checkpoints", "1/.ipynb_checkpoints"):
        save(x[0], tmp_path/"tree"/hidden/"0-checkpoint.png")
    images, labels = load_images(kind(tmp_path/"tree"), labels=True)
    assert torch.equal(pixels(images), x) and torch.equal(labels, y)
    for seed, part in enumerate(("train", "test")):
        write_tree(tmp_path/"split"/part, classes=2, channels=channels, seed=seed)
    for seed, part in enumerate(("train", "test")):
        images = load_images(kind(tmp_path/"split"), part)
        assert torch.equal(pixels(images), noise(4, channels, 32, 32, seed=seed))


def test_a_folder_by_its_bare_name_and_by_tilde(tmp_path, monkeypatch):
    save(noise(1, 4, 4), tmp_path/"pets/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_images("pets").shape == load_images("~/pets").shape == (1, 1, 4, 4)


def test_labels_are_those_of_torchvisions_image_folder(tmp_path):
    for name in ("b", "a10", "a9", "B"):
        save(noise(3, 4, 4, seed=len(name)), tmp_path/name/"deep"/"x.png")
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    x, y = load_images(tmp_path, labels=True)
    assert y.tolist() == theirs.targets
    expected = np.stack([np.array(image) for image, _ in theirs])
    assert np.array_equal(pixels(x).permute(0, 2, 3, 1).numpy(), expected)


def test_kinds_of_pixels(tmp_path):
    "Palettes, transparency, black and white; grey beside colour; EXIF; 16 bits are an error."
    grey = Image.fromarray(noise(4, 6).numpy())
    colour = Image.fromarray(noise(4, 6, 3).numpy())
    for name, image in {"a": grey, "b": grey.convert("LA"), "c": grey.convert("1")}.items():
        image.save(tmp_path/f"{name}.png")
    x = load_images(tmp_path)
    assert x.shape == (3, 1, 4, 6) and torch.equal(x[0], x[1])
    assert set(x[2].unique().tolist()) <= {-1, 1}
    for name, image in {"d": colour, "e": colour.convert("RGBA"), "f": colour.quantize()}.items():
        image.save(tmp_path/f"{name}.png")
    x = load_images(tmp_path)
    assert x.shape == (6, 3, 4, 6)
    assert torch.equal(x[3], x[4]) and torch.equal(x[0, 0], x[0, 2])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = tmp_path/"turned"
    turned.mkdir()
    colour.save(turned/"a.png", exif=exif)
    assert load_images(turned).shape == (1, 3, 6, 4)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(turned/"deep.png")
    with pytest.raises(ValueError, match="deep.png .*mode I;16.*8 bits"):
        load_images(turned)


def test_size(tmp_path):
    for i, (h, w) in enumerate(((8, 8), (24, 8), (10, 31), (100, 73), (3, 5))):
        save(noise(3, h, w, seed=i), tmp_path/f"{i}.png")
    x = load_images(tmp_path, size=8)
    assert x.shape == (5, 3, 8, 8) and x.abs().max() <= 1
    middle = noise(3, 24, 8, seed=1)[:, 8:16]  # only cropped
    assert torch.equal(pixels(x[:2]), torch.stack([noise(3, 8, 8), middle]))
    large = Image.fromarray(noise(3, 100, 73, seed=3).permute(1, 2, 0).contiguous().numpy())
    theirs = np.array(large.resize((8, 11), Image.Resampling.BILINEAR), int)[1:9]
    assert np.abs(theirs - pixels(x[3]).permute(1, 2, 0).numpy()).max() <= 2
    enlarged = load_images("digits", size=12)
    assert enlarged.shape == (1498, 1, 12, 12) and enlarged.abs().max() <= 1
    assert load_images(torch.full((2, 3, 9, 5), -.5).double(), size=4).shape == (2, 3, 4, 4)
    for bad in (0, -3, 2.5, "8"):
        with pytest.raises(ValueError, match=f"size.*{bad!r}"):
            load_images("digits", size=bad)


def test_different_sizes_name_two_files(tmp_path):
    for i, h in enumerate((8, 8, 9)):
        save(noise(1, h, 8), tmp_path/f"{i}.png")
    with pytest.raises(ValueError, match=r"0\.png has 8 × 8 .*2\.png has 9 × 8; pass size="):
        load_images(tmp_path)


def test_damaged_images(tmp_path):
    for name in ("a.png", "b.png"):
        save(noise(3, 32, 32), tmp_path/name)
    whole = (tmp_path/"b.png").read_bytes()
    cut = (b"", b"text", whole[:50], whole[:len(whole)//2])
    for content in (*cut, whole[:200] + bytes(40) + whole[240:]):
        (tmp_path/"b.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.png cannot be read"):
            load_images(tmp_path)


def test_empty_and_mixed_folders(tmp_path):
    (tmp_path/"notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images"):
        load_images(tmp_path)
    save(noise(1, 4, 4), tmp_path/"cats/a.png")
    (tmp_path/"dogs").mkdir()
    with pytest.raises(ValueError, match="dogs: no images"):
        load_images(tmp_path)
    save(noise(1, 4, 4), tmp_path/"dogs/a.png")
    save(noise(1, 4, 4), tmp_path/"stray.png")
    with pytest.raises(ValueError, match=r"\(stray.png\) beside subfolders \(cats\)"):
        load_images(tmp_path)


# ---- tensors, names, splits

def test_tensors():
    x = torch.rand(4, 2, 5, 6, dtype=torch.float64)*2 - 1
    assert torch.equal(load_images(x), x.float())
    y = x.float().requires_grad_()
    assert torch.equal(load_images(y), y) and not load_images(y).requires_grad
    assert load_images(x.bfloat16()).dtype == torch.float32
    with pytest.warns(UserWarning, match=r"below 0.*2\*x - 1") as caught:
        load_images(x.abs())
    assert caught[0].filename == __file__


@pytest.mark.parametrize("x, error, message", [
    (noise(4, 1, 5, 5), TypeError, r"name.*torch.uint8: .*x\.float\(\)/127\.5 - 1"),
    (torch.zeros(4, 1, 5, 5, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.zeros(4, 5, 5), ValueError, r"\(4, 5, 5\): .*x\[:, None\]"),
    (torch.zeros(4, 25), ValueError, r"\(4, 25\)$"),
    (torch.zeros(0, 1, 5, 5), ValueError, r"non-empty .*\(0, 1, 5, 5\)"),
    (noise(4, 1, 5, 5).float(), ValueError, r"\d to 2\d\d: .*/127\.5 - 1"),
    (torch.full((1, 1, 2, 2), -1.01), ValueError, r"-1\.01 to -1\.01"),
    (torch.tensor([[[[0., torch.nan, torch.inf]]]]), ValueError, "2 of 3 values"),
    (np.zeros((4, 1, 5, 5)), TypeError, "name: .*ndarray"),
    (None, TypeError, "NoneType"),
])
def test_bad_tensors(x, error, message):
    with pytest.raises(error, match=message):
        load_images(x)


def test_no_labels_and_no_test_part(tmp_path):
    save(noise(1, 4, 4), tmp_path/"a.png")
    for name in (tmp_path, -torch.ones(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="labels: "):
            load_images(name, labels=True)
    with pytest.raises(ValueError, match="split: .*tensor .*'test'"):
        load_images(torch.zeros(1, 1, 2, 2), "test")
    with pytest.raises(FileNotFoundError, match="split 'test': .*no test/"):
        load_images(tmp_path, "test")
    write_tree(tmp_path/"d"/"train", classes=1)
    with pytest.raises(FileNotFoundError, match="split 'test': .*test$"):
        load_images(tmp_path/"d", "test")


@pytest.mark.parametrize("name, hint", (
    ("minst", "; did you mean 'mnist'?"), ("MNIST", "; did you mean 'mnist'?"),
    ("CIFAR-10", "; did you mean 'cifar10'?"), ("digit", "; did you mean 'digits'?"), ("xyz", "")))
def test_unknown_names(name, hint):
    known = f"'{name}': .*digits, mnist, cifar10, a folder or a tensor"
    with pytest.raises(ValueError, match=known + re.escape(hint) + "$"):
        load_images(name)


@pytest.mark.parametrize("split", ("valid", "Train", None, 0))
def test_unknown_splits(split):
    with pytest.raises(ValueError, match=f"split: .*{split!r}"):
        load_images("digits", split)


# ---- where files are looked for

@excerpt
def test_order_of_search(tmp_path, monkeypatch):
    "root, then NSGF_NB_DATA, then the cache; each seen once those before it have nothing."
    root, data = tmp_path/"root", tmp_path/"data"
    root.mkdir()
    data.mkdir()
    cached, _ = write_mnist(tmp_path/"cache/nsgf_nb", seed=10)
    monkeypatch.setenv("NSGF_NB_DATA", str(data))
    assert torch.equal(pixels(load_images("mnist")), cached)
    in_data, _ = write_mnist(data/"mnist", seed=20)
    assert torch.equal(pixels(load_images("mnist")), in_data)
    with pytest.raises(FileNotFoundError, match="mnist: no train .*root; .*root= .*NSGF_NB_DATA"):
        load_images("mnist", root=root)  # there, and nowhere else
    in_root, _ = write_mnist(root, seed=30)
    assert torch.equal(pixels(load_images("mnist", root=root)), in_root)
    monkeypatch.delenv("NSGF_NB_DATA")
    assert torch.equal(pixels(load_images("mnist")), cached)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    at_home, _ = write_mnist(tmp_path/"home/.cache/nsgf_nb", seed=40)
    assert torch.equal(pixels(load_images("mnist")), at_home)


def test_folders_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="root: .*nowhere"):
        load_images("mnist", root=tmp_path/"nowhere")
    monkeypatch.setenv("NSGF_NB_DATA", str(tmp_path/"gone"))
    with pytest.raises(FileNotFoundError, match="NSGF_NB_DATA: .*gone"):
        load_images("cifar10")
    (tmp_path/"file.png").write_bytes(b"")
    for path in (tmp_path/"nowhere", str(tmp_path/"nowhere"), tmp_path/"file.png"):
        with pytest.raises(FileNotFoundError, match=f"name: .*{Path(path).name}"):
            load_images(path)


@pytest.mark.parametrize("name, files", (
    ("mnist", "train-images-idx3-ubyte.gz, .*t10k-labels-idx1-ubyte.gz"),
    ("cifar10", "cifar-10-batches-py/")))
@pytest.mark.parametrize("error, reason", (
    (URLError("no route"), "<urlopen error no route>"),
    (RuntimeError("Error downloading:\nTried a, got:\n<urlopen error 1>\n"), "<urlopen error 1>"),
    (ConnectionResetError(), "ConnectionResetError"),
    (PermissionError(13, "Permission denied"), "Permission denied"),
), ids=("no network", "several lines", "no message", "no permission"))
def test_offline(name, files, error, reason, tmp_path, monkeypatch):
    def download(self, *args):
        raise error

    monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "download", download)
    monkeypatch.setenv("NSGF_NB_DATA", str(tmp_path))
    places = f"{tmp_path} or .*nsgf_nb"
    expected = rf"{name}: no train .*{places}.*{re.escape(reason)}\); put {files}.*root="
    with pytest.raises(FileNotFoundError, match=expected) as caught:
        load_images(name)
    assert "\n" not in str(caught.value)
    assert list((tmp_path/"cache/nsgf_nb").iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_silent_server_is_given_up(monkeypatch):
    "torchvision's own download, from a server that accepts and says nothing."
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", DOWNLOAD)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    socket.setdefaulttimeout(.2)  # shorter than ours, and so kept
    with socket.create_server(("127.0.0.1", 0)) as server:
        hang_up = threading.Timer(10, server.close)  # or a failure would be a wait for ever
        hang_up.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        try:
            with pytest.raises(FileNotFoundError, match="timed out"):
                load_images("mnist")
            assert socket.getdefaulttimeout() == .2
        finally:
            socket.setdefaulttimeout(None)
            hang_up.cancel()


@excerpt
def test_download(tmp_path, monkeypatch):
    "What torchvision fetched is kept in the cache; an interrupted download leaves nothing."
    cache = tmp_path/"cache/nsgf_nb"
    calls = []

    def download(self):
        calls.append(socket.getdefaulttimeout())
        write_mnist(Path(self.raw_folder), zipped=False)
        if len(calls) == 1:
            raise URLError("interrupted")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError, match="interrupted"):
        load_images("mnist")
    assert list(cache.iterdir()) == []
    x = load_images("mnist")
    assert calls == [5., 5.] and x.shape == (7, 1, 28, 28)
    assert torch.equal(load_images("mnist"), x) and len(calls) == 2
    for file in (cache/"MNIST/raw").glob("train-*"):
        file.unlink()  # the rest stays in the way
    assert torch.equal(load_images("mnist"), x) and len(calls) == 3
    assert [p.name for p in cache.iterdir()] == ["MNIST"]


# ---- damaged IDX files

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
GOOD = idx(noise(7, 28, 28))
HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 28, 28)
DAMAGED = {
    b"": "nothing",
    b"<html>404 Not Found</html>": "3c 68 74 6d",
    GOOD[:10]: "00 00 08 03",
    GOOD[:-1]: "7 × 28 × 28",
    GOOD + b"x": "7 × 28 × 28",
    idx(noise(0, 28, 28)): "0 × 28 × 28",
    idx(noise(7, 784)): "00 00 08 02",
    b"\0\0\x0d" + GOOD[3:]: "00 00 0d 03",  # floats
    HUGE + bytes(784): "4294967295 × 28 × 28",
}


@pytest.mark.parametrize("content", DAMAGED, ids=DAMAGED.values())
@pytest.mark.parametrize("zipped", (True, False))
def test_damaged_idx(tmp_path, content, zipped):
    write_mnist(tmp_path)
    (tmp_path/IMAGES).write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=f"{IMAGES} is damaged .*{DAMAGED[content]}"):
        load_images("mnist", root=tmp_path)


@excerpt
def test_damaged_gzip(tmp_path):
    "Cut short, or one bit changed: an error, or, in what gzip ignores, read as it was."
    write_mnist(tmp_path)
    path = tmp_path/IMAGES
    draw = random.Random(0)
    expected = noise(7, 1, 28, 28) % 5  # few values, so that deflate has work to do
    whole = gzip.compress(idx(expected[:, 0]))
    size = len(whole)
    for k in (1, 2, 5, 12, 100, size//2, size - 8, size - 1):
        path.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=f"{IMAGES} is damaged"):
            load_images("mnist", root=tmp_path)
    errors = 0
    for k in [*range(4), *draw.sample(range(10, size), 60)]:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << draw.randrange(8)]) + whole[k + 1:])
        try:
            assert torch.equal(pixels(load_images("mnist", root=tmp_path)), expected)
        except ValueError as error:
            assert IMAGES in str(error)
            errors += 1
    assert errors >= 60


@pytest.mark.parametrize("content", (
    HUGE, gzip.compress(HUGE + bytes(784)),
    gzip.compress(HUGE[:4] + struct.pack(">3I", *[2**32 - 1]*3))), ids=("raw", "gz", "terabytes"))
def test_a_header_cannot_reserve_memory(tmp_path, content):
    write_mnist(tmp_path)
    (tmp_path/IMAGES).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="4294967295"):
            load_images("mnist", root=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    write_mnist(tmp_path)

    def load_fails(error, message):
        with pytest.raises(error, match=message):
            load_images("mnist", root=tmp_path)

    (tmp_path/LABELS).write_bytes(gzip.compress(idx(noise(6))))
    load_fails(ValueError, f"{IMAGES} has 7 images.* 6 labels")
    (tmp_path/LABELS).write_bytes(b"nothing")
    load_fails(ValueError, f"{LABELS} is damaged")
    (tmp_path/LABELS).unlink()
    load_fails(FileNotFoundError, "train-labels-idx1-ubyte.* is missing")
    (tmp_path/IMAGES).write_bytes(gzip.compress(idx(noise(7, 14, 56))))
    (tmp_path/LABELS).write_bytes(gzip.compress(idx(noise(7))))
    load_fails(ValueError, f"{IMAGES}: .*14 × 56")


# ---- the real ones

@real
@pytest.mark.parametrize("split, n, mean, md5, counts", (
    ("train", 60_000, .1307, "6bbc9ace898e44ae57da46a324031adb",
     [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    ("test", 10_000, .1325, "2646ac647ad5339dbf082846283269ea",
     [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
), ids=("train", "test"))
def test_real_mnist(monkeypatch, split, n, mean, md5, counts):
    monkeypatch.setenv("NSGF_NB_DATA", DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is whole: nothing to warn about
        x, y = load_images("mnist", split, labels=True)
    assert x.shape == (n, 1, 28, 28) and y.bincount().tolist() == counts
    assert (x.mean() + 1).item()/2 == pytest.approx(mean, abs=1e-4)
    assert hashlib.md5(idx(pixels(x)[:, 0])).hexdigest() == md5


@real
def test_real_cifar10(monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", DATA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, y = load_images("cifar10", "test", labels=True)
    assert x.shape[1:] == (3, 32, 32) and y.bincount().tolist() == [len(y)//10]*10
    means = (x.mean((0, 2, 3)) + 1)/2
    assert means.tolist() == pytest.approx([.491, .482, .447], abs=.02)
    expected = f"cifar10: only {len(x):,} of 10,000 test images"
    assert len(x) == 10_000 or any(expected in str(w.message) for w in caught)


# ---- sheets

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def shown(ax):
    return torch.as_tensor(np.asarray(ax.images[0].get_array()))


@pytest.mark.parametrize("channels", (1, 3))
def test_show_images(plt, channels):
    x = torch.rand(7, channels, 20, 10)*4 - 2
    ax = show_images(x.requires_grad_(), title="sheet", columns=3)
    sheet = shown(ax)
    assert sheet.shape[:2] == (3*20 + 2, 3*10 + 2)
    assert ax.get_title() == "sheet" and not ax.axison
    expected = (x.detach().clamp(-1, 1) + 1)/2
    for i in range(7):
        top, left = 21*(i//3), 11*(i % 3)
        image = sheet[top:top + 20, left:left + 10].reshape(20, 10, -1)
        torch.testing.assert_close(image.permute(2, 0, 1), expected[i])
    empty = sheet[42:, 11:].flatten(0, 1)
    assert (torch.cat([sheet[20], sheet[41], sheet[:, 10], empty]) == 1).all()
    assert ax.images[0].get_clim() == (0, 1)
    assert channels == 3 or ax.images[0].get_cmap().name in ("gray", "grey")
    mine = plt.subplots()[1]
    assert show_images(x[:1], ax=mine) is mine and shown(mine).shape[:2] == (20, 10)
    assert shown(show_images(x.double())).shape[:2] == (3*21 - 1, 3*11 - 1)
    assert shown(show_images(x[:2], columns=5)).shape[:2] == (20, 5*11 - 1)


@pytest.mark.parametrize("x, error, message", [
    (torch.zeros(4, 8, 8), ValueError, r"show_images: .*\(4, 8, 8\)"),
    (torch.zeros(4, 2, 8, 8), ValueError, r"\(4, 2, 8, 8\)"),
    (torch.zeros(0, 1, 8, 8), ValueError, r"non-empty.*\(0, 1, 8, 8\)"),
    ([1, 2], ValueError, "list"),
    (noise(4, 1, 8, 8), TypeError, r"torch.uint8: .*x\.float\(\)/127\.5 - 1"),
])
def test_what_show_images_does_not_accept(plt, x, error, message):
    with pytest.raises(error, match=message):
        show_images(x)


def test_columns_of_a_sheet(plt):
    with pytest.raises(ValueError, match="columns: .*0"):
        show_images(torch.zeros(4, 1, 8, 8), columns=0)
