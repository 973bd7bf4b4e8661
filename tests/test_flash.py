"""The optional GPU backend: column sums by flash-sinkhorn, checked on the CPU by a stand-in and, where it is installed, by Triton's interpreter."""
import importlib.util
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.testing import assert_close

import nsgf_nb.sinkhorn as sinkhorn

NAME = "flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid"
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_sinkhorn") is None, reason="flash-sinkhorn is not installed (pip install nsgf_nb[gpu])")


def flashsinkhorn_lse(x, y, bias, eps, *, cost_scale=1., damping=1., allow_tf32=True, use_exp2=True,
                      block_m=None, block_n=None, block_k=None, num_warps=None, num_stages=2, autotune=True):
    "Stands in for the Triton kernel of the same name and signature (0.4.1): −eps·LSE_j(2·cost_scale·⟨x_i, y_j⟩/eps + bias_j)."
    return -eps*torch.logsumexp(2*cost_scale*(x @ y.mT)/eps + bias, -1)


def install(monkeypatch, kernel):
    "Put a module with `kernel` where flash-sinkhorn's would be, and let the solver believe that it is on a GPU."
    calls = []
    def counted(*args, **kwargs): calls.append(1); return kernel(*args, **kwargs)
    for name in ("flash_sinkhorn", "flash_sinkhorn.kernels", NAME): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[NAME].flashsinkhorn_lse = counted
    monkeypatch.setattr(sinkhorn, "_use_flash", lambda X, masked: not masked)
    monkeypatch.setattr(sinkhorn, "_STREAM", 100)
    return calls


def clouds(n=90, m=70, d=2):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=gen), torch.randn(m, d, generator=gen)*.5 + 1


def test_column_sums(monkeypatch):
    install(monkeypatch, flashsinkhorn_lse)
    x, y = clouds()
    h, a = torch.randn(70, generator=torch.Generator().manual_seed(1)), torch.full((90,), 1/90)
    assert_close(sinkhorn._flash(x, y, h, a), sinkhorn._pass(x, y, h, a)[2], rtol=1e-4, atol=1e-7)


def test_same_map_with_and_without(monkeypatch):
    x, y = clouds()
    dense = sinkhorn.barycentric_map(x, y, .3, tol=1e-4)
    calls = install(monkeypatch, flashsinkhorn_lse)
    assert_close(sinkhorn.barycentric_map(x, y, .3, tol=1e-4), dense, atol=2e-3, rtol=0)
    assert len(calls) >= 2


@pytest.mark.parametrize("spoil", (lambda t: t*float("nan"), lambda t: t + .01*torch.arange(len(t)), lambda t: t*0), ids=("nan", "tilted", "zero"))
def test_a_faulty_kernel_is_caught(monkeypatch, spoil):
    x, y = clouds()
    dense = sinkhorn.barycentric_map(x, y, .3, tol=1e-4)
    install(monkeypatch, lambda *a, **k: spoil(flashsinkhorn_lse(*a, **k)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, info = sinkhorn.barycentric_map(x, y, .3, tol=1e-4, max_iter=300, diagnostics=True)
    if info.error <= 1e-4: assert_close(found, dense, atol=1e-2, rtol=0)
    else: assert caught and "marginal error" in str(caught[0].message)
    assert found.isfinite().all()


def test_not_used_on_the_cpu():
    assert not sinkhorn._use_flash(torch.zeros(3, 2), False)


INTERPRETED = f"""
import torch, sys
torch.Tensor.is_cuda = True                      # the only thing that keeps the kernels off the CPU
import nsgf_nb.sinkhorn as sinkhorn
gen = torch.Generator().manual_seed(0)
for n, m, d in ((64, 64, 2), (100, 70, 32)):
    x, y, h, a = torch.randn(n, d, generator=gen), torch.randn(m, d, generator=gen), torch.randn(m, generator=gen), torch.full((n,), 1/n)
    torch.testing.assert_close(sinkhorn._flash(x, y, h, a), sinkhorn._pass(x, y, h, a)[2], rtol=1e-3, atol=1e-6)
"""


@needs_flash
def test_real_kernels_in_the_interpreter():
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=dict(os.environ, TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_flash
def test_signature_of_the_stand_in():
    import inspect
    source = importlib.util.find_spec(NAME)
    if source is None: pytest.fail(f"{NAME} is not in this flash-sinkhorn")
    done = subprocess.run([sys.executable, "-c", f"import inspect\nfrom {NAME} import flashsinkhorn_lse as f\nprint(','.join(inspect.signature(f).parameters))"],
                          env=dict(os.environ, TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.stdout.strip().split(",") == list(inspect.signature(flashsinkhorn_lse).parameters), done.stderr
