"""AdamW by torch's own multi-tensor kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from duetvl.core.optimizer import AdamWState, Group
from duetvl.core.params import Parameter

ROW = 4096  # elements


class TorchOptimizer:
    """See core/optimizer.py."""

    def create(self, groups: Sequence[Group]) -> AdamWState:
        state = AdamWState()
        for p in (p for group in groups for p in group.parameters):
            state.step[p.path] = 0
            state.exp_avg[p.path] = torch.zeros_like(p.tensor, dtype=torch.float32)
            state.exp_avg_sq[p.path] = torch.zeros_like(p.tensor, dtype=torch.float32)
            if p.tensor.dtype != torch.float32:
                state.master[p.path] = p.tensor.detach().float()
        return state

    @torch.no_grad()
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
            chosen = [p for p in group.parameters if p.main_grad is not None]
            if not chosen:
                continue
            weights = [state.weight(p) for p in chosen]
            adamw(
                weights,
                [p.main_grad for p in chosen],
                [state.exp_avg[p.path] for p in chosen],
                [state.exp_avg_sq[p.path] for p in chosen],
                [],
                [torch.tensor(float(state.step[p.path]), device=p.tensor.device) for p in chosen],
                fused=True,
                # The kernel divides gradients by this scale on its way, which saves a pass over them.
                grad_scale=torch.tensor(1.0 / grad_scale, device=weights[0].device),
                found_inf=torch.zeros((), device=weights[0].device),
                amsgrad=False,
                maximize=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=lr * group.lr_scale,
                weight_decay=group.weight_decay,
                eps=eps,
            )
            for p in chosen:
                state.step[p.path] += 1
                if p.path in state.master:
                    p.tensor.copy_(state.master[p.path])
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


def _short_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All elements of `x`, as rows of ROW elements and one shorter row."""
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    return flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)
