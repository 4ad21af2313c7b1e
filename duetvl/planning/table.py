"""Proposals in words: a table, why the first is faster than the guides' layout, the recipe's sections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from duetvl.core.stages import show
from duetvl.planning.search import Proposal, Wish, degrees
from duetvl.training.recipe.section import Section
from duetvl.training.recipe.yaml_values import write_yaml

_PARTS: Final = {  # of a step's seconds
    "waiting": "waiting for other pipeline stages",
    "sums": "collectives of tensor parallelism",
    "pieces": "exchanges of context parallelism",
    "blocks": "gathering weights for ZeRO-3",
    "again": "recomputation",
    "compute": "computing on the busiest rank",
    "gradients": "reducing gradients and gathering new weights",
    "update": "the optimizer's update",
    "reference": "the reference model",
}


def heading(wish: Wish) -> Iterator[str]:
    """What the plan is for, and what it rests on."""
    base, (size, *_) = wish.base, wish.sizes
    if base.lora is not None:
        trained = f"adapters of {', '.join(base.lora.targets)}"
    else:
        trained = "all weights" + f" but {', '.join(base.model.freeze)}" * bool(base.model.freeze)
    kind = "pairs" if base.dpo else "samples"
    yield f"plan: {base.model.path}, {trained}, {base.model.dtype}, on {wish.devices} x {wish.device.name}"
    count = len(size.grids)
    yield (
        f"  {wish.memory / 2**30:.1f} GiB for tensors on each; a step of {base.train.global_batch} {kind} of "
        f"{size.tokens} tokens, {size.trained} trained, {count} picture{'s' * (count != 1)}; micro-batches of at most "
        f"{base.data.pack_tokens} tokens"
    )
    yield "  seconds by the cost model of docs/planning.md, memory by the estimate of duetvl check: neither measured"


def lines(proposals: Sequence[Proposal], guide: Proposal | None) -> Iterator[str]:
    """The table, best first, with the layers of stages below each; and the guides' layout beside the first."""
    rows = [("", "layout", "tokens", "recompute", "memory", "bubble", "sent", "seconds")]
    for number, one in enumerate(proposals, 1):
        is_guide = guide is not None and one.recipe == guide.recipe
        step, parallel = one.step, one.recipe.parallel
        name = degrees(parallel) + " zero 3" * (parallel.zero == 3) + " (guide)" * is_guide
        memory = f"{one.memory.on_device / 2**30:.1f} GiB"
        sent = f"{step.sent / 1e9:.1f} GB"
        tokens, again = str(one.recipe.data.pack_tokens), one.recipe.train.recompute
        rows.append((str(number), name, tokens, again, memory, f"{step.bubble:.0%}", sent, f"{step.seconds:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for index, row in enumerate(rows):
        yield "  ".join(
            cell.ljust(width) if column in (1, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        stages = _stages(proposals[index - 1]) if index else ""
        if stages:
            yield f"{' ' * (widths[0] + 2)}{stages}"
    if guide is not None:
        yield _beside(proposals[0], guide)


def _stages(proposal: Proposal) -> str:
    parallel = proposal.recipe.parallel
    if parallel.pp == 1 or not parallel.vision_layers or not parallel.language_layers:
        return ""
    return f"vision {_flat(_needed(parallel.vision_layers))} language {_flat(parallel.language_layers)}"


def _needed(rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Without the last rows of zeros, which a recipe need not have."""
    last = max(number for number, row in enumerate(rows) if any(row))
    return rows[: last + 1]


def _flat(rows: Sequence[Sequence[int]]) -> str:
    text = show(rows)
    return text[1:-1] if len(rows) == 1 else text


def _beside(first: Proposal, guide: Proposal) -> str:
    """Why the first is faster than the guides' layout."""
    if first.recipe == guide.recipe:
        return "the guides' layout is the fastest"
    saved = guide.step.seconds - first.step.seconds
    parts = {part: getattr(guide.step, part) - getattr(first.step, part) for part in _PARTS}
    most = max(parts, key=lambda part: parts[part])
    lost = min(parts, key=lambda part: parts[part])
    words = f"{_PARTS[most]} ({_change(guide, first, most)} s)"
    but = f", against {_PARTS[lost]} ({_change(guide, first, lost)} s)" if parts[lost] < -0.05 * saved else ""
    return (
        f"the guides' layout takes {guide.step.seconds:.2f} s, {saved / first.step.seconds:.0%} more than the first, "
        f"most of it {words}{but}"
    )


def _change(guide: Proposal, first: Proposal, part: str) -> str:
    return f"{getattr(guide.step, part):.2f} against {getattr(first.step, part):.2f}"


def sections_text(proposal: Proposal) -> str:
    """The sections of a recipe that are the layout's, as YAML."""
    return write_yaml(sections_of(proposal), flow=True)


def recipe_text(proposal: Proposal, wish: Wish) -> str:
    """A whole recipe with the layout, and what was computed for it as a comment."""
    recipe, step = proposal.recipe, proposal.step
    comment = [
        f"# {recipe.model.path} on {wish.devices} x {wish.device.name}, planned and not measured:",
        f"# {proposal.memory.on_device / 2**30:.1f} GiB of tensors on the rank with most, {step.seconds:.2f} s a step",
    ]
    sections: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if section is not None and (fields := _set_fields(section)) is not None:
            sections[name] = fields
    layout = sections_of(proposal)
    for name in ("data", "train"):
        sections[name] = {**sections.get(name, {}), **layout[name]}
    sections["parallel"] = layout["parallel"]
    return "\n".join(comment) + "\n\n" + write_yaml(sections, flow=True)


def _set_fields(section: Section) -> dict[str, Any] | None:
    """The fields of a section that were set; None where none was and the section need not be there."""
    values = section.model_dump(mode="json", include=section.model_fields_set)
    values.pop("output_dir", None)
    optional = type(section).__name__ in ("LoraSection", "DpoSection")
    return values if values or optional else None


def sections_of(proposal: Proposal) -> dict[str, dict[str, Any]]:
    """The fields of a recipe that a layout sets, by section."""
    parallel = proposal.recipe.parallel
    fields = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp")}
    optional = {
        "sequence": parallel.sequence if parallel.tp > 1 else None,
        "cp_algorithm": parallel.cp_algorithm if parallel.cp > 1 else None,
        "zero": parallel.zero if parallel.zero == 3 else None,
        "vision": parallel.vision if parallel.vision != "divide" else None,
        "ulysses": parallel.ulysses,
        "vision_layers": _listed(_needed(parallel.vision_layers)) if parallel.vision_layers else None,
        "language_layers": _listed(parallel.language_layers),
    }
    layout = {**fields, **{name: value for name, value in optional.items() if value is not None}}
    return {
        "data": {"pack_tokens": proposal.recipe.data.pack_tokens},
        "train": {"recompute": proposal.recipe.train.recompute},
        "parallel": layout,
    }


def _listed(rows: Sequence[Sequence[int]] | None) -> Any:
    if not rows:
        return None
    return list(rows[0]) if len(rows) == 1 else [list(row) for row in rows]
