"""Files: written whole or not at all, read with suspicion; weights by name, folders that can be written to."""
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nsgf_nb
from nsgf_nb.files import load_tensors, made_with, save_tensors, shipped, writable_folder, write_json, write_whole


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=g), "b.c": torch.arange(5), "none": torch.empty(0, 4), "one": torch.tensor(2.5, dtype=torch.float64)}


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path/"m.safetensors", tensors(), dict(model="a", steps=[1, 2], name="ä"))
    return tmp_path/"m.safetensors"


def crash(monkeypatch):
    "The machine stops between writing and replacing."
    def fail(*args): raise OSError("power cut")
    monkeypatch.setattr(os, "replace", fail)


# ---- writing

def test_what_is_written_comes_back(saved, tmp_path):
    found, about = load_tensors(saved)
    assert about == dict(format="nsgf_nb/2", model="a", steps=[1, 2], name="ä")
    assert found.keys() == tensors().keys()
    for k, t in tensors().items(): assert torch.equal(found[k], t) and found[k].dtype == t.dtype and found[k].shape == t.shape
    assert json.loads((tmp_path/"m.safetensors.json").read_text()) == about
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "m.safetensors.json"]


@pytest.mark.parametrize("t", (torch.arange(12.).view(3, 4).T, torch.arange(12.)[::2], torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
                               torch.ones(3, requires_grad=True), torch.ones(1).expand(4)), ids=("transposed", "strided", "channels last", "with a graph", "expanded"))
def test_tensors_of_any_layout(tmp_path, t):
    save_tensors(tmp_path/"m", {"t": t}, {})
    assert torch.equal(load_tensors(tmp_path/"m")[0]["t"], t.detach())


def test_folders_are_made_and_paths_may_be_strings(tmp_path):
    save_tensors(str(tmp_path/"a"/"b"/"m"), tensors(), {})
    write_json(str(tmp_path/"c"/"d.json"), [1])
    assert len(load_tensors(str(tmp_path/"a"/"b"/"m"))[0]) == 4 and json.loads((tmp_path/"c"/"d.json").read_text()) == [1]


@pytest.mark.parametrize("write", (lambda p: write_whole(p, b"new"), lambda p: write_json(p, "new"), lambda p: save_tensors(p, tensors(1), dict(model="new"))),
                         ids=("bytes", "JSON", "tensors"))
def test_a_crash_before_the_end_leaves_the_old_file(saved, monkeypatch, write):
    old = saved.read_bytes(), saved.with_name("m.safetensors.json").read_bytes()
    crash(monkeypatch)
    with pytest.raises(OSError, match="power cut"): write(saved)
    assert (saved.read_bytes(), saved.with_name("m.safetensors.json").read_bytes()) == old
    monkeypatch.undo()
    write(saved)                                                  # what the crash has left behind is in nobody's way
    assert saved.read_bytes() != old[0]


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()
    def full(number): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): save_tensors(saved, tensors(1), {})
    monkeypatch.undo()
    assert [p.name for p in saved.parent.glob("*.tmp")] == []      # and no half of the new one
    assert saved.read_bytes() == old and torch.equal(load_tensors(saved)[0]["a"], tensors()["a"])


def test_a_text_that_json_cannot_say_leaves_the_old_file(saved):
    old = saved.read_bytes()
    with pytest.raises(TypeError): save_tensors(saved, tensors(1), dict(model={1, 2}))
    assert saved.read_bytes() == old


# ---- reading

def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path/"none", tmp_path, str(tmp_path), ""):
        with pytest.raises(FileNotFoundError, match="^no model file at "): load_tensors(path)


