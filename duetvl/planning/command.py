"""`duetvl plan`: a table of layouts, and the recipe's sections of the first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.errors import ConfigError
from duetvl.cost_model.devices import DeviceType, device_type
from duetvl.cost_model.measured import this_cpu
from duetvl.models.qwen_vl.config import ModelConfig, load_config, published_config, published_names
from duetvl.planning.calibration import describe, fitted, read_run, shares_of
from duetvl.planning.guides import guide_for
from duetvl.planning.search import Candidate, Proposal, Search, Wish, check_wish, degrees
from duetvl.planning.shortage import shortage
from duetvl.planning.table import heading, lines, recipe_text, sections_text
from duetvl.storage.files import write_text
from duetvl.training.expected import SampleSize
from duetvl.training.recipe.reading import make_recipe

_UNITS: Final = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SAMPLES_A_DEVICE: Final = 24  # the guides' 192 on 8
_FOR_TENSORS: Final = 0.9  # of a device's memory; the allocator and the collectives take some
_MEASURED: Final = 2048  # rows and columns of the product that is measured on a CPU, at most


@dataclass(frozen=True)
class Question:
    """What `duetvl plan` is asked.

    memory: bytes of a device that tensors may take; None: nine tenths of what the kind has. seq: most tokens of a
    micro-batch. sample: tokens of a sample, of a pair each answer with its prompt; of them `answer` are trained.
    picture: (height, width) in pixels; `pictures` of them in each sample. global_batch: samples in a step; None: 24 a
    device. shares: of the device's peaks, as text; measured: directories of runs on this kind of device that they are
    fitted to instead.
    """

    model: str
    devices: int
    device: str
    memory: int | None = None
    seq: int = 4096
    sample: int = 512
    answer: int = 128
    picture: tuple[int, int] = (504, 504)
    pictures: int = 1
    global_batch: int | None = None
    lora: bool = False
    dpo: bool = False
    count: int = 8
    data: str = "data.jsonl"
    overrides: Sequence[str] = ()
    out: Path | None = None
    shares: str | None = None
    measured: Sequence[Path] = ()


def plan(question: Question) -> Iterator[str]:
    """The plan, line by line; the recipe of the first layout goes to `out`, or its sections are the last lines.

    Raises ConfigError where no layout fits, with what is missing and the nearest that would.
    """
    if question.devices < 1:
        raise ConfigError(f"--devices {question.devices}: give the number of devices, 1 or more")
    wish = wish_of(question)
    check_wish(wish)
    if question.measured:
        kind = None if question.device.lower() == "cpu" else wish.device
        runs = [read_run(run, kind) for run in question.measured]
        shares = fitted(runs)
        yield from describe(runs, shares)
        wish = replace(wish, device=replace(wish.device, shares=shares))
    search = Search(wish)
    if next(search.sections(), None) is None:
        raise ConfigError(
            f"--devices {wish.devices}: a step of {wish.base.train.global_batch} samples fills {search.step_packs} "
            f"micro-batches of {question.seq} tokens, fewer than any layout has replicas; raise --global-batch, or "
            f"lower --seq"
        )
    yield from heading(wish)
    best = search.best(question.count)
    if not best:
        raise ConfigError(shortage(search))
    guide, why_not = _guide(question, search)
    if guide is not None and not any(_same(guide, one) for one in best):
        best = [*best, guide]
    yield from lines(best, guide)
    if why_not:
        yield why_not
    if question.out is None:
        yield from ("", *sections_text(best[0]).splitlines())
        return
    write_text(question.out, recipe_text(best[0], wish))
    yield f"{question.out}: written with the first layout; give data.train your records, then: duetvl check"


def wish_of(question: Question) -> Wish:
    """The question in the terms of the search. Raises ConfigError for what cannot be."""
    config = _config(question.model)
    size, device = _size(question, config), _device(question, config)
    values: dict[str, Any] = {
        "model": {"path": question.model, "dtype": _dtype(device, question.device), "freeze": ["vision", "projector"]},
        "data": {"train": question.data, "pack_tokens": question.seq},
        "train": {"global_batch": question.global_batch or _SAMPLES_A_DEVICE * question.devices},
    }
    values |= {name: {} for name, asked in (("lora", question.lora), ("dpo", question.dpo)) if asked}
    base = make_recipe(values, question.overrides)
    if base.model.dtype == "auto":
        base = base.model_copy(update={"model": base.model.model_copy(update={"dtype": values["model"]["dtype"]})})
    if question.shares is not None:
        device = replace(device, shares=shares_of(question.shares, device.shares))
    memory = int(_FOR_TENSORS * device.memory) if question.memory is None else question.memory
    return Wish(base, config, question.devices, device, memory, [size])


def _device(question: Question, config: ModelConfig) -> DeviceType:
    """A row of the table; `cpu` for this machine's processor, which the processes share."""
    if question.device.lower() != "cpu":
        return device_type(question.device)
    text = config.text
    shape = (min(question.seq, _MEASURED), min(text.hidden_size, _MEASURED), min(text.intermediate_size, _MEASURED))
    return this_cpu(shape, question.devices)


