"""Runs in the grammar of MindSpeed-MM's guides: data.json, model.json and a shell script, for any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from duetvl.models.qwen_vl.config import published_config


class Guide(NamedTuple):
    """What a guide's script sets."""

    name: str
    pp: int
    tp: int
    accumulate: int
    vision: list
    language: list
    devices: int = 8


GUIDES = {
    "qwen2_vl_2b": Guide("Qwen2-VL-2B", 1, 1, 24, [32], [28]),
    "qwen2_vl_7b": Guide("Qwen2-VL-7B", 4, 1, 96, [32, 0, 0, 0], [1, 10, 10, 7]),
    "qwen2_vl_72b": Guide("Qwen2-VL-72B", 8, 2, 96, [32, *[0] * 7], [5, *[11] * 6, 9], 16),
    "qwen2_5_vl_3b": Guide("Qwen2.5-VL-3B", 1, 1, 32, [32], [36]),
    "qwen2_5_vl_7b": Guide("Qwen2.5-VL-7B", 2, 1, 48, [32, 0], [12, 16]),
    "qwen2_5_vl_32b": Guide("Qwen2.5-VL-32B", 8, 2, 96, [32, *[0] * 7], [1, *[9] * 7], 16),
    "qwen2_5_vl_72b": Guide("Qwen2.5-VL-72B", 8, 2, 96, [32, *[0] * 7], [6, *[11] * 6, 8], 16),
}


def data_json(guide: Guide, *, dpo: bool = False, video: bool = False) -> dict[str, Any]:
    """As the guides' files: records with messages, and pairs or videos."""
    files = {"dpo": "./data/rlhf-v.json", "video": "./data/mllm_video_demo.json"}
    attr = {
        "system": None, "images": None if video else "images", "videos": "videos" if video else None,
        "messages": "messages", "role_tag": "role", "content_tag": "content", "user_tag": "user",
        "assistant_tag": "assistant", "observation_tag": None, "function_tag": None, "system_tag": None,
    }  # fmt: skip
    if dpo:
        attr |= {"ranking": True, "chosen": "chosen", "rejected": "rejected"}
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": f"./ckpt/hf_path/{guide.name}-Instruct", "use_fast_tokenizer": True,
                "split_special_tokens": False, "image_max_pixels": 262144, "image_min_pixels": 0,
                "video_max_pixels": 16384, "video_min_pixels": 0, "video_fps": 2.0, "video_maxlen": 64,
            },
            "basic_parameters": {
                "template": "qwen2vl", "dataset_dir": "./data",
                "dataset": files.get("dpo" if dpo else "video" if video else "", "./data/mllm_data.json"),
                "cache_dir": "./data/cache_dir", "train_on_prompt": False, "mask_history": False,
                "preprocessing_batch_size": 1000, "preprocessing_num_workers": 16, "max_samples": None,
                "tool_format": None,
            },
            "attr": attr,
        },
        "dataloader_param": {
            "dataloader_mode": "sampler", "drop_last": True, "sampler_type": "BaseRandomBatchSampler",
            "collate_param": {"model_name": "qwen2vl_dpo" if dpo else "qwen2vl", "ignore_pad_token_for_loss": True},
            "pin_memory": True, "shuffle": True,
        },
    }  # fmt: skip


