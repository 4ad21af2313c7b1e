"""Backends: one folder each, the only places that name a framework."""
