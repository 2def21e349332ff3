"""Refits against least squares solved on the tokens themselves."""

import pytest
import torch
from torch import Tensor

from eigenslice.algebra.refit import RIDGES, InputsOutputs, NormalEquations, RidgeChoice

INPUTS, OUTPUTS = 9, 5


def sample(tokens: int, seed: int, inputs: int = INPUTS) -> Tensor:
    """Correlated inputs; the same correlation for every seed."""
    mixing = torch.randn(inputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(tokens, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise @ mixing


def weights(seed: int) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equations(inputs: Tensor, outputs: Tensor) -> NormalEquations:
    result = NormalEquations.zeros(inputs.shape[1], outputs.shape[1])
    result.add(inputs, outputs)
    return result


def lstsq(inputs: Tensor, outputs: Tensor, base: Tensor, ridge: float) -> Tensor:
    """min |Y - A W^T|^2 + r |W - base|^2 as one least-squares problem, r a share of the inputs' mean energy."""
    level = ridge * inputs.square().sum() / inputs.shape[1]
    rows = torch.cat([inputs, level.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([outputs, level.sqrt() * base.T])).solution.T


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.3, 10.0])
@pytest.mark.parametrize("tokens", [4, 200], ids=["fewer-tokens-than-inputs", "many-tokens"])
def test_the_fit_is_ridge_regression_towards_the_base(tokens: int, ridge: float) -> None:
    a, base = sample(tokens, 1), weights(2)
    y = a @ weights(3).T + noise(tokens, 4)
    fitted = equations(a, y).solve(base, ridge).weights
    torch.testing.assert_close(fitted, lstsq(a, y, base, ridge), rtol=1e-6, atol=1e-6)


def test_without_a_ridge_the_residual_is_orthogonal_to_the_inputs() -> None:
    a, y = sample(200, 1), noise(200, 4)
    fitted = equations(a, y).solve(weights(2), 1e-12).weights
    residual = y - a @ fitted.T
    assert (a.T @ residual).abs().max() < 1e-8 * (a.T @ y).abs().max()


def test_with_a_large_ridge_the_base_stays() -> None:
    a, base = sample(200, 1), weights(2)
    torch.testing.assert_close(equations(a, noise(200, 4)).solve(base, 1e9).weights, base, rtol=1e-6, atol=1e-6)


def test_what_the_base_explains_changes_nothing() -> None:
    a, base = sample(200, 1), weights(2)
    torch.testing.assert_close(equations(a, a @ base.T).solve(base, 1e-3).weights, base)


def test_inputs_without_energy_keep_their_base() -> None:
    a, base = sample(200, 1), weights(2)
    y = noise(200, 4)
    a[:, 3:] = 0
    fitted = equations(a, y).solve(base, 1e-3).weights
    torch.testing.assert_close(fitted[:, 3:], base[:, 3:])
    assert (fitted[:, :3] - base[:, :3]).abs().min() > 1e-3
    nothing = NormalEquations.zeros(INPUTS, OUTPUTS)
    torch.testing.assert_close(nothing.solve(base, 0.1).weights, base)


def test_parts_add_up_to_the_whole() -> None:
    a, y, base = sample(200, 1), noise(200, 4), weights(2)
    in_turn = NormalEquations.zeros(INPUTS, OUTPUTS)
    for start in range(0, 200, 70):
        in_turn.add(a[start : start + 70], y[start : start + 70])
    torch.testing.assert_close(in_turn.solve(base, 0.1).weights, lstsq(a, y, base, 0.1))


def test_many_float32_tokens_are_summed_in_float64() -> None:
    """A float32 sum of so many squares would stop growing."""
    parts = 3000
    found = NormalEquations.zeros(2, 1)
    for _ in range(parts):
        found.add(torch.full((64, 2), 1.1), torch.full((64, 1), 0.7))
    assert found.gram.dtype == found.cross.dtype == torch.float64
    assert float(found.gram[0, 1]) == pytest.approx(parts * 64 * 1.21, rel=1e-6)
    assert float(found.cross[0, 0]) == pytest.approx(parts * 64 * 0.77, rel=1e-6)


def split(tokens: int, signal: float, seed: int) -> tuple[NormalEquations, list[InputsOutputs]]:
    """Few tokens to fit on and others to hold out: outputs of noise, and of signal times true weights."""
    a, held = sample(tokens, seed), sample(400, seed + 1)
    y, held_y = (signal * x @ weights(3).T + noise(len(x), seed + 2 + len(x)) for x in (a, held))
    return equations(a, y), list(zip(held.split(150), held_y.split(150), strict=True))


ZERO = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)


