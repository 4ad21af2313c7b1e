"""One choice of a request from its arrival to its completion: its sequence, how tokens are chosen, what they become."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

import numpy as np

from duetvl.core.errors import DuetvlError
from duetvl.core.family import Placed
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.output import Output
from duetvl.inference.request import Answer, Completion, Delta, Finish, Request, Timings, TokenAnswer
from duetvl.inference.sampling import Chooser, Chosen, Sampling, TokenLogprob
from duetvl.inference.scheduler import Sequence
from duetvl.inference.vision_cache import media_of


class Job:
    """A choice under way. `deadline` is on the clock of time.monotonic."""

    def __init__(self, request: Request, sequence: Sequence, chooser: Chooser, answer: Answer):
        self.request, self.sequence, self.chooser, self.answer = request, sequence, chooser, answer
        self.arrived = time.monotonic()
        self.deadline = None if request.timeout is None else self.arrived + request.timeout
        self.logprobs: list[TokenLogprob] = []
        self._guide = None if request.guide is None else request.guide()
        self._started: float | None = None
        self._first: float | None = None
        self._found = 0
        self._told = 0

    def begin(self) -> None:
        """It is part of a pass."""
        if self._started is None:
            self._started, self._found = time.monotonic(), self.sequence.found

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, (V,) bool; None for all."""
        return None if self._guide is None else self._guide.mask()

    def add(self, chosen: Chosen | None) -> Finish | None:
        """Take the next token, None where the logits are not finite; why it was the last one, or None.

        Raises DuetvlError for logits that are not finite, and whatever the answer raises.
        """
        sequence = self.sequence
        if chosen is None:  # the argmax of NaN is token 0: "!!!!" for ever
            raise DuetvlError(
                f"{self.request.id}: the logits after {len(sequence.tokens)} new tokens are not finite; the weights "
                f"are damaged, or too large for float16: use bfloat16 or float32"
            )
        if self._first is None:
            self._first = time.monotonic()
        sequence.tokens.append(chosen.token)
        if self._guide is not None and chosen.token not in (self.request.stop_ids or ()):
            self._guide.take(chosen.token)
        if chosen.logprob is not None:
            self.logprobs.append(chosen.logprob)
        return self.answer.add(chosen.token, chosen.logprob)

    def delta(self, completion: Completion | None = None) -> Delta:
        """What has come since this was last asked."""
        start, self._told = self._told, len(self.sequence.tokens)
        return Delta(
            self.request.id,
            self.sequence.choice,
            self.sequence.tokens[start:],
            self.answer.text_delta(),
            self.logprobs[start:],
            completion,
        )

    def finish(self, reason: Finish, error: Exception | None) -> Delta:
        """The last delta, with the completion."""
        self.answer.finish(reason)
        completion = Completion(
            id=self.request.id,
            choice=self.sequence.choice,
            token_ids=list(self.sequence.tokens),
            text=self.answer.text,
            finish_reason=reason,
            prompt_tokens=len(self.sequence.ids),
            cached_tokens=self._found,
            timings=Timings(self.arrived, self._started, self._first, time.monotonic()),
            logprobs=None if self.request.logprobs is None else self.logprobs,
            error=error,
        )
        return self.delta(completion)


def make_jobs(
    request: Request, placed: Placed, first: int, block_size: int, tokenizer: TextTokenizer | None
) -> list[Job]:
    """The choices of a request, numbered from `first` on; they share its arrays. Raises ConfigError."""
    ids = np.asarray(request.prompt.input_ids, np.int32)
    media = media_of(request.prompt, placed)
    jobs = []
    for place in range(request.n):
        choice = request.choice + place
        sequence = Sequence(request, first + place, choice, ids, placed.positions, placed.following, media, block_size)
        chooser = Chooser(
            request.sampling or Sampling(),
            ids,
            choice=choice,
            ends=request.stop_ids or (),
            min_tokens=request.min_new_tokens,
            logprobs=request.logprobs,
        )
        answer = TokenAnswer(request) if tokenizer is None else Output(request, tokenizer)
        jobs.append(Job(request, sequence, chooser, answer))
    return jobs


def masks_of(jobs: Items[Job]) -> tuple[list[np.ndarray | None], dict[int, Exception]]:
    """Which tokens may come next in each choice, and by the number of its sequence what went wrong with that."""
    masks: list[np.ndarray | None] = []
    errors: dict[int, Exception] = {}
    for job in jobs:
        try:
            masks.append(job.allowed())
        except Exception as error:
            masks.append(None)
            errors[job.sequence.number] = error
    return masks, errors
