"""LLaMA-Factory's keys of the run to the sections `train`, `optim`, `parallel`, `checkpoint` and `log`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.llamafactory.keys import Keys
from duetvl.storage.files import read_object

_SCHEDULES: Final = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "inverse_sqrt": "inverse_sqrt", "warmup_stable_decay": "wsd",
}  # fmt: skip
_EVERY: Final = ("steps", "epoch", "no")


def train_section(keys: Keys, devices: int, evaluates: bool) -> dict[str, Any]:
    """Batch, length, recomputation and evaluation. `devices`: how many the run had."""
    per_device = keys.whole("per_device_train_batch_size")
    accumulated = keys.whole("gradient_accumulation_steps")
    if per_device < 1 or accumulated < 1:
        raise ConfigError(
            f"{keys.table.title}: per_device_train_batch_size is {per_device} and gradient_accumulation_steps "
            f"{accumulated}, expected 1 or more of each"
        )
    batch = per_device * accumulated * devices
    plural = "s" * (devices > 1)
    said = f"train.global_batch: {batch} = {per_device} x {accumulated} x {devices} device{plural} (--devices)"
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        keys.note(key, said)
    section: dict[str, Any] = {"global_batch": batch}
    if (steps := keys.whole("max_steps")) > 0:
        section["steps"] = keys.take("max_steps", "train.steps", whole=True)
        if "num_train_epochs" in keys:
            keys.report.add("not needed", "num_train_epochs", "max_steps is given")
    else:
        section["epochs"] = keys.take("num_train_epochs", "train.epochs")
        if "max_steps" in keys:
            keys.report.add("not needed", "max_steps", f"{steps}, the epochs count")
    if directory := keys.text("output_dir"):
        section["output_dir"] = directory
        keys.note("output_dir", f"train.output_dir: {directory}")
    if _recomputes(keys):
        section["recompute"] = "full"
    return section | _evaluation(keys, evaluates)


def _recomputes(keys: Keys) -> bool:
    """LLaMA-Factory recomputes unless told not to."""
    wanted = not keys.switch("disable_gradient_checkpointing")
    key = "disable_gradient_checkpointing"
    keys.note(key, f"train.recompute: {'full' if wanted else 'none'}")
    if keys.peek("gradient_checkpointing") is not None:
        keys.switch("gradient_checkpointing")
        keys.report.add("not needed", "gradient_checkpointing", f"{key} decides it there")
    return wanted


def _strategy(keys: Keys, key: str, usual: str) -> str:
    value = keys.get(key, usual)
    value = "no" if value is False else value
    if value not in _EVERY:
        raise ConfigError(f"{keys.table.title}: {key} is {value}, expected steps, epoch or no")
    return str(value)


def _evaluation(keys: Keys, evaluates: bool) -> dict[str, Any]:
    key = "evaluation_strategy" if keys.peek("evaluation_strategy") is not None else "eval_strategy"
    strategy = _strategy(keys, key, "no")
    names = (key, "do_eval", "eval_steps", "eval_on_start", "early_stopping_steps")
    present = [name for name in names if keys.peek(name) is not None]
    if not evaluates:
        for name in present:
            keys.report.add("not needed", name, "neither eval_dataset nor val_size gives anything to evaluate")
        return {}
    if strategy != "steps":
        for name in present:
            keys.note(name, "data.val is evaluated at the end alone; train.eval_every does more", changed=True)
        return {}
    every = keys.number("eval_steps", keys.whole("logging_steps"))
    if every < 1 or every != int(every):
        raise ConfigError(f"{keys.table.title}: eval_steps is {every:g}, expected a number of steps, 1 or more")
    keys.note(key, "train.eval_every")
    keys.note("eval_steps", f"train.eval_every: {int(every)}")
    if "do_eval" in keys:
        keys.note("do_eval", "train.eval_every")
    return {"eval_every": int(every)} | _by_evaluation(keys)


def _by_evaluation(keys: Keys) -> dict[str, Any]:
    """An evaluation before the first step, and an end by the evaluations."""
    section: dict[str, Any] = {}
    if keys.switch("eval_on_start"):
        section["eval_first"] = True
        keys.note("eval_on_start", "train.eval_first: true")
    if keys.peek("early_stopping_steps") is not None:
        section["patience"] = keys.take("early_stopping_steps", "train.patience", whole=True, least=1)
    return section


def optim_section(keys: Keys) -> dict[str, Any]:
    """AdamW, its schedule and clipping."""
    optimizer = str(keys.get("optim"))
    if optimizer not in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_npu_fused", "adamw_apex_fused"):
        keys.report.lacks(keys.table.title, f"optim: {optimizer}", ": duetvl has AdamW alone")
    elif "optim" in keys:
        keys.note("optim", "AdamW, the one there is")
    lr = keys.take("learning_rate", "optim.lr")
    section = {"lr": lr, **_schedule(keys, lr)}
    section["betas"] = [keys.take("adam_beta1", "optim.betas"), keys.take("adam_beta2", "optim.betas")]
    section["eps"] = keys.take("adam_epsilon", "optim.eps")
    section["weight_decay"] = keys.take("weight_decay", "optim.weight_decay")
    section["clip"] = keys.take("max_grad_norm", "optim.clip") or None
    return section


def _schedule(keys: Keys, lr: float) -> dict[str, Any]:
    asked = keys.one_of("lr_scheduler_type", tuple(_SCHEDULES))
    section: dict[str, Any] = {"schedule": _SCHEDULES[asked]}
    keys.note("lr_scheduler_type", f"optim.schedule: {section['schedule']}")
    steps, ratio = float(keys.number("warmup_steps")), float(keys.number("warmup_ratio"))
    key = "warmup_steps" if steps else "warmup_ratio"  # steps count where both are given
    if asked == "constant" and (steps or ratio):
        keys.report.add("not needed", key, "constant has no warm-up there; constant_with_warmup has")
    elif steps or ratio:
        section["warmup"] = steps or ratio
        keys.note(key, f"optim.warmup: {section['warmup']:g}")
    if steps and ratio:
        keys.report.add("not needed", "warmup_ratio", "warmup_steps is given")
    return section | _schedule_options(keys, asked, lr, section.get("warmup", 0.0))


def _schedule_options(keys: Keys, asked: str, lr: float, warmup: float) -> dict[str, Any]:
    """What `lr_scheduler_kwargs` says of the schedule that is asked for."""
    section: dict[str, Any] = {}
    options = keys.get("lr_scheduler_kwargs") or {}
    if not isinstance(options, dict):
        raise ConfigError(f"{keys.table.title}: lr_scheduler_kwargs is {options}, expected keys and values")
    for name, value in options.items():
        field = _OPTIONS.get(asked, {}).get(name)
        if field is None or not isinstance(value, int | float):
            if (asked, name, value) not in _USUAL:
                keys.report.lacks(keys.table.title, f"lr_scheduler_kwargs.{name}", ": is no option of this schedule")
            continue
        section[field] = float(f"{value / lr:.12g}") if name == "min_lr" else value
        keys.note("lr_scheduler_kwargs", f"optim.{field}: {section[field]:g}")
    if asked == "warmup_stable_decay" and "decay" not in section:
        section["decay"] = _usual_decay(keys, warmup)
        keys.report.add(
            "added", "optim.decay", f"{section['decay']:g}, two thirds of what follows the warm-up, as there"
        )
    return section


# By schedule, options of transformers' that are fields of `optim`, and values of others that are as here.
_OPTIONS: Final = {
    "cosine_with_min_lr": {"min_lr": "min_lr_ratio", "min_lr_rate": "min_lr_ratio"},
    "warmup_stable_decay": {"num_decay_steps": "decay", "min_lr_ratio": "min_lr_ratio"},
}
_USUAL: Final = (("warmup_stable_decay", "decay_type", "cosine"), ("warmup_stable_decay", "warmup_type", "linear"))


def _usual_decay(keys: Keys, warmup: float) -> float:
    """LLaMA-Factory's length of the decay: steps where all steps are given, else their share.

    Of a warm-up in steps the share is not known: it is taken as none.
    """
    steps = keys.whole("max_steps")
    if steps > 0:
        rest = steps - (math.ceil(warmup * steps) if warmup < 1 else int(warmup))
        return max(1, rest - rest // 3)
    return float(f"{(1 - (warmup if warmup < 1 else 0)) * 2 / 3:.4g}")


def parallel_section(keys: Keys, devices: int) -> tuple[dict[str, Any], bool]:
    """Replicas and what they divide; and whether the optimizer's state is kept on the host."""
    section: dict[str, Any] = {"dp": devices} if devices > 1 else {}
    setting = keys.get("deepspeed")
    if not setting:
        return section, False
    stage, offload = _deepspeed(keys, setting)
    said = f"ZeRO-{stage}: parallel.zero: {3 if stage == 3 else 1}" + ", optim.offload: true" * offload
    if devices == 1:
        said += " - left out with one device (--devices)" * (stage == 3)
    elif stage == 3:
        section["zero"] = 3
    keys.note("deepspeed", said, changed=True)
    return section, offload


