"""What a run writes and shows."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
from PIL import Image

from duetvl.core.errors import ConfigError
from duetvl.training.watching.metrics import MetricsLog, check_own, read_metrics
from duetvl.training.watching.plots import figure_of, plot_runs, smoothed
from duetvl.training.watching.trackers import TensorBoard


def row(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "lr": 0.1, "grad_norm": 2.0, "tokens_per_s": 1234.5}


def write(run, steps, **options) -> None:
    log = MetricsLog(run, **options)
    for step in steps:
        log.write(row(step))
    log.close()


def test_rows_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(row(1))
    assert read_metrics(tmp_path) == [row(1)]
    log.close()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], after=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], after=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_run_that_goes_on_from_another_takes_its_rows_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", [1, 2, 3])
    write(tmp_path / "b", [3], after=2, history=tmp_path / "a")
    assert [r["step"] for r in read_metrics(tmp_path / "b")] == [1, 2, 3]
    assert [r["step"] for r in read_metrics(tmp_path / "a")] == [1, 2, 3]


def test_what_is_not_finite_is_null_as_json_has_no_other_name(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_rows_wait_for_room_and_what_never_finds_any_is_told(tmp_path):
    said, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(tmp_path, say=said.append)
    try:
        for step, room in ((1, 1000), (2, 120), (3, 120), (4, 1000), (5, 120)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            log.write(row(step))
            readable = [r["step"] for r in read_metrics(tmp_path)]
            assert readable == ([1] if step < 4 else [1, 2, 3, 4])
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file = tmp_path / "metrics.jsonl"
    waiting = f"warning: {file} cannot be written: File too large; its rows are kept for later"
    assert said == [waiting, waiting, f"warning: the last rows of {file} are lost: File too large"]


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, [1, 2], trackers=[TensorBoard(tmp_path / "tensorboard")])
    assert [file.stat().st_size > 100 for file in (tmp_path / "tensorboard").iterdir()] == [True]


def test_the_plot_is_a_picture_that_appears_whole(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 30):
        log.write(row(step, loss=3 / step))
    log.write({"step": 29, "eval_loss": 0.5})
    log.write({"step": 30, "loss": None, "lr": 0.1})
    log.close()
    plot_runs([tmp_path], tmp_path / "loss.png")
    plot_runs([tmp_path, tmp_path], tmp_path / "two.png")
    assert min(Image.open(tmp_path / "loss.png").size) > 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "two.png"]


def test_the_smoothed_line_does_not_lag():
    steps = np.arange(1, 301)
    falling = 0.3 + 11 * np.exp(-steps / 25)
    assert np.abs(smoothed(falling) / falling - 1).max() < 0.02
    for count in (0, 1, 2, 39, 40, 41, 150):
        line = 1.5 * np.arange(count) - 3
        assert np.allclose(smoothed(line), line)
    noise = np.random.default_rng(0).standard_normal(400)
    assert smoothed(noise)[40:].std() < 0.4 * noise.std()


def test_two_runs_that_agree_are_both_seen_and_so_is_their_difference(tmp_path):
    for name, shift in (("a", 0.0), ("b", 1e-4)):
        (tmp_path / name).mkdir()
        log = MetricsLog(tmp_path / name)
        for step in range(1, 31):
            log.write(row(step, loss=12 * 0.8**step + shift))
        log.close()
    loss, apart, rate = figure_of([tmp_path / "a", tmp_path / "b"]).axes
    solid, dashed = (line for line in loss.lines if "smoothed" in line.get_label())
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert np.allclose(apart.lines[0].get_ydata(), 1e-4) and apart.lines[0].get_label() == "b - a, at most 0.0001"
    assert loss.get_yscale() == "log" and rate.get_yscale() == apart.get_yscale() == "linear"
    assert [axes.get_ylabel() for axes in figure_of([tmp_path / "a"]).axes] == ["loss", "learning rate"]
    (norms,) = figure_of([tmp_path / "a"], ["grad_norm"]).axes
    assert norms.get_yscale() == "linear", "all are 2"


def test_scores_of_benchmarks_have_a_part_of_their_own(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 5):
        log.write(row(step, loss=3 / step))
    plot_runs([tmp_path], tmp_path / "loss.png")
    log.write({"step": 4, "eval_ai2d_test": 60.0, "eval_ai2d_test_low": 50.0, "eval_ai2d_test_high": 70.0})
    log.close()
    plot_runs([tmp_path], tmp_path / "scores.png")
    plot_runs([tmp_path], tmp_path / "key.png", ["eval_ai2d_test"])
    heights = [Image.open(tmp_path / f"{name}.png").size[1] for name in ("loss", "scores", "key")]
    assert heights[0] == heights[2] < heights[1]


def test_a_plot_of_nothing_is_no_error(tmp_path):
    MetricsLog(tmp_path).close()
    plot_runs([tmp_path], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_the_names_of_the_trainer_are_its_own(tmp_path):
    for name in ("loss", "step", "lr", "eval_loss", "total_tokens", "tokens_per_sample"):
        with pytest.raises(ConfigError, match=f"a callback logs '{name}', which the trainer itself writes"):
            check_own({"mine": 1, name: 2.0})
    check_own({"my_loss": 1.0, "eval_accuracy": 0.5})


def test_numbers_of_arrays_without_axes_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    with_log = MetricsLog(tmp_path)
    with_log.write({"step": 1, "a": torch.tensor(0.5), "b": np.array(2), "c": np.float32(3)})
    with_log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5, "b": 2, "c": 3.0}]


def test_numbers_of_numpy_are_written_and_what_is_none_is_named(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "a": np.float32(0.5), "b": np.int64(3), "c": np.float32("nan"), "d": [1, 2], "e": "text"})
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5, "b": 3, "c": None, "d": [1, 2], "e": "text"}]
    for value in (object(), {"x": {1, 2}}, [float("inf")]):
        with pytest.raises(ConfigError, match="the value logged as 'mine' is not a JSON value"):
            log.write({"step": 2, "mine": value})
    log.close()
    assert len(read_metrics(tmp_path)) == 1