def model_json(guide: Guide) -> dict[str, Any]:
    """As the guides' files."""
    config = published_config(guide.name)
    newer = guide.name.startswith("Qwen2.5")
    vision = {
        "model_id": "qwen2vit", "num_layers": 32, "hidden_size": 1280,
        "ffn_hidden_size": config.vision.intermediate_size, "llm_hidden_size": config.text.hidden_size,
        "num_attention_heads": 16, "hidden_dropout": 0.0, "attention_dropout": 0.0, "in_channels": 3, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "layernorm_epsilon": 1e-06,
        "normalization": "RMSNorm" if newer else "LayerNorm", "fp16": False, "bf16": True, "params_dtype": "bf16",
        "activation_func": "silu" if newer else "quick_gelu", "freeze": True, "use_fused_rotary_pos_emb": True,
        "post_layer_norm": False, "pipeline_num_layers": guide.vision, "attention_mask_type": "general",
    }  # fmt: skip
    if newer:
        vision |= {
            "intermediate_size": config.vision.intermediate_size, "gated_linear_unit": True, "tokens_per_second": 2,
            "bias_activation_fusion": True, "window_attn_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        }  # fmt: skip
    projector = {
        "model_id": "lnmlp", "num_layers": 1, "gated_linear_unit": False, "bias_activation_fusion": False,
        "add_bias_linear": True, "input_size": 1280, "hidden_size": config.text.hidden_size, "ffn_hidden_size": 5120,
        "activation_func": "gelu", "bf16": True, "params_dtype": "bf16", "freeze": True, "layernorm_epsilon": 1e-06,
        "normalization": "RMSNorm" if newer else "LayerNorm",
    }  # fmt: skip
    text = {
        "model_id": "qwen2_5_lm" if newer else "qwen2lm", "num_layers": config.text.num_layers,
        "pipeline_num_layers": guide.language, "hidden_size": config.text.hidden_size,
        "ffn_hidden_size": config.text.intermediate_size, "num_attention_heads": config.text.num_heads,
        "max_position_embeddings": 32768, "vocab_size": config.text.vocab_size, "rope_theta": 1000000.0,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings, "disable_bias_linear": True,
        "attention_dropout": 0.0, "init_method_std": 0.01, "hidden_dropout": 0.0, "position_embedding_type": "mrope",
        "normalization": "RMSNorm", "activation_func": "silu", "use_fused_rotary_pos_emb": True,
        "attention_softmax_in_fp32": True, "params_dtype": "bf16", "bf16": True, "parallel_output": True,
        "group_query_attention": True, "num_query_groups": config.text.num_kv_heads, "rope_scaling": None,
        "gated_linear_unit": True, "layernorm_epsilon": 1e-06, "mrope_section": [16, 24, 24],
        "add_bias_linear": False, "add_qkv_bias": True,
    }  # fmt: skip
    return {
        "model_id": "qwen2_5vl" if newer else "qwen2vl", "img_context_token_id": 151655,
        "vision_start_token_id": 151652, "image_encoder": {"vision_encoder": vision, "vision_projector": projector},
        "text_decoder": text, "text_encoder": None, "video_encoder": None, "patch": {"bridge_patch": False},
    }  # fmt: skip


SCRIPT = r"""#!/bin/bash
source /usr/local/Ascend/ascend-toolkit/set_env.sh
export CUDA_DEVICE_MAX_CONNECTIONS=1   # one queue
export TASK_QUEUE_ENABLE=2
NPUS_PER_NODE=@DEVICES@
MASTER_ADDR=localhost
MASTER_PORT=29501
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
export LOCAL_WORLD_SIZE=$NPUS_PER_NODE

MM_DATA="./examples/data.json"
MM_MODEL=./examples/model.json
MM_TOOL='./mindspeed_mm/tools/tools.json'
LOAD_PATH="ckpt/mm_path/model"
SAVE_PATH="save_dir"

TP=@TP@
PP=@PP@
CP=1
MBS=1
GRAD_ACC_STEP=@ACCUMULATE@
DP=$(($WORLD_SIZE/$TP/$PP/$CP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} \
    --context-parallel-algo ulysses_cp_algo \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --tokenizer-type NullTokenizer \
    --vocab-size @VOCAB@ \
    --seq-length 1024 \
    --make-vocab-size-divisible-by 1 \
    --normalization RMSNorm \
    --use-fused-rmsnorm \
    --swiglu \
    --use-fused-swiglu \
    --no-masked-softmax-fusion \
    --lr @LR@ \
    --lr-decay-style cosine \
    --weight-decay 0 \
    --train-iters @STEPS@ \
    --lr-warmup-fraction 0.1 \
    --clip-grad 0.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --no-gradient-accumulation-fusion \
    --seed 42 \
    --bf16 \
    --load $LOAD_PATH \
    --variable-seq-lengths \
    --use-distributed-optimizer \
    --reuse-fp32-param \
    --use-flash-attn \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --num-workers 8 \
    --distributed-timeout-minutes 20 @MORE@
"

MM_ARGS="
    --mm-data $MM_DATA \
    --mm-model $MM_MODEL \
    --mm-tool $MM_TOOL
"

OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --eval-iters 5000 \
    --save $SAVE_PATH \
    --ckpt-format torch \
    --log-tps
"

logfile=$(date +%Y%m%d)_$(date +%H%M%S)
mkdir -p logs
torchrun $DISTRIBUTED_ARGS \
    pretrain_vlm.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    2>&1 | tee logs/train_${logfile}.log

chmod 440 logs/train_${logfile}.log
STEP_TIME=`grep "elapsed time per iteration" logs/train_${logfile}.log | awk -F 'iteration (ms): ' '{print $2}' \
    | head -n 150 | tail -n 100 | awk '{sum+=$1} END {if (NR != 0) printf("%.1f",sum/NR)}'`
SPS=`awk 'BEGIN{printf "%.3f\n", '${GBS}'*1000/'${STEP_TIME}'}'`
echo "samples per second: $SPS"
"""

LORA = (
    "\\\n    --lora-r 8 \\\n    --lora-alpha 16 \\\n"
    "    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2"
)
DPO = "\\\n    --dpo-beta 0.1 \\\n    --dpo-loss-type sigmoid \\\n    --dpo-label-smoothing 0.0 \\\n    --pref-ftx 0.0"


def script(guide: Guide, *, more: str = "", dpo: bool = False) -> str:
    """As the guides' scripts; `more` goes to the end of GPT_ARGS."""
    values = {
        "DEVICES": guide.devices, "TP": guide.tp, "PP": guide.pp, "ACCUMULATE": guide.accumulate,
        "VOCAB": published_config(guide.name).text.vocab_size, "LR": "5e-6" if dpo else "1.0e-5",
        "STEPS": 5000 if dpo else 10000, "MORE": more,
    }  # fmt: skip
    text = SCRIPT
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def write(directory: Path, guide: Guide, *, lora: bool = False, dpo: bool = False, video: bool = False) -> list[Path]:
    """data.json, model.json, script.sh."""
    files = [directory / name for name in ("data.json", "model.json", "finetune.sh")]
    more = (LORA if lora else "") + (DPO if dpo else "")
    texts = [
        json.dumps(data_json(guide, dpo=dpo, video=video)), json.dumps(model_json(guide)),
        script(guide, more=more, dpo=dpo),
    ]  # fmt: skip
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return files
