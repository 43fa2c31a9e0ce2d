"""Thresholds and controllers: numbers alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adn
from adn.routing.controller import BudgetController, RollingShare
from adn.routing.policy import ThresholdPolicy

WATT = 20.85  # of the reference's energies
SCORES = [0.3, -0.1, 0.7, 0.2, 0.5]


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_are_the_references(golden) -> None:
    """In its scores, 1 - ours, a threshold is the share's percentile, and images below it take the deep route."""
    manifest, arrays = golden("dynamicdet_thresholds")
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    setting, = manifest["configs"]
    hard = 1 - arrays["scores"]
    for i in range(1, 10):
        policy = ThresholdPolicy.from_share(hard, i / 10)
        assert 1 - policy.tau == pytest.approx(arrays["thresholds"][i], abs=1e-12)
        assert policy.share == arrays["second_fraction"][i]
    for target, threshold, share, cost in zip(setting["targets"], *(arrays[name] for name in (
            "latency_thresholds", "latency_second_fraction", "expected_latency")), strict=True):
        c1, c2 = setting["lat1"], setting["lat2"]
        policy = ThresholdPolicy.from_budget(hard, c1, c2, target)
        if c1 < target < c2:
            assert 1 - policy.tau == pytest.approx(threshold, abs=1e-12)
            assert policy.share == share
            assert policy.cost() == pytest.approx(cost, abs=1e-12)
        else:  # all of them; by its percentile the reference leaves the hardest out
            assert policy.tau == (math.inf if target <= c1 else -math.inf)
            assert policy.share == (0 if target <= c1 else 1)
        assert bool(policy.note) == (not c1 <= target <= c2)


def test_rule() -> None:
    policy = ThresholdPolicy.from_share(SCORES, 0.4)
    assert policy.tau == np.quantile(SCORES, 0.6)
    assert [policy.deep(score) for score in SCORES] == [False, False, True, False, True]
    assert not ThresholdPolicy(0.5).deep(0.5)
    assert ThresholdPolicy.from_share([1.0, 1.0], 1).deep(-1e30)
    assert not ThresholdPolicy.from_share([1.0, 1.0], 0).deep(1e30)
    assert "is below what the shallow route costs (2): every image" in ThresholdPolicy.from_budget(SCORES, 2, 3, 1).note
    assert "is above what the deep route costs (3): every image" in ThresholdPolicy.from_budget(SCORES, 2, 3, 4).note


@pytest.mark.parametrize("tau", [0.25, math.inf, -math.inf])
def test_through_a_file(tau: float) -> None:
    policy = ThresholdPolicy(tau, 0.5, (1.0, 2.0), "why")
    assert ThresholdPolicy.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False))) == policy
    with pytest.raises(ValueError, match="is no policy as to_dict gives it"):
        ThresholdPolicy.from_dict({"tau": 1.0})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ThresholdPolicy.from_share([], 0.5), "no scores; collect"),
    (lambda: ThresholdPolicy.from_share([0.1, math.nan], 0.5), "1 of 2 scores are not finite"),
    (lambda: ThresholdPolicy.from_share([0.1, 0.1], 0.5), r"all 2 scores are 0\.1: no threshold parts them"),
    (lambda: ThresholdPolicy.from_share(SCORES, 1.1), r"share=1\.1; pass a number between 0 and 1"),
    (lambda: ThresholdPolicy.from_share(SCORES, math.nan), "share=nan"),
    (lambda: ThresholdPolicy.from_budget(SCORES, 3, 2, 2.5), "the shallow route must cost less than the deep one"),
    (lambda: ThresholdPolicy.from_budget(SCORES, 1, 2, math.nan), "budget=nan; pass a mean cost, 1 to 2"),
    (lambda: ThresholdPolicy(math.nan), "tau is not a number"),
    (lambda: ThresholdPolicy(0.0, share=0.5).cost(), "what the routes cost has not been measured"),
    (lambda: ThresholdPolicy(0.0, costs=(2.0, 1.0)), "costs 2.0 and 1.0"),
])
def test_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------- controllers


def trace(golden) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    manifest, arrays = golden("dynamicrouting_controller")
    return manifest, {name: np.asarray(value) for name, value in arrays.items()}


