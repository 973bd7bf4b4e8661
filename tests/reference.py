"""Reference solutions in float64, and clouds, that the tests of the Sinkhorn solver share."""
import math
import re
import warnings

import torch

EXACT = dict(tol=1e-10, max_iter=50_000)
WARNING = re.compile(r"max_iter=(\d+) .* error of (\S+), above tol=(\S+)")


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(n):
    return torch.full((n,), 1/n, dtype=torch.float64)


def simplex(n, orders=1, seed=0):
    "Weights of which the smallest are `orders` decades below the largest."
    generator = torch.Generator().manual_seed(seed)
    w = 10**(-orders*torch.rand(n, generator=generator, dtype=torch.float64))
    return w/w.sum()


def watched(call, *args, **kwargs):
    "What a call returns, and (max_iter, error, tol) of its worst warning, or None."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call(*args, **kwargs)
    matches = [WARNING.search(str(w.message)) for w in caught]
    assert all(matches), [str(w.message) for w in caught]
    numbers = [tuple(float(group) for group in match.groups()) for match in matches]
    return out, max(numbers, key=lambda triple: triple[1], default=None)


def radius(x):
    "The largest distance from the mean."
    x = x.double()
    return (x - x.mean(0)).norm(dim=1).max().item()


def exact_cost(x, y, centred=True):
    "½‖x − y‖² by differences; `centred` moves each cloud to its mean, which no map notices."
    x = x.double()
    y = y.double()
    x = x - (x if centred else y).mean(0)
    y = y - y.mean(0)
    if x.shape[1] > 64 and len(x)*len(y) > 4096:
        squares = (x*x).sum(1)[:, None] + (y*y).sum(1) - 2*x @ y.T
        return squares.clamp_min(0)/2
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()/2


def _annealed(C, eps, a, b, iterations):
    "The logarithms of the plan's factors, by plain annealed Sinkhorn in the log domain."
    log_a = a.log()
    log_b = b.log()
    g = torch.zeros_like(b)
    e = max(C[C.isfinite()].max().item(), eps)
    while True:
        for _ in range(iterations if e == eps else 20):
            f = -e*torch.logsumexp((g - C)/e + log_b, 1)
            g = -e*torch.logsumexp((f - C.T)/e + log_a, 1)
        if e == eps:
            return f/eps + log_a, g/eps + log_b
        e = max(e/2, eps)


def optimal_plan(C, eps, a, b, iterations=300, until=1e-13):
    "The plan for any cost, by Sinkhorn and then Newton's method, and its marginal error."
    u, v = _annealed(C, eps, a, b, iterations)

    def state(u, v):
        P = (u[:, None] + v - C/eps).clamp_max(50).exp()
        return P, torch.cat([a - P.sum(1), b - P.sum(0)])

    P, residual = state(u, v)
    for _ in range(60):
        if residual.abs().sum() < until:
            break
        upper = torch.cat([P.sum(1).diag(), P], 1)
        H = torch.cat([upper, torch.cat([P.T, P.sum(0).diag()], 1)])
        s = H.diag().sqrt()
        scaled = (residual/s)[:, None]
        step = torch.linalg.lstsq(H/s[:, None]/s, scaled, driver="gelsd").solution[:, 0]/s
        for t in .5**torch.arange(12.):
            u_new = u + t*step[:len(a)]
            v_new = v + t*step[len(a):]
            P_new, residual_new = state(u_new, v_new)
            if residual_new.abs().sum() < residual.abs().sum():
                break
        else:
            break
        u, v, P, residual = u_new, v_new, P_new, residual_new
    return P, residual.abs().sum().item()


def image(P, y):
    "Where the plan sends each row."
    y = y.double()
    return P @ (y - y.mean(0))/P.sum(1, keepdim=True) + y.mean(0)


def exact_velocity(x, y, blur, a=None, b=None, second=None, masked=False):
    "v in float64, and the marginal error left in its two plans."
    a = uniform(len(x)) if a is None else a.double()/a.double().sum()
    b = uniform(len(y)) if b is None else b.double()/b.double().sum()
    P, error = optimal_plan(exact_cost(x, y), blur**2, a, b)
    z = x if second is None else second
    C = exact_cost(x, z)
    if masked:
        C.fill_diagonal_(math.inf)
    Q, own_error = optimal_plan(C, blur**2, a, a if second is None else uniform(len(z)))
    return image(P, y) - image(Q, z), max(error, own_error)


def marginal_errors(x, y, blur, f, g, a, b):
    """The L1 error of the worse marginal of the plan that f and g define, in float64.

    And what the rounding of f and g alone, to the dtype in which they came, can have added.
    """
    eps = blur**2
    unit = torch.finfo(f.dtype).eps
    C = exact_cost(x, y, centred=False)
    f = f.double()
    g = g.double()
    exponents = (f[:, None] + g - C)/eps + a.log()[:, None] + b.log()
    P = exponents.clamp_max(50).exp()
    error = max((P.sum(1) - a).abs().sum().item(), (P.sum(0) - b).abs().sum().item())
    shift = f.mean().abs() + g.mean().abs()
    cancelled = 2**-50*(C.amax(1).min() + C.amin(1).max())

    def noise(w, h):
        return w @ ((2*unit*(h.abs() + shift) + cancelled)/eps).clamp_max(1).expm1()

    return error, (noise(a, f) + noise(b, g)).item()
