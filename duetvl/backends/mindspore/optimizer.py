"""AdamW by MindSpore's Adam primitive, which updates weight and moments in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from duetvl.backends.mindspore.ops import MindSporeOps
from duetvl.core.counter_hash import rounding_bits
from duetvl.core.optimizer import AdamWState, ParameterGroup
from duetvl.core.params import Parameter

_adam = ops.Adam()


class MindSporeOptimizer:
    """See core/optimizer.py."""

    def __init__(self, own_ops: MindSporeOps):
        self.ops = own_ops

    def create(self, groups: Sequence[ParameterGroup], *, dtype: str = "float32", offload: bool = False) -> AdamWState:
        state = AdamWState(dtype=dtype, offload=offload)
        place = self.to_host if offload else _here
        for p in (p for group in groups for p in group.parameters):
            self.ops.require_whole(p.tensor)
            state.step[p.path] = 0
            state.exp_avg[p.path] = place(self.ops.zeros(p.shape, dtype))
            state.exp_avg_sq[p.path] = place(self.ops.zeros(p.shape, dtype))
            if p.tensor.dtype != ms.float32:
                state.master[p.path] = place(ops.cast(p.tensor, ms.float32))
        return state

    def to_host(self, x: Tensor) -> Tensor:
        """`x` in the host's memory."""
        return x.move_to("CPU")

    def to_device(self, x: Tensor) -> Tensor:
        """`x` in the device's memory."""
        return x.move_to("Ascend")

    def step(
        self,
        state: AdamWState,
        groups: Sequence[ParameterGroup],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        grad_scale: float,
    ) -> None:
        for group in groups:
            for p in (p for p in group.parameters if p.main_grad is not None):
                state.step[p.path] += 1
                weight, *moments = kept = self._held(state, p)
                self.update(
                    weight,
                    (moments[0], moments[1]),
                    p.main_grad,
                    scale=grad_scale,
                    rate=lr * group.lr_scale,
                    decay=group.weight_decay,
                    betas=betas,
                    eps=eps,
                    step=state.step[p.path],
                )
                self._give_back(state, p, kept)
                p.main_grad = None

    def _held(self, state: AdamWState, p: Parameter) -> list[Tensor]:
        """Weight and moments as an update works on them: float32, on the device; the state's own where those are."""
        kept = [state.weight(p), state.exp_avg[p.path], state.exp_avg_sq[p.path]]
        if state.offload:
            kept = [x if x is p.tensor else self.to_device(x) for x in kept]
        return [x if x.dtype == ms.float32 else self.ops.cast(x, "float32") for x in kept]

    def _give_back(self, state: AdamWState, p: Parameter, held: Sequence[Tensor]) -> None:
        """Round what was updated to the state's dtype, and put it where the state is kept."""
        weight, first, second = held
        if state.dtype == "bfloat16":
            second = self._rounded_at_random(second, p, state.step[p.path])
        for slot, new in ((state.exp_avg, first), (state.exp_avg_sq, second)):
            if slot[p.path] is not new:
                narrow = self.ops.cast(new, state.dtype)
                slot[p.path] = self.to_host(narrow) if state.offload else narrow
        if p.path in state.master:
            self.ops.assign(p.tensor, weight)
            if state.master[p.path] is not weight:
                state.master[p.path] = self.to_host(weight)

    def _rounded_at_random(self, x: Tensor, p: Parameter, step: int) -> Tensor:
        """float32 numbers that bfloat16 holds, one of the two neighbours of each, with the odds that keep the mean.

        On the host: MindSpore has no view of a tensor's bits.
        """
        noise = rounding_bits(p.shape, p.path, step, p.part)
        bits = np.ascontiguousarray(x.asnumpy()).view(np.int32) + noise
        return self.ops.from_numpy((bits & -(1 << 16)).view(np.float32))

    def update(
        self, weight: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, *, scale: float, rate: float,
        decay: float, betas: tuple[float, float], eps: float, step: int,
    ) -> None:  # fmt: skip
        """One parameter's update, in place."""
        if decay:
            self.ops.assign(weight, weight * (1.0 - rate * decay))
        decay1, decay2 = (beta**step for beta in betas)
        # The primitive adds eps to sqrt(v), not to sqrt(v / (1 - beta2^t)): scale it to be the same number.
        own_eps = eps * math.sqrt(1.0 - decay2)
        numbers = (ms.Tensor(x, ms.float32) for x in (decay1, decay2, rate, *betas, own_eps))
        _adam(weight, *moments, *numbers, gradient * scale)

    def grad_norm(self, parameters: Sequence[Parameter]) -> float:
        # Without empty ones: MindSpore leaves the sum of no elements unwritten.
        gradients = (p.main_grad for p in parameters if p.main_grad is not None and 0 not in p.main_grad.shape)
        return math.sqrt(sum(float((g * g).sum().asnumpy()) for g in gradients))


def _here(x: Tensor) -> Tensor:
    return x
