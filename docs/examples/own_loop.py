"""Fine-tuning in a loop of one's own: python own_loop.py RECIPE TARGET [section.key=value ...]"""

import sys

import numpy as np

import duetvl
from duetvl.core.optimizer import ParameterGroup
from duetvl.training.dtype import on_device
from duetvl.training.feed import DataSets, Feed
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.sft import record_encoder


def main(path, target, *overrides):
    recipe = load_recipe(path, overrides)
    be = duetvl.load_backend(recipe.backend.name, recipe.backend.device)
    recipe = on_device(recipe, be.device)  # decides `model.dtype: auto`
    model = duetvl.load_model(recipe.model.path, backend=be, dtype=recipe.model.dtype)
    model.freeze(["vision"])
    trained = [p for p in model.parameters.values() if p.trainable]
    groups = [ParameterGroup(trained, weight_decay=0.01)]
    state = be.optimizer.create(groups)

    losses = []
    one = be.ops.from_numpy(np.ones((), np.float32))
    feed = Feed(recipe, DataSets(recipe.data), record_encoder(recipe))
    with feed.started(recipe.train.steps):
        for step in range(1, recipe.train.steps + 1):
            work, total = feed.next_step(), 0.0
            for index, batch in enumerate(work.batches):
                loss, tape = model.forward_loss(batch)  # the sum over the trained tokens of the micro-batch
                be.autograd.backward(tape, [one], last=index == len(work.batches) - 1)
                total += float(be.to_numpy(loss))
            norm = be.optimizer.grad_norm(trained) / work.trained_tokens
            scale = min(1.0, 1.0 / norm) / work.trained_tokens  # of the mean over the step's tokens, clipped at 1
            be.optimizer.step(state, groups, lr=recipe.optim.lr, betas=(0.9, 0.999), eps=1e-8, grad_scale=scale)
            losses.append(total / work.trained_tokens)
            print(f"step {step}  loss {losses[-1]:.4f}  grad_norm {norm:.3g}")
    model.save_pretrained(target)
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