@pytest.mark.parametrize("run", range(6))
def test_controller_is_the_references(run: int, golden) -> None:
    manifest, arrays = trace(golden)
    setting = manifest["configs"][run]
    label, energy = setting["label"], WATT if setting["mode"] == "energy" else 1.0
    costs = [np.median(arrays[f"warm_lat_{path}"][15:]) * energy for path in ("base", "super")]
    controller = BudgetController(
        *costs, arrays["warm_ahat"], setting["kp"], setting["ki"], setting["beta"], jump=1.0,
        feedforward=setting["mode"] != "latency", unit="fps" if setting["mode"] == "fps" else "cost")
    low, high, middle = arrays[f"{label}.scalars"][2:5]
    assert (controller.low, controller.high, controller.tau0) == (low, high, middle)
    deep = False
    for t in range(len(arrays["first"])):
        deep = deep and not arrays["first"][t]
        assert deep == bool(arrays[f"{label}.is_super"][t])
        path = "super" if deep else "base"
        score = arrays[f"ahat_{path}"][t]
        tau = controller.update(arrays[f"{label}.target"][t], arrays[f"lat_{path}"][t] * energy, score)
        found = [tau, controller.integral, controller.mean, controller.tau_ff(controller.target)]
        wanted = [arrays[f"{label}.{name}"][t] for name in ("tau", "integral", "ema", "tau_ff")]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
        deep = controller.deep(score)


@pytest.mark.parametrize(("label", "share"), [("rate30", 0.3), ("rate70", 0.7)])
def test_shares_are_the_references(label: str, share: float, golden) -> None:
    """Routes that cost 0 and 1, without a limit of the integral. There the score decides over the frame itself."""
    _, arrays = trace(golden)
    controller = BudgetController(0, 1, [0.0], 2 / 4, 0.2 / 4, 0.9, feedforward=False, rails=(-2, 2), start=0.5,
                                  anti_windup=False)
    deep = False
    for t in range(len(arrays["first"])):
        score = arrays["ahat_super" if deep else "ahat_base"][t]
        deep = t > 0 and controller.deep(score)
        assert deep == bool(arrays[f"{label}.is_super"][t])
        assert controller.update(share, float(deep), score) == pytest.approx(arrays[f"{label}.tau"][t], abs=1e-9)


@pytest.mark.parametrize("label", ["sim_pi", "sim_ff"])
def test_earlier_forms_are_the_references(label: str, golden) -> None:
    """Corrections that add up, and the quantile of the last scores alone."""
    _, arrays = trace(golden)
    shallow, full, router, rails = 13.35, 20.87, 0.33, (-0.15, 0.60)
    if label == "sim_ff":
        controller = RollingShare(shallow, full, tau=0.15)
    else:
        scale = (full - shallow) / (rails[1] - rails[0])
        controller = BudgetController(
            shallow, full, [0.0], 0.02 * scale, 0.004 * scale, 0.85, feedforward=False, rails=rails,
            start=(shallow + full) / 2, incremental=True, anti_windup=False)
        controller.tau = 0.15
    deep = False
    for t in range(len(arrays["first"])):
        score, first = 4 * arrays["ahat_super" if deep else "ahat_base"][t], bool(arrays["first"][t])
        target = arrays["sim.target"][t]
        if label == "sim_ff" and not first:
            controller.update(target, 0.0, score)
        assert controller.tau == pytest.approx(arrays[f"{label}.tau"][t], abs=1e-9)
        deep = controller.deep(score) and not first
        assert deep == bool(arrays[f"{label}.is_super"][t])
        if label == "sim_pi":
            controller.update(target, (full if deep else shallow) + router, score)


def test_errors_in_images_per_second() -> None:
    """The form of a demonstration video, written out: gains per span of rates, the integral forgotten at jumps of
    either direction. It holds what is asked for."""
    rng = np.random.default_rng(2)
    scores, (c1, c2), (kp, ki, beta, jump) = rng.normal(size=100), (10.0, 20.0), (1.0, 0.1, 0.85, 1.0)
    controller = BudgetController(c1, c2, scores, kp, ki, beta, jump=jump, unit="rate")
    low, high = scores.min() - 0.03, scores.max() + 0.03
    gain = (high - low) / (1000 / c1 - 1000 / c2)
    integral, mean, before, deep, rates = 0.0, None, None, False, []
    for t, target in enumerate(np.repeat([60.0, 90.0, 70.0], 300)):
        cost, score = (c2 if deep else c1) * rng.normal(1, 0.02), rng.normal()
        mean = beta * (1000 / target if mean is None else mean) + (1 - beta) * cost
        if t and abs(target - before) > jump:
            integral = 0.0
        error = 1000 / mean - target
        integral += error
        share = np.clip((1000 / target - c1) / (c2 - c1), 0, 1)
        wanted = np.clip(np.quantile(scores, 1 - share), low, high) - kp * gain * error - ki * gain * integral
        tau = np.clip(wanted, low, high)
        integral += (wanted - tau) / (ki * gain)
        assert controller.update(target, cost, score) == pytest.approx(tau, abs=1e-9)
        before, deep = target, controller.deep(score)
        rates.append(cost)
    for start, target in ((100, 60), (400, 90), (700, 70)):
        assert 1000 / np.mean(rates[start : start + 200]) == pytest.approx(target, rel=0.05)
    with pytest.raises(ValueError, match='unit="rate" with a route that costs nothing'):
        BudgetController(0, 1, scores, kp, ki, beta, unit="rate")


