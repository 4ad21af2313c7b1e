"""MindSpeed-MM checkpoint directories: opened as logical tensors, and planned.

    MM_DIR/latest_checkpointed_iteration.txt              `release`, or the iteration of a trained one
    MM_DIR/release/mp_rank_TT[_PPP]/model_optim_rng.pt    TT: rank of tensor parallelism, PPP: pipeline rank if several
    MM_DIR/iter_0000100/...

A file holds `{"model": tensors}`, with virtual stages `{"model0": ..., "model1": ...}`. Our safetensors edition has the
same tree with `.safetensors` for `.pt` and names such as `model0.text_decoder.decoder.layers.0...`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

from duetvl.convert.layouts import (
    Layout,
    Model,
    Stored,
    lora_tensors,
    stored_tensors,
)
from duetvl.convert.names import Rule, Tower, rules, tied_head
from duetvl.convert.streaming import (
    Fragment,
    FragmentedTensors,
    Output,
    PlannedFile,
    TensorStore,
    plan_tensor_file,
)
from duetvl.convert.torch_plan import plan_torch_file
from duetvl.convert.torch_zip import TorchFile
from duetvl.core.boxes import Shape
from duetvl.core.errors import CheckpointError, ConfigError, shown
from duetvl.core.stages import Rows
from duetvl.storage.files import parse_json
from duetvl.storage.tensor_files import TensorFile, TensorSpec
from duetvl.storage.weights_dir import count_and_name

Format = Literal["pt", "safetensors"]
LATEST: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
VERSION: Final = 3.0
_RANK: Final = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_STEP: Final = re.compile(r"release|iter_\d{7,}")
_SECTION: Final = re.compile(r"model(\d*)\.(.+)", re.DOTALL)
_PREFIXES: Final[Mapping[Tower, str]] = {"text": "text_decoder.", "vision": "image_encoder."}
_TEXT_LAYER: Final = re.compile(r"text_decoder\.decoder\.layers\.(\d+)\.")
_VISION_LAYER: Final = re.compile(r"image_encoder\.encoder\.blocks\.layers\.(\d+)\.")
_CANONICAL_LORA: Final = re.compile(r"\.(q|k|v|gate|up)_proj\.lora_[AB]\.")
_FUSED_LORA: Final = re.compile(r"text_decoder\..*\.linear_(qkv|fc1)\.lora_[AB]\.")
_FUSED_QKV_B: Final = "linear_qkv.lora_B."
_NOT_WEIGHTS: Final = ("_extra_state", ".inv_freq")  # of Transformer Engine and of rotary tables

Place = tuple[int, int, str]  # rank, stage, name


@dataclass(frozen=True)
class MindSpeedDirectory:
    """One iteration of a checkpoint directory, all files open."""

    path: Path
    tensors: Mapping[Place, tuple[TensorStore, str]]
    ranks: int
    pp: int
    vpp: int

    def spec(self, place: Place) -> TensorSpec:
        """Dtype and shape of a stored tensor."""
        store, key = self.tensors[place]
        return store.specs[key]

    @cached_property
    def layout(self) -> Layout:
        """The division that its files show; all but the order of the vision tower's qkv can be seen."""
        text, vision = self._layers(_TEXT_LAYER), self._layers(_VISION_LAYER)
        tp, vision_tp = self._tp("text_decoder.decoder.layers."), self._tp("image_encoder.encoder.blocks.layers.")
        canonical = any(name.endswith((".q_proj.weight", ".gate_proj.weight")) for _, _, name in self.tensors)
        return Layout(text, vision, tp or self.ranks, 0 if vision_tp in (0, tp) else vision_tp, canonical)

    def has(self, prefix: str) -> bool:
        """Whether a name starts so, e.g. `text_decoder.`."""
        return any(name.startswith(prefix) for _, _, name in self.tensors)

    @property
    def has_vision_qkv_adapter(self) -> bool:
        """Whether the vision tower's q, k, v have a LoRA adapter."""
        return any(_VISION_LAYER.match(name) and _FUSED_QKV_B in name for _, _, name in self.tensors)

    def canonical_adapter(self, stated: bool) -> bool:
        """Whether its LoRA adapter is on the canonical structure, by its names; as `stated` where they do not tell.

        ConfigError where they tell otherwise than stated.
        """
        canonical = any(_CANONICAL_LORA.search(name) for _, _, name in self.tensors)
        fused = any(_FUSED_LORA.search(name) for _, _, name in self.tensors)
        if fused and (stated or canonical):
            what = "also for separate ones" if canonical else "but enable_canonical_hf_struct is true"
            raise ConfigError(f"{self.path}: its adapter is for fused q, k, v or gate, up, {what}")
        return canonical or (stated and not fused)

    def layers_without_adapter(self, stated: Layout) -> Iterator[str]:
        """Stages with adapters on fewer layers than are stated: numbers of the layers after them may be wrong."""
        for tower, pattern in (("text", _TEXT_LAYER), ("vision", _VISION_LAYER)):
            found: dict[int, set[int]] = {}
            for _, stage, name in self.tensors:
                if (match := pattern.match(name)) and ".lora_" in name:
                    found.setdefault(stage, set()).add(int(match[1]))
            stages = stated.stages("text" if tower == "text" else "vision")
            for stage, count in enumerate(stages):
                if found and (there := len(found.get(stage, ()))) < count:
                    yield f"stage {stage} has adapters on {there} of the {count} {tower} layers that are stated for it"

    def check_grid(self, stated: Layout, where: str) -> None:
        """Raise ConfigError where the user states other numbers of ranks and stages than there are."""
        if (self.pp, self.vpp, self.ranks) != (stated.pp, stated.vpp, stated.ranks):
            there = f"tensor-parallel ranks: {self.ranks}, pipeline ranks: {self.pp}, virtual stages: {self.vpp}"
            raise ConfigError(f"{where} says {stated.describe()}, but {self.path} has {there}")

    def check(self, stated: Layout, where: str) -> None:
        """Raise ConfigError where the user states another division than the files have."""
        self.check_grid(stated, where)
        found = self.layout
        for tower, prefix in _PREFIXES.items():
            same = found.stages(tower) == stated.stages(tower) and found.tp_of(tower) == stated.tp_of(tower)
            if self.has(prefix) and not same:
                raise ConfigError(f"{where} says {stated.describe()}, but {self.path} has {found.describe()}")
        if stated.canonical and not found.canonical:
            raise ConfigError(f"enable_canonical_hf_struct is true, but {self.path} has fused q, k, v")

    def logical(self, model: Model, layout: Layout) -> FragmentedTensors:
        """Its tensors by Hugging Face names. CheckpointError unless they are exactly those of the model."""
        chosen = self._readable_rules(model, layout)
        wanted = {(stored.rank, stored.stage, stored.name): stored for stored in stored_tensors(model, layout, chosen)}
        problems = [
            count_and_name("tensor(s) absent", [_tell(place) for place in wanted if place not in self.tensors]),
            count_and_name("not part of the model", [_tell(place) for place in self.tensors if place not in wanted]),
            count_and_name("of another shape", self._wrong_shapes(wanted)),
        ]
        if any(problems):
            hint = ". It has LoRA adapters: see lora_mm_to_hf" if any(".lora_" in p[2] for p in self.tensors) else ""
            found = "; ".join(filter(None, problems))
            raise CheckpointError(f"{self.path}: its tensors are not those of the model and layout: {found}{hint}")
        return FragmentedTensors(self.path, self._fragments(model, wanted))

    def vision_qkv(self, model: Model, layout: Layout) -> FragmentedTensors:
        """Of `logical` the fused q, k, v of the vision tower alone."""
        chosen = [rule for rule in self._readable_rules(model, layout) if "attn.qkv" in rule.parts[0].name]
        wanted = {(s.rank, s.stage, s.name): s for s in stored_tensors(model, layout, chosen)}
        return FragmentedTensors(self.path, self._fragments(model, wanted))

    def lora(self, model: Model, layout: Layout) -> FragmentedTensors:
        """The adapter's tensors alone."""
        wanted = {(s.rank, s.stage, s.name): s for s in lora_tensors(model, layout)}
        unknown = [_tell(place) for place in self.tensors if ".lora_" in place[2] and place not in wanted]
        if unknown or not wanted:
            what = count_and_name("adapter tensor(s) not understood", unknown) or "has no adapter"
            raise CheckpointError(f"{self.path}: {what}")
        if absent := [_tell(place) for place in wanted if place not in self.tensors]:
            raise CheckpointError(f"{self.path}: {count_and_name('adapter tensor(s) absent', absent)}")
        if wrong := self._wrong_shapes(wanted):
            raise CheckpointError(f"{self.path}: {count_and_name('adapter tensor(s) of another shape', wrong)}")
        return FragmentedTensors(self.path, self._fragments(model, wanted))

    def _readable_rules(self, model: Model, layout: Layout) -> Sequence[Rule]:
        """Of a tied model: its files may hold the copy of the embedding whatever the stages, or lack it."""
        found = rules(model.gated_vision, layout.canonical, layout.vision_order)
        return (*found, tied_head()) if model.tied and self.has(tied_head().stored) else found

    def _wrong_shapes(self, wanted: Mapping[Place, Stored]) -> list[str]:
        return [
            f"{_tell(place)} {list(self.spec(place).shape)} instead of {list(stored.shape)}"
            for place, stored in wanted.items()
            if place in self.tensors and self.spec(place).shape != stored.shape
        ]

    def _fragments(self, model: Model, wanted: Mapping[Place, Stored]) -> Iterator[tuple[str, Shape, Fragment]]:
        for place, stored in wanted.items():
            if place not in self.tensors:
                continue
            store, key = self.tensors[place]
            for piece, row in stored.rows():
                yield piece.name, model.shapes[piece.name], Fragment(piece.box, store, key, row, stored.shape)

    def _layers(self, pattern: re.Pattern[str]) -> Rows:
        numbers: dict[int, set[int]] = {}
        for _, stage, name in self.tensors:
            if match := pattern.match(name):
                numbers.setdefault(stage, set()).add(int(match[1]))
        for stage, there in numbers.items():
            if len(there) != max(there) + 1:
                raise CheckpointError(f"{self.path}: stage {stage} lacks one of its layers 0 to {max(there)}")
        flat = [len(numbers.get(stage, ())) for stage in range(self.pp * self.vpp)]
        return tuple(tuple(flat[row * self.pp : (row + 1) * self.pp]) for row in range(self.vpp))

    def _tp(self, prefix: str) -> int:
        """Ranks that a tower is divided over: its attention's output matrix is square, but for that."""
        for place in self.tensors:
            if place[2].startswith(prefix) and place[2].endswith("self_attention.linear_proj.weight"):
                rows, columns = self.spec(place).shape
                return rows // columns
        return 0


