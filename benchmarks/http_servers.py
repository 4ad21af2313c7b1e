"""The servers that benchmarks/serve.py measures, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from http_load import CHAT, Client, Payload


def processor_seconds(pid: int) -> float:
    """Of the threads of a process that live, so far: to the microsecond."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


class Running(NamedTuple):
    """A server's port and process."""

    port: int
    pid: int

    def processor_seconds(self) -> float:
        """Of all its threads so far, those that have ended too: to the hundredth."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(command: Sequence[str], first: Payload | None = None) -> Iterator[Running]:
    """A server as long as it runs, which has answered a `first` request; `PORT` in the command is its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "PORT" else word for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "4"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, env=environment, stderr=log)
        try:
            asyncio.run(ready(port, process, first))
            yield Running(port, process.pid)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode("utf-8", "replace")[-4000:])
            sys.stderr.write(f"status of the server: {process.poll()}\n")
            raise
        finally:
            process.terminate()
            process.wait()


async def ready(port: int, process: subprocess.Popen[bytes], first: Payload | None) -> None:
    """Wait until a server is there."""
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}: {process.args}")
        try:
            status, _ = await Client(port).get("/health")
            break
        except OSError:
            await asyncio.sleep(0.1)
    assert status == 200
    if first is not None:
        outcome = await Client(port).post(first)
        assert outcome.status == 200 and outcome.tokens == first["max_tokens"], outcome


def bare(port: int) -> None:
    """A server that knows /health alone."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", lifespan="off")


def plain_loop(directory: Path, port: int) -> None:
    """What one writes in an afternoon: FastAPI around `generate`, a lock, and a streamer."""
    import threading

    import torch
    import transformers as hf
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    torch.set_num_threads(1)
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    model = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.post(CHAT)
    def chat(asked: dict[str, Any]) -> StreamingResponse:
        def chunks() -> Iterator[str]:
            question = asked["messages"][-1]["content"]
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            fed = tokenizer(prompt, return_tensors="pt")
            streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True)
            new = asked["max_tokens"]
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            with lock:
                work = threading.Thread(target=model.generate, kwargs={**fed, **options, "streamer": streamer})
                work.start()
                for piece in streamer:
                    yield "data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}) + "\n\n"
                work.join()
            yield "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": new}}) + "\n\ndata: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")