def stream(controller: BudgetController, targets: np.ndarray, disturbed: slice) -> np.ndarray:
    """What images cost, of routes of 10 and 20 that are noisy, and cost twice as much for a while."""
    rng = np.random.default_rng(0)
    costs, deep = np.zeros(len(targets)), False
    factor = np.ones(len(targets))
    factor[disturbed] = 2
    for t, target in enumerate(targets):
        costs[t] = (20 if deep else 10) * factor[t] * rng.normal(1, 0.02)
        score = rng.normal()
        controller.update(target, costs[t], score)
        deep = controller.deep(score)
    return costs


def test_holds_a_target_under_load() -> None:
    """A target that changes, and costs that double for 200 images: outside of transitions the mean is within 5 %."""
    scores = np.random.default_rng(1).normal(size=200)
    controller = BudgetController(10, 20, scores, kp=1.0, ki=0.05, beta=0.9)
    targets = np.repeat([14.0, 18.0, 22.0, 15.0], 400)
    costs = stream(controller, targets, slice(900, 1100))
    for start, end in ((100, 400), (500, 800), (1000, 1100), (1300, 1600)):
        assert costs[start:end].mean() == pytest.approx(targets[start], rel=0.05), (start, end)


@pytest.mark.parametrize(("target", "route"), [(5.0, False), (40.0, True)])
def test_no_wind_up_at_the_rails(target: float, route: bool) -> None:
    """After a thousand images of a target that no route meets, it takes few to follow one that can be met."""
    scores = np.random.default_rng(1).normal(size=200)
    controller = BudgetController(10, 20, scores, kp=1.0, ki=0.05, beta=0.9)
    targets = np.repeat([target, 15.0], [1000, 300])
    costs = stream(controller, targets, slice(0, 0))
    assert np.mean(costs[100:1000]) == pytest.approx(20 if route else 10, rel=0.02)
    assert np.mean(costs[1060:]) == pytest.approx(15, rel=0.05)


def test_state() -> None:
    a, b = (BudgetController(1, 2, SCORES, 1.0, 0.1, 0.5) for _ in range(2))
    for score in SCORES:
        a.update(1.5, 1.0, score)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert a.update(1.4, 2.0, 0.1) == b.update(1.4, 2.0, 0.1)
    a.reset()
    assert a.state_dict() == BudgetController(1, 2, SCORES, 1.0, 0.1, 0.5).state_dict()
    a.reset(target=1.7)
    assert a.mean == 1.7
    with pytest.raises(ValueError, match="a state of tau; a controller's has tau, integral, mean, target"):
        a.load_state_dict({"tau": 1.0})


@pytest.mark.parametrize("bad", [
    (math.nan, 1.0, 0.0), (1.5, math.nan, 0.0), (1.5, 1.0, math.inf), (1.5, 1.0, math.nan)])
def test_what_is_not_finite_changes_nothing(bad: tuple[float, float, float]) -> None:
    controller = BudgetController(1, 2, SCORES, 1.0, 0.1, 0.5)
    controller.update(1.5, 1.0, 0.3)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="the controller stays as it was"):
        controller.update(*bad)
    assert controller.state_dict() == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"c1": 2.0}, "the shallow route must cost less"),
    ({"unit": "hours"}, "unit='hours'; pass one of 'cost', 'fps'"),
    ({"beta": 1.0}, r"beta=1\.0; pass gains of at least 0"),
    ({"jump": 0.0}, r"jump=0\.0"),
    ({"rails": (1.0, 0.0)}, r"rails 1\.0 and 0\.0; the first must be the lower one"),
    ({"scores": []}, "no scores"),
])
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    settings = {"c1": 1.0, "c2": 2.0, "scores": SCORES, "kp": 1.0, "ki": 0.1, "beta": 0.5, **changes}
    with pytest.raises(ValueError, match=message):
        BudgetController(**settings)
    with pytest.raises(ValueError, match=r"target=0; pass images per second, above 0"):
        BudgetController(1, 2, SCORES, 1.0, 0.1, 0.5, unit="fps").update(0, 1.0, 0.3)


def test_without_torch() -> None:
    """Where a net is served by something else, the two files do by themselves."""
    folder = Path(adn.__file__).parent / "routing"
    code = f"""
import importlib.util, sys, types
sys.modules["torch"] = None
sys.modules["routing"] = types.ModuleType("routing")
sys.modules["routing"].__path__ = [{str(folder)!r}]
from routing.controller import BudgetController
from routing.policy import ThresholdPolicy
controller = BudgetController(1, 2, [0.1, 0.2, 0.3], 1.0, 0.1, 0.9)
controller.update(1.5, 1.2, 0.2)
print(ThresholdPolicy.from_share([0.1, 0.2, 0.3], 0.5).tau)
"""
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == 0.2
