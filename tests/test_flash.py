"""Column sums by flash-sinkhorn: a stand-in on the CPU, Triton's interpreter if it is installed."""
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from reference import watched
from torch.testing import assert_close

from nsgf_nb import solver
from nsgf_nb.sinkhorn import barycentric_map
from nsgf_nb.solver import Problems, flash_column_sums, use_flash

NAME = "flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid"
installed = importlib.util.find_spec("flash_sinkhorn") is not None
needs_flash = pytest.mark.skipif(not installed, reason="flash-sinkhorn is not installed")


def flashsinkhorn_lse(x, y, bias, eps, *, cost_scale=1., damping=1., allow_tf32=True,
                      use_exp2=True, block_m=None, block_n=None, block_k=None, num_warps=None,
                      num_stages=2, autotune=True):
    "Stands in for the Triton kernel of the same name and signature (0.4.1)."
    return -eps*torch.logsumexp(2*cost_scale*(x @ y.mT)/eps + bias, -1)


def install(monkeypatch, kernel):
    "Put `kernel` in flash-sinkhorn's place, and let the solver use it on the CPU."
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    for name in ("flash_sinkhorn", "flash_sinkhorn.kernels", NAME):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[NAME].flashsinkhorn_lse = counted
    monkeypatch.setattr(solver, "use_flash", lambda problem: not problem.masked)
    monkeypatch.setattr(solver, "STREAM_ABOVE", 100)
    return calls


def clouds(n=90, m=70, d=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    return x, torch.randn(m, d, generator=generator)*.5 + 1


def test_column_sums(monkeypatch):
    install(monkeypatch, flashsinkhorn_lse)
    x, y = clouds()
    h = torch.randn(70, generator=torch.Generator().manual_seed(1))
    a = torch.full((90,), 1/90)
    expected = a @ torch.softmax(x @ y.T + h, 1)
    assert_close(flash_column_sums(x, y, h, a), expected, rtol=1e-4, atol=1e-7)


FAULTS = {
    "none": lambda f: f,
    "nan": lambda f: f*float("nan"),
    "tilted": lambda f: f + .01*torch.arange(len(f)),
    "zero": lambda f: f*0,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_noticed(monkeypatch, fault):
    x, y = clouds()
    dense = barycentric_map(x, y, .3, tol=1e-4)
    calls = install(monkeypatch, lambda *a, **k: FAULTS[fault](flashsinkhorn_lse(*a, **k)))
    (T, info), warning = watched(barycentric_map, x, y, .3, tol=1e-4, max_iter=300,
                                 diagnostics=True)
    assert len(calls) >= 2 and T.isfinite().all()
    assert (warning is None) == (info.error.item() <= 1e-4)
    if warning is None:
        assert_close(T, dense, atol=1e-2, rtol=0)
    assert warning is None or fault != "none"


def test_not_used_on_the_cpu():
    x = torch.zeros(1, 3, 2)
    w = torch.full((1, 1, 3), 1/3)
    assert not use_flash(Problems(x, x, w, w))


INTERPRETED = f"""
import inspect, torch
torch.Tensor.is_cuda = True  # the only thing that keeps the kernels off the CPU
from nsgf_nb.solver import flash_column_sums
from {NAME} import flashsinkhorn_lse
generator = torch.Generator().manual_seed(0)
for n, m, d in ((64, 64, 2), (100, 70, 32)):
    x, y, h = (torch.randn(*s, generator=generator) for s in ((n, d), (m, d), (m,)))
    a = torch.full((n,), 1/n)
    expected = a @ torch.softmax(x @ y.T + h, 1)
    torch.testing.assert_close(flash_column_sums(x, y, h, a), expected, rtol=1e-3, atol=1e-6)
print(",".join(inspect.signature(flashsinkhorn_lse).parameters))
"""


@needs_flash
def test_the_real_kernels_in_tritons_interpreter():
    "They give the column sums, and have the signature of the stand-in."
    import inspect
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split(",") == list(inspect.signature(flashsinkhorn_lse).parameters)