def _dtype(device: DeviceType, name: str) -> str:
    if name.lower() == "cpu":
        return "float32"
    return "bfloat16" if "bfloat16" in device.peaks else next(iter(device.peaks))


def _config(model: str) -> ModelConfig:
    """Of a directory, whose weights are not needed, or of a published size."""
    if Path(model).is_dir():
        return load_config(model)
    try:
        return published_config(model)
    except ConfigError:
        raise ConfigError(
            f"{model}: is no directory with a config.json, nor a size that is known: {', '.join(published_names())}"
        ) from None


def _size(question: Question, config: ModelConfig) -> SampleSize:
    """One sample, or one pair."""
    vision = config.vision
    side = vision.patch * vision.merge
    height, width = (max(1, round(pixels / side)) * vision.merge for pixels in question.picture)
    grids = np.array([[1, height, width]] * question.pictures, np.int64).reshape(-1, 3)
    pictures = question.pictures * height * width // vision.merge**2
    if question.sample < pictures + question.answer:
        raise ConfigError(
            f"--sample {question.sample}: {question.pictures} pictures are {pictures} tokens and the answer "
            f"{question.answer}, together more than that; give --sample at least {pictures + question.answer}"
        )
    if question.sample > question.seq:
        raise ConfigError(
            f"--sample {question.sample}: a micro-batch of --seq {question.seq} tokens has no room for a sample; give "
            f"--seq at least {question.sample}"
        )
    answers = 2 if question.dpo else 1
    return SampleSize(answers * question.answer, (question.sample,) * answers, grids)


def _guide(question: Question, search: Search) -> tuple[Proposal | None, str]:
    """The guides' layout for the size, and what is to be said where it is not among the proposals."""
    wish = search.wish
    guide = guide_for(question.model, lora=question.lora, dpo=question.dpo)
    if guide is None:
        return None, ""
    try:
        section = guide.section(wish.devices)
    except ConfigError as error:
        return None, f"the guides' layout is not for {wish.devices} devices: {error}"
    if other := [name for name, value in search.pinned.items() if getattr(section, name) != value]:
        return None, f"the guides' layout ({degrees(section)}) has another parallel.{other[0]} than the one that is set"
    candidates = [Candidate(section, pack) for pack in search.packs]
    proposals = [proposal for one in candidates if (proposal := search.proposal(one)) is not None]
    if proposals:
        return min(proposals, key=lambda one: one.step.seconds), ""
    recipe = search.recipe(candidates[-1], wish.modes[-1])
    least = search.memory(recipe).on_device
    more = "" if recipe.optim.offload else "; optim.offload=true takes the optimizer's part to the host"
    return None, (
        f"the guides' layout ({degrees(section)}) does not fit: with train.recompute={wish.modes[-1]} it takes "
        f"{least / 2**30:.1f} GiB{more}"
    )


def _same(one: Proposal, other: Proposal) -> bool:
    return all(getattr(one.recipe, name) == getattr(other.recipe, name) for name in ("parallel", "train", "data"))


def bytes_of(text: str, option: str) -> int:
    """`64GiB`, `32 GB` or a number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if unit is None or number * (unit or 0) < 1:
        raise ConfigError(f"{option} {text!r}: give bytes with a unit, such as 64GiB or 32GB")
    return int(number * unit)


def pixels_of(text: str) -> tuple[int, int]:
    """`504x504`: height and width. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    if match is None or not int(match[1]) * int(match[2]):
        raise ConfigError(f"--picture {text!r}: give height and width in pixels, such as 504x504")
    return int(match[1]), int(match[2])


def question_of(values: Mapping[str, Any]) -> Question:
    """From the words of the command line."""
    names = ("model", "devices", "seq", "sample", "answer", "pictures", "global_batch", "lora", "dpo", "count", "data")
    return Question(
        **{name: values[name] for name in names},
        device=values["device_type"],
        memory=None if values["memory"] is None else bytes_of(values["memory"], "--memory"),
        picture=pixels_of(values["picture"]),
        overrides=values["overrides"],
        out=values["output"],
        shares=values["shares"],
        measured=values["measured"] or (),
    )