def _deepspeed(keys: Keys, setting: Any) -> tuple[int, bool]:
    """Its stage and whether it offloads, from the file, and by the file's name where it is not there."""
    if isinstance(setting, str) and not Path(setting).is_file():
        name = Path(setting).name
        stages = [stage for stage in range(4) if f"z{stage}" in name or f"zero{stage}" in name]
        if not stages:
            raise ConfigError(f"{keys.table.title}: deepspeed {setting}: no such file, and its name gives no stage")
        return stages[0], "offload" in name
    options = setting if isinstance(setting, dict) else read_object(Path(str(setting)), ConfigError)
    zero = options.get("zero_optimization") or {}
    if not isinstance(zero, dict) or zero.get("stage", 0) not in range(4):
        raise ConfigError(f"{keys.table.title}: deepspeed: zero_optimization.stage is none of 0, 1, 2 and 3")
    target = zero.get("offload_optimizer")
    return int(zero.get("stage", 0)), isinstance(target, dict) and target.get("device", "none") != "none"


def checkpoint_section(keys: Keys, evaluates: bool) -> dict[str, Any]:
    """When checkpoints are saved, what is in them, and how many are kept. `evaluates`: the run does so as it goes."""
    strategy = _strategy(keys, "save_strategy", "steps")
    section: dict[str, Any] = {}
    if strategy == "no":
        section["every"] = None
        keys.note("save_strategy", "checkpoint.every: null; the last step is saved", changed=True)
    elif strategy == "epoch":
        keys.note(
            "save_strategy", "checkpoint.every is a number of steps: its default, and the last step", changed=True
        )
    else:
        section["every"] = keys.take("save_steps", "checkpoint.every", whole=True, least=1)
        keys.note("save_strategy", "checkpoint.every")
    section["keep_last"] = keys.whole("save_total_limit")
    keys.note("save_total_limit", f"checkpoint.keep_last: {section['keep_last'] or 'null, all of them'}")
    if keys.switch("save_only_model"):
        section["save_only_model"] = True
        keys.note("save_only_model", "checkpoint.save_only_model: true")
    return section | _best(keys, evaluates)


