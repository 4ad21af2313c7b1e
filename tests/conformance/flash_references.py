"""torch's variable-length flash attention on a CPU, under its own schema, and as strict as the kernel of a card is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from . import reference  # noqa: E402

Tensor = Any
CALLS: list[str] = []


@contextmanager
def flash_attention_on_cpu() -> Iterator[None]:
    """Meanwhile the two operators run on CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_attention_forward, "CPU")
    library.impl("_flash_attention_backward", flash_attention_backward, "CPU")
    yield
    del library


def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, longest: int, most_keys: int, dropout: float,
    causal: bool, debug: bool, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS.append("forward")
    if options.get("seqused_k") is not None:
        return cached_forward(q, k, v, rows, keys, longest, most_keys, dropout, causal, debug, **options)
    lengths, key_lengths = checked(q, k, v, rows, keys, longest, most_keys, dropout, options)
    assert not debug
    out, lse = reference.attention(q.double(), k.double(), v.double(), lengths, causal, key_lengths)
    return out.to(q.dtype), lse.float(), torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)


def cached_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, starts: Tensor, longest: int, most_keys: int, dropout: float,
    causal: bool, debug: bool, seqused_k: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Keys that begin anywhere, with lengths of their own."""
    assert causal and not debug and dropout == 0.0
    assert rows.dtype == starts.dtype == seqused_k.dtype == torch.int32
    assert len(rows) == len(starts) == len(seqused_k) + 1 and rows[-1] == q.shape[0]
    assert longest == rows.diff().max() and most_keys >= seqused_k.max()
    outs = []
    for n, used in enumerate(seqused_k.tolist()):
        at, held = slice(int(rows[n]), int(rows[n + 1])), slice(int(starts[n]), int(starts[n]) + used)
        assert held.stop <= len(k)
        outs.append(reference.attention_cached(*(x.double() for x in (q[at], k[held], v[held]))))
    unused = torch.zeros(0)
    return torch.cat(outs).to(q.dtype), unused.float(), torch.zeros(2, dtype=torch.uint64), unused, unused


def flash_attention_backward(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Tensor, keys: Tensor, longest: int,
    most_keys: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS.append("backward")
    lengths, key_lengths = checked(q, k, v, rows, keys, longest, most_keys, dropout, options)
    assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0]) and lse.isfinite().all()
    heads, times, scale = q.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q, d, out = (x.double() for x in (q, d, out))
    wide_k, wide_v = (x.double().repeat_interleave(times, 1) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, wide_k, wide_v))
    starts, key_starts = rows.tolist(), keys.tolist()
    for n, (length, count) in enumerate(zip(lengths, key_lengths, strict=True)):
        at, key_at = slice(starts[n], starts[n + 1]), slice(key_starts[n], key_starts[n + 1])
        seen = torch.ones(length, count).tril(count - length if causal else count)
        for h in range(heads):
            p = (q[at, h] @ wide_k[key_at, h].T * scale - lse[h, at, None].double()).exp() * seen
            delta = (d[at, h] * out[at, h]).sum(-1, keepdim=True)
            ds = p * (d[at, h] @ wide_v[key_at, h].T - delta) * scale
            dq[at, h], dk[key_at, h], dv[key_at, h] = ds @ wide_k[key_at, h], ds.T @ q[at, h], p.T @ d[at, h]
    grouped = (x.unflatten(1, (-1, times)).sum(2) for x in (dk, dv))
    return tuple(x.to(k.dtype) for x in (dq, *grouped))


def checked(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, longest: int, most_keys: int, dropout: float,
    options: dict[str, Any],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """The lengths of the spans; what the kernel would refuse, or answer otherwise than the seam does, fails here."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    assert rows.dtype == keys.dtype == torch.int32 and rows[0] == keys[0] == 0
    assert (rows[-1], keys[-1]) == (q.shape[0], k.shape[0]) and dropout == 0.0
    assert options.get("scale") in (None, q.shape[-1] ** -0.5)
    lengths, key_lengths = rows.diff().tolist(), keys.diff().tolist()
    assert (longest, most_keys) == (max(lengths), max(key_lengths))
    assert min(key_lengths) > 0, "rows without keys would have lse +inf"
    return lengths, key_lengths
