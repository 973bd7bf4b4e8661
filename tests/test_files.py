"""Files: written whole or not at all, checked when read; shipped weights, writable folders."""
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nsgf_nb
from nsgf_nb.files import (
    load_tensors,
    pretrained_names,
    pretrained_path,
    read_json,
    save_tensors,
    writable_folder,
    write_file,
    write_json,
)

FORMAT = "nsgf_nb/3"


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b.c": torch.arange(5),
            "none": torch.empty(0, 4), "one": torch.tensor(2.5, dtype=torch.float64)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path/"m.safetensors"
    save_tensors(path, tensors(), dict(model="a", steps=[1, 2], name="ä"))
    return path


# ---- writing

def test_what_is_written_comes_back(saved):
    loaded, about = load_tensors(saved)
    assert about == dict(format=FORMAT, model="a", steps=[1, 2], name="ä")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    readable = saved.with_name("m.safetensors.json")
    assert json.loads(readable.read_text()) == about
    assert sorted(saved.parent.iterdir()) == [saved, readable]


@pytest.mark.parametrize("tensor", (
    torch.arange(12.).view(3, 4).T,
    torch.arange(12.)[::2],
    torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    torch.ones(3, requires_grad=True),
    torch.ones(1).expand(4),
    torch.arange(4.).bfloat16(),
), ids=("transposed", "strided", "channels last", "with a graph", "expanded", "bfloat16"))
def test_tensors_of_any_layout(tmp_path, tensor):
    save_tensors(tmp_path/"m", {"t": tensor}, {}, readable=False)
    assert torch.equal(load_tensors(tmp_path/"m")[0]["t"], tensor.detach())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_folders_are_made_and_paths_may_be_strings(tmp_path):
    save_tensors(f"{tmp_path}/a/b/m", tensors(), {})
    write_json(f"{tmp_path}/c/d.json", {"n": 1})
    assert len(load_tensors(f"{tmp_path}/a/b/m")[0]) == 4
    assert read_json(f"{tmp_path}/c/d.json") == {"n": 1}


def write_new_bytes(path):
    write_file(path, b"new")


def write_new_json(path):
    write_json(path, {"new": 1})


def write_new_tensors(path):
    save_tensors(path, tensors(1), dict(model="new"))


WRITERS = (write_new_bytes, write_new_json, write_new_tensors)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ("replace", "fsync"))
def test_a_failure_leaves_the_old_file_and_no_other(saved, monkeypatch, write, call):
    readable = saved.with_name("m.safetensors.json")
    old = saved.read_bytes(), readable.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(saved)
    monkeypatch.undo()
    assert (saved.read_bytes(), readable.read_bytes()) == old
    assert sorted(saved.parent.iterdir()) == [saved, readable]
    write(saved)
    assert saved.read_bytes() != old[0]


def test_a_description_that_json_cannot_express_leaves_the_old_file(saved):
    old = saved.read_bytes()
    with pytest.raises(TypeError):
        save_tensors(saved, tensors(1), dict(model={1, 2}))
    assert saved.read_bytes() == old


def test_two_processes_use_temporary_files_of_their_own(tmp_path, monkeypatch):
    sources = set()
    replace = os.replace

    def noted(source, target):
        sources.add(str(source))
        replace(source, target)
    monkeypatch.setattr(os, "replace", noted)
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        write_file(tmp_path/"m", b"x")
    assert len(sources) == 2


# ---- reading

def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path/"none", tmp_path, str(tmp_path), ""):
        with pytest.raises(FileNotFoundError, match="^no model file at "):
            load_tensors(path)


