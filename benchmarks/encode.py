"""Encoding of pictures on one core: a JPEG of 448 x 448 and a conversation to patch rows and tokens.

    python benchmarks/encode.py [--images 200] [--repeats 5] [--write]     speed, against what else is installed
    python benchmarks/encode.py --memory 50000 [--write]                   memory over so many samples

The others are transformers' processor with its slow image processor (Pillow), with its fast one (torchvision), and
Qwen's recipe of qwen-vl-utils before the fast one. Those that are not installed are left out. All read the same files,
in turn, on one thread; seconds are those of the processor, not of the clock. `--write` puts
the tables and what they ran on into benchmarks/results/encode.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Limit, Limits, Row, Seconds, processor_name
from PIL import Image

from duetvl.data.encode import Processor, RecordEncoder
from duetvl.data.sources.records import Record
from duetvl.models.qwen_vl import config as configs
from duetvl.models.qwen_vl.host import QwenVLFamily

RESULTS = harness.RESULTS / "encode.md"
QUESTION = "What is shown in this picture? Describe it."
ANSWER = "Squares of many colours, blurred into each other; no object can be made out. " * 2
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PAD = "<|image_pad|>"
PROMPT = f"<|im_start|>user\n<|vision_start|>{PAD}<|vision_end|>" + QUESTION + "<|im_end|>\n"
TEXT = f"{SYSTEM}{PROMPT}<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
Contender = Callable[[Path], tuple[int, int]]  # a file to the numbers of patch rows and tokens


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=200)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--memory", type=int, metavar="SAMPLES")
    arguments.add_argument("--write", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model_directory(directory)
        if options.memory:
            report = memory(directory, options.memory)
        else:
            report = speed(directory, options.images, options.repeats)
    print(report)  # noqa: T201
    if options.write:
        write(report, "## Memory" if options.memory else "## Speed")


def make_model_directory(directory: Path) -> None:
    """Configuration and tokenizer of Qwen2.5-VL-3B; no weights."""
    sys.path.insert(0, str(harness.ROOT / "tests" / "data"))
    from qwen_tokenizer import build_qwen_tokenizer

    build_qwen_tokenizer().save(str(directory / "tokenizer.json"))
    published = Path(configs.__file__).parent / "published" / "Qwen2.5-VL-3B.json"
    (directory / "config.json").write_bytes(published.read_bytes())
    settings = {"min_pixels": 3136, "max_pixels": 12845056}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def make_pictures(directory: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """JPEG files of these heights and widths, as detailed as photographs are: 100 kB for 448 x 448."""
    paths = []
    for number, (height, width) in enumerate(sizes):
        coarse = np.random.default_rng(number).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        paths.append(directory / f"{number}.jpg")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def record(path: Path, number: int = 1, question: str = QUESTION) -> Record:
    """A conversation about one picture."""
    messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": ANSWER}]
    where = f"{path.parent}/chat.jsonl:{number}"
    return Record(path.parent / "chat.jsonl", number, where, {"messages": messages, "images": [path.name]})


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(directory: Path, images: int, repeats: int) -> str:
    """Images per second of every contender, in turns, as a table."""
    taken, made = rounds(directory, images, repeats)
    seconds = {name: [each.cpu for each in runs] for name, runs in taken.items()}
    best = {name: images / min(times) for name, times in seconds.items()}
    lines = ["| | images/s, best | images/s, median | of duetvl |", "|---|---|---|---|"]
    for name, times in seconds.items():
        median = images / statistics.median(times)
        lines.append(f"| {name} | {best[name]:.0f} | {median:.0f} | {best[name] / best['duetvl']:.2f} |")
    rows, tokens = made["duetvl"]
    head = f"{rows} patch rows and {tokens} tokens from each file; {repeats} rounds of {images} images; processor time."
    return "\n".join([head, "", *lines])


def rounds(directory: Path, images: int, repeats: int) -> tuple[dict[str, list[Seconds]], dict[str, tuple[int, int]]]:
    """What every contender takes for this number of images, in turns; and the patch rows and tokens of one."""
    paths = make_pictures(directory, [(448, 448)] * 16)
    contenders = dict(available(directory))
    made = {name: encode(paths[0]) for name, encode in contenders.items()}
    assert len({rows for rows, _ in made.values()}) == 1, made
    taken: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, encode in contenders.items():
            taken[name].append(harness.timed(partial(encode_all, encode, paths, images)))
    return taken, made


def encode_all(encode: Contender, paths: list[Path], images: int) -> None:
    """The files over and over."""
    for number in range(images):
        encode(paths[number % len(paths)])


def rows(quick: bool, limits: Limits) -> Iterator[Row]:
    """Encoding as training's workers do it; decoding the JPEG alone is what nobody gets below."""
    images = 20 if quick else 200
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model_directory(directory)
        taken, made = rounds(directory, images, 3)
        paths = sorted(directory.glob("*.jpg"))
        decoding = harness.repeated(lambda: encode_all(decode, paths, images), 3) / images
    seconds = {name: harness.least(runs) / images for name, runs in taken.items()}
    ours = seconds["duetvl, bytes as workers send them"]
    theirs, other = harness.fastest({name: each for name, each in seconds.items() if not name.startswith("duetvl")})
    work = f"a JPEG of 448 x 448 and its conversation to {made['duetvl'][0]} patch rows"
    limit, command = Limit("decoding the JPEG", decoding.cpu), harness.command_of(__file__)
    yield Row("encode", "host", work, ours, theirs, other, limit, command)


