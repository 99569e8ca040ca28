"""The trainer: a thin subclass of transformers' own, over weighted tokens."""
