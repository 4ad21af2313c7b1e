"""The arguments of a script to the sections other than `data`'s records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.migrate.layout_keys import Devices, parallel_section
from duetvl.migrate.names import APPLY_MODULES, LORA_PREFIX, LORA_TARGETS, PARTS
from duetvl.migrate.report import Report, Values
from duetvl.migrate.schedule_keys import absent, schedule
from duetvl.migrate.tables import SCRIPT

_ADAPTED: Final = frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"})


@dataclass(frozen=True)
class Wanted:
    """What the JSON files say that the arguments depend on.

    `gated`: the vision tower's MLP has a gate. `frozen`: the parts that are not trained, in MindSpeed-MM's names.
    `cutoff`: release 1.0 cuts samples there to that many tokens.
    """

    gated: bool
    pairs: bool
    evaluates: bool
    frozen: tuple[str, ...]
    cutoff: int | None


def sections(script: Values, devices: Devices, wanted: Wanted, report: Report) -> dict[str, Any]:
    """Sections by name, each with the fields that the arguments give."""
    if (micro := script.whole("--micro-batch-size", 1)) < 1:
        raise ConfigError(f"{SCRIPT.title}: --micro-batch-size is {micro}, expected 1 or more")
    parallel = parallel_section(script, devices, report)
    train = _train(script, wanted, parallel["dp"], report)
    made = {
        "model": _dtype(script, report),
        "data": _lengths(script, wanted, report),
        "train": train,
        "optim": _optim(script, train["steps"], report),
        "parallel": parallel,
        "checkpoint": _saving(script, report),
        "log": _logging(script, report),
        "backend": _backend(script, report),
    }
    if lora := _lora(script, wanted, report):
        made["lora"] = lora
    if wanted.pairs:
        made["dpo"] = _dpo(script, report)
    return made


def _passed(script: Values, report: Report, fields: dict[str, tuple[str, int | None]]) -> dict[str, Any]:
    """Whole numbers that mean the same here, each with Megatron's default."""
    made = {}
    for argument, (field, usual) in fields.items():
        value = script.whole(argument, usual)
        if value is not None:
            made[field.partition(".")[2]] = value
            report.add("used", argument, f"{field}: {value:g}{absent(script, argument)}")
    return made


def _dtype(script: Values, report: Report) -> dict[str, Any]:
    bf16, fp16 = script.switch("--bf16"), script.switch("--fp16")
    if bf16 and fp16:
        raise ConfigError(f"{SCRIPT.title}: --bf16 and --fp16 are both given; remove one of them")
    dtype = "bfloat16" if bf16 else "float16" if fp16 else "float32"
    report.add("used", "--bf16, --fp16", f"model.dtype: {dtype}")
    return {"dtype": dtype}


def _lengths(script: Values, wanted: Wanted, report: Report) -> dict[str, Any]:
    seq = script.whole("--seq-length")
    micro = script.whole("--micro-batch-size", 1)
    if seq is None:
        raise ConfigError(f"{SCRIPT.title}: --seq-length is missing")
    if wanted.cutoff is not None:
        report.add("changed", "cutoff_len", f"data.cutoff_len: {wanted.cutoff} - of release 1.0, which cuts to it")
        if wanted.cutoff != seq:
            report.add(
                "contradiction", "--seq-length", f"{seq}, but data.json has cutoff_len {wanted.cutoff}, which counts"
            )
        seq = wanted.cutoff
    pack = micro * seq
    if script.switch("--use-txt-dynamic-batching"):
        pack = script.whole("--max-seq-len", 2048)
    report.add("changed", "--seq-length", f"data.cutoff_len: {seq}, data.too_long: truncate - never inside a picture")
    report.add(
        "changed", "--micro-batch-size",
        f"{micro} x {seq}: data.pack_tokens: {pack} - samples are packed up to it, not padded; more is faster where "
        f"there is memory, and the loss stays the same",
    )  # fmt: skip
    made = {"cutoff_len": seq, "too_long": "truncate", "pack_tokens": pack}
    return made | _passed(script, report, {"--num-workers": ("data.workers", 2), "--seed": ("data.seed", 1234)})


