"""AdamW by MindSpore's Adam primitive, which updates weight and moments in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, ops

from duetvl.backends.mindspore.ops import MindSporeOps
from duetvl.core.optimizer import AdamWState, Group
from duetvl.core.params import Parameter

_adam = ops.Adam()


class MindSporeOptimizer:
    """See core/optimizer.py."""

    def __init__(self, own_ops: MindSporeOps):
        self.ops = own_ops

    def create(self, groups: Sequence[Group]) -> AdamWState:
        state = AdamWState()
        for p in (p for group in groups for p in group.parameters):
            state.step[p.path] = 0
            state.exp_avg[p.path] = self.ops.zeros(p.shape)
            state.exp_avg_sq[p.path] = self.ops.zeros(p.shape)
            if p.tensor.dtype != ms.float32:
                state.master[p.path] = ops.cast(p.tensor, ms.float32)
        return state

    def step(
        self,
        state: AdamWState,
        groups: Sequence[Group],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        grad_scale: float,
    ) -> None:
        for group in groups:
            for p in (p for p in group.parameters if p.main_grad is not None):
                state.step[p.path] += 1
                self.update(
                    state.weight(p),
                    (state.exp_avg[p.path], state.exp_avg_sq[p.path]),
                    p.main_grad,
                    scale=grad_scale,
                    rate=lr * group.lr_scale,
                    decay=group.weight_decay,
                    betas=betas,
                    eps=eps,
                    step=state.step[p.path],
                )
                if p.path in state.master:
                    self.ops.assign(p.tensor, state.master[p.path])
                p.main_grad = None

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
