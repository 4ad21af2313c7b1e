"""Weights between Hugging Face, MindSpeed-MM and our training checkpoints: numpy only, no framework, no device.

names.py says which tensors of MindSpeed-MM hold which of Hugging Face's, layouts.py which part of them lies in which
file. From that one description every conversion is made: open any layout as logical tensors (Hugging Face names),
write any layout from logical tensors.
"""
