"""Questions a second of `duetvl eval` against a plain loop of transformers' `generate`, in one process.

One table in AI2D's format is asked by all: drawn pictures, one question each or four, which come one after the other
as in AI2D_TEST.tsv. The model is a random Qwen2.5-VL in float32 whose answers end at one of several tokens, so their
lengths differ as those of a trained model do; `--new` bounds them. duetvl reads the table, makes pixels, answers and
writes answers.jsonl; transformers gets the same words and pictures from the same table, one question at a time, or 16
padded on the left. The table, not the model, is read within the time. Contenders take turns; answers are compared.

    python benchmarks/eval.py [--questions 16] [--new 8] [--side 36] [--repeats 3] [--profile] [--write]

`--write` puts the table and what it ran on into benchmarks/results/eval.md, above what its sections say of it.
"""

from __future__ import annotations

import argparse
import base64
import cProfile
import io
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import SIDES, Limits, Row, Seconds, Side
from PIL import Image

from duetvl.data.media.images import NO_WISH
from duetvl.evaluation.answers import Asked, RunAnswers
from duetvl.evaluation.profiles import Profile, find_profile
from duetvl.evaluation.question import Question, Questions, Task
from duetvl.evaluation.run import engine_answers, keep
from duetvl.evaluation.tasks.registry import find_task

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "demo"))
import tiny_model  # the demo's tokenizer, which transformers reads as well

BATCH = 16
PAD = "<|image_pad|>"
STOPS = range(0, tiny_model.ORDINARY_TOKENS, 12)
TEXT = "What colour shape do you see Where is the it many corners has triangle square top left bottom right are there"
WORDS = TEXT.split()
Answer = Callable[[Path], Mapping[int, str]]  # a table -> the answers to its questions


@dataclass(frozen=True)
class Taken:
    """What one round took, and what it answered."""

    seconds: Seconds
    texts: Mapping[int, str]


def config() -> dict:
    """A small Qwen2.5-VL; its vision tower has one block of full attention."""
    return tiny_model.tiny_config() | {
        "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 4,
        "initializer_range": 0.05, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": {
            **tiny_model.tiny_config()["vision_config"], "depth": 3, "hidden_size": 128, "intermediate_size": 352,
            "out_hidden_size": 256, "fullatt_block_indexes": [2],
        },
    }  # fmt: skip


def write_model(directory: Path) -> None:
    """The model with its tokenizer and settings, as both libraries read them."""
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.loading import write_random_model

    def settings(target: Path) -> None:
        tiny_model.write_tokenizer(target)
        pixels = tiny_model.preprocessor_config() | {"max_pixels": 2**22}
        tiny_model.write_json(target / "preprocessor_config.json", pixels)
        ends = tiny_model.generation_config() | {"eos_token_id": [tiny_model.token_id("<|im_end|>"), *STOPS]}
        tiny_model.write_json(target / "generation_config.json", ends)

    write_random_model(ModelConfig.from_dict(config()), directory, seed=0, settings=settings)


