"""Every key of MindSpeed-MM's files and every argument of its scripts: where it goes in a recipe, or why nowhere.

Three tables for each of the three inputs. USED: key -> field of the recipe. NOT_NEEDED: key -> reason. CANNOT: key ->
reason, for what a run would depend on and duetvl does not do. Keys of the JSON files are dotted paths; `*` stands for
anything. docs/migrating_keys.md is made from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Arity = Literal["switch", "one", "many"]


@dataclass(frozen=True)
class Table:
    """What is known of the keys of one input. `switches` and `lists`: arguments with no value, and with several."""

    title: str
    used: Mapping[str, str]
    not_needed: Mapping[str, str]
    cannot: Mapping[str, str]
    switches: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()

    def known(self) -> Iterator[str]:
        """Every key."""
        yield from (*self.used, *self.not_needed, *self.cannot)

    def arity(self, name: str) -> Arity:
        """How many values an argument takes."""
        return "switch" if name in self.switches else "many" if name in self.lists else "one"


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# -- data.json -------------------------------------------------------------------------------------------------------

_PRE, _BASIC, _ATTR, _LOADER = (
    "dataset_param.preprocess_parameters.", "dataset_param.basic_parameters.", "dataset_param.attr.",
    "dataloader_param.",
)  # fmt: skip

DATA: Final = Table(
    "data.json",
    used={
        f"{_PRE}model_name_or_path": "model.path",
        f"{_PRE}image_max_pixels": "data.max_pixels",
        f"{_PRE}image_min_pixels": "data.min_pixels",
        f"{_PRE}video_max_pixels": "data.video_max_pixels",
        f"{_PRE}video_min_pixels": "data.video_min_pixels",
        f"{_PRE}video_fps": "data.video_fps",
        f"{_PRE}video_maxlen": "data.video_max_frames",
        f"{_BASIC}dataset": "data.train",
        f"{_BASIC}dataset_dir": "media are looked for beside the data file, and then in the working directory",
        f"{_BASIC}val_dataset": "data.val",
        f"{_BASIC}val_rate": "data.val_rate",
        f"{_BASIC}val_max_samples": "data.val_max_samples",
        f"{_BASIC}max_samples": "data.max_samples",
        f"{_BASIC}cutoff_len": "data.cutoff_len, before --seq-length: a key of release 1.0",
        f"{_PRE}image_resolution": "data.max_pixels, its square: a key of release 1.0",
        f"{_PRE}video_resolution": "data.video_max_pixels, its square: a key of release 1.0",
        f"{_BASIC}train_on_prompt": "data.train_on_prompt",
        f"{_BASIC}mask_history": "data.mask_history",
        f"{_BASIC}streaming": "data.streaming",
        f"{_ATTR}formatting": "data.train: format",
        f"{_ATTR}ranking": "data.train: format, and the section dpo",
        **{f"{_ATTR}{name}": "data.train: columns" for name in (
            "system", "images", "videos", "messages", "chosen", "rejected", "prompt", "query", "response", "history",
            "tools")},
        **{f"{_ATTR}{name}": "data.train: tags" for name in (
            "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")},
        f"{_LOADER}shuffle": "data.shuffle",
        f"{_LOADER}sampler_type": "data.shuffle",
        f"{_LOADER}collate_param.model_name": "the section dpo",
    },
    not_needed={
        "dataset_param.dataset_type": "records of all layouts are read by one pipeline",
        f"{_PRE}use_fast_tokenizer": "tokenizer.json of the model directory is used",
        f"{_PRE}split_special_tokens": "text never makes a control token, and the template's own are never split",
        **{f"{_PRE}{name}": "these models have no audio" for name in ("use_audio_in_video", "audio_sampling_rate")},
        f"{_PRE}trust_remote_code": "no code of a model is ever run",
        f"{_BASIC}template": "the family's own chat template is used",
        f"{_BASIC}tool_format": "tools are written in Qwen's form",
        **{f"{_BASIC}{name}": "records are encoded while training goes on; `data.cache` keeps them, `data.workers` "
                             "says how many processes do it" for name in (
            "cache_dir", "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers",
            "preprocess_on_fly", "async_preprocess", "async_preprocess_buffer_size")},
        **{f"{_BASIC}{name}": "samples are always packed, and never see each other (`data.pack`)" for name in (
            "packing", "neat_packing")},
        f"{_ATTR}packing": "samples are always packed, and never see each other (`data.pack`)",
        f"{_BASIC}enable_thinking": "these models have no thinking mode",
        f"{_LOADER}dataloader_mode": "`data.streaming` says whether files are indexed or read as streams",
        f"{_LOADER}drop_last": "every step is full: the last one takes records of the next epoch",
        f"{_LOADER}collate_param.ignore_pad_token_for_loss": "there is no padding",
        f"{_LOADER}pin_memory": "how batches reach the device is the backend's business",
        f"{_LOADER}priority_mode": "a step's packs are balanced by tokens and patches",
        f"{_LOADER}data_sharding": "records are given to ranks by the planner",
        f"{_LOADER}prefetch_factor": "`data.prefetch` steps are made ahead",
        f"{_LOADER}batch_size": "--micro-batch-size says it",
        f"{_LOADER}num_workers": "`data.workers`, from --num-workers",
        f"{_LOADER}collate_param": "it is empty",
    },
    cannot={
        f"{_BASIC}use_pmcc_data": "PMCC's data layout is not read; convert it to messages",
        f"{_ATTR}pretrain": "text without turns is not trained on; give conversations",
        f"{_ATTR}audios": "these models have no audio; give null",
    },
)  # fmt: skip


# -- model.json ------------------------------------------------------------------------------------------------------

_KERNELS = "kernels are the backend's choice"
_STRUCTURE = "read from the model's config.json; compared with it where the size is a published one"
_STRUCTURE_KEYS = (
    "model_id num_layers hidden_size ffn_hidden_size intermediate_size llm_hidden_size num_attention_heads in_channels "
    "patch_size spatial_merge_size temporal_patch_size layernorm_epsilon normalization activation_func post_layer_norm "
    "gated_linear_unit tokens_per_second window_attn_size fullatt_block_indexes input_size kv_channels vocab_size "
    "max_position_embeddings rope_theta rope_scaling position_embedding_type mrope_section num_query_groups "
    "group_query_attention untie_embeddings_and_output_weights add_bias_linear disable_bias_linear add_qkv_bias "
    "window_size spatial_patch_size padded_vocab_size make_vocab_size_divisible_by norm_epsilon "
    "use_rotary_position_embeddings rope_scaling_factor rope_scaling_original_max_position_embeddings "
    "rope_scaling_type rotary_base"
)
_RECOMPUTE = "`train.recompute` computes whole blocks again, one by one, or (selective) their MLPs"
_NOT_IN_A_RECIPE = {
    **_each(_STRUCTURE_KEYS, _STRUCTURE),
    **_each("use_fused_rotary_pos_emb bias_activation_fusion use_remove_padding parallel_output attention_mask_type "
            "masked_softmax_fusion no_masked_softmax_fusion bias_dropout_fusion use_infer_fa apply_rope_fusion "
            "use_fused_rmsnorm use_fused_swiglu use_flash_attn", _KERNELS),
    **_each("micro_batch_size global_batch_size lr lr_decay_style", "the script's arguments say it"),
    "ckpt_path": "weights come from `model.path`",
    "ps_version": "there is one model code",
    "num_layer_list": "stages are divided evenly; `parallel.language_layers` divides them otherwise",
    **_each("attention_softmax_in_fp32 params_dtype bf16 fp16", "`model.dtype`, from --bf16, holds for all; softmax, "
            "norms and the loss are computed in float32"),
    **_each("hidden_dropout attention_dropout", "these models have no dropout; LoRA's is `lora.dropout`"),
    "init_method_std": "weights are read, not made",
    "canonical_model": "weights have Hugging Face's names and are never fused",
    "seq_length": "`data.cutoff_len`, from --seq-length",
    **_each("use_vit_dp context_parallel_size tensor_model_parallel_size pipeline_model_parallel_size "
            "sequence_parallel", "the layout is that of the script's degrees"),
    **_each("recompute_method recompute_num_layers", _RECOMPUTE),
    "moe_*": "these models have no experts",
    "num_experts": "these models have no experts",
}  # fmt: skip
_PARTS = ("image_encoder.vision_encoder.", "image_encoder.vision_projector.", "text_decoder.")

MODEL: Final = Table(
    "model.json",
    used={
        "model_id": "the family",
        "image_encoder.vision_encoder.freeze": "model.freeze",
        "image_encoder.vision_projector.freeze": "model.freeze",
        "text_decoder.freeze": "model.freeze",
        "image_encoder.vision_encoder.recompute_granularity": "train.recompute",
        "text_decoder.recompute_granularity": "train.recompute",
        "image_encoder.vision_encoder.pipeline_num_layers": "parallel.vision_layers",
        "text_decoder.pipeline_num_layers": "parallel.language_layers",
    },
    not_needed={
        **{part + key: reason for part in _PARTS for key, reason in _NOT_IN_A_RECIPE.items()},
        **_each("img_context_token_id image_token_id video_token_id vision_start_token_id",
                "ids are read from the model's config.json; images and videos may be mixed"),
        "image_encoder.vision_projector.recompute_granularity": "the projector is never recomputed",
        "patch.*": "weights are read straight from the Hugging Face directory",
        **_each("dtype device params_dtype", "`model.dtype` and --device say so"),
        "ps_version": "there is one model code",
    },
    cannot={
        **_each("text_encoder text_encoder.* video_encoder video_encoder.* audio_encoder audio_encoder.*",
                "no such part in these models; give null"),
    },
)  # fmt: skip


# -- the script ------------------------------------------------------------------------------------------------------

_IGNORED_THERE = "the model's shape is read from its config.json (MindSpeed-MM ignores this as well)"
_ONE_CODE = "there is one model code"
_STATE = "a checkpoint of duetvl holds all, and a run with checkpoints is resumed from the newest"
_MEMORY = "what is kept is decided by `train.recompute` and `optim.offload`"
_BALANCE = "a step's packs are balanced over ranks by tokens and patches"

SCRIPT: Final = Table(
    "script.sh",
    used={
        "--bf16": "model.dtype", "--fp16": "model.dtype",
        "--micro-batch-size": "data.pack_tokens, together with --seq-length",
        "--global-batch-size": "train.global_batch",
        "--seq-length": "data.cutoff_len",
        "--use-txt-dynamic-batching": "data.pack_tokens, from --max-seq-len",
        "--max-seq-len": "data.pack_tokens, with --use-txt-dynamic-batching",
        "--num-workers": "data.workers",
        "--seed": "data.seed",
        "--train-iters": "train.steps", "--train-samples": "train.steps",
        "--calculate-per-sample-loss": "train.loss", "--calculate-per-token-loss": "train.loss",
        "--recompute-granularity": "train.recompute", "--recompute-activations": "train.recompute",
        "--save": "train.output_dir",
        "--lr": "optim.lr", "--min-lr": "optim.min_lr_ratio", "--lr-decay-style": "optim.schedule",
        "--lr-decay-iters": "optim.schedule, where it is that of --train-iters",
        "--lr-warmup-fraction": "optim.warmup", "--lr-warmup-iters": "optim.warmup",
        "--lr-wsd-decay-iters": "optim.decay", "--lr-wsd-decay-style": "along a cosine",
        "--weight-decay": "optim.weight_decay", "--clip-grad": "optim.clip",
        "--weight-decay-exclude-modules": "optim.no_decay",
        "--lr-scale-modules": "optim.lr_scale", "--lr-mult": "optim.lr_scale",
        "--adam-beta1": "optim.betas", "--adam-beta2": "optim.betas", "--adam-eps": "optim.eps",
        "--optimizer": "AdamW is the one there is",
        "--tensor-model-parallel-size": "parallel.tp", "--pipeline-model-parallel-size": "parallel.pp",
        "--context-parallel-size": "parallel.cp", "--context-parallel-algo": "parallel.cp_algorithm",
        "--ulysses-degree-in-cp": "parallel.ulysses",
        "--virtual-pipeline-model-parallel-size": "compared with the rows of pipeline_num_layers",
        "--sequence-parallel": "parallel.sequence",
        "--lora-r": "lora.rank", "--lora-alpha": "lora.alpha", "--lora-dropout": "lora.dropout",
        "--lora-target-modules": "lora.targets", "--lora-apply-modules": "lora.targets",
        "--dpo-beta": "dpo.beta", "--dpo-loss-type": "dpo.loss", "--dpo-label-smoothing": "dpo.label_smoothing",
        "--pref-ftx": "dpo.pref_ftx", "--ref-model": "dpo.reference",
        "--save-interval": "checkpoint.every", "--eval-interval": "train.eval_every", "--log-interval": "log.every",
        "--wandb-project": "log.wandb",
        "--eval-iters": "data.val_max_samples, as many batches",
        "--use-torch-fsdp2": "parallel.zero: 3, with parallel.pp 1",
        "--fsdp2-config-path": "not read",
        "--load": "model.path, the Hugging Face directory",
        "--ai-framework": "backend.name",
    },
    not_needed={
        "--use-mcore-models": _ONE_CODE,
        **_each("--mm-data --mm-model --mm-tool", "the files are given to this command"),
        **_each("--tokenizer-type --tokenizer-model --tokenizer-name-or-path --vocab-file --merge-file "
                "--make-vocab-size-divisible-by --vocab-extra-ids",
                "tokenizer and vocabulary are those of the model directory"),
        **_each("--vocab-size --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels "
                "--group-query-attention --num-query-groups --max-position-embeddings --position-embedding-type "
                "--rotary-base --rotary-percent --use-rotary-position-embeddings --rope-scaling-type "
                "--rope-scaling-factor "
                "--rope-scaling-original-max-position-embeddings --no-position-embedding "
                "--normalization --norm-epsilon --swiglu --disable-bias-linear "
                "--add-qkv-bias --untie-embeddings-and-output-weights --init-method-std --no-bias-swiglu-fusion",
                _IGNORED_THERE),
        **_each("--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-flash-attn "
                "--no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion --no-rope-fusion "
                "--use-ascend-mc2 --use-fused-ring-attention-update --attention-softmax-in-fp32 "
                "--no-gradient-accumulation-fusion --use-cp-send-recv-overlap", _KERNELS),
        **_each("--attention-dropout --hidden-dropout", "these models have no dropout; LoRA's is `lora.dropout`"),
        "--variable-seq-lengths": "samples are packed end to end, never padded",
        **_each("--use-distributed-optimizer --reuse-fp32-param --overlap-grad-reduce --overlap-param-gather "
                "--delay-grad-reduce --accumulate-allreduce-grads-in-fp32",
                "float32 main gradients and master weights are always kept; how they are divided and sent follows "
                "from the layout"),
        **_each("--no-load-optim --no-load-rng --no-save-optim --no-save-rng --finetune --exit-on-missing-checkpoint "
                "--use-checkpoint-args --no-use-checkpoint-args", _STATE),
        **_each("--ckpt-format --auto-detect-ckpt-format --dist-ckpt-format --use-dist-ckpt",
                "checkpoints have one format, which knows neither framework nor layout"),
        "--load-base-model": "the base is `model.path`",
        "--lora-register-forward-hook": "gradients reach adapters by themselves",
        **_each("--distributed-backend --distributed-timeout-minutes --local-rank",
                "torchrun or msrun starts the ranks; DUETVL_PEER_TIMEOUT says how long they wait for each other"),
        "--log-tps": "`tokens_per_sample` and `tokens_per_s` of every step are in metrics.jsonl, and the rate of the "
                     "whole run is said at its end",
        **_each("--log-throughput --log-params-norm --log-num-zeros-in-grad --timing-log-level "
                "--tensorboard-dir --tensorboard-queue-size --log-timers-to-tensorboard "
                "--log-validation-ppl-to-tensorboard --log-memory-to-tensorboard --enable-one-logger",
                "every step's loss, norm, rate of real tokens, time and memory are in metrics.jsonl and TensorBoard"),
        "--enable-dummy-optimizer": "a stage with nothing to train is legal",
        "--unaligned-linear": "any length and any number of heads may be divided",
        **_each("--trust-remote-code", "no code of a model is ever run"),
        **_each("--encoder-dp-balance --use-data-balance --use-image-mbs-data-balance --hetero-parallel "
                "--hetero-encoder-mbs-scale --dynamic-batch-buffer-size --dataloader-type --no-mmap-bin-files",
                _BALANCE),
        **_each("--use-deter-comp --jit-compile --allow-tf32 --downcast-to-bf16 --allow-internal-format "
                "--no-check-for-nan-in-loss-and-grad --manual-gc --manual-gc-interval --transformer-impl "
                "--use-fusion-attn-v2 "
                "--npu-deterministic --empty-unused-memory-level", "settings of the device"),
        **_each("--use-cpu-initialization --init-model-with-meta-device --no-initialization",
                "weights are read slice by slice straight to the device"),
        **_each("--profile-subgraph-seg --profile-stage --simulated-nnodes --simulated-nproc-per-node",
                "there is no search for a layout"),
        **_each("--lr-warmup-init --start-weight-decay --end-weight-decay --weight-decay-incr-style",
                "the rate starts at zero, and weight decay is constant"),
        **_each("--matched-adamw-rms --muon-momentum --ns-steps", "of Muon, which is not there"),
        **_each("--recompute-method --recompute-num-layers --recompute-skip-core-attention "
                "--recompute-num-layers-skip-core-attention", _RECOMPUTE),
        **_each("--cp-attention-mask-type --use-cp-mask", "attention is causal within each sample"),
        **_each("--swap-attention --swap-modules --swap-optimizer --swap-optimizer-times "
                "--adaptive-memory-optimization "
                "--recompute-activation-function --recompute-activation-function-num-layers --recompute-norm "
                "--recompute-norm-num-layers --recompute-in-advance --recompute-in-bubble --recompute-modules "
                "--optimizer-cpu-offload --optimizer-offload-fraction", _MEMORY),
        "--moe-*": "these models have no experts",
        **_each("--wandb-exp-name --wandb-save-dir --wandb-entity", "a run is named after `train.output_dir`"),
        **_each("--tensorboard-log-interval --log-learning-rate-to-tensorboard --log-loss-scale-to-tensorboard",
                "TensorBoard has every step"),
        "--optimizer-selection": "AdamW is the one optimizer, and its kernel is the backend's choice",
        **_each("--qk-layernorm --fp32-residual-connection", _IGNORED_THERE),
        "--data-parallel-random-init": "weights are read, not made",
        **_each("--overlap-p2p-communication --no-overlap-p2p-communication --ddp-bucket-size --no-shared-storage "
                "--overlap-param-gather-with-optimizer-step --align-grad-reduce --no-align-grad-reduce",
                "how ranks communicate follows from the layout"),
        "--num-layer-list": "stages are divided evenly; `parallel.language_layers` divides them otherwise",
        **_each("--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
                "float16 alone has a loss scale, which finds its size itself: `optim.loss_scale`"),
    },
    cannot={
        "--lora-mixed-training": "with `lora` only adapters are trained",
        "--lora-target-parameters": "adapters are of linear layers; use --lora-target-modules",
        "--calculate-square-loss": "train.loss is token, sample or micro_batch",
        "--calculate-token-loss": "train.loss is token, sample or micro_batch",
        "--use-ema": "there is no moving average of the weights",
        **_each("--exit-interval --exit-duration-in-mins", "a run ends with train.steps, or by a signal"),
        "--override-opt_param-scheduler": "the schedule is that of the recipe",
        **_each("--lr-warmup-samples --lr-decay-samples", "give steps: --lr-warmup-iters, --lr-decay-iters"),
        "--rampup-batch-size": "every step has train.global_batch samples",
        "--num-layers-per-virtual-pipeline-stage": "give rows of pipeline_num_layers in model.json",
    },
    switches=_names(
        "--bf16 --fp16 --use-txt-dynamic-batching --calculate-per-sample-loss --calculate-per-token-loss "
        "--sequence-parallel --use-mcore-models --group-query-attention --swiglu --disable-bias-linear --add-qkv-bias "
        "--untie-embeddings-and-output-weights --no-bias-swiglu-fusion --use-fused-rmsnorm --use-fused-swiglu "
        "--use-fused-rotary-pos-emb --use-flash-attn --no-masked-softmax-fusion --no-bias-dropout-fusion "
        "--no-bias-gelu-fusion --no-rope-fusion --use-ascend-mc2 --use-fused-ring-attention-update "
        "--attention-softmax-in-fp32 --no-gradient-accumulation-fusion --use-cp-send-recv-overlap "
        "--variable-seq-lengths --use-distributed-optimizer --reuse-fp32-param --overlap-grad-reduce "
        "--overlap-param-gather --delay-grad-reduce --accumulate-allreduce-grads-in-fp32 --no-load-optim --no-load-rng "
        "--no-save-optim --no-save-rng --finetune --exit-on-missing-checkpoint --use-checkpoint-args "
        "--no-use-checkpoint-args --auto-detect-ckpt-format --use-dist-ckpt --log-tps --log-throughput "
        "--log-params-norm --log-num-zeros-in-grad --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--log-memory-to-tensorboard --enable-dummy-optimizer --unaligned-linear --trust-remote-code "
        "--encoder-dp-balance --use-data-balance --use-image-mbs-data-balance --hetero-parallel --no-mmap-bin-files "
        "--use-deter-comp --jit-compile --allow-tf32 --downcast-to-bf16 --allow-internal-format "
        "--no-check-for-nan-in-loss-and-grad --manual-gc --use-cpu-initialization --init-model-with-meta-device "
        "--no-initialization --profile-subgraph-seg --recompute-skip-core-attention --recompute-activations "
        "--use-cp-mask --lora-mixed-training --calculate-square-loss --calculate-token-loss --use-torch-fsdp2 "
        "--swap-attention --swap-optimizer --adaptive-memory-optimization --recompute-activation-function "
        "--recompute-norm --recompute-in-advance --recompute-in-bubble --optimizer-cpu-offload "
        "--use-rotary-position-embeddings --no-position-embedding --enable-one-logger --use-fusion-attn-v2 "
        "--npu-deterministic --qk-layernorm --fp32-residual-connection --data-parallel-random-init "
        "--overlap-p2p-communication --no-overlap-p2p-communication --no-shared-storage --align-grad-reduce "
        "--overlap-param-gather-with-optimizer-step --no-align-grad-reduce --log-learning-rate-to-tensorboard "
        "--log-loss-scale-to-tensorboard --use-ema --override-opt_param-scheduler"
    ),
    lists=_names(
        "--rampup-batch-size --lora-target-modules --lora-apply-modules --lora-target-parameters "
        "--lora-register-forward-hook "
        "--weight-decay-exclude-modules --lr-scale-modules"
    ),
)  # fmt: skip

TABLES: Final = (DATA, MODEL, SCRIPT)
