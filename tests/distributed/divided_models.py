"""A tiny model whole and divided over ranks, with the same weights and batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Sample
from duetvl.core.boxes import Slices
from duetvl.core.params import Parameter
from duetvl.core.random import philox
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import Heads, slices_of
from duetvl.parallel.differentiable import Team
from duetvl.parallel.tensor import TensorLayout, sum_partial_gradients
from duetvl.training.objective import TokenLoss

VOCABULARY = 99  # no number of ranks divides it
IMAGE, START, END = 91, 92, 93
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 42, "out_hidden_size": 48, "num_heads": 4,
        "tokens_per_second": 2, "fullatt_block_indexes": [1], "window_size": 112,
    },
}  # fmt: skip
ADAPTED = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj", "visual.blocks.0.attn.qkv", "visual.merger.mlp.2",
)  # fmt: skip


def config(family: str, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": family, "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 50,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 48 // heads // 2 - 2]},
            "tie_word_embeddings": family == "qwen2_5_vl", "vision_start_token_id": START,
            "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": 90,
            "vision_config": VISION[family],
        }
    )  # fmt: skip


def heads_of(given: ModelConfig) -> Heads:
    return Heads(given.text.num_heads, given.text.num_kv_heads, given.vision.num_heads)


def cut(array: np.ndarray, part: Slices) -> np.ndarray:
    return np.concatenate([array[box.slices] for box in part.boxes], part.axis)


def model_of(be: Backend, given: ModelConfig, team: Team | None, lora: bool) -> QwenVL:
    """The model, or the part of it that this rank of the team has."""
    shapes = dict(parameter_shapes(given))
    adapters = Adapters({module: Size(3, 6.0) for module in ADAPTED}) if lora else None
    own = {} if adapters is None else adapters.shapes(shapes)

    def tensor(path: str, shape: tuple[int, ...]) -> Any:
        array = philox(3, path).standard_normal(shape, dtype=np.float32)
        array = array / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + array * 0.1
        if team is not None:
            array = cut(array, slices_of(path, shape, heads_of(given), team.index, team.size))
        return be.ops.from_numpy(np.ascontiguousarray(array, np.float32))

    model = QwenVL(given, be, {path: Parameter(path, tensor(path, shape)) for path, shape in shapes.items()})
    if adapters is not None:
        model.put_adapters(adapters, {path: tensor(path, shape) for path, shape in own.items()})
    if team is not None:
        model.layout = TensorLayout(team, heads_of(given), VOCABULARY)
    return model


def samples() -> list[Sample]:
    """One with a picture and one without, of different lengths."""
    rng = np.random.default_rng(1)
    grid = np.array([[1, 8, 12]])
    found = []
    for number, head in enumerate(([START, *[IMAGE] * 24, END], [])):
        ids = np.array([*head, *rng.integers(0, 90, 9 + number)])
        labels = np.where(np.arange(len(ids)) >= len(head) + 2, ids, -100)
        media = {"pixel_values": rng.standard_normal((96, 1176)).astype(np.float32), "image_grid_thw": grid}
        found.append(Sample(ids, labels, id=f"s{number}", **(media if head else {})))
    return found


def run(be: Backend, model: QwenVL) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and the complete gradient of every trainable parameter as this model holds it."""
    batch = model.pack(samples())
    objective = TokenLoss(be.ops, "sample")  # with weights
    last = partial(objective.loss, prepared=objective.prepare(batch))
    (loss,), tape = model.forward(batch, last)
    be.autograd.backward(tape, [be.ops.from_numpy(np.array(1, np.float32))])
    trained = [p for p in model.parameters.values() if p.trainable]
    if isinstance(model.layout, TensorLayout):
        sum_partial_gradients(model.layout.team, model.layout.heads, trained)
    (evaluated,) = model.evaluate(batch, last)
    assert abs(float(be.to_numpy(evaluated)) - float(be.to_numpy(loss))) < 1e-5
    return float(be.to_numpy(loss)), {p.path: np.array(be.to_numpy(p.main_grad)) for p in trained}


def check_divided(be: Backend, family: str, heads: tuple[int, int], team: Team, *, lora: bool = False) -> None:
    """Loss, gradients and logits of the parts are those of the whole."""
    given = config(family, *heads)
    whole, part = model_of(be, given, None, lora), model_of(be, given, team, lora)
    loss, expected = run(be, whole)
    part.recompute = "full"
    found_loss, found = run(be, part)
    assert abs(found_loss - loss) < 1e-5 * abs(loss), (found_loss, loss)
    total = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values())))
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        mine = cut(gradient, slices_of(path, gradient.shape, heads_of(given), team.index, team.size))
        # In exact arithmetic the softmax does not feel a key's bias: its gradient is rounding, here and in the whole.
        floor = 2e-3 if path.endswith("k_proj.bias") else 1e-3
        allowed = 1e-5 * max(float(np.linalg.norm(mine)), floor * total)
        assert found[path].shape == mine.shape, (path, found[path].shape, mine.shape)
        assert float(np.linalg.norm(found[path] - mine)) < allowed, (path, float(np.abs(found[path] - mine).max()))
    batch = whole.pack(samples())
    logits = np.array(be.to_numpy(part.logits(batch)))
    np.testing.assert_allclose(logits, be.to_numpy(whole.logits(batch)), rtol=0, atol=2e-5)
