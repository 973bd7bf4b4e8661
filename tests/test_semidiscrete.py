"""Plans to a whole data set: cells in blocks, resume to the bit, wrong input, models with plans."""
import math

import pytest
import torch
from conftest import rewrite

from nsgf_nb import NSGF, NSGFPlusPlus, dual_ascent
from nsgf_nb.dual_ascent import (
    Balance,
    Cells,
    DualAscent,
    balance,
    coarse_prices,
    count_draws,
    extended_prices,
)
from nsgf_nb.flow import visited_times
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.runs.checkpoints import LongRun
from nsgf_nb.semidiscrete import SemidiscretePlan, check_distinct, principal_directions
from nsgf_nb.sinkhorn import potentials

N, D = 60, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(n=N, seed=0):
    return normal(n, D, seed=seed)


def fitted(y=None, source=None, weights=None, init=None, loop=None, **settings):
    plan = SemidiscretePlan(device="cpu", **settings)
    y = points() if y is None else y
    return plan.fit(y, source, weights, init, progress=False, loop=loop)


@pytest.fixture(scope="module")
def hard():
    return fitted(tol=.01)


@pytest.fixture(scope="module")
def soft():
    return fitted(tol=.01, blur=.4)


# ---- cells

@pytest.mark.parametrize("blur", (0., .3))
def test_blocks_do_not_change_what_is_computed(monkeypatch, blur):
    x, y, g = points(50, 1), points(), normal(N, seed=2)*.1
    cells = Cells(y, blur)
    whole = [*cells.best(x, g, 3), *cells.count(x, g)]
    monkeypatch.setitem(dual_ascent.BLOCK, "cpu", 50*7)
    blocks = [*cells.best(x, g, 3), *cells.count(x, g)]
    for a, b in zip(whole, blocks):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole[1], blocks[1])


def test_the_best_point_minimises_cost_less_price():
    x, y, g = points(50, 1), points(), normal(N, seed=2)*.1
    expected = (torch.cdist(x, y).square()/2 - g).argmin(1)
    assert torch.equal(Cells(y).best(x, g)[1][:, 0], expected)


@pytest.mark.parametrize("n", (2, 31, 33, 100))
@pytest.mark.parametrize("k", (1, 2, 5))
def test_the_best_points_are_found_in_groups_of_any_number_of_points(n, k):
    x, y, g = normal(50, 2, seed=1), normal(n, 2, seed=3), normal(n, seed=2)*.1
    scores = x @ y.mT + g - y.square().sum(1)/2
    values, index = scores.topk(min(k, n), 1)
    found_values, found = Cells(y).best(x, g, k)
    assert torch.equal(found, index)
    torch.testing.assert_close(found_values, values)


def test_points_may_be_stored_in_half_precision():
    x, y, g = points(50, 1), points().half(), normal(N, seed=2)*.1
    best = Cells(y).best(x, g)[1]
    assert torch.equal(best, Cells(y.float()).best(x, g)[1])


