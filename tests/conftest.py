"""What tests share: the `nsgf` command in process, and model files that say something else."""
import re

import pytest


@pytest.fixture
def command(capsys):
    "Run `nsgf` in process: exit code, what it printed, the lines of its complaint that begin with `starts` (bars and warnings of others aside)."
    from nsgf_nb.cli import main
    def call(starts, *words):
        capsys.readouterr()
        try: code = main([str(w) for w in words])
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, [line for line in err.splitlines() if line.startswith(starts)]
    return call


def fails(result, words, code=1):
    "One sentence on stderr, that says so."
    found, _, err = result
    assert found == code and len(err) == 1, result
    assert err[0].startswith("nsgf: ") and re.search(words, err[0]), err[0]


def rewrite(path, about=None, tensors=None):
    "The same model file with some of its description, or of its tensors, replaced, and the checksum of what it says then; None removes one."
    import json
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from nsgf_nb.files import _digest
    with safe_open(path, "pt") as f: old = json.loads(f.metadata()["nsgf_nb"])
    new = {k: v for k, v in {**old, **(about or {})}.items() if v is not None and k != "sha256"}
    content = {k: v for k, v in {**load_file(path), **(tensors or {})}.items() if v is not None}
    save_file(content, path, {"nsgf_nb": json.dumps(dict(new, sha256=_digest(content, new)))})