# -- train -----------------------------------------------------------------------------------------------------------


def _train(script: Values, wanted: Wanted, dp: int, report: Report) -> dict[str, Any]:
    micro = script.whole("--micro-batch-size", 1)
    batch = script.whole("--global-batch-size")
    if batch is None:
        batch = micro * dp
        report.add("changed", "--global-batch-size", f"not given: train.global_batch: {batch}, as Megatron takes it")
    else:
        report.add("used", "--global-batch-size", f"train.global_batch: {batch}")
        if batch % (micro * dp):
            report.add(
                "contradiction", "--global-batch-size",
                f"{batch} is no multiple of {micro} samples x {dp} replicas, which MindSpeed-MM refuses",
            )  # fmt: skip
    steps, samples = script.whole("--train-iters"), script.whole("--train-samples")
    if steps is None and samples is None:
        raise ConfigError(f"{SCRIPT.title}: --train-iters is missing")
    if steps is None:
        steps = samples // max(1, batch)  # as Megatron has it: the rest makes no step
        report.add("changed", "--train-samples", f"{samples} samples of {batch} a step: train.steps: {steps}")
    else:
        if samples is not None:
            report.add("contradiction", "--train-samples", f"{samples}, but --train-iters is given, which is taken")
        report.add("used", "--train-iters", f"train.steps: {steps}")
    made = {"global_batch": batch, "steps": steps, **_loss(script, wanted, micro, report)}
    if save := script.text("--save"):
        made["output_dir"] = save
        report.add("used", "--save", f"train.output_dir: {save}")
    if wanted.evaluates:
        return made | _passed(script, report, {"--eval-interval": ("train.eval_every", 1000)})
    for argument in ("--eval-interval", "--eval-iters"):
        if argument in script:
            script.whole(argument)
            report.add("not needed", argument, "data.json gives nothing to evaluate")
    return made


def _loss(script: Values, wanted: Wanted, micro: int, report: Report) -> dict[str, Any]:
    per_sample = script.switch("--calculate-per-sample-loss")
    per_token = script.switch("--calculate-per-token-loss")
    if wanted.pairs:
        return {}
    if per_sample and per_token:
        raise ConfigError(f"{SCRIPT.title}: --calculate-per-sample-loss and --calculate-per-token-loss are both given")
    if per_token:
        report.add("used", "--calculate-per-token-loss", "train.loss: token")
        return {"loss": "token"}
    if per_sample:
        report.add("used", "--calculate-per-sample-loss", "train.loss: sample")
        return {"loss": "sample"}
    same = "which is the same with one sample in each" if micro == 1 else (
        f"which weighs samples, not micro-batches of {micro} padded ones"
    )  # fmt: skip
    report.add("changed", "loss", f"its default is the mean over micro-batches: train.loss: sample, {same}")
    return {"loss": "sample"}


# -- optim -----------------------------------------------------------------------------------------------------------


def _optim(script: Values, steps: int, report: Report) -> dict[str, Any]:
    if (optimizer := script.text("--optimizer") or "adam") != "adam":
        report.lacks(SCRIPT.title, f"--optimizer {optimizer}", ": duetvl has AdamW (adam) alone")
    elif "--optimizer" in script:
        report.add("used", "--optimizer", "AdamW, the one there is")
    lr = script.number("--lr")
    if lr is None:
        raise ConfigError(f"{SCRIPT.title}: --lr is missing")
    if lr <= 0:
        raise ConfigError(f"{SCRIPT.title}: --lr is {lr:g}, expected more than 0")
    made: dict[str, Any] = {"lr": float(lr), **schedule(script, float(lr), steps, report)}
    report.add("used", "--lr", f"optim.lr: {lr:g}")
    betas = [float(script.number("--adam-beta1", 0.9)), float(script.number("--adam-beta2", 0.999))]
    made |= {"betas": betas, "eps": float(script.number("--adam-eps", 1e-8))}
    for argument, field in (("--adam-beta1", "betas"), ("--adam-beta2", "betas"), ("--adam-eps", "eps")):
        report.add("used", argument, f"optim.{field}: {made[field]}{absent(script, argument)}")
    decay = float(script.number("--weight-decay", 0.01))
    made["weight_decay"] = decay
    report.add("used", "--weight-decay", f"optim.weight_decay: {decay:g}{absent(script, '--weight-decay')}")
    clip = float(script.number("--clip-grad", 1.0))
    made["clip"] = clip or None
    kind, meaning = ("used", f"{clip:g}") if clip else ("changed", "null - 0 is no clipping there")
    report.add(kind, "--clip-grad", f"optim.clip: {meaning}{absent(script, '--clip-grad')}")  # type: ignore[arg-type]
    return made | _groups(script, report)


