"""Published data sets to records that training reads: LLaVA-Instruct with its pictures, RLHF-V's Parquet files.

Nothing is overwritten, results appear whole or not at all, and every record that is left out is written down with
the reason.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from duetvl.core.errors import DataError
from duetvl.data.conversation import Conversation, ImagePart, Preference, Turn, VideoPart
from duetvl.data.draft import MissingMedia
from duetvl.data.formats.reading import read_record
from duetvl.data.formats.tools import parse_json
from duetvl.data.sources.json_files import open_json
from duetvl.data.sources.records import Places, Reading, Record, RecordFile
from duetvl.data.sources.tables import ParquetFile
from duetvl.storage.files import staged_directory, staged_file

PAIRS: Final = "rlhf-v.jsonl"
DROPPED: Final = "dropped.txt"
_SHOWN: Final = 3  # of the records that were left out


@dataclass
class Report:
    """What became of the records: where the good ones are, and why the others were left out."""

    output: Path
    written: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (kind, place and reason)

    def lines(self) -> Iterator[str]:
        """For a reader."""
        yield f"wrote {self.written} record{'s' * (self.written != 1)} to {self.output}"
        if self.dropped:
            counts = Counter(kind for kind, _ in self.dropped)
            yield f"left out {len(self.dropped)}: {', '.join(f'{n} {kind}' for kind, n in counts.most_common())}"
            yield from (f"  {reason}" for _, reason in self.dropped[:_SHOWN])
            more = len(self.dropped) - _SHOWN
            yield f"  {'and ' + str(more) + ' more; ' if more > 0 else ''}all are in {self.dropped_file}"

    @property
    def dropped_file(self) -> Path:
        """The list of what was left out; it is written when there is any."""
        if self.output.name == PAIRS:
            return self.output.with_name(DROPPED)
        return self.output.with_name(f"{self.output.stem}.{DROPPED}")


def convert_llava(annotations: Path, images: Path, output: Path) -> Report:
    """LLaVA-Instruct's JSON, and the directory of its pictures (COCO's train2017), to one JSONL file of messages.

    Records whose picture is missing, or that make no sense, are left out. Paths of pictures below the directory of
    `output` are written relative to it, others whole. Raises DataError when `output` exists or nothing is left.
    """
    report = Report(output)
    _refuse_existing(output, report.dropped_file)
    if not images.is_dir():
        raise DataError(f"{images}: no such directory of pictures")
    with staged_file(output) as out:
        _convert([_opened(annotations)], report, out, lambda record: _llava_record(record, images, output.parent))
    _write_dropped(report, report.dropped_file)
    return report


def convert_rlhf_v(files: Sequence[Path], output: Path) -> Report:
    """Parquet files of preference pairs with their pictures to a file of records and a directory of pictures.

    They are RLHF-V's or RLAIF-V's, of openbmb or of llamafactory. `output` is the file where its name ends in .json or
    .jsonl, with the pictures in a directory of its name beside it, as for recipes; otherwise it is a directory for
    both. Rows without a readable picture, a question and two answers are left out. Raises DataError when the output
    exists (a directory with something in it), or nothing is left.
    """
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    tables = [ParquetFile(path, Reading()) for path in files]
    if output.suffix in (".json", ".jsonl"):
        report, pictures = Report(output), output.with_suffix("")
        _refuse_existing(output, report.dropped_file)
        _refuse_filled(pictures)
        with staged_file(output) as out, staged_directory(pictures) as staging:
            _convert(tables, report, out, lambda record: _pair_record(record.values, staging, f"{pictures.name}/"))
        _write_dropped(report, report.dropped_file)
        return report
    _refuse_filled(output)
    report = Report(output / PAIRS)
    with staged_directory(output) as staging:
        pictures = staging / "images"
        pictures.mkdir()
        with open(staging / PAIRS, "w", encoding="utf-8") as out:
            _convert(tables, report, out, lambda record: _pair_record(record.values, pictures, "images/"))
        _write_dropped(report, staging / DROPPED)
    return report


def _convert(
    files: Sequence[RecordFile], report: Report, out: TextIO, convert: Callable[[Record], Mapping[str, Any]]
) -> None:
    """Write what `convert` makes of every record of the files, a `.json` file as a list; its DataErrors are noted."""
    before, between, after = ("[\n", ",\n", "\n]\n") if report.output.suffix == ".json" else ("", "\n", "\n")
    found = [(file, file.places()) for file in files]
    total = sum(len(places.at) for _, places in found)
    for record in tqdm(_records(found), total=total, unit=" records", disable=None):
        try:
            if isinstance(record, DataError):
                raise record
            line = _line(convert(record))
        except MissingMedia as error:
            report.dropped.append(("missing pictures", f"{_where(record)}{error}"))
        except DataError as error:
            report.dropped.append(("bad records", f"{_where(record)}{error}"))
        else:
            out.write(f"{between if report.written else before}{line}")
            report.written += 1
    if not report.written:
        first = f"; the first: {report.dropped[0][1]}" if report.dropped else ""
        raise DataError(f"no record could be converted, {len(report.dropped)} were found{first}")
    out.write(after)


def _where(record: Record | DataError) -> str:
    return f"{record.where}: " if isinstance(record, Record) else ""


def _llava_record(record: Record, images: Path, output_directory: Path) -> dict[str, Any]:
    found = read_record(record.values, form="llava", media_dirs=(images,))
    assert isinstance(found, Conversation), "this layout has no pairs"
    pictures = []
    for part in (part for turn in found.turns for part in turn.parts):
        if isinstance(part, VideoPart) or (isinstance(part, ImagePart) and not isinstance(part.source, Path)):
            raise DataError("only records with files of pictures are converted")
        if isinstance(part, ImagePart):
            pictures.append(_existing(Path(str(part.source)), output_directory))
    return {"messages": [_message(turn) for turn in found.turns], "images": pictures}


def _message(turn: Turn) -> dict[str, str]:
    content = "".join(part if isinstance(part, str) else "<image>" for part in turn.parts)
    return {"role": turn.role, "content": content}


def _existing(picture: Path, output_directory: Path) -> str:
    if not picture.is_file():
        raise MissingMedia(f"{picture}: no such file")
    whole, base = picture.absolute(), output_directory.absolute()
    return str(whole.relative_to(base)) if whole.is_relative_to(base) else str(whole)


def _pair_record(row: Mapping[str, Any], directory: Path, prefix: str) -> dict[str, Any]:
    """The pair of a row; its pictures are written into the directory, which its paths call `prefix`."""
    texts = parse_json("text", row["text"]) if isinstance(row.get("text"), str) else {}
    if not isinstance(texts, Mapping):
        raise DataError(f"text must have question, chosen and rejected, found {type(texts).__name__}")
    found = read_record({**row, **texts}, form="preference")
    assert isinstance(found, Preference), "this layout has pairs alone"
    parts = [part for turn in found.prompt.turns for part in turn.parts if not isinstance(part, str)]
    if not parts or not all(isinstance(part, ImagePart) for part in parts):
        raise DataError("needs a question with a picture")
    record = {
        "messages": [_message(turn) for turn in found.prompt.turns],
        "chosen": _message(found.chosen),
        "rejected": _message(found.rejected),
        "images": [prefix + _saved(part.source, directory) for part in parts if isinstance(part, ImagePart)],
    }
    read_record(record, form="preference")  # says what training would say
    return record


def _saved(content: Any, directory: Path) -> str:
    """Write a picture under a name that its content gives it: pairs about one picture share the file."""
    if not isinstance(content, bytes) or not content:
        raise DataError(f"needs the bytes of its picture, found {type(content).__name__}")
    try:
        picture = Image.open(io.BytesIO(content))
        suffix = (picture.format or "bin").lower().replace("jpeg", "jpg")
        picture.draft("RGB", (1, 1))  # a JPEG is then decoded small; a truncated one still shows
        picture.load()
    except UnidentifiedImageError:
        raise DataError("its picture is not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"its picture is damaged or unreadable: {error}") from None
    name = f"{hashlib.sha256(content).hexdigest()[:20]}.{suffix}"
    if not (directory / name).exists():
        (directory / name).write_bytes(content)
    return name


def _line(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("a text contains half of a character (a lone surrogate)") from None
    return text


def _records(found: Sequence[tuple[RecordFile, Places]]) -> Iterator[Record | DataError]:
    for file, places in found:
        numbers = range(1, len(places.at) + 1) if places.numbers is None else places.numbers
        for at, number in zip(places.at, numbers, strict=True):
            try:
                yield file.read(int(at), int(number))
            except DataError as error:
                yield error


def _opened(path: Path) -> RecordFile:
    try:
        return open_json(path, Reading())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no directory {path.parent}; create it, or choose another place")
        if path.exists():
            raise DataError(f"{path}: exists already, and nothing is overwritten; choose another name or remove it")


def _refuse_filled(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise DataError(f"{directory}: exists already, and nothing is overwritten; choose another name or remove it")


def _write_dropped(report: Report, path: Path) -> None:
    if report.dropped:
        path.write_text("".join(f"{reason}\n" for _, reason in report.dropped), encoding="utf-8")
