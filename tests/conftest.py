"""What tests share: the `nsgf` command in process, and model files whose content was changed."""
import hashlib
import json
import re

import pytest


@pytest.fixture
def command(capsys):
    "Run `nsgf` in process: exit code, stdout, and the lines of stderr that start with `starts`."
    from nsgf_nb.cli import main

    def call(starts, *words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, [line for line in err.splitlines() if line.startswith(starts)]
    return call


def fails(result, words, code=1):
    "Check that a command failed with one sentence on stderr that matches `words`."
    actual, _, err = result
    assert actual == code and len(err) == 1, result
    assert err[0].startswith("nsgf: ") and re.search(words, err[0]), err[0]


def rewrite(path, about=None, tensors=None):
    "Change the description or the tensors of a model file, and seal it again; None removes one."
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(path, "pt") as file:
        old_about = json.loads(file.metadata()["nsgf_nb"])
        old_tensors = {name: file.get_tensor(name) for name in file.keys()}
    changed = {**old_about, **(about or {}), "sha256": None}
    about = {name: value for name, value in changed.items() if value is not None}
    changed = {**old_tensors, **(tensors or {})}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    save_file(tensors, path, {"nsgf_nb": json.dumps(dict(about, sha256=digest.hexdigest()))})
