"""The habits of scikit-learn: parameters, clones, searches, pipelines."""
import inspect

import numpy
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from nsgf_nb import NSGF, NSGFPlusPlus, SinkhornGenerator
from nsgf_nb.flow_matching import FlowMatching, FlowMatchingConfig
from nsgf_nb.nsgf import NSGFConfig

TINY = dict(train_steps=4, batch_size=32, width=8, depth=1, pool_size=128, minibatch=32,
            device="cpu")
rows = numpy.random.default_rng(0).normal(5, 3, (60, 3))


def test_a_repr_shows_what_differs_from_the_defaults():
    assert repr(NSGF()) == "NSGF()"
    assert repr(NSGF(blur=.1, coupling="population")) == "NSGF(coupling='population', blur=0.1)"
    assert repr(FlowMatching(mult=(1, 2))) == "FlowMatching(mult=(1, 2))"
    model = NSGFPlusPlus(handover="flow", straight=FlowMatchingConfig(lr=.5))
    assert repr(model).startswith("NSGFPlusPlus(handover='flow', straight=FlowMatchingConfig(")
    assert "lr=0.5" in repr(model)


@pytest.mark.parametrize("make", (NSGF, FlowMatching, NSGFPlusPlus, SinkhornGenerator))
def test_parameters_make_the_same_model_again(make):
    model = make(train_steps=7, device="cpu")
    params = model.get_params(deep=False)
    again = make(**params)
    assert again.get_params(deep=False) == params
    assert clone(model).get_params(deep=False) == params


def test_a_clone_is_not_fitted():
    model = NSGF(**TINY).fit(rows, progress=False)
    check_is_fitted(model)
    with pytest.raises(RuntimeError, match="fit"):
        clone(model).sample(2)


def test_settings_change_and_a_trained_network_stays():
    model = NSGF(**TINY).fit(rows, progress=False)
    before = model.sample(5, steps=3)
    assert model.set_params(sample_steps=3) is model
    assert torch.equal(model.sample(5), before)
    assert model.set_params(device=torch.device("cpu")).sample(5).shape == (5, 3)
    with pytest.raises(TypeError, match="'epochs'.*NSGF"):
        model.set_params(epochs=3)
    with pytest.raises(ValueError, match="blur.*above 0.*-1"):
        model.set_params(blur=-1.)


def test_settings_of_parts():
    model = NSGFPlusPlus().set_params(straight__lr=.25, handover="flow", delivered=99)
    assert model.straight.config.lr == .25 and model.sinkhorn.config.lr != .25
    assert model.get_params()["straight__lr"] == .25
    model.set_params(sinkhorn=NSGFConfig(blur=3.), device="cpu")
    assert model.sinkhorn.config.blur == 3. and model.delivered == 99
    with pytest.raises(TypeError, match="'speed'.*NSGF"):
        model.set_params(speed=3)


def test_a_search_over_settings():
    model = FlowMatching(train_steps=60, batch_size=128, width=16, depth=1, device="cpu")
    clusters = numpy.sign(rows - 5)*9 + rows/10  # far from the normal law
    search = GridSearchCV(model, {"lr": [1e-7, 1e-2]}, cv=2)
    search.fit(clusters)
    assert search.best_params_ == {"lr": 1e-2}
    assert search.best_estimator_.sample(4).shape == (4, 3)


def test_in_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), FlowMatching(train_steps=4, device="cpu")).fit(rows)
    assert pipeline.score_samples(rows).shape == (60,)
    samples = pipeline[:-1].inverse_transform(pipeline[-1].sample(5).numpy())
    assert samples.shape == (5, 3)


def test_random_state_is_another_word_for_seed():
    model = NSGF(**TINY).fit(rows, progress=False)
    assert torch.equal(model.sample(5, random_state=3), model.sample(5, seed=3))
    assert torch.equal(model.sample(5, random_state=numpy.int64(3)), model.sample(5, seed=3))
    for make in (numpy.random.RandomState, numpy.random.default_rng):
        first = model.sample(5, random_state=make(0))
        assert torch.equal(first, model.sample(5, random_state=make(0)))
        state = make(0)
        state.random(2)
        assert not torch.equal(first, model.sample(5, random_state=state))


@pytest.mark.parametrize("scale", (0., -1., float("nan")))
def test_a_file_whose_scale_is_not_positive_is_refused(tmp_path, scale):
    model = NSGF(**TINY, scale="global").fit(rows, progress=False)
    model.standardizer.scale.fill_(scale)
    model.save(tmp_path/"m.safetensors")
    with pytest.raises(ValueError, match="m.safetensors.*scale must be positive"):
        NSGF.load(tmp_path/"m.safetensors")


def test_columns_keep_their_names(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows, columns=["age", "height", "weight"])
    model = NSGF(**TINY).fit(frame, progress=False)
    out = model.to_frame(model.sample(7))
    assert list(out.columns) == ["age", "height", "weight"] and len(out) == 7
    model.save(tmp_path/"m.safetensors")
    assert NSGF.load(tmp_path/"m.safetensors").columns == ["age", "height", "weight"]
    assert NSGF(**TINY).fit(rows, progress=False).columns is None


# Each with its reason. All others of scikit-learn's checks pass.
NOT_APPLICABLE = {
    "check_no_attributes_set_in_init": "the network is None before fit, not absent",
    "check_do_not_raise_errors_in_init_or_set_params": "a wrong setting is an error at once",
    "check_dont_overwrite_parameters": "losses, seconds and net keep PyTorch's names",
    "check_fit_score_takes_y": "the second argument of fit is a source; a vector there is ignored",
    "check_n_features_in_after_fitting": "a wrong shape is an error with our own words",
    "check_complex_data": "our own words",
    "check_estimators_empty_data_messages": "our own words",
}


@pytest.mark.slow
def test_scikit_learns_checks():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    if "on_fail" not in inspect.signature(checks.check_estimator).parameters:
        pytest.skip("needs scikit-learn 1.6")
    model = FlowMatching(train_steps=5, batch_size=16, width=8, depth=1, device="cpu")
    results = checks.check_estimator(model, on_fail=None)
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    assert failed <= set(NOT_APPLICABLE)
    assert sum(result["status"] == "passed" for result in results) >= 30


def test_a_vector_in_the_second_place_is_scikit_learns_target():
    with pytest.warns(UserWarning, match="vector.*ignored"):
        model = NSGF(**TINY).fit(rows, rows[:, 0], progress=False)
    assert model.source == "normal" and model.n_features_in_ == 3
    with pytest.raises(AttributeError, match="NSGF.*table"):
        _ = NSGF().n_features_in_