def test_noise_gets_the_largest_ridge() -> None:
    assert RidgeChoice().choose(*split(12, 0.0, 1), ZERO) == max(RIDGES)


def test_what_the_inputs_explain_gets_the_smallest_ridge() -> None:
    assert RidgeChoice().choose(*split(200, 1e3, 1), ZERO) == min(RIDGES)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.3, 1.0, 3.0])
def test_the_chosen_ridge_errs_least_on_what_was_held_out(signal: float) -> None:
    a, held = sample(12, 1), sample(400, 2)
    truth, base = weights(3), weights(5)
    y, held_y = a @ (base + signal * truth).T + noise(12, 6), held @ (base + signal * truth).T + noise(400, 7)

    def error(ridge: float) -> float:
        return float((held_y - held @ lstsq(a, y, base, ridge).T).square().sum())

    chosen = RidgeChoice().choose(equations(a, y), [(held, held_y)], base)
    assert chosen == min(RIDGES, key=error)


def test_the_choice_is_not_the_same_for_all_signals() -> None:
    """Else the test above would show nothing."""
    assert len({RidgeChoice().choose(*split(12, signal, 1), ZERO) for signal in (0.0, 0.1, 0.3, 1.0, 30.0)}) >= 3


def test_processes_add_up_what_they_have_measured() -> None:
    """Two that hold half of the held-out tokens each choose as one that holds all."""
    fitted, held = split(12, 0.3, 1)
    parts: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        parts.append(sums)
        return torch.stack(parts).sum(0)

    together, alone = RidgeChoice(), RidgeChoice()
    alone.choose(fitted, held, ZERO)
    RidgeChoice().choose(fitted, held[:1], ZERO, collect)
    together.choose(fitted, held[1:], ZERO, collect)
    assert together.errors == pytest.approx(alone.errors, rel=1e-5)


def test_older_fits_fade() -> None:
    """One fit of another kind doesn't turn the choice; several do, and at last it is as if only they had been."""
    noisy, clear = split(12, 0.0, 1), split(200, 1e3, 1)
    choice = RidgeChoice()
    for _ in range(5):
        assert choice.choose(*noisy, ZERO) == max(RIDGES)
    assert choice.choose(*clear, ZERO) == max(RIDGES)
    later = [choice.choose(*clear, ZERO) for _ in range(80)]
    assert later[-1] == min(RIDGES)
    steady = {ridge: fit_error(clear, ridge) / (1 - choice.fading) for ridge in RIDGES}
    assert choice.errors == pytest.approx(steady, rel=1e-3, abs=1e-5)


def fit_error(pair: tuple[NormalEquations, list[InputsOutputs]], ridge: float) -> float:
    """Error on what was held out as a share of that before the fit."""
    fitted, held = pair
    weight = NormalEquations(fitted.gram.clone(), fitted.cross.clone()).solve(ZERO, ridge).weights
    error = sum(float((y - a @ weight.T).square().sum()) for a, y in held)
    return error / sum(float(y.square().sum()) for _, y in held)


def test_rounding_errors_of_a_base_that_is_right_already_do_not_choose() -> None:
    """At full width nothing is to be fitted at the first sites: float32 sums leave errors of any size and sign."""
    clear = split(200, 1e3, 1)
    for seed in range(5):
        choice, base = RidgeChoice(), weights(2)
        fitted, held = (sample(300, seed + part).float() for part in (20, 40))
        choice.choose(equations(fitted, fitted @ base.T.float()), [(held, held @ base.T.float())], base)
        assert choice.choose(*clear, ZERO) == min(RIDGES)
