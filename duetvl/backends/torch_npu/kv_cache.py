"""The key-value cache on torch: rows of all slots end to end, read by the framework's own attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from duetvl.core.composed import ComposedKVCache

Tensor = torch.Tensor


class TorchKVCache(ComposedKVCache):
    """See core/kv_cache.py."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, rows = q.shape[0], k.shape[0]
        visible = None
        if 1 < new < rows:
            visible = torch.ones(new, rows, dtype=torch.bool, device=q.device).tril(rows - new)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=new == rows and new > 1, enable_gqa=True
        )
        return out[0].transpose(0, 1)
