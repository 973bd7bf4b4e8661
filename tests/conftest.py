"""What the tests of the `nsgf` command share."""
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
