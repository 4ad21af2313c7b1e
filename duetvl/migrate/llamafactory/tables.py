"""Every key of LLaMA-Factory's training YAML: where it goes in a recipe, or why nowhere.

The keys are those of its own arguments and of transformers' Seq2SeqTrainingArguments, which one YAML file holds
together. `DEFAULTS` are the values that a key has there when the file leaves it out.
"""

from __future__ import annotations

from typing import Any, Final

from duetvl.migrate.tables import Table


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


DEFAULTS: Final[dict[str, Any]] = {
    "stage": "sft", "finetuning_type": "lora", "freeze_trainable_layers": 2, "freeze_trainable_modules": "all",
    "freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False,
    "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all", "pref_beta": 0.1, "pref_loss": "sigmoid",
    "pref_ftx": 0.0, "dpo_label_smoothing": 0.0, "dataset_dir": "data", "cutoff_len": 2048, "buffer_size": 16384,
    "mix_strategy": "concat", "val_size": 0.0, "image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32,
    "video_max_pixels": 256 * 256, "video_min_pixels": 16 * 16, "video_fps": 2.0, "video_maxlen": 128,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": -1,
    "num_train_epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
    "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "optim": "adamw_torch", "seed": 42, "dataloader_num_workers": 0, "save_strategy": "steps",
    "save_steps": 500, "logging_steps": 500, "swanlab_project": "llamafactory",
}  # fmt: skip

_DECODING = "how answers are made is given to `duetvl infer` and `duetvl eval`"
_ENCODING = "records are encoded while training goes on; `data.cache` keeps them, `data.workers` says how many do it"
_METHOD = "duetvl trains all weights, whole layers, or LoRA adapters, with AdamW"
_HUB = "nothing is uploaded; `duetvl export` writes the model"

