"""Which fused operators the installed torch_npu has, as their schemas say: its versions differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

TRAINED_SPANS: Final = ("atten_mask", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")
# What our code runs by fused operators: the operators, and those of their arguments that it names.
USED: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "attention": {
        "npu_fusion_attention": ("scale", *TRAINED_SPANS),
        "npu_fusion_attention_grad": ("softmax_max", "softmax_sum", "attention_in", "scale_value", *TRAINED_SPANS),
    },
    "rms_norm": {"npu_rms_norm": ("epsilon",), "npu_rms_norm_backward": ()},
    "rope": {"npu_rotary_mul": ()},
    "swiglu": {"npu_swiglu": (), "npu_swiglu_backward": ()},
    "attention to the cache": {
        "npu_fused_infer_attention_score": (
            "atten_mask", "sparse_mode", "input_layout", "block_table", "block_size", "actual_seq_lengths",
            "actual_seq_lengths_kv", "num_heads", "num_key_value_heads", "scale",
        ),
    },
    # Without `cache_mode` the operator cannot be told of our layout; it means another.
    "writing to the cache": {"npu_scatter_pa_kv_cache": ("cache_mode",)},
}  # fmt: skip


class NpuOperators:
    """The operators of one namespace of torch.ops, and what they lack of what we use.

    space: torch.ops.npu, or another with operators of these names. lacking: what of `USED` cannot run, with the reason;
    torch's own functions serve it, which a warning says once.
    """

    def __init__(self, space: Any):
        self.space = space
        self.lacking = {what: reason for what, operators in USED.items() if (reason := self._reason(operators))}
        if self.lacking:
            reasons = "; ".join(f"{what}: {reason}" for what, reason in self.lacking.items())
            warnings.warn(f"torch's own functions instead of fused operators for {reasons}", stacklevel=3)

    def arguments(self, operator: str) -> frozenset[str] | None:
        """The names of an operator's arguments, None where there is no such operator."""
        packet = getattr(self.space, operator, None)
        if packet is None or "default" not in packet.overloads():
            return None
        return frozenset(argument.name for argument in packet.default._schema.arguments)

    def knows(self, operator: str, argument: str) -> bool:
        """Whether the operator is there with that argument."""
        return argument in (self.arguments(operator) or ())

    def _reason(self, operators: Mapping[str, tuple[str, ...]]) -> str | None:
        for operator, named in operators.items():
            known = self.arguments(operator)
            if known is None:
                return f"torch_npu has no {operator}"
            if unknown := [name for name in named if name not in known]:
                return f"{operator} of this torch_npu has no {', '.join(unknown)}"
        return None
