"""Several processes, with the gloo backend on this machine's CPU: the same run as on one, and an end with a clear message."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsgf_nb.files import load_tensors, read_json

root = Path(__file__).resolve().parent.parent
TRAIN = """
import sys
from nsgf_nb import NSGF
from nsgf_nb.data import sample_2d
from nsgf_nb.files import save_tensors
from nsgf_nb.nsgfpp import StraightFlow
from nsgf_nb.ranks import ranks, sharing
out, data = sys.argv[1], sample_2d("moons", 2000, 0)
kw = dict(width=32, depth=2, batch_size=128, train_steps=60, device="cpu")
own = dict(pool_size=2**13, pool_mb=1, minibatch=64)
for name, model, more in (("memory", NSGF(**kw, **own), {}), ("disk", NSGF(**kw, **own), dict(pool=f"{out}/pool")), ("fm", StraightFlow(**kw), {})):
    model.fit(data, progress=False, checkpoint=f"{out}/{name}.checkpoint", **more)
    with sharing(): x, nfe = model.sample(5000, return_nfe=True)
    if ranks().main: save_tensors(f"{out}/{name}", {**model.net.state_dict(), "x": x, "nfe": nfe}, dict(ranks=ranks().count))
"""
DIE = """
import os, sys
import torch
from nsgf_nb.nsgfpp import StraightFlow
from nsgf_nb.ranks import ranks
calls = []
def data(n):
    calls.append(n)
    if ranks().index == 1 and len(calls) > 5: os._exit(3)
    return torch.randn(n, 2)
StraightFlow(width=16, depth=2, batch_size=64, train_steps=5000, device="cpu").fit(data, progress=False, checkpoint=sys.argv[1] + "/c", every=0.)
"""
LAUNCH = """
import sys
def work(out):
    from nsgf_nb.data import sample_2d
    from nsgf_nb.nsgfpp import StraightFlow
    from nsgf_nb.ranks import ranks
    model = StraightFlow(width=16, depth=2, batch_size=64, train_steps=20, device="cpu").fit(sample_2d("moons", 500, 0), progress=False, checkpoint=out + "/c")
    if ranks().main: model.save(out + "/m", ranks=ranks().count)
if __name__ == "__main__":
    from accelerate import debug_launcher
    debug_launcher(work, (sys.argv[1],), num_processes=2)
"""


def run(tmp_path, program, *words, ranks=2, ok=True):
    "A program in so many processes: what they printed."
    (tmp_path/"program.py").write_text(program)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *start, tmp_path/"program.py", *words], cwd=root, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(root)))
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_ranks_do_what_one_does(tmp_path):
    "A global batch of B is B/2 on each of two ranks; weights, samples, pool and losses agree to the rounding of sums."
    for n in (1, 2):
        (tmp_path/str(n)).mkdir()
        run(tmp_path, TRAIN, tmp_path/str(n), ranks=n)
    for name in ("memory", "disk", "fm"):
        (one, about1), (two, about2) = (load_tensors(tmp_path/n/name) for n in "12")
        assert (about1["ranks"], about2["ranks"]) == (1, 2) and one["x"].shape == (5000, 2) and torch.equal(one["nfe"], two["nfe"])
        for k in one: assert torch.allclose(one[k].double(), two[k].double(), atol=1e-4), (name, k)
        a, b = (load_tensors(tmp_path/n/f"{name}.checkpoint")[0] for n in "12")
        assert torch.allclose(a["losses"], b["losses"], rtol=1e-4)
    for path in sorted((tmp_path/"1"/"pool").glob("*.safetensors")): assert path.read_bytes() == (tmp_path/"2"/"pool"/path.name).read_bytes()
    run(tmp_path, TRAIN, tmp_path/"2", ranks=1)                        # and what two have begun, one can take up


def test_a_rank_that_dies_ends_the_others_with_a_clear_message(tmp_path):
    said = run(tmp_path, DIE, tmp_path, ok=False)
    assert "rank 0 of 2 has lost another rank, which died: see what that one printed; step " in said    # the error itself may come too late
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) in (3, 4, 5)   # the last good checkpoint


def test_the_command_line_on_two_ranks(tmp_path):
    "nsgf train under torchrun: only rank 0 writes and talks."
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nsgf_nb", "train", "digits", "--quick", "--out", tmp_path],
                          cwd=root, capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stdout + done.stderr
    assert read_json(tmp_path/"digits"/"seed0"/"result.json")["measured"]["nfe"]


def test_accelerate_starts_the_ranks_of_a_notebook(tmp_path):
    if importlib.util.find_spec("accelerate") is None: pytest.skip("accelerate is not installed")
    run(tmp_path, LAUNCH, tmp_path, ranks=1)
    assert load_tensors(tmp_path/"m")[1]["ranks"] == 2


def test_a_batch_that_does_not_divide(tmp_path):
    from nsgf_nb.ranks import Ranks
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 ranks, got 64"): Ranks(0, 3).share((torch.zeros(64),))