def _best(keys: Keys, evaluates: bool) -> dict[str, Any]:
    """The best checkpoint is kept, where it is that of eval_loss."""
    metric, wanted = str(keys.get("metric_for_best_model", "loss")), keys.switch("load_best_model_at_end")
    names = [name for name in ("load_best_model_at_end", "metric_for_best_model") if keys.peek(name) is not None]
    if not wanted or not evaluates:
        for name in names:
            keys.report.add(
                "not needed", name, "no best checkpoint is asked for" if not wanted else "nothing is evaluated"
            )
        return {}
    if metric not in ("loss", "eval_loss"):
        keys.report.lacks(keys.table.title, f"metric_for_best_model: {metric}", ": duetvl keeps the best by eval_loss")
    for name in names:
        keys.note(name, "checkpoint.keep_best: eval_loss; RUN@best names it, export/ has the last", changed=True)
    return {"keep_best": "eval_loss"}


def log_section(keys: Keys) -> dict[str, Any]:
    """How often a line is printed, and the trackers."""
    section: dict[str, Any] = {"every": keys.take("logging_steps", "log.every", whole=True, least=1)}
    trackers = keys.names("report_to")
    if trackers:
        section["tensorboard"] = bool({"tensorboard", "all"} & set(trackers))
        others = set(trackers) - {"tensorboard", "wandb", "swanlab", "none", "all"}
        if others:
            keys.report.lacks(keys.table.title, "report_to", f": {', '.join(sorted(others))} is no tracker of duetvl's")
        keys.note("report_to", f"log: {', '.join(trackers)}")
    if "wandb" in trackers:
        section["wandb"] = "llamafactory"
    if keys.switch("use_swanlab") or "swanlab" in trackers:
        section["swanlab"] = keys.text("swanlab_project")
        keys.note("swanlab_project", f"log.swanlab: {section['swanlab']}")
        if "use_swanlab" in keys:
            keys.note("use_swanlab", "log.swanlab")
    return section