def write_table(path: Path, questions: int, a_picture: int, side: int) -> Path:
    """AI2D_TEST.tsv with `questions` questions, `a_picture` of them about each picture of side x side tokens."""
    rng = np.random.default_rng(3)
    lines = ["index\timage\tquestion\tA\tB\tC\tD\tanswer"]
    for number in range(questions):
        cell = str(number - number % a_picture)
        if number % a_picture == 0:
            pixels = rng.integers(0, 255, (side, side + int(rng.integers(0, 5)), 3), np.uint8)
            file = io.BytesIO()
            picture = Image.fromarray(pixels)
            picture.resize((28 * picture.width, 28 * picture.height)).save(file, "PNG")
            cell = base64.b64encode(file.getvalue()).decode()
        texts = [" ".join(rng.choice(WORDS, int(rng.integers(low, high)))) for low, high in [(5, 25), *[(1, 5)] * 4]]
        lines.append("\t".join([str(number), cell, *texts, "ABCD"[number % 4]]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def questions_of(table: Path) -> tuple[Task, Profile, Questions]:
    """The task, its profile and its questions; pictures keep their size."""
    task, profile = find_task("ai2d_test"), replace(find_profile("vlmevalkit"), pixels=NO_WISH)
    return task, profile, task.questions(table, profile)


# -- contenders ------------------------------------------------------------------------------------------------------


def duetvl_eval(directory: Path, new: int, side: Side = "torch") -> Answer:
    """What `duetvl eval` does from its table to answers.jsonl."""
    import duetvl

    model = duetvl.load_model(directory, backend=duetvl.load_backend(SIDES[side], device="cpu"), dtype="float32")
    ends = frozenset(json.loads((directory / "generation_config.json").read_text())["eos_token_id"])
    tokenizer = model.processor.tokenizer

    def request(sample: duetvl.Sample, name: str) -> duetvl.Request:
        return duetvl.Request(sample, max_new_tokens=new, stop_ids=ends, id=name)

    def answer(table: Path) -> Mapping[int, str]:
        task, profile, questions = questions_of(table)
        asked = Asked(task, profile, questions, len(questions))
        with tempfile.TemporaryDirectory() as place:
            run = RunAnswers(asked, Path(place))
            engine = duetvl.Engine(model, tokenizer=tokenizer, cache_tokens=2**15)
            keep(
                run, engine_answers(engine, model.processor, asked, run.missing(), request), 0, lambda number, row: None
            )
            return {number: row["text"] for number, row in run.rows().items()}

    return answer


def transformers_loop(directory: Path, new: int, batch: int) -> Answer:
    """The processor, `generate` and the tokenizer, `batch` questions at a time in the table's order."""
    import torch
    import transformers as hf

    model = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(directory, padding_side="left")
    images = hf.Qwen2VLImageProcessor.from_pretrained(directory)

    def answer(table: Path) -> Mapping[int, str]:
        _, _, questions = questions_of(table)
        texts: dict[int, str] = {}
        for start in range(0, len(questions), batch):
            numbers = range(start, min(start + batch, len(questions)))
            fed = _inputs(images, tokenizer, [questions[number] for number in numbers])
            with torch.no_grad():
                ids = model.generate(**fed, do_sample=False, max_new_tokens=new)
            decoded = tokenizer.batch_decode(ids[:, fed["input_ids"].shape[1] :], skip_special_tokens=True)
            texts.update(zip(numbers, decoded, strict=True))
        return texts

    return answer


def _inputs(images: Any, tokenizer: Any, batch: Sequence[Question]) -> dict[str, Any]:
    """Prompts and pictures of some questions, as Qwen2_5_VLProcessor makes them; that one needs torchvision."""
    parts = [question.conversation.turns[0].parts for question in batch]
    pictures = [Image.open(io.BytesIO(image.source)).convert("RGB") for image, _ in parts]
    pixels = images(images=pictures, return_tensors="pt")
    prompts = []
    for (_, words), grid in zip(parts, pixels["image_grid_thw"], strict=True):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        prompt = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        prompts.append(prompt.replace(PAD, PAD * (int(grid.prod()) // 4)))
    return {**tokenizer(prompts, padding=True, return_tensors="pt"), **pixels}


# -- measuring -------------------------------------------------------------------------------------------------------


def contenders(directory: Path, new: int) -> dict[str, Answer]:
    """All that take part."""
    return {
        "transformers, one at a time": transformers_loop(directory, new, 1),
        f"transformers, padded batch of {BATCH}": transformers_loop(directory, new, BATCH),
        "duetvl eval": duetvl_eval(directory, new),
    }


def timed(answer: Answer, table: Path) -> Taken:
    """One round over a table."""
    texts: dict[int, str] = {}
    return Taken(harness.timed(lambda: texts.update(answer(table))), texts)


def rounds(taking_part: Mapping[str, Answer], table: Path, short: Path, repeats: int) -> dict[str, list[Taken]]:
    """Rounds in turn, after a short one of each."""
    for answer in taking_part.values():
        answer(short)
    taken: dict[str, list[Taken]] = {name: [] for name in taking_part}
    for _ in range(repeats):
        for name, answer in taking_part.items():
            taken[name].append(timed(answer, table))
    return taken


def rows_of(taken: Mapping[str, Sequence[Taken]], case: str) -> list[str]:
    """A line of the report for each contender."""
    busy = {name: statistics.median(one.seconds.cpu for one in some) for name, some in taken.items()}
    single, padded, _ = busy
    lines = []
    for name, some in taken.items():
        count, wall = len(some[0].texts), statistics.median(one.seconds.wall for one in some)
        same = sum(some[0].texts[number] == text for number, text in taken[single][0].texts.items())
        lines.append(
            f"| {case} | {name} | {count / busy[name]:.2f} | {busy[name]:.1f} | {wall:.1f} "
            f"| {busy[single] / busy[name]:.2f} | {busy[padded] / busy[name]:.2f} | {same} of {count} |"
        )
    return lines


def profile(answer: Answer, table: Path) -> str:
    """Where the time of a round goes: the functions with the most of their own."""
    recorder = cProfile.Profile()
    recorder.runcall(answer, table)
    stream = io.StringIO()
    pstats.Stats(recorder, stream=stream).sort_stats("tottime").print_stats(18)
    return stream.getvalue()


def report(lines: Sequence[str], options: argparse.Namespace, size: int) -> str:
    """The table with the machine and the command."""
    import torch
    import transformers

    head = "| case | | questions a second | processor s | wall s | of one at a time | of the batch | same answers |"
    return "\n".join(
        [
            head,
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"Medians of {options.repeats} rounds in turn, {options.questions} questions each; rates and ratios are",
            "of processor seconds: the machine is shared, and wall seconds include other work on it.",
            f"Same answers: as transformers gives one at a time. A Qwen2.5-VL with {size / 1e6:.1f} MB of weights,",
            f"float32; pictures of {options.side**2} to {options.side * (options.side + 4)} tokens; VLMEvalKit has "
            "1,280 and more.",
            f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
            f"Command: `python benchmarks/eval.py {' '.join(sys.argv[1:])}`",
        ]
    )


# -- the common table -------------------------------------------------------------------------------------------------


def rows(quick: bool, limits: Limits) -> Iterator[Row]:
    """A question of its own about each picture, on each framework of ours in a process of its own."""
    count, side, new = (8, 12, 8) if quick else (16, 36, 8)
    taken = {}
    for name in [*harness.sides(), *(["transformers"] if harness.installed("torch", "transformers") else [])]:
        figures = harness.apart(__file__, "--questions", count, "--side", side, "--new", new, "--inside", name)
        taken |= {contender: Seconds(**seconds) for contender, seconds in figures.items()}
    theirs, other = harness.fastest({name: each for name, each in taken.items() if name not in SIDES})
    work = f"a question with a picture of {side**2} tokens and more, up to {new} of its answer; float32"
    limit, command = limits.of(flops=prompt_flops(side)), harness.command_of(__file__)
    for one in harness.sides():
        yield Row("eval", one, work, taken[one] / count, theirs and theirs / count, other, limit, command)


def rounds_apart(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """In a process of its own: the least seconds of one of our frameworks, or of all ways of transformers."""
    with tempfile.TemporaryDirectory() as place:
        home, (new, *_) = Path(place), options.new
        write_model(home / "model")
        table = write_table(home / "1.tsv", options.questions, 1, options.side)
        short = write_table(home / "short.tsv", 4, 1, 4)
        if name in SIDES:
            taking_part = {name: duetvl_eval(home / "model", new, name)}
        else:
            taking_part = {k: v for k, v in contenders(home / "model", new).items() if k.startswith(name)}
        taken = rounds(taking_part, table, short, 2)
    return {who: vars(harness.least(each.seconds for each in runs)) for who, runs in taken.items()}


def prompt_flops(side: int) -> float:
    """Operations of a pass over the smallest picture that is asked about; words and answers add little to them."""
    from duetvl.core.batch import Sample
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.flops import inference_flops
    from duetvl.models.qwen_vl.host import QwenVLFamily

    model = ModelConfig.from_dict(config())
    ids = [model.vision_start_token_id, *[model.image_token_id] * side**2, model.vision_end_token_id]
    pixels = np.zeros((4 * side**2, model.vision.patch_row), np.float32)
    sample = Sample(np.array(ids), None, pixels, np.array([[1, 2 * side, 2 * side]]))
    return inference_flops(model, QwenVLFamily(model).pack([sample]))


def main() -> None:
    """Let all answer both tables, and print, or write, the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--side", type=int, default=36, help="a picture has this times as many tokens")
    parser.add_argument("--new", type=int, nargs="*", default=[8], help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="where duetvl's time goes, on the standard error output")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(rounds_apart(options.inside, options)))  # noqa: T201
        return
    import torch

    torch.set_num_threads(options.threads)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        write_model(home / "model")
        size = sum(file.stat().st_size for file in (home / "model").glob("*.safetensors"))
        tables = {many: write_table(home / f"{many}.tsv", options.questions, many, options.side) for many in (1, 4)}
        short = write_table(home / "short.tsv", 4, 1, 4)
        for new in options.new:
            taking_part = contenders(home / "model", new)
            for many, table in tables.items():
                case = f"{many} a picture, up to {new} tokens"
                lines += rows_of(rounds(taking_part, table, short, options.repeats), case)
                print("\n".join(lines[-3:]), file=sys.stderr)  # noqa: T201
                if options.profile:
                    print(profile(taking_part["duetvl eval"], table), file=sys.stderr)  # noqa: T201
    text = report(lines, options, size) + "\n"
    print(text)  # noqa: T201
    if options.write:
        page = Path(__file__).parent / "results" / "eval.md"
        _, heading, sections = page.read_text(encoding="utf-8").partition("\n## ") if page.exists() else ("", "", "")
        page.write_text(text + heading + sections, encoding="utf-8")


if __name__ == "__main__":
    main()