def open_mindspeed(directory: str | Path) -> MindSpeedDirectory:
    """Open a checkpoint directory, or one iteration of it. Raises CheckpointError."""
    path = _iteration(Path(directory))
    stores = {(rank, pp): _open_file(folder) for folder, rank, pp in _rank_folders(path)}
    ranks, pp_size = max(rank for rank, _ in stores) + 1, max(pp for _, pp in stores) + 1
    grid = [(rank, pp) for rank in range(ranks) for pp in range(pp_size)]
    if missing := [rank_name(*place, pp_size) for place in grid if place not in stores]:
        raise CheckpointError(f"{path}: {count_and_name(f'of {len(grid)} parts missing', missing)}")
    vpp = _virtual_stages(stores.values())
    tensors: dict[Place, tuple[TensorStore, str]] = {}
    for (rank, pp), store in stores.items():
        for key in store.specs:
            match = _SECTION.fullmatch(key)
            if match and not match[2].endswith(_NOT_WEIGHTS):
                tensors[rank, int(match[1] or 0) * pp_size + pp, match[2]] = store, key
    return MindSpeedDirectory(path, tensors, ranks, pp_size, vpp)


def is_mindspeed(directory: Path) -> bool:
    """Whether it looks like a checkpoint directory of MindSpeed-MM, or one iteration of it."""
    return (
        (directory / LATEST).exists()
        or any(_RANK.fullmatch(p.name) for p in _folders(directory))
        or any(_STEP.fullmatch(p.name) for p in _folders(directory))
    )