def decode(path: Path) -> tuple[int, int]:
    """A file to pixels; their numbers."""
    return Image.open(path).convert("RGB").size


def available(directory: Path) -> Iterator[tuple[str, Contender]]:
    """Every way that is installed, by name."""
    encoder = make_encoder(directory)
    yield "duetvl", lambda path: ours(encoder, path, as_bytes=False)
    yield "duetvl, bytes as workers send them", lambda path: ours(encoder, path, as_bytes=True)
    if not harness.installed("torch", "transformers"):
        return
    import torch

    torch.set_num_threads(1)
    if not harness.installed("torchvision"):  # which transformers' processor needs, whichever way images go
        yield "transformers, its slow image processor (Pillow) and its tokenizer", parts_by_hand(directory)
        return
    slow = their_processor(directory, "Qwen2VLImageProcessor")
    fast = their_processor(directory, "Qwen2VLImageProcessorFast")
    yield "transformers, slow (Pillow)", lambda path: theirs(slow, TEXT, Image.open(path))
    yield "transformers, fast (torchvision)", lambda path: theirs(fast, TEXT, Image.open(path))
    if harness.installed("qwen_vl_utils"):
        yield "qwen-vl-utils, then transformers, fast", with_utils(fast)


def parts_by_hand(directory: Path) -> Contender:
    """What Qwen2_5_VLProcessor does with a picture and a text, without it."""
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor

    tokenizer = Qwen2TokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    images = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)

    def encode(path: Path) -> tuple[int, int]:
        pixels = images(images=[Image.open(path)], return_tensors="pt")
        places = PAD * (int(pixels["image_grid_thw"].prod()) // 4)
        tokens = tokenizer([TEXT.replace(PAD, places)], return_tensors="pt")
        return len(pixels["pixel_values"]), tokens["input_ids"].shape[1]

    return encode


def with_utils(processor: Any) -> Contender:
    """Qwen's recipe."""
    from qwen_vl_utils import process_vision_info

    def encode(path: Path) -> tuple[int, int]:
        content = [{"type": "image", "image": str(path)}, {"type": "text", "text": QUESTION}]
        images, _ = process_vision_info([{"role": "user", "content": content}])
        return theirs(processor, TEXT, images[0])

    return encode


def make_encoder(directory: Path) -> RecordEncoder:
    """What training uses."""
    return RecordEncoder(Processor.from_directory(directory, QwenVLFamily(configs.load_config(directory))))


def ours(encoder: RecordEncoder, path: Path, *, as_bytes: bool) -> tuple[int, int]:
    """A record to a sample."""
    sample: Any = encoder.processor.load(encoder.draft(record(path)), as_bytes=as_bytes)
    return len(sample.pixel_values), len(sample)


def their_processor(directory: Path, image_processor: str) -> Any:
    """Qwen2_5_VLProcessor with one of its image processors."""
    import transformers
    from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLVideoProcessor

    tokenizer = Qwen2TokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    images = getattr(transformers, image_processor)(min_pixels=3136, max_pixels=12845056)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


def theirs(processor: Any, text: str, image: Any) -> tuple[int, int]:
    """A text and a picture to tensors."""
    made = processor(text=[text], images=[image], return_tensors="pt")
    return len(made["pixel_values"]), made["input_ids"].shape[1]


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(directory: Path, samples: int) -> str:
    """Memory of this process while it drafts, loads and packs so many samples, as a table.

    The pictures are 64 files of many sizes, over and over; texts are new each time. Memory is RssAnon of
    /proc/self/status, the peak within each tenth of the samples.
    """
    rng = np.random.default_rng(0)
    paths = make_pictures(directory, [(int(h), int(w)) for h, w in rng.integers(56, 400, (64, 2))])
    encoder = make_encoder(directory)
    peaks, peak = [], 0.0
    for number in range(samples):
        draft = encoder.draft(record(paths[number % len(paths)], number, f"Question {number}: {rng.random()}?"))
        encoder.pack([encoder.load(draft)])
        if number % 20 == 0:
            peak = max(peak, harness.status("RssAnon") / 2**20)
        if (number + 1) % max(1, samples // 10) == 0:
            peaks.append((number + 1, peak))
            peak = 0.0
    lines = ["| samples | peak of RssAnon, MB |", "|---|---|", *(f"| {count} | {mb:.1f} |" for count, mb in peaks)]
    return "\n".join([" ".join((memory.__doc__ or "").split()), "", *lines])


# -- report ------------------------------------------------------------------------------------------------------------


def write(report: str, title: str) -> None:
    """Replace one section of the results."""
    head = (
        "# Encoding\n\nBy `benchmarks/encode.py`; aim: at least 1.5 times the others' images per second, flat memory.\n"
    )
    sections = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    kept = {f"## {part.partition(chr(10))[0]}": part.partition("\n")[2].strip() for part in sections}
    kept[title] = f"{machine()}\n\n{report}"
    parts = [f"{name}\n\n{kept[name]}\n" for name in ("## Speed", "## Memory") if name in kept]
    RESULTS.write_text("\n".join([head, *parts]))


def machine() -> str:
    """What it ran on, and how."""
    names = ("numpy", "pillow", "tokenizers", "transformers", "torch", "torchvision", "qwen-vl-utils")
    return (
        f"`python {' '.join(['benchmarks/encode.py', *sys.argv[1:]])}` on {processor_name()}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}, {harness.versions(*names)}; "
        f"load {os.getloadavg()[0]:.1f} at the end."
    )


if __name__ == "__main__":
    main()
