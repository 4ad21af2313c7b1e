"""How long a training step takes on a kind of device, from a recipe's layout: docs/planning.md has the formulas."""
