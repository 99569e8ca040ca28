"""Figures with intervals: held-out preference, generated text, token credit."""
