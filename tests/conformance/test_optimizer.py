"""AdamW against torch's in float64, and the gradient norm."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from duetvl.core.backend import Backend
from duetvl.core.boxes import Box, LocalPart, Slices
from duetvl.core.optimizer import AdamWState, ParameterGroup
from duetvl.core.params import Parameter

from .cases import normal
from .reference import element_bits, rounded

torch = pytest.importorskip("torch")

SHAPES = {"matrix": (5, 7), "vector": (9,), "number": (), "one": (1,), "empty": (0, 3)}
STEPS, LR, BETAS, GRAD_SCALE = 20, 1e-2, (0.9, 0.95), 0.37


def gradient(name: str, step: int) -> np.ndarray | None:
    """Of sizes that differ by a thousand; one parameter goes without in every third step."""
    if name == "vector" and step % 3 == 1:
        return None
    return (normal(*SHAPES[name], seed=100 + step) * 10.0 ** -(step % 4)).astype(np.float32)


def initial(dtype: str) -> dict[str, np.ndarray]:
    return {name: rounded(normal(*shape), dtype) for name, shape in SHAPES.items()}


def ours(be: Backend, stored: str, eps: float, **options: Any) -> tuple[dict[str, Parameter], AdamWState]:
    parameters = {name: Parameter(name, be.ops.from_numpy(w, stored)) for name, w in initial(stored).items()}
    groups = [
        ParameterGroup([parameters["matrix"], parameters["number"]], weight_decay=0.1),
        ParameterGroup([parameters["vector"], parameters["one"], parameters["empty"]], lr_scale=0.5),
    ]
    state = be.optimizer.create(groups, **options)
    for step in range(STEPS):
        for name, p in parameters.items():
            d = gradient(name, step)
            p.main_grad = None if d is None else be.ops.from_numpy(d)
        be.optimizer.step(state, groups, lr=LR, betas=BETAS, eps=eps, grad_scale=GRAD_SCALE)
    return parameters, state


def torchs(dtype: str, eps: float) -> tuple[dict[str, torch.Tensor], torch.optim.AdamW]:
    weights = {name: torch.tensor(w, requires_grad=True) for name, w in initial(dtype).items()}
    groups = [
        {"params": [weights["matrix"], weights["number"]], "weight_decay": 0.1},
        {"params": [weights["vector"], weights["one"], weights["empty"]], "weight_decay": 0.0, "lr": LR / 2},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=eps)
    for step in range(STEPS):
        for name, w in weights.items():
            d = gradient(name, step)
            w.grad = None if d is None else torch.tensor(d).double() * GRAD_SCALE
        adamw.step()
    return weights, adamw


def assert_near(found: np.ndarray, exact: torch.Tensor) -> None:
    """One part in a million of the largest: float32 roundings of 20 updates."""
    expected = exact.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(np.abs(expected).max(initial=0.0)))


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_twenty_steps_equal_torch(be: Backend, dtype: str, eps: float) -> None:
    """Groups, lr_scale, weight decay, grad_scale, skipped gradients; half precision through its float32 master."""
    parameters, state = ours(be, dtype, eps)
    weights, adamw = torchs(dtype, eps)
    half = dtype != "float32"
    assert set(state.master) == (set(SHAPES) if half else set())
    for name, p in parameters.items():
        exact = adamw.state[weights[name]]
        master = state.master[name] if half else p.tensor
        assert_near(be.to_numpy(master), weights[name])
        assert_near(be.to_numpy(state.exp_avg[name]), exact["exp_avg"])
        assert_near(be.to_numpy(state.exp_avg_sq[name]), exact["exp_avg_sq"])
        assert state.step[name] == int(exact["step"])
        assert be.ops.dtype_of(p.tensor) == dtype
        np.testing.assert_array_equal(be.to_numpy(p.tensor), rounded(be.to_numpy(master), dtype))
        assert p.main_grad is None
    assert state.step == {"matrix": 20, "number": 20, "vector": 13, "one": 20, "empty": 20}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_state_gives_the_same_numbers(be: Backend, dtype: str) -> None:
    parameters, state = ours(be, dtype, 1e-8)
    others, other = ours(be, dtype, 1e-8, offload=True)
    assert other.offload
    for name in SHAPES:
        np.testing.assert_array_equal(be.to_numpy(parameters[name].tensor), be.to_numpy(others[name].tensor))
        for kind, slot in state.slots().items():
            if name in slot:
                np.testing.assert_array_equal(be.to_numpy(slot[name]), be.to_numpy(other.slots()[kind][name]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_in_bfloat16(be: Backend, dtype: str) -> None:
    """Near the exact ones, twice alike, and stored so."""
    parameters, state = ours(be, dtype, 1e-8, dtype="bfloat16")
    again, _ = ours(be, dtype, 1e-8, dtype="bfloat16")
    weights, adamw = torchs(dtype, 1e-8)
    for name, p in parameters.items():
        assert be.ops.dtype_of(state.exp_avg[name]) == be.ops.dtype_of(state.exp_avg_sq[name]) == "bfloat16"
        np.testing.assert_array_equal(be.to_numpy(p.tensor), be.to_numpy(again[name].tensor))
        master = state.master[name] if dtype != "float32" else p.tensor
        expected = weights[name].detach().numpy()
        np.testing.assert_allclose(be.to_numpy(master), expected, rtol=0, atol=0.02)  # of 20 updates of at most 0.01
        exact = adamw.state[weights[name]]["exp_avg_sq"].numpy()
        np.testing.assert_allclose(be.to_numpy(state.exp_avg_sq[name]), exact, rtol=0.1, atol=1e-7)


def test_the_second_moment_falls_in_bfloat16(be: Backend) -> None:
    """At beta2 0.999 each step takes a thousandth away, which rounding to the nearest would give back."""
    p = Parameter("w", be.ops.from_numpy(np.zeros(2000, np.float32)))
    groups = [ParameterGroup([p])]
    state = be.optimizer.create(groups, dtype="bfloat16")
    for size in [1.0] + [0.0] * 400:
        p.main_grad = be.ops.from_numpy(np.full(2000, size, np.float32))
        be.optimizer.step(state, groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, grad_scale=1.0)
    found = np.asarray(be.to_numpy(state.exp_avg_sq["w"]), np.float64)
    assert found.mean() == pytest.approx(0.001 * 0.999**400, rel=0.01)
    assert len(np.unique(found)) > 2


def second_moments(be: Backend, shape: tuple[int, ...], part: tuple[Box, ...] = ()) -> np.ndarray:
    """Of a parameter after two steps in bfloat16, or of the rows and columns `part` of it, as the bits of float32."""
    gradients = [np.abs(normal(*shape, seed=step)).astype(np.float32) for step in range(2)]
    cut = [np.concatenate([g[box.slices] for box in part]) if part else g for g in gradients]
    place = LocalPart(shape, Slices(part)) if part else None
    p = Parameter("layers.0.w", be.ops.zeros(cut[0].shape), part=place)
    state = be.optimizer.create([ParameterGroup([p])], dtype="bfloat16")
    for g in cut:
        p.main_grad = be.ops.from_numpy(np.ascontiguousarray(g))
        be.optimizer.step(state, [ParameterGroup([p])], lr=0.0, betas=(0.0, 0.0), eps=1e-8, grad_scale=1.0)
    return be.to_numpy(state.exp_avg_sq["layers.0.w"]).view(np.uint32)


@pytest.mark.parametrize("shape", [(6, 5), (11,), (), (4, 3, 2)], ids=str)
def test_rounding_of_moments_is_the_hash_of_their_places(be: Backend, shape: tuple[int, ...]) -> None:
    """With betas of 0 the moment is the square of the last gradient, so the same on every backend."""
    square = np.square(np.abs(normal(*shape, seed=1)).astype(np.float32)).reshape(shape)
    key = (zlib.crc32(b"layers.0.w"), 2)
    columns = shape[-1] if len(shape) > 1 else 1
    noise = [element_bits(n // columns, n % columns, key) & 0xFFFF for n in range(square.size)]
    wanted = np.asarray(square).view(np.uint32) + np.array(noise, np.uint32).reshape(shape) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(second_moments(be, shape), wanted)


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((6, 5), (Box((2, 0), (3, 5)),)),
        ((6, 5), (Box((0, 2), (6, 3)),)),
        ((12, 5), (Box((1, 0), (2, 5)), Box((5, 0), (2, 5)), Box((9, 0), (2, 5)))),
        ((12,), (Box((1,), (2,)), Box((5,), (2,)), Box((9,), (2,)))),
        ((4, 3, 2), (Box((1, 0, 0), (2, 3, 2)),)),
    ],
)
def test_a_part_is_rounded_as_the_whole_is(be: Backend, shape: tuple[int, ...], part: tuple[Box, ...]) -> None:
    whole = second_moments(be, shape)
    np.testing.assert_array_equal(second_moments(be, shape, part), np.concatenate([whole[box.slices] for box in part]))


def test_a_step_keeps_the_storage(be: Backend) -> None:
    """Whoever holds a weight (a tied use, a view) sees the update."""
    p = Parameter("w", be.ops.from_numpy(normal(4, 3), "float32"))
    view, groups = p.tensor[1:2], [ParameterGroup([p])]
    state = be.optimizer.create(groups)
    p.main_grad = be.ops.from_numpy(np.ones((4, 3), np.float32))
    be.optimizer.step(state, groups, lr=0.5, betas=BETAS, eps=1e-8, grad_scale=1.0)
    np.testing.assert_allclose(be.to_numpy(view), normal(4, 3)[1:2] - 0.5, rtol=1e-6)


def test_state_has_names_and_zero_moments(be: Backend) -> None:
    p = Parameter("w", be.ops.from_numpy(normal(4, 3), "bfloat16"))
    state = be.optimizer.create([ParameterGroup([p])])
    assert {kind: list(slots) for kind, slots in state.slots().items()} == {
        "exp_avg": ["w"], "exp_avg_sq": ["w"], "master": ["w"],
    }  # fmt: skip
    assert state.step == {"w": 0}
    for moment in (state.exp_avg["w"], state.exp_avg_sq["w"]):
        assert be.ops.dtype_of(moment) == "float32"
        assert not be.to_numpy(moment).any()


def test_no_gradients_is_no_step(be: Backend) -> None:
    p = Parameter("w", be.ops.from_numpy(normal(4, 3), "float32"))
    state = be.optimizer.create([ParameterGroup([p])])
    be.optimizer.step(state, [ParameterGroup([p]), ParameterGroup([])], lr=1.0, betas=BETAS, eps=1e-8, grad_scale=1.0)
    assert state.step == {"w": 0}
    np.testing.assert_array_equal(be.to_numpy(p.tensor), normal(4, 3).astype(np.float32))


def norm_of(be: Backend, gradients: Sequence[np.ndarray | None]) -> float:
    parameters = [Parameter(str(i), None) for i in range(len(gradients))]
    for p, d in zip(parameters, gradients, strict=True):
        p.main_grad = None if d is None else be.ops.from_numpy(np.asarray(d, np.float32))
    return be.optimizer.grad_norm(parameters)


def test_grad_norm_is_accurate_over_ten_million_elements(be: Backend) -> None:
    large = np.random.default_rng(0).standard_normal(10_000_000, np.float32)
    small = normal(3, 4099).astype(np.float32)
    exact = np.sqrt(np.square(large, dtype=np.float64).sum() + np.square(small, dtype=np.float64).sum())
    assert norm_of(be, [large, None, small]) == pytest.approx(exact, rel=1e-6)


def test_grad_norm_of_little(be: Backend) -> None:
    assert norm_of(be, [np.float32(3.0), [4.0]]) == pytest.approx(5.0)
    assert norm_of(be, [np.zeros((0, 4)), [2.0]]) == pytest.approx(2.0)
    assert norm_of(be, [[0.0]]) == 0.0
    assert norm_of(be, [None]) == 0.0
    assert norm_of(be, []) == 0.0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_grad_norm_shows_what_is_not_finite(be: Backend, bad: float) -> None:
    found = norm_of(be, [[1.0, 2.0], np.array([1.0] * 5000 + [bad])])
    assert np.isnan(found) if np.isnan(bad) else found == np.inf


def test_parameters_that_have_taken_different_numbers_of_steps(be: Backend) -> None:
    """Moments are corrected by each parameter's own count, also where all are updated in one call."""
    start = np.linspace(-1, 1, 6, dtype=np.float32)

    def run(first_step_of: Sequence[int]) -> list[np.ndarray]:
        parameters = [Parameter(f"p{n}", be.ops.from_numpy(start.copy())) for n in range(2)]
        groups = [ParameterGroup(parameters)]
        state = be.optimizer.create(groups)
        for chosen in (first_step_of, (0, 1)):
            for n in chosen:
                parameters[n].main_grad = be.ops.from_numpy(start + np.float32(0.3))
            be.optimizer.step(state, groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, grad_scale=0.5)
        return [be.to_numpy(p.tensor) for p in parameters]

    late, (early, both) = run((0,)), run((0, 1))
    np.testing.assert_array_equal(late[0], early)
    np.testing.assert_array_equal(early, both)
    first = start - 0.1 * np.sign(start + np.float32(0.3))  # what a first step of AdamW is
    np.testing.assert_allclose(late[1], first, rtol=0, atol=1e-6)
