"""Which parameters are trained, and which of them share a learning rate and a weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duetvl.core.errors import ConfigError
from duetvl.core.optimizer import ParameterGroup
from duetvl.core.params import Parameter
from duetvl.core.patterns import Parts, require_matching
from duetvl.parallel.inventory import Inventory
from duetvl.training.recipe.optim_section import OptimSection


def parameter_groups(
    parameters: Mapping[str, Parameter], everything: Inventory, optim: OptimSection, parts: Parts
) -> list[ParameterGroup]:
    """The trainable ones of this rank's parameters, grouped by learning-rate scale and weight decay; it may have none.

    What has one axis (norms, biases) does not decay, nor what `optim.no_decay` names. Raises ConfigError where of
    `everything`, which all ranks have together, nothing is trainable, or a pattern matches no parameter, trainable or
    not.
    """
    if not any(entry.trainable for entry in everything.values()):
        raise ConfigError("nothing would be trained: every parameter is frozen; remove something from model.freeze")
    paths = list(everything)
    scales = learning_rate_scales(paths, optim, parts)
    spared = _union(require_matching("optim.no_decay", optim.no_decay, paths, parts))
    members: dict[tuple[float, float], list[Parameter]] = {}
    for path, p in parameters.items():
        if p.trainable:
            decay = optim.weight_decay if len(p.shape) > 1 and path not in spared else 0.0
            members.setdefault((scales.get(path, 1.0), decay), []).append(p)
    return [ParameterGroup(chosen, lr_scale=scale, weight_decay=decay) for (scale, decay), chosen in members.items()]


def learning_rate_scales(paths: Sequence[str], optim: OptimSection, parts: Parts) -> dict[str, float]:
    """Path -> factor of those that `optim.lr_scale` names; where several patterns match, the last one counts."""
    found = require_matching("optim.lr_scale", optim.lr_scale, paths, parts)
    return {path: optim.lr_scale[pattern] for pattern, chosen in found.items() for path in chosen}


def check_patterns(paths: Sequence[str], freeze: Sequence[str], optim: OptimSection, parts: Parts) -> None:
    """Raise whatever training would meet in the patterns of a recipe, from the names of the parameters alone."""
    frozen = require_matching("model.freeze", freeze, paths, parts)
    require_matching("optim.no_decay", optim.no_decay, paths, parts)
    learning_rate_scales(paths, optim, parts)
    if _union(frozen) == set(paths):
        raise ConfigError(f"model.freeze {', '.join(freeze)}: every parameter is frozen, nothing would be trained")


def _union(found: Mapping[str, Sequence[str]]) -> set[str]:
    return {path for chosen in found.values() for path in chosen}
