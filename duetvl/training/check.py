"""`duetvl check`: everything about a recipe that can be wrong, found before the first step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from duetvl.convert.opening import open_merged
from duetvl.core.backend import choose_backend
from duetvl.core.errors import ConfigError, DataError
from duetvl.cost_model import devices
from duetvl.cost_model.devices import DeviceType, device_names
from duetvl.data.loading.loader import FEW_MEDIA
from duetvl.data.loading.order import choice
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.sources.records import Ref
from duetvl.models.hub import is_id
from duetvl.models.lora import Adapters
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.parameters import PARTS, parameter_shapes
from duetvl.training.checkpoints.run_directory import Start, check_resumable, find_start
from duetvl.training.checkpoints.space import Space, in_words
from duetvl.training.drawn_schedule import check_drawable, draw, schedule_lines
from duetvl.training.dtype import with_dtype
from duetvl.training.expected import SampleSize, describe_step, expected_step, sizes_of
from duetvl.training.feed import FIRST, DataSets
from duetvl.training.groups import check_patterns
from duetvl.training.layout import layout_lines
from duetvl.training.lora import plan_adapters
from duetvl.training.memory import disk_of, division_of, estimate, host_memory, load_of
from duetvl.training.preference.reference import describe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.schedule import total_steps
from duetvl.training.sft import recipe_processor, record_encoder
from duetvl.training.train import read_recipe
from duetvl.training.walk import walk


def check(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    decode: bool = False,
    sample: int | None = None,
    output: Path | None = None,
    schedule: Path | None = None,
    device_type: str | None = None,
) -> Iterator[str]:
    """What the recipe will do, line by line. Raises whatever training would meet on as many processes as it asks for.

    All records are read, tokenised and measured by the headers of their media; with `decode` their pixels are made as
    well, which finds truncated pictures and takes as long as training's data side does. `sample` takes that many
    records of each of `data.train` and `data.val` instead, drawn by `data.seed` (of a stream the first). A model
    directory may lack its weights: all else is checked then, and a line says so.

    Nothing is written (what an id of a hub needs is fetched into the hub's cache), but for what is asked for: into the
    directory `output`, pictures of the lengths and a list of all records that are left out; the schedule of a pipeline
    into the PNG file `schedule`.

    `device_type` is the device, of the table in docs/planning.md, that the seconds of a step are estimated for; None:
    this machine's processor, if the recipe is trained on it.
    """
    given = read_recipe(recipe, overrides)
    given = with_dtype(given, on_cpu=_on_cpu(given) and device_type is None)
    if schedule is not None:
        check_drawable(given)
    if sample is not None and sample < 1:
        raise ConfigError(f"a sample of {sample} records is asked for; there must be at least one")
    kind = None if device_type is None else devices.device_type(device_type)
    yield f"backend: {choose_backend(given.backend.name, given.backend.device)}, device {given.backend.device}"
    sets = DataSets(given.data)
    yield _steps_line(given, sets.per_epoch)
    start = find_start(given)
    check_resumable(start, given, total_steps(given, sets.per_epoch))
    yield from start.notes or (f"run directory: {start.run_dir}, new",)
    source = open_merged(given.model.path, base=given.model.base, weights=False)
    yield from _model_lines(given, source)
    if given.dpo is not None:
        yield describe(given, source.config)
    processor = recipe_processor(given, source)
    if more := processor.beyond_vocabulary:
        yield f"  its tokenizer has {more} tokens that the model has no row for: records that use one are bad"
    maker = SampleMaker(sets.files, record_encoder(given, processor))
    skip_bad, config = given.data.on_bad_sample == "skip", source.config
    way = _Way(config.vision.merge, decode, skip_bad, output, config.text.max_positions, sample, given.data.seed)
    yield from _walked("data.train", sets.train_refs(), sets.train_count, maker, way)
    val = sets.val_refs()
    if val is not None:
        yield from _walked("data.val", val, sets.val_count, maker, way)
    steps = total_steps(given, sets.per_epoch)
    drafts = list(maker.drafts(list(islice(sets.train_refs(), FIRST))))
    yield from _room_lines(given, source, start, steps, drafts, schedule, kind)


def _steps_line(recipe: Recipe, per_epoch: Fraction | None) -> str:
    steps, group = total_steps(recipe, per_epoch), recipe.train.global_batch
    if per_epoch is None:
        return f"recipe: {steps} steps of {group} samples of a stream"
    return f"recipe: {steps} steps of {group} samples, {steps * group / float(per_epoch):.2f} epochs"


def _model_lines(recipe: Recipe, source: ModelDirectory) -> Iterator[str]:
    """Configuration, the headers of the weights, and adapters."""
    config = source.config
    division_of(recipe, config)
    shapes = parameter_shapes(config)
    plan = plan_adapters(recipe, config)
    adapters = plan.adapters.shapes(shapes) if plan else {}
    check_patterns([*shapes, *adapters], recipe.model.freeze, recipe.optim, PARTS)
    if source.has_weights:
        _ = source.weights  # opened, and so checked
    numbers = sum(_volume(shape) for shape in shapes.values())
    known = f"{config.model_type}, {numbers / 1e6:.1f} million parameters in {recipe.model.dtype}"
    yield f"model: {source.path}, {known}"
    if not source.has_weights:
        fetched = "; they are fetched when it is trained" if is_id(source.name) else ""
        yield f"  not checked: its weights, of which {source.path} has none: their names, shapes and dtypes{fetched}"
    if plan:
        yield plan.describe(config)


def _room_lines(
    recipe: Recipe,
    source: ModelDirectory,
    start: Start,
    steps: int,
    outcomes: Sequence[Any],
    picture: Path | None,
    kind: DeviceType | None,
) -> Iterator[str]:
    """The estimates from the sizes of the first samples: memory, layout and schedule, and the disk.

    With what to say where memory or disk are short.
    """
    config = source.config
    plan = plan_adapters(recipe, config)
    adapters = plan.adapters if plan else None
    load = load_of(recipe, outcomes)
    if load is not None:
        memory = estimate(config, recipe, *load, adapters)
        yield memory.describe()
        if _on_cpu(recipe):
            yield memory.describe_process()
            if warning := memory.warning(host_memory(), "cpu"):
                yield warning
    yield from layout_lines(recipe, config, adapters, load)
    if load is not None:
        yield _expected_line(recipe, config, adapters, sizes_of(outcomes), kind)
    if load is not None and recipe.parallel.pp > 1:
        yield from _schedule_lines(recipe, load[1], picture)
    space = Space.with_export(*disk_of(config, recipe, adapters), recipe)
    yield f"disk: a checkpoint takes {in_words(space.checkpoint)}"
    left = steps - (start.checkpoint.step if start.checkpoint else 0)
    if left > 0 and (warning := space.warning(start.run_dir, recipe.checkpoint, left)):
        yield warning


def _expected_line(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, sizes: Sequence[SampleSize], kind: DeviceType | None
) -> str:
    """How long a step is expected to take (docs/planning.md)."""
    if kind is None and not _on_cpu(recipe):
        return f"expected: name the kind of device for seconds a step: --device-type {', '.join(device_names())}"
    if kind is not None and recipe.model.dtype not in kind.peaks:
        return f"expected: unknown, as the table of devices has no {recipe.model.dtype} for {kind.name}"
    step = expected_step(recipe, config, adapters, sizes, kind)
    where = f"on {kind.name}" if kind else "on this machine's processor, measured at a product"
    return f"expected {where}: {describe_step(step)}"


def _schedule_lines(recipe: Recipe, micro_batches: int, picture: Path | None) -> Iterator[str]:
    shape = recipe.parallel.pp, recipe.parallel.virtual, micro_batches
    yield from schedule_lines(*shape)
    if picture is not None:
        try:
            draw(*shape, picture)
        except OSError as error:
            raise ConfigError(f"--schedule {picture}: cannot be written: {error.strerror or error}") from None
        yield f"  drawn: {picture}"


def _on_cpu(recipe: Recipe) -> bool:
    """Whether it will be trained on the CPU, as far as can be told without a framework."""
    accelerators = any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/davinci0"))
    return recipe.backend.device == "cpu" or (recipe.backend.device == "auto" and not accelerators)


def _volume(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _walked(name: str, refs: Iterator[Ref], count: int | None, maker: SampleMaker, way: _Way) -> Iterator[str]:
    """The findings of a walk over all records. Raises DataError, at its end, for what would end training."""
    if way.sample is not None and (count is None or count > way.sample):
        yield f"{name}: a sample, {way.sample} of {'a stream, its first' if count is None else f'{count} records'}"
        refs, count = _drawn(refs, count, way), way.sample
    found = walk(name, refs, count, maker, merge=way.merge, decode=way.decode)
    lines = found.lines()
    yield f"{name}: {next(lines)}"
    yield from (f"  {line}" for line in lines)
    if way.output is not None:
        with _writing_to(way.output):
            if found.list_left_out(every := way.output / f"{name}.left_out.txt"):
                yield f"  each of them listed: {every}"
    if found.bad and not way.skip_bad:
        raise DataError(
            f"{name}: training would meet {found.bad} bad record{'s' * (found.bad > 1)}, the first of them: "
            f"{found.examples['bad'][0]}; correct them, or leave them out with data.on_bad_sample=skip"
        )
    found.tally.check(1 if not found.lengths else FEW_MEDIA)
    if not found.lengths:
        raise DataError(f"{name}: has no usable record")
    if beyond := sum(length > way.most_positions for length in found.lengths):
        yield (
            f"  warning: {beyond} of {len(found.lengths)} samples have more tokens than the {way.most_positions} "
            f"positions that the model is made for (max_position_embeddings)"
        )
    if not found.trained_tokens:
        raise DataError(f"{name}: no token of its samples is trained; each needs an answer, neither masked nor cut off")
    if way.output is not None:
        with _writing_to(way.output):
            found.draw(picture := way.output / f"{name}.lengths.png")
        yield f"  lengths drawn: {picture}"


def _drawn(refs: Iterator[Ref], count: int | None, way: _Way) -> Iterator[Ref]:
    """A sample of the records, in their order; of a stream the first, as all of it would have to be read for others."""
    if count is None:
        return islice(refs, way.sample)
    numbers = set(choice(way.seed, "check", 0, count, way.sample).tolist())
    return (ref for number, ref in enumerate(refs) if number in numbers)


@contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"-o {output}: cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Way:
    """How to walk over the records of a recipe."""

    merge: int
    decode: bool
    skip_bad: bool
    output: Path | None
    most_positions: int
    sample: int | None
    seed: int