LLAMAFACTORY: Final = Table(
    "LLaMA-Factory's YAML",
    used={
        "stage": "the section dpo",
        "do_train": "must not be false",
        "finetuning_type": "the section lora, or model.freeze",
        "model_name_or_path": "model.path",
        "adapter_name_or_path": "lora.adapter",
        "create_new_adapter": "must be false where lora.adapter is given",
        **_each("bf16 fp16 pure_bf16", "model.dtype"),
        **_each("freeze_vision_tower freeze_multi_modal_projector freeze_language_model", "model.freeze"),
        **_each("freeze_trainable_layers freeze_trainable_modules freeze_extra_modules", "model.freeze"),
        "lora_rank": "lora.rank", "lora_alpha": "lora.alpha, twice the rank by default",
        "lora_dropout": "lora.dropout", "lora_target": "lora.targets", "use_rslora": "lora.rslora",
        "use_dora": "lora.dora",
        "pref_beta": "dpo.beta", "pref_loss": "dpo.loss", "pref_ftx": "dpo.pref_ftx",
        "dpo_label_smoothing": "dpo.label_smoothing", "ref_model": "dpo.reference",
        **_each("dataset dataset_dir", "data.train: `dataset_dir/dataset_info.json:NAME`"),
        "eval_dataset": "data.val", "val_size": "data.val_rate", "media_dir": "data.image_root",
        "max_samples": "max_samples of each source", "cutoff_len": "data.cutoff_len, with data.too_long: truncate",
        "streaming": "data.streaming", "buffer_size": "data.shuffle_buffer", "mix_strategy": "must be concat",
        "disable_shuffling": "data.shuffle", "train_on_prompt": "data.train_on_prompt",
        "mask_history": "data.mask_history",
        "image_max_pixels": "data.max_pixels", "image_min_pixels": "data.min_pixels",
        "video_max_pixels": "data.video_max_pixels", "video_min_pixels": "data.video_min_pixels",
        "video_fps": "data.video_fps", "video_maxlen": "data.video_max_frames",
        "dataloader_num_workers": "data.workers", **_each("seed data_seed", "data.seed"),
        **_each("per_device_train_batch_size gradient_accumulation_steps", "train.global_batch"),
        "output_dir": "train.output_dir", "num_train_epochs": "train.epochs", "max_steps": "train.steps",
        **_each("gradient_checkpointing disable_gradient_checkpointing", "train.recompute"),
        **_each("do_eval eval_strategy evaluation_strategy eval_steps", "train.eval_every"),
        "eval_on_start": "train.eval_first", "early_stopping_steps": "train.patience",
        **_each("load_best_model_at_end metric_for_best_model", "checkpoint.keep_best"),
        "default_system": "data.system", "save_only_model": "checkpoint.save_only_model",
        "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule",
        "lr_scheduler_kwargs": "optim.min_lr_ratio, optim.decay", **_each("warmup_ratio warmup_steps", "optim.warmup"),
        "weight_decay": "optim.weight_decay", **_each("adam_beta1 adam_beta2", "optim.betas"),
        "adam_epsilon": "optim.eps", "max_grad_norm": "optim.clip", "optim": "AdamW, the one there is",
        "deepspeed": "parallel.zero, optim.offload",
        "save_strategy": "checkpoint.every", "save_steps": "checkpoint.every",
        "save_total_limit": "checkpoint.keep_last", "logging_steps": "log.every",
        "report_to": "log.tensorboard, log.wandb, log.swanlab",
        **_each("use_swanlab swanlab_project", "log.swanlab"),
    },
    not_needed={
        "template": "the family's own chat template is used",
        "tool_format": "tools are written in Qwen's form",
        "trust_remote_code": "no code of a model is ever run",
        **_each("use_fast_tokenizer split_special_tokens", "tokenizer.json of the model directory is used"),
        **_each("flash_attn enable_liger_kernel use_unsloth use_unsloth_gc use_kv_cache use_v1_kernels "
                "use_reentrant_gc torch_compile tf32 low_cpu_mem_usage disable_tqdm",
                "kernels are the backend's choice"),
        **_each("packing neat_packing", "samples are always packed, and never see each other (`data.pack`)"),
        **_each("overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path cache_dir "
                "data_shared_file_system", _ENCODING),
        **_each("use_audio_in_video audio_sampling_rate", "these models have no audio"),
        **_each("enable_thinking preserve_thinking", "these models have no thinking mode"),
        **_each("ignore_pad_token_for_loss group_by_length per_device_eval_batch_size eval_accumulation_steps",
                "there is no padding"),
        **_each("dataloader_drop_last dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers "
                "remove_unused_columns accelerator_config", "batches are made by duetvl's own loader"),
        **_each("overwrite_output_dir resume_from_checkpoint", "a run that has checkpoints is resumed; "
                "`duetvl train --restart` starts again, `--resume DIR@STEP` elsewhere"),
        **_each("plot_loss logging_first_step logging_strategy logging_dir log_level include_num_input_tokens_seen "
                "include_tokens_per_second include_effective_tokens_per_second compute_accuracy print_param_status "
                "run_name", "every step is in metrics.jsonl, and loss.png is drawn"),
        **_each("ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_backend local_rank",
                "`duetvl launch` and the backend connect the processes"),
        **_each("upcast_layernorm upcast_lmhead_output average_tokens_across_devices full_determinism "
                "bf16_full_eval fp16_full_eval", "numerics are the same on any layout; sums are in float32"),
        "save_safetensors": "checkpoints are safetensors",
        **_each("push_to_hub hub_* hf_hub_token ms_hub_token om_hub_token", _HUB),
        **_each("export_*", "`duetvl export` and `duetvl merge` write models"),
        **_each("infer_backend infer_dtype vllm_* sglang_* do_sample temperature top_p top_k num_beams max_length "
                "max_new_tokens repetition_penalty length_penalty skip_special_tokens eval_num_beams "
                "predict_with_generate offload_folder", _DECODING),
        **_each("swanlab_*", "the tracker's own environment variables say it"),
        **_each("galore_* apollo_* badam_* swanlab_mode ppo_* reward_model_type kto_* simpo_gamma oft_* "
                "loraplus_lr_embedding pissa_iter quantization_method quantization_type double_quantization "
                "moe_aux_loss_coef", "belongs to a method whose own switch is reported"),
    },
    cannot={
        **_each("quantization_bit quantization_device_map ref_model_quantization_bit", "weights are not quantised"),
        **_each("use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro pissa_init loraplus_lr_ratio "
                "use_mca use_dft_loss use_asft_loss use_eaft_loss fp8 shift_attn mixture_of_depths", _METHOD),
        **_each("additional_target neftune_noise_alpha label_smoothing_factor pref_bco_weight ld_alpha "
                "ref_model_adapters reward_model reward_model_adapters", "there is nothing like it"),
        "interleave_probs": "data sets are joined; give each a `weight`",
        **_each("add_tokens add_special_tokens new_special_tokens_config resize_vocab",
                "the vocabulary is the model's"),
        "rope_scaling": "positions are as config.json says",
        "train_from_scratch": "training starts from a model's weights",
        "model_revision": "give a directory, or the id whose main revision is meant",
        **_each("fsdp fsdp_config", "give parallel.zero: 3 in the recipe"),
        "do_predict": "answers are made by `duetvl infer`",
        "eval_on_each_dataset": "the sets of data.val are evaluated together",
    },
)  # fmt: skip
STAGES: Final = ("pt", "rm", "ppo", "kto")
