"""Scorers, the score store, and scores of any text."""
