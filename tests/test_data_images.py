"""Images: every layout that loads, where they are looked for, and what is refused and how."""
import gzip
import hashlib
import os
import pickle
import random
import re
import socket
import struct
import threading
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import nsgf_nb.data
from nsgf_nb.data import load_images, show_images

DATA = os.environ.get("NSGF_NB_DATA")
DOWNLOAD = torchvision.datasets.MNIST.download
real = pytest.mark.skipif(not DATA, reason="NSGF_NB_DATA is not set: the real MNIST and CIFAR-10 are not tested")
EXCERPT = pytest.mark.filterwarnings("ignore:.*only .* images in:UserWarning")


@pytest.fixture(autouse=True)
def nothing_there(monkeypatch, tmp_path):
    "No NSGF_NB_DATA, an empty cache, and no network."
    monkeypatch.delenv("NSGF_NB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    def offline(*args, **kwargs): raise URLError("no network here")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)


def noise(*shape, seed=0): return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
def pixels(x): return ((x + 1)*127.5).round().byte()
def idx(x): return bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.numpy().tobytes()


def write_mnist(folder, n=7, seed=0, zipped=True):
    "Made-up MNIST files of both splits; the images and labels of the training split."
    folder.mkdir(parents=True, exist_ok=True)
    for part, s in (("train", seed), ("t10k", seed + 1)):
        for kind, x in (("images-idx3", noise(n, 28, 28, seed=s)), ("labels-idx1", noise(n, seed=s) % 10)):
            (folder/f"{part}-{kind}-ubyte{'.gz' if zipped else ''}").write_bytes(gzip.compress(idx(x)) if zipped else idx(x))
    return noise(n, 1, 28, 28, seed=seed), (noise(n, seed=seed) % 10).long()


def save(x, path):
    "An image (C, H, W) of bytes as a file."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_tree(folder, n=2, classes=10, channels=3, side=32, seed=0):
    "An ImageFolder tree; its images and labels in the order in which they are to be read."
    x = noise(n*classes, channels, side, side, seed=seed)
    for i, image in enumerate(x): save(image, folder/f"{i//n}"/f"{i % n}.png")
    return x, torch.arange(classes).repeat_interleave(n)


def write_batches(root, monkeypatch, n=3):
    "Made-up CIFAR-10 pickles in torchvision's layout, with their own MD5 sums put into torchvision's list."
    base, x, y, lists = root/"cifar-10-batches-py", [], [], {}
    base.mkdir(parents=True)
    def dump(name, obj):
        (base/name).write_bytes(pickle.dumps(obj))
        return [name, hashlib.md5((base/name).read_bytes()).hexdigest()]
    for s, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        x.append(noise(n, 3, 32, 32, seed=s))
        y.append((noise(n, seed=s) % 10).tolist())
        lists[name] = dump(name, {"data": x[-1].flatten(1).numpy(), "labels": y[-1]})
    meta = dump("batches.meta", {"label_names": list("abcdefghij")})
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [v for k, v in lists.items() if k != "test_batch"])
    monkeypatch.setattr(cifar, "test_list", [lists["test_batch"]])
    monkeypatch.setattr(cifar, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return torch.cat(x[:5]), torch.tensor(sum(y[:5], [])), x[5]


# digits

def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    train, test = load_images("digits", labels=True), load_images("digits", "test", labels=True)
    assert train[0].shape == (1498, 1, 8, 8) and test[0].shape == (299, 1, 8, 8)
    assert train[0].dtype == torch.float32 and train[1].dtype == torch.int64
    is_test = np.arange(1797) % 6 == 5           # the split: disjoint, and nothing lost
    for (a, b), part in ((train, ~is_test), (test, is_test)):
        assert np.array_equal((a.flatten(1).numpy() + 1)*8, x[part]) and np.array_equal(b.numpy(), y[part])
    assert torch.equal(load_images("digits"), train[0])
    assert test[1].bincount().min() > 20


# layouts

@EXCERPT
@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize("folder", ("", "mnist", "MNIST/raw"))
def test_mnist_layouts(tmp_path, folder, zipped):
    want, y = write_mnist(tmp_path/"d"/folder, zipped=zipped)
    x, labels = load_images("mnist", root=tmp_path/"d", labels=True)
    assert x.dtype == torch.float32 and torch.equal(pixels(x), want) and torch.equal(labels, y)
    assert torch.equal(x, want/127.5 - 1)
    assert torch.equal(pixels(load_images("mnist", "test", root=str(tmp_path/"d")))[:, 0], noise(7, 28, 28, seed=1))


@EXCERPT
def test_mnist_half_unpacked(tmp_path):
    "Images gzipped and labels not; and a file unpacked by a browser that kept the ending."
    want, _ = write_mnist(tmp_path)
    labels = tmp_path/"train-labels-idx1-ubyte.gz"
    (tmp_path/"train-labels-idx1-ubyte").write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    images = tmp_path/"train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.decompress(images.read_bytes()))
    assert torch.equal(pixels(load_images("mnist", root=tmp_path)), want)


@EXCERPT
def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    x, y, test = write_batches(tmp_path/"d", monkeypatch)
    got, labels = load_images("cifar10", root=tmp_path/"d", labels=True)
    assert torch.equal(pixels(got), x) and torch.equal(labels, y) and got.is_contiguous()
    assert torch.equal(pixels(load_images("cifar10", "test", root=tmp_path/"d")), test)
    (tmp_path/"d/cifar-10-batches-py/data_batch_3").write_bytes(b"cos\nsystem\n") # never unpickled
    (tmp_path/"d/cifar-10-batches-py/batches.meta").unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-py is damaged or incomplete, .* MD5 .* data_batch_3, batches.meta$"):
        load_images("cifar10", root=tmp_path/"d")


@pytest.mark.parametrize("folder", ("", "cifar10", "cifar10_subset"))
def test_cifar10_as_image_files(tmp_path, folder):
    x, y = write_tree(tmp_path/"d"/folder/"train")
    with pytest.warns(UserWarning, match=r"cifar10: only 20 of 50,000 train images in .*train") as caught:
        got, labels = load_images("cifar10", root=tmp_path/"d", labels=True)
    assert caught[0].filename == __file__
    assert torch.equal(pixels(got), x) and torch.equal(labels, y)
    with pytest.raises(FileNotFoundError, match="cifar10: no test images in"): load_images("cifar10", "test", root=tmp_path/"d")


@EXCERPT
def test_an_excerpt_comes_last(tmp_path, monkeypatch):
    write_tree(tmp_path/"d/cifar10_subset/train", seed=0)
    tree, _ = write_tree(tmp_path/"d/cifar10/train", seed=1)
    assert torch.equal(pixels(load_images("cifar10", root=tmp_path/"d")), tree)
    whole, _, _ = write_batches(tmp_path/"d", monkeypatch)
    assert torch.equal(pixels(load_images("cifar10", root=tmp_path/"d")), whole)


@pytest.mark.parametrize("change", ({"classes": 9}, {"side": 28}, {"channels": 1}))
def test_what_is_not_cifar10(tmp_path, change):
    write_tree(tmp_path/"train", **change)
    with pytest.raises(ValueError, match=r"train: expected colour images of 32 × 32 pixels in ten class folders, .*got shape \("):
        load_images("cifar10", root=tmp_path)


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("kind", (str, Path))
def test_folders(tmp_path, channels, kind):
    flat = noise(5, channels, 6, 9)
    for i, image in enumerate(flat): save(image, tmp_path/"flat"/f"{i}.PNG")
    (tmp_path/"flat/notes.txt").write_text("not a picture")
    (tmp_path/"flat/.hidden.png").write_text("nor this")
    assert torch.equal(pixels(load_images(kind(tmp_path/"flat"))), flat)
    x, y = write_tree(tmp_path/"tree", classes=3, channels=channels, side=5)
    for hidden in (".ipynb_checkpoints", "1/.ipynb_checkpoints"): save(x[0], tmp_path/"tree"/hidden/"0-checkpoint.png")
    got, labels = load_images(kind(tmp_path/"tree"), labels=True)
    assert torch.equal(pixels(got), x) and torch.equal(labels, y)
    parts = [write_tree(tmp_path/"split"/part, classes=2, channels=channels, seed=s)[0] for s, part in enumerate(("train", "test"))]
    for want, part in zip(parts, ("train", "test")): assert torch.equal(pixels(load_images(kind(tmp_path/"split"), part)), want)


def test_a_folder_by_its_bare_name_and_by_tilde(tmp_path, monkeypatch):
    save(noise(1, 4, 4), tmp_path/"pets/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_images("pets").shape == load_images("~/pets").shape == (1, 1, 4, 4)


def test_labels_are_those_of_torchvisions_image_folder(tmp_path):
    for name in ("b", "a10", "a9", "B"): save(noise(3, 4, 4, seed=len(name)), tmp_path/name/"deep"/"x.png")
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    x, y = load_images(tmp_path, labels=True)
    assert y.tolist() == theirs.targets
    assert np.array_equal(pixels(x).permute(0, 2, 3, 1).numpy(), np.stack([np.array(image) for image, _ in theirs]))


def test_kinds_of_pixels(tmp_path):
    "Palettes, transparency and black-and-white are read, grey beside colour becomes colour, EXIF turns; 16 bits are refused."
    grey = Image.fromarray(noise(4, 6).numpy())
    colour = Image.fromarray(noise(4, 6, 3).numpy())
    for name, image in {"a": grey, "b": grey.convert("LA"), "c": grey.convert("1")}.items(): image.save(tmp_path/f"{name}.png")
    x = load_images(tmp_path)
    assert x.shape == (3, 1, 4, 6) and torch.equal(x[0], x[1]) and set(x[2].unique().tolist()) <= {-1, 1}
    for name, image in {"d": colour, "e": colour.convert("RGBA"), "f": colour.quantize()}.items(): image.save(tmp_path/f"{name}.png")
    x = load_images(tmp_path)
    assert x.shape == (6, 3, 4, 6) and torch.equal(x[3], x[4]) and torch.equal(x[0, 0], x[0, 2])
    exif = Image.Exif()
    exif[0x0112] = 6 # the camera was held upright
    turned = tmp_path/"turned"
    turned.mkdir()
    colour.save(turned/"a.png", exif=exif)
    assert load_images(turned).shape == (1, 3, 6, 4)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(turned/"deep.png")
    with pytest.raises(ValueError, match=r"deep.png cannot be read as an image: mode I;16.*8 bits"): load_images(turned)


# sizes

def test_size(tmp_path):
    for i, (h, w) in enumerate(((8, 8), (24, 8), (10, 31), (100, 73), (3, 5))): save(noise(3, h, w, seed=i), tmp_path/f"{i}.png")
    x = load_images(tmp_path, size=8)
    assert x.shape == (5, 3, 8, 8) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(pixels(x[:2]), torch.stack([noise(3, 8, 8), noise(3, 24, 8, seed=1)[:, 8:16]])) # only cropped: the middle
    theirs = Image.fromarray(noise(3, 100, 73, seed=3).permute(1, 2, 0).contiguous().numpy()).resize((8, 11), Image.Resampling.BILINEAR)
    assert np.abs(np.array(theirs, int)[1:9] - pixels(x[3]).permute(1, 2, 0).numpy()).max() <= 2
    larger = load_images("digits", size=12)
    assert larger.shape == (1498, 1, 12, 12) and larger.abs().max() <= 1
    assert load_images(torch.ones(2, 3, 9, 5, dtype=torch.float64) * -.5, size=4).shape == (2, 3, 4, 4)
    for bad in (0, -3, 2.5, "8"):
        with pytest.raises(ValueError, match=f"size: expected a whole number of at least 1, got {bad!r}"): load_images("digits", size=bad)


def test_different_sizes_name_two_files(tmp_path):
    for i, h in enumerate((8, 8, 9)): save(noise(1, h, 8), tmp_path/f"{i}.png")
    with pytest.raises(ValueError, match=r"different sizes: .*0\.png has 8 × 8 pixels, .*2\.png has 9 × 8; pass size="): load_images(tmp_path)


# tensors

def test_tensors():
    x = torch.rand(4, 2, 5, 6, dtype=torch.float64)*2 - 1
    assert torch.equal(load_images(x), x.float())
    y = x.float().requires_grad_()
    assert torch.equal(load_images(y), y) and not load_images(y).requires_grad
    assert load_images(x.bfloat16()).dtype == torch.float32
    with pytest.warns(UserWarning, match=r"no value lies below 0: for values in \[0, 1\], pass 2\*x - 1") as caught: load_images(x.abs())
    assert caught[0].filename == __file__


@pytest.mark.parametrize("x, error, message", [
    (noise(4, 1, 5, 5), TypeError, r"name: expected a floating-point tensor .* got torch.uint8: .*x\.float\(\)/127\.5 - 1"),
    (torch.zeros(4, 1, 5, 5, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.zeros(4, 5, 5), ValueError, r"shape \(N, C, H, W\), got shape \(4, 5, 5\): .*x\[:, None\]"),
    (torch.zeros(4, 25), ValueError, r"got shape \(4, 25\)$"),
    (torch.zeros(0, 1, 5, 5), ValueError, r"non-empty .* got shape \(0, 1, 5, 5\)"),
    (noise(4, 1, 5, 5).float(), ValueError, r"values in \[-1, 1\], got \d to 2\d\d: .*/127\.5 - 1"),
    (torch.full((1, 1, 2, 2), -1.01), ValueError, r"got -1\.01 to -1\.01"),
    (torch.tensor([[[[0., torch.nan, torch.inf]]]]), ValueError, "name: 2 of 3 values are NaN or infinite"),
    (np.zeros((4, 1, 5, 5)), TypeError, "name: expected a name, a folder or a tensor, got ndarray"),
    (None, TypeError, "got NoneType"),
])
def test_bad_tensors(x, error, message):
    with pytest.raises(error, match=message): load_images(x)


def test_no_labels_and_no_test_part(tmp_path):
    save(noise(1, 4, 4), tmp_path/"a.png")
    for name in (tmp_path, -torch.ones(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="labels: a tensor has none"): load_images(name, labels=True)
    with pytest.raises(ValueError, match="a tensor has no 'test' part"): load_images(torch.zeros(1, 1, 2, 2), "test")
    with pytest.raises(FileNotFoundError, match="split 'test': .* has no test/ inside"): load_images(tmp_path, "test")
    write_tree(tmp_path/"d"/"train", classes=1)
    with pytest.raises(FileNotFoundError, match="split 'test': there is no folder .*test"): load_images(tmp_path/"d", "test")


# where to look

@EXCERPT
def test_order_of_search(tmp_path, monkeypatch):
    "root, then NSGF_NB_DATA, then the cache; each seen once those before it have nothing."
    root, env, cache = tmp_path/"root", tmp_path/"env", tmp_path/"cache/nsgf_nb"
    for folder in (root, env): folder.mkdir()
    cached, _ = write_mnist(cache, seed=10)
    monkeypatch.setenv("NSGF_NB_DATA", str(env))
    assert torch.equal(pixels(load_images("mnist")), cached)
    in_env, _ = write_mnist(env/"mnist", seed=20)
    assert torch.equal(pixels(load_images("mnist")), in_env)
    with pytest.raises(FileNotFoundError, match="mnist: no train images in .*root; put train-images.*root= .*NSGF_NB_DATA"):
        load_images("mnist", root=root)          # there, and nowhere else
    in_root, _ = write_mnist(root, seed=30)
    assert torch.equal(pixels(load_images("mnist", root=root)), in_root)
    monkeypatch.delenv("NSGF_NB_DATA")
    assert torch.equal(pixels(load_images("mnist")), cached)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    at_home, _ = write_mnist(tmp_path/"home/.cache/nsgf_nb", seed=40)
    assert torch.equal(pixels(load_images("mnist")), at_home)


def test_folders_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="root: there is no folder .*nowhere"): load_images("mnist", root=tmp_path/"nowhere")
    monkeypatch.setenv("NSGF_NB_DATA", str(tmp_path/"gone"))
    with pytest.raises(FileNotFoundError, match="NSGF_NB_DATA: there is no folder .*gone"): load_images("cifar10")
    with pytest.raises(FileNotFoundError, match="name: there is no folder .*nowhere"): load_images(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="name: there is no folder"): load_images(str(tmp_path/"nowhere"))
    (tmp_path/"file.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="name: there is no folder .*file.png"): load_images(tmp_path/"file.png")


@pytest.mark.parametrize("name, files", (("mnist", "train-images-idx3-ubyte.gz, .*t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-batches-py/")))
@pytest.mark.parametrize("error, reason", (
    (URLError("no route"), "<urlopen error no route>"),
    (RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried a, got:\n<urlopen error 1>\n"), "<urlopen error 1>"),
    (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
    (ConnectionResetError(), "ConnectionResetError"),
    (PermissionError(13, "Permission denied"), "Permission denied"),
))
def test_offline(name, files, error, reason, tmp_path, monkeypatch):
    def download(self, *args): raise error
    monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "download", download)
    monkeypatch.setenv("NSGF_NB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: load_images(name)
    said = str(e.value)
    assert re.search(rf"{name}: no train images in {tmp_path} or .*nsgf_nb, and the download failed \(.*{re.escape(reason)}\); put {files}", said)
    assert "root=" in said and "NSGF_NB_DATA" in said and "\n" not in said
    assert list((tmp_path/"cache/nsgf_nb").iterdir()) == [] and socket.getdefaulttimeout() is None


def test_a_server_that_says_nothing(monkeypatch):
    "torchvision's own download, from a server that accepts and keeps silent: given up, not waited for."
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", DOWNLOAD)
    monkeypatch.setattr(nsgf_nb.data, "_PATIENCE", .2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        hang_up = threading.Timer(10, server.close)
        hang_up.start()                          # or this test would not fail, but wait for ever
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        with pytest.raises(FileNotFoundError, match=r"download failed \(.*timed out"): load_images("mnist")
        hang_up.cancel()


@EXCERPT
def test_download(tmp_path, monkeypatch):
    "What torchvision fetched is kept in the cache, and used from there; an interrupted download leaves nothing."
    calls = []
    def download(self):
        calls.append(self.root)
        write_mnist(Path(self.raw_folder), zipped=False)
        if len(calls) == 1: raise URLError("interrupted")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError, match="interrupted"): load_images("mnist")
    assert list((tmp_path/"cache/nsgf_nb").iterdir()) == []
    x = load_images("mnist")
    assert len(calls) == 2 and x.shape == (7, 1, 28, 28)
    assert torch.equal(load_images("mnist"), x) and len(calls) == 2
    for file in (tmp_path/"cache/nsgf_nb/MNIST/raw").glob("train-*"): file.unlink() # the rest stays in the way
    assert torch.equal(load_images("mnist"), x) and len(calls) == 3
    assert [p.name for p in (tmp_path/"cache/nsgf_nb").iterdir()] == ["MNIST"]


# names

@pytest.mark.parametrize("name, suggestion", (("minst", "mnist"), ("MNIST", "mnist"), ("CIFAR-10", "cifar10"), ("digit", "digits")))
def test_unknown_names(name, suggestion):
    with pytest.raises(ValueError, match=f"unknown images '{name}': expected digits, mnist, cifar10, a folder or a tensor; did you mean '{suggestion}'"):
        load_images(name)


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="a folder or a tensor$"): load_images("xyz")
    for split in ("valid", "Train", None, 0):
        with pytest.raises(ValueError, match=f"split: expected 'train' or 'test', got {split!r}"): load_images("digits", split)


# damaged files

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 28, 28)
damaged = pytest.mark.parametrize("content, message", (
    (b"", "begins with nothing"),
    (b"<html>404 Not Found</html>", "begins with 3c 68 74 6d"),
    (idx(noise(7, 28, 28))[:10], "begins with 00 00 08 03"),
    (idx(noise(7, 28, 28))[:-1], "header says 7 × 28 × 28 bytes"),
    (idx(noise(7, 28, 28)) + b"x", "header says 7 × 28 × 28 bytes"),
    (idx(noise(0, 28, 28)), "header says 0 × 28 × 28 bytes"),
    (idx(noise(7, 784)), "begins with 00 00 08 02"),
    (b"\0\0\x0d" + idx(noise(7, 28, 28))[3:], "begins with 00 00 0d 03"), # floats
    (HUGE + bytes(784), "header says 4294967295 × 28 × 28 bytes"),
))


@damaged
@pytest.mark.parametrize("zipped", (True, False))
def test_damaged_idx(tmp_path, content, message, zipped):
    write_mnist(tmp_path)
    (tmp_path/IMAGES).write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=f"{IMAGES} is damaged or incomplete, get it anew: .*{message}"): load_images("mnist", root=tmp_path)


def test_damaged_gzip(tmp_path):
    "Cut short anywhere, or one byte changed: named and refused, or, in what gzip ignores, read as it was."
    write_mnist(tmp_path)
    path, draw, want = tmp_path/IMAGES, random.Random(0), noise(7, 1, 28, 28) % 5 # few values, so that deflate has work to do
    whole = gzip.compress(idx(want[:, 0]))
    for k in (1, 2, 5, 12, 100, len(whole)//2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=f"{IMAGES} is damaged or incomplete"): load_images("mnist", root=tmp_path)
    refused = 0
    for k in [*range(4), *draw.sample(range(10, len(whole)), 60)]:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << draw.randrange(8)]) + whole[k + 1:])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert torch.equal(pixels(load_images("mnist", root=tmp_path)), want)
        except ValueError as e:
            assert IMAGES in str(e)
            refused += 1
    assert refused >= 60


def test_a_header_cannot_reserve_memory(tmp_path):
    "A file of a few bytes that promises terabytes is refused before anything is reserved for them."
    import tracemalloc
    write_mnist(tmp_path)
    for content in (HUGE, gzip.compress(HUGE + bytes(784)), gzip.compress(HUGE[:4] + struct.pack(">3I", *[2**32 - 1]*3))):
        (tmp_path/IMAGES).write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="header says"): load_images("mnist", root=tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally: tracemalloc.stop()


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    write_mnist(tmp_path)
    (tmp_path/LABELS).write_bytes(gzip.compress(idx(noise(6))))
    with pytest.raises(ValueError, match=f"{IMAGES} has 7 images, but .* 6 labels"): load_images("mnist", root=tmp_path)
    (tmp_path/LABELS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{LABELS} is damaged"): load_images("mnist", root=tmp_path)
    (tmp_path/LABELS).unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte.* is missing"): load_images("mnist", root=tmp_path)
    (tmp_path/IMAGES).write_bytes(gzip.compress(idx(noise(7, 14, 56))))
    (tmp_path/LABELS).write_bytes(gzip.compress(idx(noise(7))))
    with pytest.raises(ValueError, match=f"{IMAGES}: expected images of 28 × 28 pixels, got 14 × 56"): load_images("mnist", root=tmp_path)


def test_damaged_images(tmp_path):
    "A picture cut short, empty or of another kind is named."
    save(noise(3, 32, 32), tmp_path/"a.png")
    save(noise(3, 32, 32), tmp_path/"b.png")
    whole = (tmp_path/"b.png").read_bytes()
    for content in (b"", b"text", whole[:50], whole[:len(whole)//2], whole[:200] + bytes(40) + whole[240:]):
        (tmp_path/"b.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.png cannot be read as an image: "): load_images(tmp_path)


def test_empty_and_mixed_folders(tmp_path):
    with pytest.raises(ValueError, match="no images in this folder"): load_images(tmp_path)
    (tmp_path/"notes.txt").write_text("still none")
    with pytest.raises(ValueError, match="no images in this folder"): load_images(tmp_path)
    save(noise(1, 4, 4), tmp_path/"cats/a.png")
    (tmp_path/"dogs").mkdir()
    with pytest.raises(ValueError, match="dogs: no images in this folder"): load_images(tmp_path)
    save(noise(1, 4, 4), tmp_path/"dogs/a.png")
    save(noise(1, 4, 4), tmp_path/"stray.png")
    with pytest.raises(ValueError, match=r"holds images \(stray.png\) beside subfolders \(cats\)"): load_images(tmp_path)


# the real ones

@real
def test_real_mnist(monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", DATA)
    sizes, means = {"train": 60_000, "test": 10_000}, {"train": .1307, "test": .1325}
    md5 = {"train": "6bbc9ace898e44ae57da46a324031adb", "test": "2646ac647ad5339dbf082846283269ea"}
    counts = {
        "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    }
    for split, n in sizes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")       # it is whole: nothing to warn about
            x, y = load_images("mnist", split, labels=True)
        assert x.shape == (n, 1, 28, 28) and y.bincount().tolist() == counts[split]
        assert (x.mean() + 1).item()/2 == pytest.approx(means[split], abs=1e-4)
        raw = bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 28, 28) + pixels(x).numpy().tobytes()
        assert hashlib.md5(raw).hexdigest() == md5[split]


@real
def test_real_cifar10(monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", DATA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, y = load_images("cifar10", "test", labels=True)
    counts = y.bincount()
    assert x.shape[1:] == (3, 32, 32) and len(counts) == 10 and (counts == len(y)/10).all()
    assert (x.mean((0, 2, 3)) + 1).div(2).tolist() == pytest.approx([.491, .482, .447], abs=.02)
    said = [str(w.message) for w in caught]
    assert len(x) == 10_000 or any(f"cifar10: only {len(x):,} of 10,000 test images" in s for s in said)


# sheets

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


@pytest.mark.parametrize("channels", (1, 3))
def test_show_images(plt, channels):
    x = torch.rand(7, channels, 20, 10)*4 - 2
    ax = show_images(x.requires_grad_(), title="sheet", columns=3)
    (image,) = ax.images
    sheet = torch.as_tensor(np.asarray(image.get_array()))
    assert sheet.shape[:2] == (3*20 + 2, 3*10 + 2) and ax.get_title() == "sheet" and not ax.axison
    want = (x.detach().clamp(-1, 1) + 1)/2
    for i in range(7):
        r, c = divmod(i, 3)
        torch.testing.assert_close(sheet[21*r:21*r + 20, 11*c:11*c + 10].reshape(20, 10, -1).permute(2, 0, 1), want[i])
    gaps = torch.cat([sheet[20], sheet[41], sheet[:, 10], sheet[42:, 11:].flatten(0, 1)]) # and the places that stay empty
    assert (gaps == 1).all()
    assert image.get_clim() == (0, 1)
    assert channels == 3 or image.get_cmap().name in ("gray", "grey")
    mine = plt.subplots()[1]
    assert show_images(x[:1], ax=mine) is mine and mine.images[0].get_array().shape[:2] == (20, 10)
    assert show_images(x.double()).images[0].get_array().shape[:2] == (3*21 - 1, 3*11 - 1)


@pytest.mark.parametrize("x, error, message", [
    (torch.zeros(4, 8, 8), ValueError, r"show_images: expected a non-empty tensor of shape \(n, 1 or 3, H, W\), got shape \(4, 8, 8\)"),
    (torch.zeros(4, 2, 8, 8), ValueError, r"got shape \(4, 2, 8, 8\)"),
    (torch.zeros(0, 1, 8, 8), ValueError, r"got shape \(0, 1, 8, 8\)"),
    ([1, 2], ValueError, "got list"),
    (noise(4, 1, 8, 8), TypeError, r"got torch.uint8: .*x\.float\(\)/127\.5 - 1"),
])
def test_show_images_refuses(plt, x, error, message):
    with pytest.raises(error, match=message): show_images(x)


def test_show_images_columns(plt):
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"): show_images(torch.zeros(4, 1, 8, 8), columns=0)
    assert show_images(torch.zeros(2, 1, 8, 8), columns=5).images[0].get_array().shape[:2] == (8, 5*9 - 1)