@pytest.mark.parametrize("keep", (0, 1, 7, 8, 9, 60, -40, -1))
def test_torn_files(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.safetensors is not a whole safetensors file"): load_tensors(saved)


def test_a_file_with_more_behind_it(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(ValueError, match="m.safetensors is not a whole safetensors file"): load_tensors(saved)


@pytest.mark.parametrize("content", (b"hello", b"\x93NUMPY" + b"v"*100, b"\xff"*64, bytes(8), bytes(range(256))*9, pickle.dumps({"a": 1}), b"{}"))
def test_foreign_files(tmp_path, content):
    (tmp_path/"m").write_bytes(content)
    with pytest.raises(ValueError, match="m is not a whole safetensors file"): load_tensors(tmp_path/"m")


@pytest.mark.parametrize("text, words", ((None, "but not one of nsgf_nb"), ("[1]", "but not one of nsgf_nb"), ("null", "but not one of nsgf_nb"), ("{", "is not a whole"),
    ("{}", "has format None; this version of nsgf_nb reads 'nsgf_nb/2'"), ('{"format": "nsgf_nb/3"}', "has format 'nsgf_nb/3'; this version of nsgf_nb reads 'nsgf_nb/2'"),
    ('{"format": "nsgf_nb/2"}', "is damaged"), ("["*10**5, "is not a whole"), ('{"format": ' + "["*10**5, "is not a whole")))
def test_safetensors_of_others_and_of_other_versions(tmp_path, text, words):
    save_file({"a": torch.zeros(2)}, tmp_path/"m", {"by": "me"} if text is None else {"nsgf_nb": text})
    with pytest.raises(ValueError, match=f"m .*{words}"): load_tensors(tmp_path/"m")


def test_nothing_is_unpickled(saved, monkeypatch, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path/"pickled")
    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert len(load_tensors(saved)[0]) == 4
    with pytest.raises(ValueError, match="pickled is not a whole safetensors file"): load_tensors(tmp_path/"pickled")


# ---- weights that come with the package

def test_shipped_weights_are_there_whole_and_small():
    folder = Path(nsgf_nb.__file__).parent/"weights"
    names = sorted(p.stem for p in folder.glob("*.safetensors"))
    assert {"classifier-digits", "classifier-mnist"} <= set(names)
    for name in names:
        assert shipped(name) == folder/f"{name}.safetensors"
        held, about = load_tensors(shipped(name))
        assert held and about["model"] in ("Classifier", "NSGFPlusPlus", "StraightFlow", "NSGF")
        assert json.loads((folder/f"{name}.safetensors.json").read_text()) == about
    assert sum(p.stat().st_size for p in folder.iterdir()) < 16e6


@pytest.mark.parametrize("name", ("none", "", "../weights/classifier-digits", "classifier-digits.safetensors", "/etc/passwd"))
def test_unknown_weights_list_the_known(name):
    with pytest.raises(ValueError, match=f"no weights named '{name}' come with the package; known are .*classifier-digits, classifier-mnist"): shipped(name)


# ---- folders

def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        path = writable_folder(str(tmp_path/"a"/"b"))
        assert path == tmp_path/"a"/"b" and path.is_dir() and list(path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path/"file").write_text("")
    for path in (tmp_path/"file", tmp_path/"file"/"under"):
        with pytest.raises(OSError, match=f"^cannot write to the folder {path}: [A-Z].+"): writable_folder(path)


def test_a_folder_that_is_for_reading_only(tmp_path, monkeypatch):
    def fail(*args, **kw): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "touch", fail)                      # root may write everywhere
    with pytest.raises(OSError, match=f"^cannot write to the folder {tmp_path}: Permission denied$"): writable_folder(tmp_path)


def test_a_folder_that_another_process_probes_at_the_same_time(tmp_path, monkeypatch):
    inner = Path.unlink
    def raced(self, *args, **kw):
        inner(self, missing_ok=True)                              # the other one was faster
        return inner(self, *args, **kw)
    monkeypatch.setattr(Path, "unlink", raced)
    assert writable_folder(tmp_path) == tmp_path


def test_two_processes_that_write_the_same_file_use_unfinished_files_of_their_own(tmp_path, monkeypatch):
    seen, inner = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(str(a)), inner(a, b)))
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: pid)
        write_whole(tmp_path/"m", b"x")
    assert len(set(seen)) == 2


def test_where_a_number_was_made():
    found = made_with("cpu")
    assert found["torch"] == torch.__version__ and found["package"] == nsgf_nb.__version__ and found["device"] == "cpu" and found["threads"] >= 1
    json.dumps(found)
