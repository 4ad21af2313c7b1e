"""Qwen2-VL and Qwen2.5-VL: one code, two sets of numbers."""