@pytest.mark.parametrize("keep", (0, 1, 7, 8, 9, 60, -40, -1))
def test_truncated_files(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.safetensors is not a complete"):
        load_tensors(saved)


def test_a_file_with_more_behind_it(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(ValueError, match="m.safetensors is not a complete"):
        load_tensors(saved)


def test_every_flipped_bit_is_noticed_or_changes_nothing(saved):
    content = saved.read_bytes()
    about = load_tensors(saved)[1]
    rng = random.Random(0)
    noticed = 0
    for i in rng.sample(range(8*len(content)), 400):
        damaged = bytearray(content)
        damaged[i//8] ^= 1 << i % 8
        saved.write_bytes(damaged)
        try:
            loaded, about_loaded = load_tensors(saved)
        except ValueError as error:
            assert str(saved) in str(error)
            noticed += 1
            continue
        assert about_loaded == about
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    assert noticed > 380  # the others fall on white space of the header


@pytest.mark.parametrize("content", (
    b"hello", b"\x93NUMPY" + b"v"*100, b"\xff"*64, bytes(8), bytes(range(256))*9,
    pickle.dumps({"a": 1}), b"{}"))
def test_foreign_bytes(tmp_path, content):
    (tmp_path/"m").write_bytes(content)
    with pytest.raises(ValueError, match="m is not a complete"):
        load_tensors(tmp_path/"m")


@pytest.mark.parametrize("text, words", (
    (None, "not one of nsgf_nb"),
    ("[1]", "not one of nsgf_nb"),
    ("null", "not one of nsgf_nb"),
    ("{", "is not a complete"),
    ("{}", f"format None; .* reads '{FORMAT}'"),
    ('{"format": "nsgf_nb/99"}', f"format 'nsgf_nb/99'; .* reads '{FORMAT}'"),
    ('{"format": "%s"}' % FORMAT, "is damaged"),
    ("["*10**5, "is not a complete"),
    ('{"format": ' + "["*10**5, "is not a complete"),
), ids=lambda value: str(value)[:30])
def test_safetensors_of_others_and_of_other_versions(tmp_path, text, words):
    metadata = {"by": "me"} if text is None else {"nsgf_nb": text}
    save_file({"a": torch.zeros(2)}, tmp_path/"m", metadata)
    with pytest.raises(ValueError, match=f"m .*{words}"):
        load_tensors(tmp_path/"m")


def test_nothing_is_unpickled(saved, monkeypatch, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path/"pickled")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert len(load_tensors(saved)[0]) == 4
    with pytest.raises(ValueError, match="pickled is not a complete"):
        load_tensors(tmp_path/"pickled")


@pytest.mark.parametrize("content, words", (
    (b"", "not a valid JSON"), (b"{", "not a valid JSON"), (b"\xff", "not a valid JSON"),
    (b"["*10**5, "not a valid JSON"), (b"[1]", "got a list"), (b"3", "got a int")),
    ids=("empty", "open", "not utf-8", "deep", "list", "number"))
def test_json_that_is_not_an_object(tmp_path, content, words):
    path = tmp_path/"a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} .*{words}"):
        read_json(path)


def test_a_json_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path/"a.json"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="67,108,865 bytes"):
        read_json(path)


# ---- weights that come with the package

def test_pretrained_weights_are_whole_and_small():
    folder = Path(nsgf_nb.__file__).parent/"weights"
    assert {"classifier-digits", "classifier-mnist", "digits", "mnist"} <= set(pretrained_names())
    models = ("Classifier", "NSGFPlusPlus", "FlowMatching", "NSGF", "SinkhornGenerator")
    for name in pretrained_names():
        assert pretrained_path(name) == folder/f"{name}.safetensors"
        loaded, about = load_tensors(pretrained_path(name))
        assert loaded and about["model"] in models
        assert read_json(folder/f"{name}.safetensors.json") == about
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6


@pytest.mark.parametrize("name", (
    "none", "", "../weights/classifier-digits", "classifier-digits.safetensors", "/etc/passwd"))
def test_unknown_weights_list_the_known(name):
    with pytest.raises(ValueError, match=f"classifier-digits, classifier-mnist.*, got '{name}'"):
        pretrained_path(name)


# ---- folders

def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        path = writable_folder(f"{tmp_path}/a/b")
        assert path == tmp_path/"a"/"b"
        assert path.is_dir() and list(path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path/"file").write_text("")
    for path in (tmp_path/"file", tmp_path/"file"/"under"):
        with pytest.raises(OSError, match=f"cannot write to the folder {path}: [A-Z]"):
            writable_folder(path)


def test_a_folder_that_is_for_reading_only(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "touch", fail)  # root may write everywhere
    with pytest.raises(OSError, match=f"{tmp_path}: Permission denied"):
        writable_folder(tmp_path)


def test_a_folder_that_another_process_probes_at_the_same_time(tmp_path, monkeypatch):
    unlink = Path.unlink

    def raced(self, *args, **kwargs):
        unlink(self, missing_ok=True)  # the other one was faster
        return unlink(self, *args, **kwargs)
    monkeypatch.setattr(Path, "unlink", raced)
    assert writable_folder(tmp_path) == tmp_path