def test_soft_counts_are_those_of_a_softmax():
    x, y, g = points(50, 1), points(), normal(N, seed=2)*.1
    rows = ((g - torch.cdist(x, y).square()/2)/.3**2).softmax(1)
    counts, squares = Cells(y, .3).count(x, g)
    torch.testing.assert_close(counts, rows.sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(squares, rows.square().sum(0), atol=1e-4, rtol=1e-4)


def test_balance_by_hand():
    counts = torch.tensor([3., 1.])
    found = balance(counts, counts, torch.tensor([.5, .5]))
    assert found.draws == 4 and found.chi2 == pytest.approx(2*.25**2/.5)
    pairs = (3*2 + 0)/(4*3)  # of different draws in one cell
    assert found.excess == pytest.approx(2*pairs - 1)


def ascent(y=None, g=None, start=None, steps=50, tol=1e-4, blur=0., batch_size=64):
    stream = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(n, D, generator=stream)
    y = points() if y is None else y
    g = torch.zeros(len(y)) if g is None else g
    start = Balance(math.inf, 0., 0) if start is None else start
    return DualAscent(Cells(y, blur), torch.full((len(y),), 1/len(y)), g, start, draw, [stream],
                      batch_size, steps, tol)


def test_a_good_start_makes_small_steps():
    sizes = []
    for excess in (math.inf, .1, .01):
        trainer = ascent(start=Balance(excess, 0., 100))
        next(trainer)
        sizes.append(trainer.step_size()/trainer.scale)
    assert 1 >= sizes[0] > sizes[1] > sizes[2] > 0


def test_a_batch_larger_than_the_points_moves_no_price_by_more_than_the_gap():
    trainer = ascent(points(4), batch_size=400)
    before = trainer.net.g.clone()
    next(trainer)
    assert (trainer.net.g - before).abs().max() <= 4*trainer.scale


def test_prices_keep_their_sum_and_the_loss_is_minus_the_dual():
    trainer = ascent(steps=200)
    losses = torch.stack(list(trainer))
    assert trainer.net.g.sum().abs() < 1e-3
    assert losses[-50:].mean() < losses[:10].mean() < 0
    assert len(trainer.checks) >= 2 and trainer.done


def test_the_checks_end_the_ascent():
    trainer = ascent(steps=5000, tol=.2)
    assert len(list(trainer)) < 5000 and trainer.converged and trainer.done
    with pytest.raises(StopIteration):
        next(trainer)
    assert set(trainer.shown(0.)) == {"chi2", "perfect"}


def test_sinkhorn_starts_better_than_equal_prices():
    stream = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(n, D, generator=stream)*2 + 1
    b = torch.full((N,), 1/N)
    cells = Cells(points())
    equal = balance(*count_draws(cells, torch.zeros(N), draw, 5000), b)
    g, found = coarse_prices(cells, b, draw, 1000, 5000)
    assert found.excess < .2*equal.excess
    _, added = extended_prices(cells, b, draw, 1000, 5000, g[:50])
    assert added.excess < .2*equal.excess


# ---- plans

def test_loads_are_even(hard, soft):
    for plan in (hard, soft):
        assert plan.converged and plan.checks[-1].excess <= .01
        loads = plan.loads(40_000)
        assert loads.sum().item() == pytest.approx(1)
        assert (loads*N - 1).abs().mean() < .12
        assert plan.balance(20_000, seed=5).excess < .03
        assert plan.seconds["start"] > 0


def test_hard_and_soft_plans_as_they_are_asked(hard, soft):
    x = points(70, 3)
    rows = hard.plan(x)
    assert rows.shape == (70, N) and torch.equal(rows.argmax(1), hard.partners(x))
    assert torch.equal(hard.map(x), hard.y[hard.partners(x)])
    assert torch.equal(rows @ hard.y, hard.map(x))
    rows = soft.plan(x)
    torch.testing.assert_close(rows.sum(1), torch.ones(70))
    torch.testing.assert_close(rows @ soft.y, soft.map(x), atol=1e-5, rtol=1e-5)
    drawn = soft.partners(x[:1].expand(4000, D), torch.Generator().manual_seed(1))
    share = drawn.bincount(minlength=N)/4000
    assert (share - rows[0]).abs().max() < .05
    assert 0 < hard.cost(5000) < soft.cost(5000)  # with the entropy


def test_any_shape_and_dtype():
    y = normal(20, 1, 2, 3).double()
    plan = fitted(y, blur=.2)
    x = normal(5, 1, 2, 3, seed=1)
    assert plan.map(x).shape == x.shape and plan.map(x).dtype == x.dtype
    assert fitted(y).map(x.double()).dtype == torch.float64


def test_weights_are_the_loads():
    b = torch.linspace(1, 5, N)
    b /= b.sum()
    plan = fitted(weights=b, tol=.01)
    assert (plan.loads(60_000)/b - 1).abs().mean() < .12


def test_units_and_offsets_do_not_matter(hard):
    def source(n):
        return 1e4*torch.randn(n, D) + 3e4
    plan = fitted(1e4*points() + 3e4, source, tol=.01)
    x = points(500, 4)
    same = plan.partners(1e4*x + 3e4) == hard.partners(x)
    assert same.float().mean() > .85


def test_a_large_offset_costs_no_digits(hard):
    y = points().double()
    plan = fitted(y + 1e7, lambda n: torch.randn(n, D, dtype=torch.float64) + 1e7, tol=.01)
    x = points(500, 4).double()
    assert (plan.partners(x + 1e7) == hard.partners(x.float())).float().mean() > .85


def test_a_low_rank_keeps_the_marginals_exact():
    y = normal(200, 30)*2*torch.exp(-torch.arange(30.)/5)
    whole, low = fitted(y, tol=.03), fitted(y, tol=.03, rank=8)
    assert low.balance(20_000).excess < .06
    x = normal(4000, 30, seed=2)
    costs = [(x - plan.map(x)).square().sum(1).mean() for plan in (whole, low)]
    independent = (x - y[torch.arange(4000) % 200]).square().sum(1).mean()
    assert costs[0] < costs[1] < costs[0] + .1*(independent - costs[0])
    directions = principal_directions(y - y.mean(0), 8)
    torch.testing.assert_close(directions.T @ directions, torch.eye(8), atol=1e-5, rtol=0)


def test_the_seed_decides(hard):
    assert torch.equal(fitted(tol=.01).g, hard.g)
    assert not torch.equal(fitted(tol=.01, seed=1).g, hard.g)
    state = torch.get_rng_state()
    fitted(source=lambda n: torch.randn(n, D))
    assert torch.equal(torch.get_rng_state(), state)


def test_points_from_the_same_seed_are_not_the_draws():
    y = normal(400, 300, seed=0)
    plan = SemidiscretePlan(tol=.1, start_draws=200, seed=0, device="cpu").fit(y, progress=False)
    assert plan.draws < 100*len(y)  # 22 for each point; from one stream of numbers 276


def test_a_plan_that_is_stopped_half_way_resumes_to_the_bit(tmp_path):
    settings = dict(tol=.004, start_draws=300)
    whole = fitted(loop=LongRun(tmp_path/"whole"), **settings)

    class Stopped(LongRun):
        def step(self, trainer, signals):
            super().step(trainer, signals)
            if trainer.step == 20:
                signals.append(KeyboardInterrupt)
            return bool(signals)
    plan = SemidiscretePlan(device="cpu", **settings)
    with pytest.raises(KeyboardInterrupt, match="20 iterations"):
        plan.fit(points(), progress=False, loop=Stopped(tmp_path/"c"))
    assert plan.g.isfinite().all()  # what it has, it keeps
    resumed = fitted(loop=LongRun(tmp_path/"c"), **settings)
    assert torch.equal(resumed.g, whole.g) and resumed.checks == whole.checks
    assert len(whole.checks) > 1
    for other in (points(N + 1), points(seed=8)):
        with pytest.raises(ValueError, match="another run.*points"):
            fitted(other, loop=LongRun(tmp_path/"c"), **settings)


def test_added_points_start_from_known_prices(hard):
    more = torch.cat([points(), points(6, 9)])
    plan = fitted(more, init=hard, tol=.05)
    assert plan.checks[0].excess < .5 and plan.converged


def test_files(tmp_path, hard, soft):
    x = points(30, 3)
    for plan in (hard, soft):
        plan.save(tmp_path/"p")
        again = SemidiscretePlan.load(tmp_path/"p", device="cpu")
        assert torch.equal(again.map(x), plan.map(x)) and again.checks == plan.checks
        assert again.config == plan.config
    rewrite(tmp_path/"p", about=dict(model="NSGF"))
    with pytest.raises(ValueError, match="'NSGF', not 'SemidiscretePlan'"):
        SemidiscretePlan.load(tmp_path/"p")
    plan = fitted(source=points(100, 5))
    plan.save(tmp_path/"q")
    with pytest.raises(ValueError, match="source.*given"):
        SemidiscretePlan.load(tmp_path/"q")
    again = SemidiscretePlan.load(tmp_path/"q", source=points(100, 5), device="cpu")
    assert torch.equal(again.loads(500), plan.loads(500))


@pytest.mark.parametrize("arguments, words", (
    (dict(y=points(1)), "y must.*at least 2 points, got 1"),
    (dict(y=torch.cat([points(), points()[[7]]])), "y must.*distinct.*rows 7 and 60"),
    (dict(y=points().index_fill(0, torch.tensor(2), math.nan)), "y has 3 NaN"),
    (dict(y=points()[0]), "y must be of shape"),
    (dict(source=normal(50, D + 1)), r"source must be of shape \(n, 3\), got \(300, 4\)"),
    (dict(weights=torch.ones(N)), "weights.*sum of 60"),
    (dict(weights=torch.ones(4)/4), r"weights.*\(60,\), got \(4,\)"),
    (dict(weights=torch.eye(N)[0]), "weights must be positive"),
    (dict(rank=4), "rank.*3.*got 4"),
    (dict(init=SemidiscretePlan(device="cpu")), "init must be a fitted plan"),
))
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        fitted(**dict(start_draws=300) | arguments)


@pytest.mark.parametrize("settings, error, words", (
    (dict(blur=-1.), ValueError, "blur.*-1"), (dict(tol=0.), ValueError, "tol.*0"),
    (dict(epochs=3), TypeError, "'epochs'.*SemidiscretePlan"),
    (dict(batch_size=1), ValueError, "batch_size.*2"),
))
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        SemidiscretePlan(device="cpu", **settings)


def test_a_plan_to_other_points_is_no_start(hard):
    with pytest.raises(ValueError, match="init.*first points"):
        fitted(points(N, 7), init=hard)


def test_soft_costs_are_those_of_the_potentials(soft):
    f, g = potentials(points(20_000, 6), points(), .4)
    assert soft.cost(40_000) == pytest.approx((f.mean() + g.mean()).item(), rel=.03)


def test_before_fit_and_wrong_draws(hard):
    for ask in ("loads", "cost", "balance"):
        with pytest.raises(RuntimeError, match="fit"):
            getattr(SemidiscretePlan(device="cpu"), ask)()
    with pytest.raises(RuntimeError, match="fit"):
        SemidiscretePlan(device="cpu").map(points())
    with pytest.raises(ValueError, match="x must be of shape"):
        hard.map(normal(5, D + 1))


def test_prices_that_do_not_converge_are_named():
    with pytest.warns(UserWarning, match="excess of χ².*above tol=1e-05"):
        fitted(tol=1e-5, start_draws=300, draws_per_point=1.)


def test_equal_keys_are_not_equal_points():
    y = torch.tensor([[1., 0.], [0., .5], [0., 1.], [.5, .25]])
    check_distinct(y)


# ---- models that learn from them

TINY = dict(train_steps=20, batch_size=32, width=16, depth=1, pool_size=256, device="cpu")


@pytest.mark.parametrize("kind", (NSGF, FlowMatching))
def test_models_learn_from_the_population(kind):
    data = points(80)*3 + 2
    model = kind(coupling="population", **TINY).fit(data, progress=False)
    assert model.seconds["couplings"] > 0
    plan = kind(coupling="population", **TINY).fit_plan(data, progress=False)
    again = kind(coupling="population", **TINY)
    again.fit(data, progress=False, plan=plan)
    assert "couplings" not in again.seconds
    x, t, velocity = next(kind(coupling="population", **TINY).batches(data, plan=plan))
    ends = x + (1 - t[:, None])*velocity
    nearest = (ends[:, None] - plan.y).norm(dim=-1).min(1).values
    assert nearest.max() < 1e-5  # every path ends at a data point
    start = x - t[:, None]*velocity
    torch.testing.assert_close(plan.map(start), ends, atol=1e-3, rtol=0)


def test_repeated_rows_get_their_share():
    data = torch.cat([points(40), points(40)[:10]])
    model = NSGF(coupling="population", **TINY)
    plan = model.fit_plan(data, progress=False)
    assert len(plan.y) == 40 and plan.weights.max().item() == pytest.approx(2/50)


def test_mirror_images_are_points_of_their_own():
    data = normal(12, 1, 4, 4).clamp(-1, 1)
    net = dict(channels=4, mult=(1, 2), flip=True)
    plan = NSGF(coupling="population", **TINY | net).fit_plan(data, progress=False)
    assert len(plan.y) == 24


def test_functions_give_as_many_points_as_population_says():
    def data(n):
        return torch.rand(n, 2)

    def source(n):
        return torch.rand(n, 2) - 3
    model = FlowMatching(coupling="population", population=50, **TINY)
    plan = model.fit_plan(data, source, progress=False)
    assert len(plan.y) == 50
    model.fit(data, source, progress=False)


def test_a_plan_must_go_with_the_model():
    data = points(40)
    plan = NSGF(coupling="population", **TINY).fit_plan(data, progress=False)
    for kind, coupling in ((NSGF, "minibatch"), (FlowMatching, "ot")):
        with pytest.raises(ValueError, match=f"plan must be None for coupling='{coupling}'"):
            kind(coupling=coupling, **TINY).fit(data, progress=False, plan=plan)
    with pytest.raises(ValueError, match=r"plan must be to points of shape \(4,\)"):
        NSGF(coupling="population", **TINY).fit(normal(40, 4), progress=False, plan=plan)


def test_times_that_a_pool_has():
    k, w = visited_times(10_000, 5, torch.Generator().manual_seed(0))
    t = (k + w)/5
    visited = t[:5000]*5
    assert torch.equal(visited, visited.round()) and set(visited.tolist()) == {0, 1, 2, 3, 4}
    assert abs(t[5000:].mean().item() - .5) < .02 and t.max() < 1


def test_half_of_the_way():
    data = points(40)
    model = NSGF(coupling="population", t_end=.5, **TINY)
    plan = model.fit_plan(data, progress=False)
    x, t, move = next(model.batches(data, plan=plan))
    start = x - t[:, None]*move
    torch.testing.assert_close(start + 2*move, plan.map(start), atol=1e-3, rtol=0)


# ---- NSGF++ whose straight flow starts where the first one ends

IMAGES = dict(train_steps=3, batch_size=8, channels=4, mult=(1, 2), pool_size=64, minibatch=32)


def test_the_flow_handover(tmp_path):
    data = normal(30, 1, 8, 8).clamp(-1, 1)
    model = NSGFPlusPlus(device="cpu", handover="flow", delivered=40, coupling="population",
                         **IMAGES)
    model.fit(data, progress=False)
    assert set(model.parts) == {"sinkhorn", "straight"} and model.predictor.net is None
    x, nfe = model.sample(6, seed=1, steps=4, sinkhorn_steps=2, return_nfe=True)
    assert x.shape == (6, 1, 8, 8) and nfe.tolist() == [6]*6
    states = model.sample(6, seed=1, steps=4, sinkhorn_steps=2, trajectory=True)
    assert len(states) == 7 and torch.equal(states[-1], x)
    assert torch.equal(states[2], model.sinkhorn.sample(6, seed=1, steps=2))
    assert torch.equal(model.straight.given, model.deliver()) and len(model.deliver()) == 40
    model.save(tmp_path/"m")
    again = NSGFPlusPlus.load(tmp_path/"m", device="cpu")
    assert again.handover == "flow"
    assert torch.equal(again.sample(6, seed=1, steps=4, sinkhorn_steps=2), x)


def test_bad_handovers():
    with pytest.raises(ValueError, match="handover.*paper, flow.*'predictor'"):
        NSGFPlusPlus(device="cpu", handover="predictor")
    with pytest.raises(ValueError, match="delivered.*1"):
        NSGFPlusPlus(device="cpu", handover="flow", delivered=1)
    with pytest.raises(ValueError, match="parts.*sinkhorn, straight.*'predictor'"):
        model = NSGFPlusPlus(device="cpu", handover="flow", **IMAGES)
        model.fit(normal(30, 1, 8, 8).clamp(-1, 1), parts="predictor", progress=False)
