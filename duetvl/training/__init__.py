"""Recipes, the training loop, what it logs and what it saves."""
