"""Names and defaults of MindSpeed-MM beside recipes' and config.json's: modules, sizes, algorithms, pixels, roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# --lora-target-modules -> the linear layers of each part; q, k, v and gate, up are fused there unless canonical_model.
LORA_TARGETS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "text_decoder": {
        "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "linear_proj": ("self_attn.o_proj",),
        "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "linear_fc2": ("mlp.down_proj",),
        "q_proj": ("self_attn.q_proj",), "k_proj": ("self_attn.k_proj",), "v_proj": ("self_attn.v_proj",),
        "gate_proj": ("mlp.gate_proj",), "up_proj": ("mlp.up_proj",),
    },
    "vision_encoder": {
        "linear_qkv": ("attn.qkv",),
        "linear_proj": ("attn.proj",),
        "linear_fc1": ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
        "linear_fc2": ("mlp.fc2", "mlp.down_proj"),
        "gate_proj": ("mlp.gate_proj",), "up_proj": ("mlp.up_proj",),
    },
    "vision_projector": {"linear_fc1": ("mlp.0",), "linear_fc2": ("mlp.2",)},
}  # fmt: skip
LORA_PREFIX: Final = {
    "text_decoder": "model.layers.*.", "vision_encoder": "visual.blocks.*.", "vision_projector": "visual.merger.",
}  # fmt: skip
PARTS: Final = {"text_decoder": "language", "vision_encoder": "vision", "vision_projector": "projector"}
APPLY_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "all": tuple(PARTS),
    "image_encoder": ("vision_encoder", "vision_projector"),
    "vision_encoder": ("vision_encoder",),
    "vision_projector": ("vision_projector",),
    "projector": ("vision_projector",),
    "text_decoder": ("text_decoder",),
}

# Key of model.json -> where the same number stands in a published config.json; "!" reverses a boolean.
SHAPES: Final[Mapping[str, str]] = {
    "image_encoder.vision_encoder.num_layers": "vision.depth",
    "image_encoder.vision_encoder.hidden_size": "vision.hidden_size",
    "image_encoder.vision_encoder.ffn_hidden_size": "vision.intermediate_size",
    "image_encoder.vision_encoder.intermediate_size": "vision.intermediate_size",
    "image_encoder.vision_encoder.num_attention_heads": "vision.num_heads",
    "image_encoder.vision_encoder.llm_hidden_size": "vision.out_hidden_size",
    "image_encoder.vision_encoder.patch_size": "vision.patch",
    "image_encoder.vision_encoder.spatial_merge_size": "vision.merge",
    "image_encoder.vision_encoder.temporal_patch_size": "vision.temporal",
    "image_encoder.vision_encoder.window_attn_size": "vision.window",
    "image_encoder.vision_encoder.tokens_per_second": "vision.tokens_per_second",
    "image_encoder.vision_encoder.fullatt_block_indexes": "vision.full_attention_layers",
    "image_encoder.vision_projector.input_size": "vision.hidden_size",
    "image_encoder.vision_projector.hidden_size": "vision.out_hidden_size",
    "text_decoder.num_layers": "text.num_layers",
    "text_decoder.hidden_size": "text.hidden_size",
    "text_decoder.ffn_hidden_size": "text.intermediate_size",
    "text_decoder.num_attention_heads": "text.num_heads",
    "text_decoder.num_query_groups": "text.num_kv_heads",
    "text_decoder.vocab_size": "text.vocab_size",
    "text_decoder.rope_theta": "text.rope_theta",
    "text_decoder.untie_embeddings_and_output_weights": "!tie_word_embeddings",
}
FAMILIES: Final = {"qwen2vl": "Qwen2-VL", "qwen2_5vl": "Qwen2.5-VL"}

CP_ALGORITHMS: Final = {"ulysses_cp_algo": "ulysses", "megatron_cp_algo": "ring", "hybrid_cp_algo": "hybrid",
                        "adaptive_cp_algo": "ring", "hybrid_adaptive_cp_algo": "hybrid"}  # fmt: skip

# Defaults of its data pipeline, which hold where data.json leaves a key out.
PIXEL_DEFAULTS: Final = {"image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32, "video_max_pixels": 256 * 256,
                         "video_min_pixels": 16 * 16, "video_fps": 2.0, "video_maxlen": 128}  # fmt: skip
SMALLEST_PICTURE: Final = 56 * 56  # below it the published processors enlarge, after MindSpeed-MM's own resize
USUAL_TAGS: Final = {
    "role_tag": ("role", "from"), "content_tag": ("content", "value"), "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"), "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call",), "system_tag": ("system",),
}  # fmt: skip
