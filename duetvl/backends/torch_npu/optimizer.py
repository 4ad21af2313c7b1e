"""AdamW by torch's own multi-tensor kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.adamw import adamw

from duetvl.backends.torch_npu.ops import require_whole
from duetvl.core.counter_hash import rounding_bits
from duetvl.core.optimizer import AdamWState, ParameterGroup
from duetvl.core.params import Parameter

ROW = 4096  # elements


class TorchOptimizer:
    """See core/optimizer.py."""

    def create(self, groups: Sequence[ParameterGroup], *, dtype: str = "float32", offload: bool = False) -> AdamWState:
        state = AdamWState(dtype=dtype, offload=offload)
        kind = getattr(torch, dtype)
        for p in (p for group in groups for p in group.parameters):
            require_whole(p.tensor)
            place = torch.device("cpu") if offload else p.tensor.device
            pinned = offload and p.tensor.device.type != "cpu"
            state.step[p.path] = 0
            for slot in (state.exp_avg, state.exp_avg_sq):
                slot[p.path] = torch.zeros(p.shape, dtype=kind, device=place, pin_memory=pinned)
            if p.tensor.dtype != torch.float32:
                master = torch.empty(p.shape, dtype=torch.float32, device=place, pin_memory=pinned)
                state.master[p.path] = master.copy_(p.tensor.detach())
        return state

    @torch.no_grad()
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
        at_once = state.dtype == "float32" and not state.offload
        for group in groups:
            chosen = [p for p in group.parameters if p.main_grad is not None]
            for together in [chosen] if at_once and chosen else [[p] for p in chosen]:
                held = [_Held.take(state, p) for p in together]
                device = together[0].tensor.device
                adamw(
                    [h.weight for h in held],
                    [p.main_grad for p in together],
                    [h.first for h in held],
                    [h.second for h in held],
                    [],
                    _steps([state.step[p.path] for p in together], device),
                    fused=True,
                    # The kernel divides gradients by this scale on its way, which saves a pass over them.
                    grad_scale=torch.full((), 1.0 / grad_scale, device=device),
                    found_inf=torch.zeros((), device=device),
                    amsgrad=False,
                    maximize=False,
                    beta1=betas[0],
                    beta2=betas[1],
                    lr=lr * group.lr_scale,
                    weight_decay=group.weight_decay,
                    eps=eps,
                )
                for h, p in zip(held, together, strict=True):
                    state.step[p.path] += 1
                    h.give_back(state, p)
                    p.main_grad = None

    def grad_norm(self, parameters: Sequence[Parameter]) -> float:
        gradients = [p.main_grad for p in parameters if p.main_grad is not None]
        if not gradients:
            return 0.0
        if gradients[0].device.type != "cpu":
            return float(torch.nn.utils.get_total_norm(gradients))
        # The CPU kernel adds all squares of a row one after the other: 4e-4 off at ten million. Rows are kept short.
        norms = [torch.linalg.vector_norm(rows, dim=-1) for g in gradients for rows in _short_rows(g)]
        return float(torch.linalg.vector_norm(torch.cat(norms).double()))


@dataclass(eq=False)
class _Held:
    """What an update works on: float32 tensors on the parameter's device, the state's own where they are that."""

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def take(cls, state: AdamWState, p: Parameter) -> _Held:
        kept = (state.weight(p), state.exp_avg[p.path], state.exp_avg_sq[p.path])
        return cls(*(x.to(p.tensor.device, torch.float32) for x in kept))

    def give_back(self, state: AdamWState, p: Parameter) -> None:
        second = self.second
        if state.dtype == "bfloat16":
            second = _rounded_at_random(second, p, state.step[p.path])
        kept = ((state.exp_avg[p.path], self.first), (state.exp_avg_sq[p.path], second), (state.weight(p), self.weight))
        for own, new in kept:
            if own is not new:
                own.copy_(new)
        if p.path in state.master:
            p.tensor.copy_(self.weight)


def _steps(counts: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """A float32 scalar for each parameter, in one tensor: a copy from the host for each of them would take longer."""
    most = max(counts)
    steps = torch.full((len(counts),), float(most), device=device)
    if min(counts) != most:
        steps.sub_(_moved(np.array([most - count for count in counts], np.float32), device))
    return list(steps.unbind())


def _rounded_at_random(x: torch.Tensor, p: Parameter, step: int) -> torch.Tensor:
    """float32 numbers that bfloat16 holds, one of the two neighbours of each, with the odds that keep the mean."""
    noise = rounding_bits(p.shape, p.path, step, p.part, place=lambda array: _moved(array, x.device))
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it still has to do."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _short_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All elements of `x`, as rows of ROW elements and one shorter row."""
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    return flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)
