"""CPU references of the npu operators under their true schemas, as strict as the documentation of torch_npu 2.13.

What an operator refuses here is what torch_npu/_op_plugin_docs.py says it does not take. The numbers are computed in
float64 and rounded once.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from .schemas import SCHEMAS, TORCH_NPU, schemas_of

torch = pytest.importorskip("torch")

Tensor = torch.Tensor
CALLS: Counter[str] = Counter()  # of each reference
FLOATING = (torch.float16, torch.bfloat16, torch.float32)


@cache
def registered(version: str) -> Any:
    """The namespace of operators with the schemas of a version of torch_npu, and references as their CPU kernels.

    It is torch.ops.npu for the version of TORCH_NPU. With DUETVL_REAL_TORCH_NPU set torch_npu itself registers it.
    """
    if os.environ.get("DUETVL_REAL_TORCH_NPU"):
        importlib.import_module("torch_npu")
    space = "npu" if version == TORCH_NPU else f"npu_{version.replace('.', '_')}"
    _LIBRARIES.append(library := torch.library.Library(space, "FRAGMENT"))
    operators = getattr(torch.ops, space)
    for name, schema in schemas_of(version).items():
        if not hasattr(operators, name):
            library.define(schema)
        library.impl(name, with_names(schema, globals()[name]), "CPU")
    return operators


_LIBRARIES: list[torch.library.Library] = []  # what they register ends with them


def with_names(schema: str, reference: Callable[[Any], Any]) -> Callable[..., Any]:
    """A kernel that hands `reference` all arguments by name: the dispatcher leaves out those at their default.

    Of an older version it gets the arguments that it lacks at their later default, and gives as much as was returned.
    """
    parsed = torch._C.parse_schema(f"npu::{schema}")
    latest = torch._C.parse_schema(f"npu::{SCHEMAS[parsed.name.removeprefix('npu::')]}")
    names = [a.name for a in parsed.arguments]
    defaults = {a.name: a.default_value for s in (latest, parsed) for a in s.arguments if a.has_default_value()}

    def kernel(*given: Any, **named: Any) -> Any:
        CALLS[reference.__name__] += 1
        results = reference(SimpleNamespace(**(defaults | dict(zip(names, given, strict=False)) | named)))
        return results[: len(parsed.returns)] if isinstance(results, tuple) else results

    return kernel


# -- attention of training -------------------------------------------------------------------------------------------


def npu_fusion_attention(a: Any) -> Any:
    out, top, total = torch.empty_like(a.query), *(torch.empty(*a.query.shape[:2], 8) for _ in range(2))
    for rows, keys in _checked_spans(a):
        scores, v = _scores(a, a.scale, rows, keys), _spread(a.value[keys], a.head_num)
        largest = scores.amax(-1, keepdim=True)
        p = (scores - largest).exp()
        out[rows] = (p @ v / p.sum(-1, keepdim=True)).transpose(0, 1).to(out.dtype)
        _store(top, largest, rows, a.softmax_layout)
        _store(total, p.sum(-1, keepdim=True), rows, a.softmax_layout)
    return out, top, total, torch.empty(0), 0, 0, 0


def npu_fusion_attention_grad(a: Any) -> Any:
    assert a.softmax_max.is_contiguous()
    assert a.softmax_sum.is_contiguous()
    assert a.softmax_max.shape == a.softmax_sum.shape == (*a.query.shape[:2], 8)
    assert a.softmax_max.dtype == a.softmax_sum.dtype == torch.float32
    assert a.dy.dtype == a.attention_in.dtype == a.query.dtype
    dq, dk, dv = (torch.empty_like(x) for x in (a.query, a.key, a.value))
    groups = a.key.shape[1]
    for rows, keys in _checked_spans(a):
        k, v = (_spread(x[keys], a.head_num) for x in (a.key, a.value))
        q, dy, out = (x[rows].double().transpose(0, 1) for x in (a.query, a.dy, a.attention_in))
        top, total = (_load(x, rows, a.softmax_layout) for x in (a.softmax_max, a.softmax_sum))
        p = (_scores(a, a.scale_value, rows, keys) - top).exp() / total
        ds = p * (dy @ v.mT - (dy * out).sum(-1, keepdim=True)) * a.scale_value
        dq[rows] = (ds @ k).transpose(0, 1).to(dq.dtype)
        dk[keys] = _gather(ds.mT @ q, groups).to(dk.dtype)
        dv[keys] = _gather(p.mT @ dy, groups).to(dv.dtype)
    return dq, dk, dv, None, torch.empty(0)


def _checked_spans(a: Any) -> list[tuple[slice, slice]]:
    assert a.input_layout == "TND"
    assert a.keep_prob == 1.0
    assert a.softmax_layout in ("", "TND")
    assert a.query.dtype == a.key.dtype == a.value.dtype
    assert a.query.dtype in FLOATING
    assert a.query.shape[1] == a.head_num
    assert a.head_num % a.key.shape[1] == 0
    assert a.key.shape == a.value.shape
    assert 1 <= a.query.shape[2] <= 768
    rows, keys = (_between(ends, x) for ends, x in ((a.actual_seq_qlen, a.query), (a.actual_seq_kvlen, a.key)))
    assert 1 <= len(rows) == len(keys) <= 1024
    if a.sparse_mode == 0:
        assert a.pre_tockens == a.next_tockens == 2147483647, "without a mask these may hide keys"
    if a.sparse_mode == 3:
        assert all(q.stop - q.start <= k.stop - k.start for q, k in zip(rows, keys, strict=True))
    _check_mask(a.atten_mask, a.sparse_mode)
    return list(zip(rows, keys, strict=True))


def _between(ends: Sequence[int], x: Tensor) -> list[slice]:
    """The rows of each span. None is empty: of the keys MindSpore's documentation says so."""
    assert ends[-1] == x.shape[0] <= 2**20
    spans = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    assert all(span.start < span.stop for span in spans), "ends of spans, without the leading zero"
    return spans


