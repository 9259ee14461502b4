"""Loss weighting for multi-task and multi-loss training on Hugging Face Accelerate."""

__version__ = "0.1.0.dev0"
