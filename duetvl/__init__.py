"""duetvl: fine-tune, run and serve Qwen2-VL and Qwen2.5-VL on PyTorch and on MindSpore with one code."""

__version__ = "0.1.0.dev0"