def _check_mask(mask: Tensor | None, mode: int) -> None:
    assert mode in (0, 2, 3)
    assert (mode == 0) == (mask is None)
    if mask is not None:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))


def _scores(a: Any, scale: float, rows: slice, keys: slice) -> Tensor:
    """Causal modes align at the first rows (2) or at the last (3)."""
    q, k = a.query[rows].double().transpose(0, 1), _spread(a.key[keys], a.head_num)
    shift = k.shape[1] - q.shape[1] if a.sparse_mode == 3 else 0
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + shift)
    return (q @ k.mT * scale).masked_fill(hidden if a.sparse_mode else hidden & False, float("-inf"))


def _spread(x: Tensor, heads: int) -> Tensor:
    """(L, G, K) -> (H, L, K) float64, each group repeated for its heads."""
    return x.double().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _gather(x: Tensor, groups: int) -> Tensor:
    """(H, L, K) -> (L, G, K), the heads of a group added."""
    return x.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)


def _store(whole: Tensor, part: Tensor, rows: slice, layout: str) -> None:
    """Write (H, L, 1) for a span. Unless the layout is TND, its storage is (H, L, 8), whatever the shape says."""
    wide = part.expand(-1, -1, 8).float()
    if layout == "TND":
        whole[rows] = wide.transpose(0, 1)
    else:
        whole.view(-1)[rows.start * whole[0].numel() : rows.stop * whole[0].numel()] = wide.reshape(-1)


def _load(whole: Tensor, rows: slice, layout: str) -> Tensor:
    """(H, L, 1) float64, the reverse of `_store`."""
    part = whole[rows].double()
    assert (part == part[:, :, :1]).all()
    by_head = part.transpose(0, 1) if layout == "TND" else part.reshape(part.shape[1], part.shape[0], 8)
    return by_head[:, :, :1]


# -- norm, rotation, gate --------------------------------------------------------------------------------------------


def npu_rms_norm(a: Any) -> Any:
    assert a.input.dtype == a.gamma.dtype
    assert a.input.dtype in FLOATING
    assert 2 <= a.input.ndim <= 8
    x = a.input.double()
    inverse = (x.pow(2).mean(-1, keepdim=True) + a.epsilon).rsqrt()
    return (x * inverse * a.gamma.double()).to(a.input.dtype), inverse.float()


def npu_rms_norm_backward(a: Any) -> Any:
    assert a.dy.dtype == a.input.dtype == a.gamma.dtype
    assert a.rstd.shape == (*a.input.shape[:-1], 1)
    unit, d = a.input.double() * a.rstd.double(), a.dy.double()
    g = d * a.gamma.double()
    dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * a.rstd.double()
    return dx.to(a.input.dtype), (d * unit).flatten(0, -2).sum(0).float()


