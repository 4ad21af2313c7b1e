"""`duetvl serve` under load: against a FastAPI loop around transformers' `generate`, against its engine alone, and 200
clients at once for a minute, some of which leave in the middle.

    python benchmarks/serve.py [compare] [overhead] [soak] [--requests 64] [--new 64] [--rounds 3] [--write]

compare: requests a second and time to the first text, of streams, from 1 and from 16 clients. The plain loop answers
one request at a time, as such loops do. overhead: tokens of 16 streams over HTTP for a second of the processor's time,
which other work on the machine does not change, against the same engine without a server. soak: what 200 clients get,
how long /health takes meanwhile (asked from a process of its own; beside it a bare uvicorn that does nothing else), and
the server's memory. All with random models, their weights in float32, on the CPU, the last with a tiny one; the first
two with texts alone, as transformers' processor wants torchvision. `--write` puts the tables and what they ran on into
benchmarks/results/serve.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from http_load import Client, Outcome, Payload, all_answered, percentile, soak
from http_servers import Running, bare, plain_loop, processor_seconds, served

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))

SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "max_position_embeddings": 32768,
}  # fmt: skip
STREAMS = 16
CACHE = 64 * 1024  # tokens
WORDS = ("the", "picture", "shows", "a", "red", "boat", "on", "wide", "river", "under", "grey", "clouds", "while")


def text(rng: random.Random) -> str:
    """A question of 100 to 300 letters, each of which is a token."""
    words = [rng.choice(WORDS) for _ in range(80)]
    return " ".join(words)[: rng.randint(100, 300)]


def payload(content: Any, new: int, *, stream: bool = True) -> dict[str, Any]:
    """A request whose answer has `new` tokens."""
    own: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    messages = [{"role": "user", "content": content}]
    return {
        "model": "tiny", "messages": messages, "max_tokens": new, "ignore_eos": True, "temperature": 0.0,
        "stream": stream, **own,
    }  # fmt: skip


def payloads(count: int, new: int) -> list[Payload]:
    """Questions, all different: nothing is found in a cache."""
    rng = random.Random(7)
    return [payload(f"{number} {text(rng)}", new) for number in range(count)]


FIRST = payload("hello", 4)


def ours(directory: Path, *options: str) -> list[str]:
    """The command of our server."""
    own = ["--host", "127.0.0.1", "--port", "PORT", "--served-name", "tiny", "--device", "cpu", "--dtype", "float32"]
    own += ["--context", "2048", "--cache-tokens", str(CACHE)]
    return [sys.executable, "-m", "duetvl", "serve", str(directory), *own, *options]


# -- against a plain loop ----------------------------------------------------------------------------------------------


def compare(directory: Path, chosen: argparse.Namespace) -> list[str]:
    """The table of both servers."""
    contenders = {
        "FastAPI + transformers generate": [sys.executable, __file__, "--plain", str(directory), "PORT"],
        "duetvl serve": ours(directory),
    }
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(chosen.rounds):  # in turns: what else this machine does hits both
        for name, command in contenders.items():
            with served(command, FIRST) as server:
                for clients in (1, STREAMS):
                    count = chosen.requests if clients > 1 else max(4, chosen.requests // STREAMS)
                    one = one_round(server, payloads(count, chosen.new), clients)
                    rounds.setdefault((name, clients), []).append(one)
    lines = [
        "| | clients | requests/s | tokens a processor second | first text p50 | p99 |",
        "|---|---|---|---|---|---|",
    ]
    base = next(iter(contenders))
    for (name, clients), found in rounds.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        theirs = rounds[base, clients]
        ratios = [middle[key] / statistics.median(one[key] for one in theirs) for key in ("requests", "efficiency")]
        lines.append(
            f"| {name} | {clients} | {middle['requests']:.2f} ({ratios[0]:.2f}) | {middle['efficiency']:.0f} "
            f"({ratios[1]:.2f}) | "
            f"{middle['p50'] * 1000:.0f} ms | {middle['p99'] * 1000:.0f} ms |"
        )
    note = f"{chosen.new} tokens an answer; medians of {chosen.rounds} rounds in turns (share of the plain loop's)."
    return ["## Against a plain loop", "", *lines, "", note]


def one_round(server: Running, questions: Sequence[Payload], clients: int) -> dict[str, float]:
    """Rates and times of one load."""
    start, busy = time.perf_counter(), server.processor_seconds()
    outcomes = asyncio.run(all_answered(server.port, questions, clients))
    seconds, busy = time.perf_counter() - start, server.processor_seconds() - busy
    assert all(outcome.status == 200 for outcome in outcomes), Counter(outcome.status for outcome in outcomes)
    firsts = [outcome.first for outcome in outcomes if outcome.first is not None]
    return {
        "requests": len(outcomes) / seconds,
        "efficiency": sum(outcome.tokens for outcome in outcomes) / busy,
        "p50": percentile(firsts, 0.5),
        "p99": percentile(firsts, 0.99),
    }


# -- against the engine alone ------------------------------------------------------------------------------------------


def overhead(directory: Path, chosen: argparse.Namespace) -> list[str]:
    """Tokens a second of 16 answers at once, over HTTP and without."""
    alone, over_http = [], []
    for _ in range(chosen.rounds):
        command = [sys.executable, __file__, "--engine", str(directory), "--new", str(chosen.new)]
        limits = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=limits, check=True, stdout=subprocess.PIPE, text=True)
        alone.append(float(done.stdout.splitlines()[-1]))
        with served(ours(directory), FIRST) as server:
            over_http.append(one_round(server, payloads(2 * STREAMS, chosen.new), STREAMS)["efficiency"])
    shares = [1 - http / own for http, own in zip(over_http, alone, strict=True)]
    lines = [
        "| | tokens a processor second |", "|---|---|",
        f"| the engine alone, {STREAMS} requests at a time | {statistics.median(alone):.0f} |",
        f"| `duetvl serve`, {STREAMS} streams | {statistics.median(over_http):.0f} |",
    ]  # fmt: skip
    note = f"Overhead {statistics.median(shares):.1%} (each round: {', '.join(f'{share:.1%}' for share in shares)})."
    return ["## Against the engine alone", "", *lines, "", note]


def engine_alone(directory: Path, new: int) -> float:
    """Tokens a processor second of the same requests, the next one submitted as soon as one is answered."""
    import duetvl
    from duetvl.data.encode import Processor

    model = duetvl.load_model(directory, backend=duetvl.load_backend("torch_npu", device="cpu"), dtype="float32")
    processor = Processor.from_directory(directory, model.family)
    engine = duetvl.Engine(model, tokenizer=processor.tokenizer, context=2048, cache_tokens=CACHE)
    samples = [processor(question["messages"], add_generation_prompt=True) for question in payloads(2 * STREAMS, new)]
    engine.generate([duetvl.Request(samples[0], max_new_tokens=4, stop_ids=frozenset())])
    waiting, under_way, start = list(reversed(samples)), 0, time.process_time()
    while waiting or under_way:
        while waiting and under_way < STREAMS:
            engine.submit(duetvl.Request(waiting.pop(), max_new_tokens=new, stop_ids=frozenset()))
            under_way += 1
        under_way -= sum(delta.completion is not None for delta in engine.step())
    return len(samples) * new / (time.process_time() - start)


# -- many clients ------------------------------------------------------------------------------------------------------


def soaked(directory: Path, chosen: argparse.Namespace) -> list[str]:
    """What many clients get."""
    idle = [sys.executable, __file__, "--bare", "PORT"]
    full = ours(directory, "--max-requests", str(chosen.clients * 3 // 4))
    with served(idle) as other, served(full, FIRST) as server:
        asyncio.run(soak(server.port, mixture(chosen.new), chosen.clients, 5.0, leaving=0.2))  # to warm it up
        command = [
            sys.executable,
            __file__,
            "--probe",
            str(server.port),
            str(server.pid),
            str(other.port),
            str(chosen.seconds),
        ]
        probe = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        outcomes = asyncio.run(soak(server.port, mixture(chosen.new), chosen.clients, chosen.seconds, leaving=0.2))
        seen = json.loads(probe.communicate()[0].splitlines()[-1])
        after = asyncio.run(at_rest(server.port))
    return ["## Many clients", "", *soak_table(outcomes, seen, after, chosen)]


def mixture(new: int) -> list[Payload]:
    """Streams and whole answers, short and long, some with a picture of their own."""
    rng, found = random.Random(3), []
    for number in range(64):
        content: Any = f"{number} {text(rng)}"
        if number % 4 == 0:
            url = {"url": "data:image/png;base64," + base64.b64encode(picture(number)).decode()}
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": content}]
        found.append(payload(content, rng.randint(1, new), stream=number % 3 > 0))
    return found


def picture(number: int) -> bytes:
    """A PNG file of 200 x 150 pixels of noise."""
    import numpy as np
    from PIL import Image

    file, rng = io.BytesIO(), np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (150, 200, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


async def probed(port: int, pid: int, other: int, seconds: float) -> dict[str, Any]:
    """How long /health takes here and at another server, and this one's memory, as time goes by.

    `busy` is what this one's threads had of the processors meanwhile: about how long it would take if nothing else ran.
    """
    end, clients = time.perf_counter() + seconds, (Client(port), Client(other))
    seen: dict[str, list[float]] = {"times": [], "other": [], "busy": [], "memory": []}
    while time.perf_counter() < end:
        busy = processor_seconds(pid)
        seen["times"].append(await timed(clients[0]))
        seen["busy"].append(processor_seconds(pid) - busy)
        seen["other"].append(await timed(clients[1]))
        if time.perf_counter() > end - seconds + len(seen["memory"]):  # once a second
            told = (await clients[0].get("/metrics"))[1].decode()
            seen["memory"].append(value_of(told, "process_resident_memory_bytes"))
        await asyncio.sleep(0.05)
    return seen


async def timed(client: Client) -> float:
    """Seconds of one /health; infinite where it fails."""
    start = time.perf_counter()
    status, _ = await client.get("/health")
    return time.perf_counter() - start if status == 200 else float("inf")


async def at_rest(port: int) -> dict[str, float]:
    """The server's own numbers once nobody asks: whoever left has left nothing behind."""
    client = Client(port)
    for _ in range(300):
        told = (await client.get("/metrics"))[1].decode()
        left = value_of(told, "vllm:num_requests_running") + value_of(told, "vllm:num_requests_waiting")
        if not left:
            break
        await asyncio.sleep(0.1)
    return {
        name: value_of(told, f"vllm:{name}")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }


