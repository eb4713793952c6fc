"""How far towards a removed model: against scores whose course along the way is known."""

import math

import pytest
import torch

from relearn_lens import progress
from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.remove.calibration import Calibration, calibrate, mixed_

NAME = "trunk.layers.1.mlp.fc_out.weight"


@pytest.fixture
def pair():
    """Weights of a base, and a model that is one step of a known length away from it."""
    model = toy.language_model()
    base = {name: value.clone() for name, value in model.weights().items()}
    with torch.no_grad():
        model.plain()[NAME].add_(1.0)
    return base, model


def share(base, model: Model) -> float:
    return float((model.weights()[NAME] - base[NAME]).mean())


def same(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("falls", "tau", "expected"), [(0.2, 0.95, 16), (0.5, 0.95, 6), (0.5, 0.5, 64), (0.06, 0.95, 53)]
)
def test_largest_share_that_keeps_the_score(pair, falls, tau, expected):
    """The score is 1 - falls a: tau of it is kept up to a = (1 - tau) / falls, rounded down to 1/64."""
    base, model = pair
    removed, calls = {name: value.clone() for name, value in model.weights().items()}, []

    def score(model: LanguageModel) -> float:
        calls.append(share(base, model))
        return 1 - (falls - 1e-4) * calls[-1]

    calibration = calibrate(model, base, score, tau=tau)
    assert calibration.share == expected / 64
    assert calibration.share == min(1, math.floor(64 * (1 - tau) / (falls - 1e-4)) / 64)
    assert calibration.score == pytest.approx(1 - (falls - 1e-4) * expected / 64, abs=1e-5)
    assert (calibration.base, calibration.removed) == pytest.approx((1, 1 - falls + 1e-4), abs=1e-5)
    assert len(calls) <= 2 + 6
    assert same(removed, model.weights())


def test_base_itself_is_kept_whole(pair):
    base, model = pair
    model.load_weights(base)

    def score(model: LanguageModel) -> float:
        assert same(base, model.weights())
        return 0.7

    assert calibrate(model, base, score) == Calibration(1.0, 0.7, 0.7, 0.7)


def test_a_removal_that_keeps_nothing_is_not_gone_along_at_all(pair):
    base, model = pair
    calibration = calibrate(model, base, lambda model: float(share(base, model) == 0), points=5)
    assert (calibration.share, calibration.score) == (0, 1)


def test_a_base_without_a_score_is_refused(pair):
    base, model = pair
    removed = {name: value.clone() for name, value in model.weights().items()}
    for nothing in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"base model scores {nothing} on what is to be retained"):
            calibrate(model, base, lambda _, nothing=nothing: nothing)
    assert same(removed, model.weights())


def test_a_score_that_fails_leaves_the_model_as_it_was(pair):
    base, model = pair
    removed = {name: value.clone() for name, value in model.weights().items()}

    def score(model: LanguageModel) -> float:
        assert not same(removed, model.weights())
        raise KeyError

    with pytest.raises(KeyError):
        calibrate(model, base, score)
    assert same(removed, model.weights())


def test_progress_of_a_calibration(pair):
    base, model = pair
    seen = []
    with progress.reported(lambda *how_far: seen.append(how_far)):
        calibrate(model, base, lambda model: 1 - 0.2 * share(base, model), points=8)
    assert seen == [("calibrating", n, 5) for n in range(6)]


def test_going_there(pair):
    base, model = pair
    removed = {name: value.clone() for name, value in model.weights().items()}
    mixed_(model, base, 1.0)
    assert same(removed, model.weights())
    mixed_(model, base, 0.25)
    assert share(base, model) == pytest.approx(0.25, abs=1e-6)
    for name, value in model.weights().items():
        assert name == NAME or torch.equal(value, base[name])
    mixed_(model, base, 0.0)
    assert same(base, model.weights())


@pytest.mark.parametrize(("field", "value"), [("tau", 0.0), ("tau", 1.1), ("points", 0)])
def test_settings_out_of_range(pair, field, value):
    base, model = pair
    with pytest.raises(
        ValueError, match=rf"tau must be above 0 and at most 1, points at least 1; got .*{field}={value}"
    ):
        calibrate(model, base, lambda _: 1.0, **{field: value})


def test_weights_of_another_model_are_refused(pair, toy_model):
    base, model = pair
    with pytest.raises(ValueError, match="the base's weights are of another model: 2 names differ"):
        mixed_(model, {**{n: v for n, v in base.items() if n != NAME}, "other": base[NAME]}, 0.5)