def npu_rotary_mul(a: Any) -> Any:
    assert a.rotary_mode == "half"
    assert a.rotate is None
    assert a.input.ndim == a.r1.ndim == a.r2.ndim == 4
    assert a.input.dtype == a.r1.dtype == a.r2.dtype
    one, rows, heads, size = a.input.shape  # as BSND, with the rotation as 1S1D
    assert max(one, heads) < 1000
    assert size % 2 == 0
    assert size < 896
    assert a.r1.shape == a.r2.shape == (1, rows, 1, size)
    x, cos, sin = (t.double() for t in (a.input, a.r1, a.r2))
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(a.input.dtype)


def npu_swiglu(a: Any) -> Any:
    gate, up = a.input.double().chunk(2, a.dim)
    return (gate * gate.sigmoid() * up).to(a.input.dtype)


def npu_swiglu_backward(a: Any) -> Any:
    (gate, up), d = a.input.double().chunk(2, a.dim), a.grad_output.double()
    s = gate.sigmoid()
    return torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], a.dim).to(a.input.dtype)


# -- attention of inference ------------------------------------------------------------------------------------------


def npu_fused_infer_attention_score(a: Any) -> Any:
    """The layout TND over a paged cache, causal: the one way in which it is called."""
    assert a.input_layout == "TND"
    assert all(x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous() for x in (a.query, a.key, a.value))
    assert a.query.shape[1] == a.num_heads
    assert a.query.shape[2] in (64, 128)
    assert a.num_heads % a.num_key_value_heads == 0
    assert a.num_heads // a.num_key_value_heads <= 64
    assert a.sparse_mode == 3
    assert a.atten_mask.dtype == torch.int8
    assert torch.equal(a.atten_mask, torch.ones(2048, 2048, dtype=torch.int8).triu(1))
    rows = _between(a.actual_seq_lengths, a.query)
    out = torch.empty_like(a.query)
    for span, (k, v) in zip(rows, _pages(a, len(rows)), strict=True):
        assert span.stop - span.start <= len(k), "rows are in the cache already"
        out[span] = _lower_right(a.query[span], k, v, a.scale)
    return out, torch.zeros(1)


def _pages(a: Any, sequences: int) -> Iterator[Sequence[Tensor]]:
    """The rows (M, G, K) that each sequence has. Lengths are its own: of a paged cache they are not cumulative."""
    assert a.key.ndim == 3
    assert a.key.shape == a.value.shape == (a.key.shape[0], a.block_size, a.num_key_value_heads * a.query.shape[2])
    assert a.block_size % 128 == 0
    assert 128 <= a.block_size <= 512
    assert a.key.shape[2] <= 65535
    assert a.key.numel() < 2**31
    assert a.block_table.dtype == torch.int32
    assert len(a.block_table) == len(a.actual_seq_lengths_kv) == sequences
    for blocks, length in zip(a.block_table, a.actual_seq_lengths_kv, strict=True):
        assert len(blocks) * a.block_size >= length
        used = blocks[: -(-length // a.block_size)].long()
        assert ((used >= 0) & (used < len(a.key))).all()
        yield [x[used].reshape(-1, a.num_key_value_heads, a.query.shape[2])[:length] for x in (a.key, a.value)]


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = q.double().transpose(0, 1) @ _spread(k, q.shape[1]).mT * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (p @ _spread(v, q.shape[1])).transpose(0, 1).to(q.dtype)


def npu_scatter_pa_kv_cache(a: Any) -> None:
    assert a.cache_mode == "Norm", "PA_NZ, the default, is another layout"
    assert a.compress_lens is a.compress_seq_offsets is a.seq_lens is None
    assert a.slot_mapping.dtype == torch.int32
    assert a.slot_mapping.shape == a.key.shape[:1]
    assert len(a.slot_mapping.unique()) == len(a.slot_mapping)
    for rows, held in ((a.key, a.key_cache), (a.value, a.value_cache)):
        assert rows.is_contiguous()
        assert held.is_contiguous()
        assert rows.dtype == held.dtype
        assert held.ndim == 4
        assert rows.shape[1:] == held.shape[2:]
        held.view(-1, *held.shape[2:])[a.slot_mapping.long()] = rows
