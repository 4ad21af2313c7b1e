"""A training YAML of LLaMA-Factory as a recipe."""