def value_of(told: str, name: str) -> float:
    """The first value of a metric in Prometheus' text."""
    line = next(line for line in told.splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    return float(line.rpartition(" ")[2])


def soak_table(
    outcomes: Sequence[Outcome], seen: dict[str, Any], after: dict[str, float], chosen: argparse.Namespace
) -> list[str]:
    """What came of it."""
    stayed = [outcome for outcome in outcomes if not outcome.left]
    statuses = Counter(outcome.status for outcome in stayed)
    good = [outcome for outcome in stayed if outcome.status == 200]
    firsts = [outcome.first for outcome in good if outcome.first is not None]
    memory = [value / 2**20 for value in seen["memory"]]
    thirds = [statistics.mean(memory[len(memory) * part // 3 : len(memory) * (part + 1) // 3]) for part in range(3)]
    return [
        "| | |", "|---|---|",
        f"| clients, seconds | {chosen.clients}, {chosen.seconds:g} |",
        f"| responses by status | {', '.join(f'{status}: {count}' for status, count in sorted(statuses.items()))} |",
        f"| requests that were left in the middle | {len(outcomes) - len(stayed)} |",
        f"| answers a second | {len(good) / chosen.seconds:.1f} |",
        f"| first text p50, p99 | {percentile(firsts, 0.5):.2f} s, {percentile(firsts, 0.99):.2f} s |",
        f"| /health p50, p99, longest of {len(seen['times'])} | {in_milliseconds(seen['times'])} |",
        f"| processor time that the server had meanwhile | {in_milliseconds(seen['busy'])} |",
        f"| /health of a bare uvicorn beside it | {in_milliseconds(seen['other'])} |",
        f"| resident memory, mean of each third of the time | {', '.join(f'{mean:.0f}' for mean in thirds)} MiB |",
        f"| at rest afterwards | {', '.join(f'{name} {value:g}' for name, value in after.items())} |",
    ]  # fmt: skip


def in_milliseconds(times: Sequence[float]) -> str:
    """Median, 99th percentile and longest."""
    return ", ".join(
        f"{value * 1000:.1f} ms" for value in (percentile(times, 0.5), percentile(times, 0.99), max(times))
    )


# -- the command -------------------------------------------------------------------------------------------------------

PARTS = {"compare": compare, "overhead": overhead, "soak": soaked}


def main() -> None:
    """Run the parts that are asked for and print, or write, their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plain", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--probe", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.plain:
        plain_loop(Path(chosen.plain[0]), int(chosen.plain[1]))
    elif chosen.engine:
        print(engine_alone(Path(chosen.engine), chosen.new))  # noqa: T201
    elif chosen.probe:
        port, pid, other, seconds = chosen.probe
        print(json.dumps(asyncio.run(probed(int(port), int(pid), int(other), float(seconds)))))  # noqa: T201
    elif chosen.bare:
        bare(chosen.bare)
    else:
        run(chosen)


def run(chosen: argparse.Namespace) -> None:
    """Make a model, and measure."""
    import tiny_run

    with tempfile.TemporaryDirectory() as directory:
        model = tiny_run.write_model(Path(directory) / "model", **SIZES)
        tiny = tiny_run.write_model(Path(directory) / "tiny")
        lines = ["# `duetvl serve` under load", ""]
        for name in chosen.parts or PARTS:
            lines += [*PARTS[name](tiny if name == "soak" else model, chosen), ""]
    lines += [
        "Random models in float32: 8 layers of width 512 (26 million parameters); for many clients 2 of width 32.",
        f"{platform.machine()}, {os.cpu_count()} cores that are shared with other work (load average "
        f"{os.getloadavg()[0]:.1f} at the end) and with the clients themselves, 1 thread, "
        f"Python {platform.python_version()}.",
        "",
        f"Command: `python benchmarks/serve.py {' '.join(sys.argv[1:])}`",
    ]
    print("\n".join(lines))  # noqa: T201
    if chosen.write:
        (ROOT / "benchmarks" / "results" / "serve.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