def _groups(script: Values, report: Report) -> dict[str, Any]:
    """Parts with their own learning rate or without weight decay."""
    made: dict[str, Any] = {}
    if excluded := script.get("--weight-decay-exclude-modules"):
        made["no_decay"] = _parts(excluded, "--weight-decay-exclude-modules", report)
        report.add("used", "--weight-decay-exclude-modules", f"optim.no_decay: {made['no_decay']}")
    factor = float(script.number("--lr-mult", 1.0))
    if scaled := script.get("--lr-scale-modules"):
        made["lr_scale"] = dict.fromkeys(_parts(scaled, "--lr-scale-modules", report), factor)
        report.add("used", "--lr-scale-modules", f"optim.lr_scale: {made['lr_scale']}")
    return made


def _parts(names: list[str], argument: str, report: Report) -> list[str]:
    """Parts of the model under MindSpeed-MM's names of modules."""
    more = "; for other modules leave the argument out and give patterns in the recipe"
    return [PARTS[part] for part in _modules(names, argument, more, report)]


def _modules(names: list[str], argument: str, more: str, report: Report) -> list[str]:
    """The parts that names of modules stand for, in MindSpeed-MM's names."""
    found: list[str] = []
    for name in names:
        if name not in APPLY_MODULES:
            report.lacks(SCRIPT.title, f"{argument} {name}", did_you_mean(name, APPLY_MODULES) + more)
        found += APPLY_MODULES.get(name, ())
    return found


# -- lora and dpo ----------------------------------------------------------------------------------------------------


def _lora(script: Values, wanted: Wanted, report: Report) -> dict[str, Any]:
    modules = script.get("--lora-target-modules") or []
    if not modules:
        if given := [name for name in SCRIPT.used if SCRIPT.used[name].startswith("lora.") and name in script]:
            said = "given, but --lora-target-modules is not: no adapters, and all that is not frozen is trained"
            report.add("contradiction", ", ".join(given), said)
        return {}
    made: dict[str, Any] = {
        "rank": script.whole("--lora-r", 8),
        "alpha": float(script.number("--lora-alpha", 16)),
        "dropout": float(script.number("--lora-dropout", 0.0)),
        "targets": _targets(modules, _adapted_parts(script, wanted, report), wanted.gated, report),
    }
    if wanted.pairs and made["dropout"]:
        report.add(
            "changed", "--lora-dropout", f"{made['dropout']:g}, but 0 with dpo: there as well no dropout is done"
        )
        made["dropout"] = 0.0
    for argument, name in (("--lora-r", "rank"), ("--lora-alpha", "alpha"), ("--lora-dropout", "dropout")):
        report.add("used", argument, f"lora.{name}: {made[name]:g}{'' if argument in script else ' (its default)'}")
    fused = " - q, k, v and gate, up have an adapter each, as in PEFT" if _ADAPTED & set(modules) else ""
    report.add("changed", "--lora-target-modules", f"{' '.join(modules)}: lora.targets: {made['targets']}{fused}")
    return made


def _adapted_parts(script: Values, wanted: Wanted, report: Report) -> list[str]:
    """The parts that get adapters: those asked for, without the frozen ones, which have none there either."""
    names = script.get("--lora-apply-modules") or ["all"]
    asked = list(dict.fromkeys(_modules(names, "--lora-apply-modules", "", report)))
    parts = [part for part in asked if part not in wanted.frozen]
    left_out = ", ".join(part for part in asked if part in wanted.frozen)
    if not parts:
        raise ConfigError(
            f"{SCRIPT.title}: --lora-apply-modules {' '.join(names)}: model.json freezes {left_out}, so no module has "
            f"an adapter and nothing would be trained; set freeze to false where adapters are wanted"
        )
    text = f"lora.targets: only layers of {', '.join(parts)}" + (f"; {left_out} frozen" if left_out else "")
    report.add("used", "--lora-apply-modules", text + absent(script, "--lora-apply-modules", "its default, all"))
    return parts


