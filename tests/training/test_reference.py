"""Where the reference's log-probabilities come from: all ways agree, and none follows the policy."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
from oracle import PAIRS

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.data.pairs import pair_digest
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl.adapters import add_adapters
from duetvl.models.qwen_vl.loading import load_model
from duetvl.training.preference.dpo import answer_sums
from duetvl.training.preference.reference import data_name, make_reference
from duetvl.training.preference.reference_cache import ReferenceCache
from duetvl.training.recipe.reading import make_recipe

NAME, OTHER = "qwen2.5-tied", "qwen2.5-untied"


def recipe_of(tiny, **dpo):
    lora = dpo.pop("lora", None)
    values = {"model": {"path": str(tiny.directory(NAME)), "dtype": "float32"}, "data": {"train": "-"}, "dpo": dpo}
    return make_recipe(values | ({"lora": lora} if lora else {}))


def batches(model) -> list:
    """Two micro-batches of pairs with digests."""
    given = list(PAIRS.values())
    parts = (given[:1], given[1:])
    return [replace(model.pack(part), digests=tuple(map(pair_digest, part))) for part in parts]


@dataclass
class Pairs:
    """The micro-batches as data, of which only the first `available` can be had before an interruption."""

    model: object
    available: int = 2
    files: tuple = ()
    count: int = 3

    def everything(self):
        yield from ((batch,) for batch in batches(self.model)[: self.available])
        if self.available < 2:
            raise KeyboardInterrupt


class Untouched(Pairs):
    def everything(self):
        raise AssertionError("the pairs are not to be looked at")


def move(model, be, paths=None) -> None:
    """Make the policy another model."""
    for path, parameter in model.parameters.items():
        if paths is None or path.endswith(paths):
            be.ops.assign(parameter.tensor, parameter.tensor + 0.5)


def numbers(be, reference, model) -> np.ndarray:
    return np.concatenate([np.array(be.to_numpy(sums)) for sums in reference(list(batches(model)))])


def expected(tiny, be, name) -> np.ndarray:
    """What a model that nobody changes says."""
    model = tiny.ours(name, be)
    made = batches(tiny.ours(NAME, be))
    return np.concatenate([np.array(be.to_numpy(answer_sums(be.ops, b, model.logprobs(b)))) for b in made])


def same(be, found, other) -> None:
    if be.capabilities.bitwise_repeatable:
        assert found.tobytes() == other.tobytes()
    else:
        np.testing.assert_allclose(found, other, rtol=1e-5)


def policy_of(tiny, be):
    return load_model(tiny.directory(NAME), backend=be)


def test_a_copy_of_the_starting_weights(tiny, be):
    policy = policy_of(tiny, be)
    reference = make_reference(recipe_of(tiny), policy, be)
    move(policy, be)
    same(be, numbers(be, reference, policy), expected(tiny, be, NAME))


def test_another_directory(tiny, be):
    policy = policy_of(tiny, be)
    reference = make_reference(recipe_of(tiny, reference=str(tiny.directory(OTHER))), policy, be)
    move(policy, be)
    found = numbers(be, reference, policy)
    same(be, found, expected(tiny, be, OTHER))
    assert np.abs(found - expected(tiny, be, NAME)).max() > 1


def test_the_tree_without_its_adapter(tiny, be):
    """The same tensors, not a copy; what the adapter learns does not reach it."""
    policy = policy_of(tiny, be)
    add_adapters(policy, Adapters({"model.layers.0.self_attn.q_proj": Size(2, 4.0)}), seed=0)
    reference = make_reference(recipe_of(tiny, lora={"rank": 2}), policy, be)
    move(policy, be, "lora_B.weight")
    same(be, numbers(be, reference, policy), expected(tiny, be, NAME))
    moved = [np.array(be.to_numpy(policy.logprobs(batch))) for batch in batches(policy)]
    kept = [np.array(be.to_numpy(policy.without_adapters().logprobs(batch))) for batch in batches(policy)]
    assert max(np.abs(a - b).max() for a, b in zip(moved, kept, strict=True)) > 1e-3


@pytest.mark.parametrize("which", ["own", "other", "adapter"])
def test_cached_numbers_are_those_of_the_reference(tiny, be, tmp_path, which):
    """Also for a start that goes on from a checkpoint: then the policy is another model, and the cache as it was."""
    options = {"reference": str(tiny.directory(OTHER))} if which == "other" else {}
    options |= {"lora": {"rank": 2}} if which == "adapter" else {}
    recipe = recipe_of(tiny, cache=str(tmp_path / "cache"), **options)
    policy = policy_of(tiny, be)
    if which == "adapter":
        add_adapters(policy, Adapters({"model.layers.0.mlp.up_proj": Size(2, 4.0)}), seed=0)
        move(policy, be, "lora_B.weight")
    reference = make_reference(recipe, policy, be)
    reference.prepare(Pairs(policy))
    move(policy, be)
    truth = expected(tiny, be, OTHER if which == "other" else NAME)
    same(be, numbers(be, reference, policy), truth)
    again = make_reference(recipe, policy, be)
    again.prepare(Untouched(policy))
    assert numbers(be, again, policy).tobytes() == numbers(be, reference, policy).tobytes()


def test_filling_goes_on_where_it_was_interrupted(tiny, be, tmp_path, capsys):
    recipe = recipe_of(tiny, cache=str(tmp_path))
    policy = policy_of(tiny, be)
    with pytest.raises(KeyboardInterrupt):
        make_reference(recipe, policy, be).prepare(Pairs(policy, available=1))
    (file,) = tmp_path.glob("*.logps")
    first = file.read_bytes()
    assert len(first) == 28 * 2 and not list(tmp_path.glob("*.complete"))
    reference = make_reference(recipe, policy, be)
    reference.prepare(Pairs(policy))
    assert file.read_bytes().startswith(first) and file.stat().st_size == 28 * 4  # nothing was computed twice
    same(be, numbers(be, reference, policy), expected(tiny, be, NAME))
    assert "reference: pair 3/3" in capsys.readouterr().out


def test_a_file_that_another_run_fills_is_waited_for(tiny, be, tmp_path, capsys, monkeypatch):
    policy = policy_of(tiny, be)
    reference = make_reference(recipe_of(tiny, cache=str(tmp_path)), policy, be)
    with ExitStack() as other:
        other.enter_context(ReferenceCache(tmp_path, reference.cache.reference).filling())
        monkeypatch.setattr("time.sleep", lambda seconds: other.close())
        reference.prepare(Pairs(policy))
    same(be, numbers(be, reference, policy), expected(tiny, be, NAME))
    assert capsys.readouterr().out.count("reference: waiting for another run") == 1


def test_numbers_that_are_not_finite_are_not_kept(tiny, be, tmp_path):
    policy = policy_of(tiny, be)
    norm = policy.parameters["model.norm.weight"].tensor
    be.ops.assign(norm, norm + float("nan"))
    with pytest.raises(CheckpointError, match="log-probability of sample text pair is not finite"):
        make_reference(recipe_of(tiny, cache=str(tmp_path)), policy, be).prepare(Pairs(policy))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 28


def test_a_reference_of_another_kind_is_refused(tiny, be):
    policy, other = policy_of(tiny, be), tiny.directory("qwen2-tied")
    with pytest.raises(ConfigError, match=r"dpo.reference .*qwen2-tied has another clock for videos compared with"):
        make_reference(recipe_of(tiny, reference=str(other)), policy, be)


def test_what_tells_data_apart(tiny, tmp_path):
    """A file's size or time, a setting that encodes; not how steps are made of it."""
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    recipe = recipe_of(tiny)
    name = data_name(recipe, [file])
    assert data_name(recipe, [file]) == name
    data = recipe.data
    harmless = recipe.model_copy(update={"data": data.model_copy(update={"pack_tokens": 7, "workers": 3})})
    assert data_name(harmless, [file]) == name
    others = [recipe.model_copy(update={"data": data.model_copy(update={"max_pixels": 10**6})})]
    names = {data_name(other, [file]) for other in others} | {data_name(recipe, [file, file])}
    file.write_text("{} ")
    assert len(names | {name, data_name(recipe, [file])}) == 4
