"""Figures with intervals: preference on eval rows, generated text, token credit."""