def _targets(modules: list[str], parts: list[str], gated: bool, report: Report) -> list[str]:
    """Patterns of the linear layers; a part of which all have an adapter is named as a whole."""
    known = {name for table in LORA_TARGETS.values() for name in table}
    for name in modules:
        if name not in known:
            report.lacks(SCRIPT.title, f"--lora-target-modules {name}", did_you_mean(name, known))
    found: list[str] = []
    for part in dict.fromkeys(parts):
        every = {layer for layers in LORA_TARGETS[part].values() for layer in _existing(part, layers, gated)}
        chosen = [layer for name in modules for layer in _existing(part, LORA_TARGETS[part].get(name, ()), gated)]
        whole = set(chosen) == every
        found += [PARTS[part]] if whole else [LORA_PREFIX[part] + layer for layer in dict.fromkeys(chosen)]
    if not found:
        raise ConfigError(
            f"{SCRIPT.title}: --lora-target-modules {' '.join(modules)} has no layer in {', '.join(parts)}"
        )
    return found


def _existing(part: str, layers: tuple[str, ...], gated: bool) -> tuple[str, ...]:
    """The layers that the family has: the vision tower's MLP has a gate in Qwen2.5-VL, and none in Qwen2-VL."""
    other = ("mlp.fc1", "mlp.fc2") if gated else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return tuple(layer for layer in layers if part != "vision_encoder" or layer not in other)


def _dpo(script: Values, report: Report) -> dict[str, Any]:
    loss = script.text("--dpo-loss-type") or "sigmoid"
    made: dict[str, Any] = {"loss": loss}
    for argument, name, usual in (
        ("--dpo-beta", "beta", 0.1), ("--dpo-label-smoothing", "label_smoothing", 0.0), ("--pref-ftx", "pref_ftx", 0.0),
    ):  # fmt: skip
        made[name] = float(script.number(argument, usual))
        report.add("used", argument, f"dpo.{name}: {made[name]:g}{'' if argument in script else ' (its default)'}")
    report.add("used", "--dpo-loss-type", f"dpo.loss: {loss}")
    if reference := script.text("--ref-model"):
        report.add(
            "changed", "--ref-model",
            f"{reference} is in MindSpeed-MM's layout: the reference is model.path; for another "
            f"one give dpo.reference a Hugging Face directory",
        )  # fmt: skip
    return made


# -- the rest --------------------------------------------------------------------------------------------------------


def _saving(script: Values, report: Report) -> dict[str, Any]:
    if load := script.text("--load"):
        report.add(
            "changed", "--load",
            f"{load}: weights come from model.path. If you have trained these, give model.path what "
            f"`mm-convert ... mm_to_hf` makes of them",
        )  # fmt: skip
    if "--save-interval" not in script:
        report.add("added", "checkpoint.every", "its default; there nothing is saved before the end")
    report.add("added", "checkpoint.export", "true: at the end the model is written in the Hugging Face layout")
    return {**_passed(script, report, {"--save-interval": ("checkpoint.every", None)}), "export": True}


def _logging(script: Values, report: Report) -> dict[str, Any]:
    made = _passed(script, report, {"--log-interval": ("log.every", 100)})
    if project := script.text("--wandb-project"):
        made["wandb"] = project
        report.add("used", "--wandb-project", f"log.wandb: {project}")
    return made


def _backend(script: Values, report: Report) -> dict[str, Any]:
    name = script.text("--ai-framework")
    if name == "mindspore":
        report.add("used", "--ai-framework", "backend.name: mindspore")
        return {"name": "mindspore"}
    if name not in (None, "pytorch"):
        report.lacks(SCRIPT.title, f"--ai-framework {name}", ": there are pytorch and mindspore")
    return {}
