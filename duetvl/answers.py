"""Answers to a few validation samples as a run goes along: training may not import generation, so they meet here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from duetvl.convert.opening import open_model
from duetvl.core.batch import IGNORE, Pair, Sample
from duetvl.data.encode import Processor
from duetvl.inference.defaults import read_defaults
from duetvl.inference.generate import generate
from duetvl.inference.request import Delta
from duetvl.training.watching.callbacks import Callback, Row, Running


class SampleAnswers(Callback):
    """Greedy answers to the first `log.generate` validation samples after every evaluation, in samples.jsonl.

    The prompt is a sample up to its last trained stretch, which is what is expected.
    """

    def on_start(self, run: Running) -> None:
        """Read the samples and the tokenizer."""
        source = open_model(run.recipe.model.path, base=run.recipe.model.base, weights=False)
        self.processor = Processor.from_directory(source.path, source.family)
        self.ends = read_defaults(source.path, self.processor).stop_ids
        given = run.validation_samples(run.recipe.log.generate)
        self.samples = [sample.chosen if isinstance(sample, Pair) else sample for sample in given]
        self.prompts = [prompt_of(sample) for sample in self.samples]

    def on_eval(self, run: Running, row: Row) -> None:
        """Answer them."""
        if not self.prompts:
            return
        try:
            answers = self._answers(run)
        except _Stopping:
            run.say("the run is to stop: validation samples are not answered")
            return
        run.log_answers(
            [
                {
                    "sample": sample.id,
                    "prompt": self.processor.decode(prompt.input_ids),
                    "answer": self.processor.decode(tokens),
                    "expected": self.processor.decode(sample.input_ids[len(prompt) :]),
                }
                for sample, prompt, tokens in zip(self.samples, self.prompts, answers, strict=True)
            ]
        )

    def _answers(self, run: Running) -> list[list[int]]:
        def look(prompt: int, delta: Delta) -> None:
            if run.stopping:
                raise _Stopping

        return generate(
            run.model,
            self.prompts,
            max_new_tokens=run.recipe.log.generate_tokens,
            stop=self.ends,
            on_delta=look,
        )


class _Stopping(Exception):
    """A signal has come, and what is left of the time is for saving."""


def prompt_of(sample: Sample) -> Sample:
    """A sample up to its last trained stretch; its media all lie before that."""
    if sample.labels is None:
        return sample
    trained = np.concatenate([[False], sample.labels != IGNORE])
    starts = np.flatnonzero(trained[1:] & ~trained[:-1])
    return replace(sample, input_ids=sample.input_ids[: starts[-1]], labels=None) if starts.size else sample
