"""Which parameters a pattern names, and what is said of one that names none."""

from __future__ import annotations

import pytest

from duetvl.core.errors import ConfigError
from duetvl.core.patterns import matching, require_matching

PARTS = {"vision": ("visual.patch_embed.", "visual.blocks."), "language": ("model.", "lm_head.")}
PATHS = [
    "visual.patch_embed.proj.weight",
    *(f"visual.blocks.{n}.attn.{leaf}" for n in range(3) for leaf in ("qkv.weight", "qkv.bias", "proj.weight")),
    "visual.merger.ln_q.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{leaf}" for n in range(12) for leaf in ("input_layernorm.weight", "mlp.up_proj.weight")),
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("vision", 10),
        ("language", 26),
        ("model.layers.0-7", 16),
        ("model.layers.10-11.mlp", 2),
        ("model.layers.1", 2),  # and not 10, 11
        ("model.layers.7-2", 0),
        ("visual.blocks.*.attn.*", 9),
        ("visual.blocks.*.attn.qkv", 6),
        ("visual.blocks.?.attn.*.bias", 3),
        ("bias", 3),
        ("*norm*", 12),
        ("weight", 34),
        ("up_proj", 12),
        ("proj", 4),  # a whole step: not up_proj
        ("model", 25),
        ("*", 37),
        ("ayers", 0),
        ("model.layers.0-7.", 0),
        ("(lm_head", 0),
    ],
)
def test_matching(pattern, count):
    assert len(matching(pattern, PATHS, PARTS)) == count


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("visio", "did you mean vision"),
        ("model.layers.40-47", r"model\.layers\.\* has layers 0-11"),
        ("model.layer.0-7", r"did you mean model\.layers\.\*"),
        ("upproj", "did you mean up_proj"),
        ("visual.blocks.*.attention.*", r"did you mean visual\.blocks\.\*\.attn"),
        ("zzz", "there are language, lm_head, model, vision, visual$"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest(pattern, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        require_matching("model.freeze", ["vision", pattern], PATHS, PARTS)
    assert str(caught.value).startswith(f"model.freeze: {pattern!r} matches no parameter; ")
