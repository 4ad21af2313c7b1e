"""Video-Bench: questions about videos in thirteen sets, with one to six options each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from duetvl.core.errors import ConfigError, DataError, did_you_mean, shown
from duetvl.data.conversation import Part
from duetvl.evaluation.media import find_medium
from duetvl.evaluation.profiles import Profile, require_profile
from duetvl.evaluation.question import Question, Questions, Score
from duetvl.evaluation.tasks.tsv_task import choice_score, no_truth, one_turn
from duetvl.storage.files import read_object

SETS: Final = (
    "ActivityNet", "Driving-decision-making", "Driving-exam", "MOT", "MSRVTT", "MSVD", "MV", "NBA", "SQA3D", "TGIF",
    "TVQA", "Ucfcrime", "Youcook2",
)  # fmt: skip
SAMPLE: Final = "sampling_data"  # some questions of each set, in a file of its own; not part of the whole
_FILES: Final = {name: f"{name}_QA_new.json" for name in SETS} | {SAMPLE: "sampling_datasets_QA_new.json"}


class _Entry(NamedTuple):
    """A question as it stands in the file of its set."""

    set: str
    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class VideoBench:
    """A directory with `SET_QA_new.json` files, or with `Eval_QA/` that holds them, and `answer/ANSWER.json`.

    `sets` are those to ask; none means all that are there.
    """

    sets: tuple[str, ...] = ()
    groups: tuple[str, ...] = ("set",)
    profiles: tuple[str, ...] = ("qwen2_vl", "vlmevalkit", "mindie", "mindie_guide")

    @property
    def name(self) -> str:
        """`videobench`, or `videobench:NBA,MOT` for some of its sets."""
        return f"videobench:{','.join(self.sets)}" if self.sets else "videobench"

    def of(self, sets: tuple[str, ...]) -> VideoBench:
        """The task for some of its sets. Raises ConfigError for an unknown one."""
        for name in sets:
            if name not in _FILES:
                raise ConfigError(f"videobench has no set {shown(name)}{did_you_mean(name, _FILES)}")
        return replace(self, sets=tuple(dict.fromkeys(sets)))

    def questions(self, path: Path, profile: Profile) -> Questions:
        """See `Task`."""
        require_profile(self.name, self.profiles, profile)
        if not path.is_dir():
            raise DataError(f"{path}: no such directory; expected that of Video-Bench, with its SET_QA_new.json files")
        folder = path / "Eval_QA" if (path / "Eval_QA").is_dir() else path
        entries = [entry for name in self._present(folder) for entry in _entries(folder, name)]
        answers = _answers((folder, path))
        around = (path, path.parent, Path())
        return Questions(len(entries), lambda number: _question(entries[number], number, answers, around, profile))

    def score(self, question: Question, answer: str, profile: Profile) -> Score:
        """See `Task`."""
        return choice_score(question, answer, profile)

    def _present(self, folder: Path) -> tuple[str, ...]:
        if self.sets:
            return self.sets
        present = tuple(name for name in SETS if (folder / _FILES[name]).is_file())
        if not present:
            raise DataError(f"{folder}: has none of Video-Bench's files; expected {_FILES[SETS[0]]} and its like")
        return present


def _entries(folder: Path, name: str) -> list[_Entry]:
    content = read_object(folder / _FILES[name], DataError, "questions by their ids")
    for key, values in content.items():
        wrong = not isinstance(values, dict) or not isinstance(values.get("choices"), dict) or "question" not in values
        if wrong:
            raise DataError(f"{folder / _FILES[name]}: {shown(key)}: expected an object with question and choices")
    return [_Entry(name, key, values) for key, values in content.items()]


def _answers(folders: tuple[Path, ...]) -> Mapping[str, Any]:
    places = [folder / part / "ANSWER.json" for folder in folders for part in ("answer", ".")]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise DataError(
            f"{places[0]}: no such file; it has Video-Bench's answers, which are separate from its questions: "
            '{"SET": {"ID": {"answer": "A"}}}'
        )
    return read_object(place, DataError, "answers by set and id")


def _question(
    entry: _Entry, number: int, answers: Mapping[str, Any], around: tuple[Path, ...], profile: Profile
) -> Question:
    choices = entry.values["choices"]
    options = {letter: str(choices[letter]) for letter in sorted(choices)}
    truth = _truth(answers, entry)
    video = str(entry.values.get("vid_path", ""))
    parts: tuple[Part, ...] = ()
    problem = ""
    try:
        parts = (profile.clip(find_medium(video, around)), profile.choice(str(entry.values["question"]), options, ""))
    except DataError as error:
        problem = str(error)
    return Question(
        index=number,
        id=f"{entry.set}/{entry.key}",
        kind="choice",
        conversation=one_turn(parts),
        truths=(truth,),
        options=options,
        groups={"set": entry.set},
        cluster=video,
        problem=problem or ("its answer is not in ANSWER.json" if not truth else no_truth((truth,), options)),
    )


def _truth(answers: Mapping[str, Any], entry: _Entry) -> str:
    of_set = answers.get(entry.set)
    answer = of_set.get(entry.key) if isinstance(of_set, dict) else None
    return str(answer.get("answer", "")) if isinstance(answer, dict) else ""


VIDEOBENCH: Final = VideoBench()
