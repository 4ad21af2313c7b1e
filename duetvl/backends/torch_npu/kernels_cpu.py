"""CPU kernels of torch: its flash attention, one call for each run of equal spans."""

from __future__ import annotations

import torch

from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.core.composed import FusedAttention
from duetvl.core.spans import EqualSpans, Spans

Tensor = torch.Tensor


class CpuOps(FusedAttention, TorchOps):
    """See core/ops.py."""

    spans_a_call = 2**31  # a call of ours is one of the kernel's for every run

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        """The kernel aligns causal rows at the first key, which is our rule where there are as many keys as rows."""
        return not spans.causal or all(run.shift == 0 or run.length == 1 for run in spans.runs)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        for run in spans.runs:
            o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _queries(q, run), *(_for_heads(_keys(x, run), q.shape[1]) for x in (k, v)), 0.0, _causal(run, spans)
            )
            _queries(out, run).copy_(o)
            _lse(lse, run).copy_(m)
        return out, lse

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for run in spans.runs:
            dout_run, q_run, out_run = (_queries(x, run) for x in (dout, q, out))
            k_run, v_run = (_for_heads(_keys(x, run), q.shape[1]) for x in (k, v))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout_run, q_run, k_run, v_run, out_run, _lse(lse, run).contiguous(), 0.0, _causal(run, spans)
            )
            _queries(dq, run).copy_(found[0])
            for whole, part in ((dk, found[1]), (dv, found[2])):
                _keys(whole, run).copy_(_by_group(part, k.shape[1]))
        return dq, dk, dv


def _causal(run: EqualSpans, spans: Spans) -> bool:
    return spans.causal and run.length > 1  # the one row of a span sees all of its keys


def _queries(x: Tensor, run: EqualSpans) -> Tensor:
    """The query rows of a run as a view (count, H, length, K)."""
    return _spread(x[run.start : run.stop], run.count)


def _keys(x: Tensor, run: EqualSpans) -> Tensor:
    """The key rows of a run as a view (count, G, keys, K)."""
    return _spread(x[run.key_start : run.key_stop], run.count)


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows.unflatten(0, (count, -1)).transpose(1, 2)


def _lse(lse: Tensor, run: EqualSpans) -> Tensor:
    """The columns of a run of (H, T) as a view (count, H, length)."""
    return lse[:, run.start : run.stop].unflatten(1, (run.count, run.length)).transpose(0, 1)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """x (count, G, keys, K) with each group repeated for its heads.

    The kernel has groups of its own, but in torch 2.6 it reads beyond them, and in bfloat16 it adds up the heads of a
    group with three times the error.
    """
    times = heads // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """x (count, H, keys, K) with the heads of each group added."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)
