"""Protocol of the optimizer: AdamW over groups of parameters, and the norm of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from duetvl.core.params import Parameter

Tensor = Any


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning-rate scale and a weight decay."""

    parameters: Sequence[Parameter]
    lr_scale: float = 1.0
    weight_decay: float = 0.0


@dataclass
class AdamWState:
    """All that AdamW remembers, by parameter path; it goes into a checkpoint as it is.

    `step` counts the updates of each parameter. exp_avg and exp_avg_sq are of `dtype`. `master` holds float32 weights
    of the parameters that are stored in bfloat16 or float16, and nothing for the others. With `offload` all of these
    are in the host's memory.
    """

    step: dict[str, int] = field(default_factory=dict)
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    master: dict[str, Tensor] = field(default_factory=dict)
    dtype: str = "float32"
    offload: bool = False

    def weight(self, parameter: Parameter) -> Any:
        """The float32 tensor that an update changes: the master copy where there is one."""
        master = self.master.get(parameter.path)
        return parameter.tensor if master is None else master

    def slots(self) -> Mapping[str, dict[str, Tensor]]:
        """The tensors by kind, as a checkpoint names them."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "master": self.master}


class Optimizer(Protocol):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), torch's formula."""

    def create(self, groups: Sequence[ParameterGroup], *, dtype: str = "float32", offload: bool = False) -> AdamWState:
        """Zero moments for every parameter, and a float32 master copy of each that is stored in half precision.

        dtype: of the moments, float32 or bfloat16. With `offload` the state is kept on the host. A parameter whose
        tensor is a slice or another view raises BackendError: updates write into whole tensors alone.
        """
        ...

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
        """Update every parameter that has a `main_grad`, using grad_scale * main_grad, and set `main_grad` to None.

        w <- w - lr * weight_decay * w; m, v <- moments; w <- w - lr * m_hat / (sqrt(v_hat) + eps), on the float32
        weights (the master copy where there is one, rounded to the parameter's dtype afterwards). A parameter
        without a gradient is left alone, its step count too.

        Moments in bfloat16 are computed in float32. The second one is rounded up or down at random, with odds that make
        its mean right (rounded to the nearest it would never fall at beta2 0.999): by bits, specified in
        counter_hash.py, of the parameter's path, its step count and each element's place in the whole tensor, of which
        `Parameter.part` may say that it is a part. Offloaded state is moved to the device and back one parameter at a
        time.
        """
        ...

    def grad_norm(self, parameters: Sequence[Parameter]) -> float:
        """Euclidean norm of all `main_grad`s together (unscaled); inf or nan where one of them is,
        and possibly inf where one is beyond 1e19, whose square float32 does not hold."""
        ...
