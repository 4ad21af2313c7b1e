"""The public interface: what users import from `duetvl`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.answers import SampleAnswers
from duetvl.convert.opening import AdapterModel, open_model
from duetvl.core.backend import Backend, load_backend
from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter, split_trainable
from duetvl.core.ranks import Ranks
from duetvl.data.encode import Processor
from duetvl.data.tokenizer import TextTokenizer
from duetvl.evaluating import TaskScores
from duetvl.inference import engine as inference
from duetvl.inference.defaults import Defaults, read_defaults
from duetvl.inference.generate import generate
from duetvl.inference.request import Completion, Delta, Request
from duetvl.inference.runner import Generator
from duetvl.inference.sampling import Sampling
from duetvl.models.lora import is_adapter
from duetvl.models.model_directory import AdapterTensors, ModelDirectory
from duetvl.models.qwen_vl import adapters, loading
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.vocabulary import LastStage
from duetvl.parallel.division import ALONE, Division
from duetvl.parallel.pipeline import placed
from duetvl.training import train as train_module
from duetvl.training.ending import TrainResult
from duetvl.training.job import Job
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.sections import Recipe
from duetvl.training.train import read_recipe
from duetvl.training.watching.callbacks import Callback

__all__ = [
    "Batch",
    "Callback",
    "Completion",
    "Delta",
    "Engine",
    "Generation",
    "Model",
    "Request",
    "Sample",
    "Sampling",
    "TrainResult",
    "load_backend",
    "load_model",
    "load_processor",
    "train",
]


@dataclass(frozen=True)
class Generation:
    """An answer: its token ids, the one that ended it included, and its text (None without a tokenizer)."""

    token_ids: list[int]
    text: str | None


class Model(QwenVL):
    """A model on one backend; made by `load_model`.

    `pack`, `features`, `logits`, `parameters`, `adapters`, `config` and `freeze` come from QwenVL. adapter_directory:
    the adapter added by `with_adapter`.
    """

    adapter_directory: Path | None = None

    @cached_property
    def processor(self) -> Processor:
        """The processor of the directory that the model was read from."""
        if self.source is None:
            raise ConfigError("this model was not read from a directory, so it has no tokenizer; pass a Sample")
        return Processor.from_directory(self.source.path, self.family)

    @cached_property
    def defaults(self) -> Defaults:
        """Sampling and end tokens from the model's own generation_config.json.

        Without that file: greedy, and the tokenizer's end tokens. `Engine` uses both for requests that do not set them;
        `generate` uses only the end tokens.
        """
        processor = self.processor
        assert self.source is not None
        return read_defaults(self.source.path, processor)

    def forward_loss(self, batch: Batch, *, key: tuple[int, ...] = ()) -> tuple[Any, Any]:
        """Sum of the trained tokens' cross-entropies, float32 and 0-d, and the tape for its backward pass.

        `key` identifies the random numbers of an adapter's dropout; without it there is no dropout.
        """
        (loss,), tape = self.forward(batch, self._loss_of(batch), key=key)
        return loss, tape

    def eval_loss(self, batch: Batch) -> Any:
        """The same sum, without a tape and without dropout."""
        return self.evaluate(batch, self._loss_of(batch))[0]

    def _loss_of(self, batch: Batch) -> LastStage:
        objective = TokenLoss(self.backend.ops)
        return partial(objective.loss, prepared=objective.prepare(batch, trained=self.trained(batch)))

    def loss_and_grads(self, batch: Batch) -> tuple[float, dict[str, Any]]:
        """Mean cross-entropy of the trained tokens, and its float32 gradient to every trainable parameter by name.

        Parameters that the batch does not touch (the vision tower without a picture) have no entry.
        """
        if batch.trained_tokens == 0:
            raise ConfigError("no token of this batch is trained: give the samples labels")
        trainable, _ = split_trainable(self.parameters.values())
        ops = self.backend.ops
        loss, tape = self.forward_loss(batch)
        scale = np.float32(1.0 / batch.trained_tokens)
        self.backend.autograd.backward(tape, [ops.from_numpy(np.array(scale))])
        gradients = {p.path: p.main_grad for p in trainable if p.main_grad is not None}
        for p in trainable:
            p.main_grad = None
        return float(ops.to_numpy(loss)) / batch.trained_tokens, gradients

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a conversation (messages) or continue a Sample; greedy unless `sampling` says otherwise.

        Ends at a token of `stop` or after `max_new_tokens`; by default `stop` is what the model's
        generation_config.json says, or the tokenizer's end tokens. `sampling=model.defaults.sampling` takes the
        sampling from that file as well, as an `Engine` and `duetvl infer` do. `on_text` is called with each new piece
        of text; it needs a model with a tokenizer.
        """
        answers = self.generate_many(
            [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, on_text=on_text
        )
        return answers[0]

    def generate_many(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """`generate` for several prompts at once, in packed passes; one Generation for each prompt, in order.

        Greedy answers do not depend on their neighbours; with sampling, a prompt's place in the list names its random
        stream. `on_text` takes a single prompt: ConfigError with several.
        """
        samples = [p if isinstance(p, Sample) else self.processor(p, add_generation_prompt=True) for p in prompts]
        processor = self._processor_if_any()
        defaults = self.defaults if processor else Defaults()
        if on_text and len(samples) != 1:
            raise ConfigError(f"on_text follows the answer to one prompt, found {len(samples)}; use Engine.stream")
        if on_text and processor is None:
            raise ConfigError("on_text needs text, and this model has no tokenizer; load it from a directory with one")
        answers = generate(
            self,
            samples,
            max_new_tokens=max_new_tokens,
            stop=defaults.stop_ids if stop is None else frozenset(stop),
            sampling=sampling,
            tokenizer=processor.tokenizer if processor and on_text else None,
            on_delta=(lambda number, delta: on_text(delta.text) if delta.text else None) if on_text else None,
        )
        return [Generation(tokens, processor.decode(tokens) if processor else None) for tokens in answers]

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write a directory that transformers loads, tokenizer and settings included.

        ConfigError for a model with an adapter: `merge_adapter` first, or `save_adapter`.
        """
        loading.save_model(self, directory, overwrite=overwrite)

    def merge_adapter(self) -> None:
        """Merge the adapter into the weights, computed in float32 and rounded once to their dtype.

        Afterwards the model has no adapter, all of it is trainable, and `save_pretrained` writes it. ConfigError if
        there is no adapter.
        """
        adapters.merge_adapter(self)

    def save_adapter(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write only the adapter, in PEFT's layout. ConfigError if there is no adapter.

        With `overwrite` an adapter is replaced; a directory with a model is refused with CheckpointError.
        """
        adapters.save_adapter(self, directory, overwrite=overwrite)

    def with_adapter(self, directory: str | Path) -> Model:
        """This model with the adapter in a directory; both share the model's weights. For `Engine(adapters=)`.

        Raises CheckpointError or ConfigError for an adapter that does not fit.
        """
        stored = adapters.open_adapter_for(self.config, directory)
        shared = {
            path: Parameter(path, p.tensor, part=p.part) for path, p in self.parameters.items() if not is_adapter(path)
        }
        other = Model(self.config, self.backend, shared, self.dtype)
        other.source, other.adapter_directory = self.source, Path(directory)
        other.layout, other.stages, other.relay = self.layout, self.stages, self.relay
        adapters.load_adapter(other, stored)
        return other

    def _processor_if_any(self) -> Processor | None:
        return self.processor if self.source is not None and self.source.has_tokenizer else None


class Engine(inference.Engine):
    """The engine for a `Model` read from a directory: answers have text, by the model's own tokenizer, and requests
    without sampling or end tokens use the model's `defaults`.
    """

    def __init__(
        self,
        model: Generator,
        *,
        tokenizer: TextTokenizer | None = None,
        defaults: Defaults | None = None,
        **options: Any,
    ):
        """Options are those of `duetvl.inference.engine.Engine`; `tokenizer` and `defaults` override the model's."""
        if isinstance(model, Model) and (processor := model._processor_if_any()) is not None:
            if tokenizer is None and processor.tokenizer.is_byte_level:
                tokenizer = processor.tokenizer
            defaults = defaults or model.defaults
        super().__init__(model, tokenizer=tokenizer, defaults=defaults, **options)


def load_model(
    path: str | Path,
    *,
    backend: Backend,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a model onto a backend, with weights in `dtype`. Nothing is converted on disk.

    `path`: a directory in the Hugging Face layout; an id, `Qwen/Qwen2.5-VL-7B-Instruct` (Hugging Face) or
    `modelscope:Qwen/Qwen2.5-VL-7B-Instruct`; a run, `runs/x` or `runs/x@1200`; an adapter; a MindSpeed-MM directory.
    `base`: the base model, in the Hugging Face layout, of a MindSpeed-MM directory, or of an adapter or a run whose
    base model has moved.

    dtype: float32, bfloat16 or float16. `adapter` is a LoRA adapter's directory in PEFT's layout; the adapter is
    float32 and then the only trainable part. mesh: the layout over the ranks of this run. Each rank calls this function
    and gets its part; afterwards all ranks must make the same calls with the same values. Raises CheckpointError for
    files that are missing, damaged or of another model, ConfigError for features that duetvl does not implement.
    """
    together = (lambda work: work()) if mesh is None else Ranks(backend.collectives).together
    source, stored = together(lambda: _opened(path, adapter, base))
    division = ALONE if mesh is None else Division.of(source.config, mesh, backend.collectives.rank)
    read = partial(loading.load_model, source, backend=backend, dtype=dtype, make=Model, division=division)
    model: Model = together(read)
    if mesh is not None:
        placed(model, division, backend)
    if isinstance(source, AdapterModel):
        model.source = source.below
    if stored is not None:
        together(lambda: adapters.load_adapter(model, stored))
    return model


def _opened(
    path: str | Path, adapter: str | Path | None, base: str | Path | None
) -> tuple[ModelDirectory, AdapterTensors | None]:
    """A model, and the adapter that belongs on it."""
    source = open_model(path, base=base)
    own = source.adapter
    if adapter is not None and own is not None:
        raise ConfigError(f"{path}: has an adapter of its own; merge it first (duetvl merge), or leave out {adapter}")
    return source, own if adapter is None else adapters.open_adapter_for(source.config, adapter)


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    resume: str | None = None,
    restart: bool = False,
    prepare: Callable[[Recipe, Backend], Job] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Run a recipe: a file, a mapping of its sections, or a `Recipe`; see `duetvl.training.train.train`.

    Adds the callbacks that answer validation samples (`log.generate`) and run benchmarks (`eval.tasks`).
    """
    read = read_recipe(recipe, overrides)
    own: list[Callback] = [SampleAnswers()] if read.log.generate else []
    own += [TaskScores()] if read.eval.tasks else []
    return train_module.train(
        read, backend=backend, resume=resume, restart=restart, prepare=prepare, callbacks=[*own, *callbacks]
    )


def load_processor(path: str | Path, *, base: str | Path | None = None) -> Processor:
    """The processor of a model, which is given as for `load_model`: its tokenizer, template and picture settings.

    Needs config.json, tokenizer.json and preprocessor_config.json; no weights, no framework. Raises
    CheckpointError for missing or damaged files, ConfigError for features that duetvl does not implement.
    """
    source = open_model(path, base=base, weights=False)
    return Processor.from_directory(source.path, source.family)
