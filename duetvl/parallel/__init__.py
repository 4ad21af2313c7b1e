"""Parallel layouts, written once in terms of core's protocols; a model is known here by its sharding table."""