def rank_name(rank: int, pp: int, pp_size: int) -> str:
    """Name of the directory of one rank."""
    return f"mp_rank_{rank:02}" + (f"_{pp:03}" if pp_size > 1 else "")


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _iteration(directory: Path) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a checkpoint directory of MindSpeed-MM")
    if any(_RANK.fullmatch(path.name) for path in _folders(directory)):
        return directory
    found = [path.name for path in _folders(directory) if _STEP.fullmatch(path.name)]
    try:
        text = (directory / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if len(found) == 1:
            return directory / found[0]
        more = f"; give one of {', '.join(found)}" if found else "; it is no checkpoint of MindSpeed-MM"
        raise CheckpointError(f"{directory}: has no {LATEST}{more}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / LATEST}: cannot be read: {error}") from None
    name = f"iter_{int(text):07}" if text.isdecimal() else text
    if name not in found:
        there = ", ".join(found) or "nothing"
        raise CheckpointError(f"{directory}: {LATEST} says {text!r}, but there is no {name!r} ({there})")
    return directory / name


def _rank_folders(path: Path) -> list[tuple[Path, int, int]]:
    found = []
    for folder in _folders(path):
        if match := _RANK.fullmatch(folder.name):
            if match[3]:
                raise CheckpointError(f"{folder}: is divided over experts, which these models do not have")
            found.append((folder, int(match[1]), int(match[2] or 0)))
    if not found:
        raise CheckpointError(f"{path}: has no mp_rank_* directories")
    return found


def _open_file(folder: Path) -> TensorStore:
    torch_file, tensor_file = folder / "model_optim_rng.pt", folder / "model_optim_rng.safetensors"
    if torch_file.exists() and tensor_file.exists():
        raise CheckpointError(f"{folder}: has both {torch_file.name} and {tensor_file.name}; remove the stale one")
    if tensor_file.exists():
        return TensorFile(tensor_file)
    if not torch_file.exists():
        raise CheckpointError(f"{folder}: has no {torch_file.name}")
    return TorchFile(torch_file)


def _virtual_stages(stores: Iterable[TensorStore]) -> int:
    """How many all files have; a virtual stage may be without tensors."""
    sections = [(store, _sections_of(store)) for store in stores]
    for store, found in sections:
        if found != sections[0][1] or found not in (["model"], [f"model{number}" for number in range(len(found))]):
            raise CheckpointError(
                f"{store.path}: has the sections {found}; expected model, or model0, model1, ..., as in all other files"
            )
    return len(sections[0][1])


def _sections_of(store: TensorStore) -> list[str]:
    if isinstance(store, TorchFile):
        return sorted(store.sections, key=lambda name: (len(name), name)) or ["nothing"]
    stated = getattr(store, "metadata", {}).get("sections", '["model"]').encode()
    found = parse_json(stated, f"{store.path}: the sections in its header", CheckpointError)
    return found if isinstance(found, list) else [shown(found)]


def _tell(place: Place) -> str:
    rank, stage, name = place
    return f"{name} in rank {rank} stage {stage}"


# -- writing ----------------------------------------------------------------------------------------------------------


def plan_mindspeed(
    specs: Mapping[str, TensorSpec], stored: Iterable[Stored], layout: Layout, kind: Format = "pt"
) -> list[Output]:
    """The files of a release, below the directory to be made. CheckpointError for what the format does not have."""
    files: dict[tuple[int, int], dict[str, dict[str, Stored]]] = {
        (rank, pp): {section: {} for section in _sections(layout.vpp)}
        for rank in range(layout.ranks)
        for pp in range(layout.pp)
    }
    for one in stored:
        section = _sections(layout.vpp)[one.stage // layout.pp]
        files[one.rank, one.stage % layout.pp][section][one.name] = one
    outputs = []
    for (rank, pp), sections in files.items():
        path = Path(RELEASE) / rank_name(rank, pp, layout.pp) / f"model_optim_rng.{kind}"
        announced = {
            section: {name: _stored_spec(one, specs) for name, one in tensors.items()}
            for section, tensors in sections.items()
        }
        pieces = {f"{section}.{name}": one.pieces for section, found in sections.items() for name, one in found.items()}
        outputs.append(Output(path, _PLANS[kind](announced), pieces))
    return outputs


def _sections(vpp: int) -> list[str]:
    return ["model"] if vpp == 1 else [f"model{number}" for number in range(vpp)]


def _stored_spec(stored: Stored, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    dtypes = {specs[piece.name].dtype for piece in stored.pieces}
    if len(dtypes) > 1:
        names = ", ".join(sorted({piece.name for piece in stored.pieces}))
        raise CheckpointError(f"{names} have different dtypes ({', '.join(sorted(dtypes))}) and cannot be fused")
    return TensorSpec(dtypes.pop(), stored.shape)


def _plan_pt(sections: Mapping[str, Mapping[str, TensorSpec]]) -> PlannedFile:
    return plan_torch_file(sections, {"checkpoint_version": VERSION})


def _plan_safetensors(sections: Mapping[str, Mapping[str, TensorSpec]]) -> PlannedFile:
    flat = {f"{section}.{name}": spec for section, specs in sections.items() for name, spec in specs.items()}
    metadata = {"format": "pt", "checkpoint_version": str(VERSION), "sections": json.dumps(list(sections))}
    return plan_tensor_file(flat, metadata)


_PLANS: Final[Mapping[str, Callable[[Mapping[str, Mapping[str, TensorSpec]]], PlannedFile]]] = {
    "pt": _plan_pt,
    "safetensors": _plan_safetensors,
}
