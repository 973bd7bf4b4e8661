"""Saved models in folders, as the Hugging Face Hub has them."""
import shutil
import sys
import types

import pytest
import torch

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb.files import MODEL_FILE, find_pretrained, load_tensors, pretrained_path

TINY = dict(train_steps=2, batch_size=8, pool_size=64, minibatch=32, device="cpu")


@pytest.fixture(scope="module")
def model():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    return NSGF(**TINY, width=8, depth=1, blur=.25).fit(x, progress=False)


def test_a_folder_with_a_model_card(model, tmp_path):
    model.save_pretrained(tmp_path/"moons", data="two moons", sw2=1.25)
    again = NSGF.from_pretrained(tmp_path/"moons", device="cpu")
    assert torch.equal(again.sample(5), model.sample(5))
    card = (tmp_path/"moons"/"README.md").read_text()
    for words in ('library_name: nsgf_nb', 'from nsgf_nb.nsgf import NSGF', '"blur": 0.25',
                  'from_pretrained("moons")', '- data: "two moons"', "- sw2: 1.25", "(2,)"):
        assert words in card, words


def test_the_code_of_a_card_runs(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path/"moons")
    code = (tmp_path/"moons"/"README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["samples"].shape == (16, 2)


def test_nsgfpp_has_a_card_too(tmp_path):
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))*2 - 1
    model = NSGFPlusPlus(**TINY, channels=4, mult=(1, 2), handover="flow", delivered=16)
    model.fit(images, progress=False).save_pretrained(tmp_path/"m")
    again = NSGFPlusPlus.from_pretrained(tmp_path/"m", device="cpu")
    assert torch.equal(again.sample(2), model.sample(2))
    assert "from nsgf_nb.nsgfpp import NSGFPlusPlus" in (tmp_path/"m"/"README.md").read_text()


def test_a_name_on_the_hub_is_downloaded(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path/"cache")
    asked = []

    def hf_hub_download(repository, file):
        asked.append((repository, file))
        return str(tmp_path/"cache"/file)
    hub = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert NSGF.from_pretrained("somebody/moons").sample(2).shape == (2, 2)
    assert asked == [("somebody/moons", MODEL_FILE)]

    def refuse(repository, file):
        raise ConnectionError("no network\nat all")
    hub.hf_hub_download = refuse
    with pytest.raises(OSError, match="somebody/moons.*Hub: no network at all"):
        NSGF.from_pretrained("somebody/moons")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder somebody/moons.*nsgf_nb\[hub\]"):
        NSGF.from_pretrained("somebody/moons")


def test_names_that_mean_nothing(tmp_path):
    assert find_pretrained("mnist") == pretrained_path("mnist")
    with pytest.raises(ValueError, match="digits.*mnist.*'nist'"):
        NSGFPlusPlus.from_pretrained("nist")
    with pytest.raises(FileNotFoundError, match=MODEL_FILE):
        NSGF.from_pretrained(tmp_path)


def test_a_pointer_of_a_large_file_store_is_called_that(tmp_path):
    pointer = tmp_path/MODEL_FILE
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="model.safetensors is a pointer.*git lfs pull"):
        load_tensors(pointer)
    shutil.rmtree(tmp_path)
