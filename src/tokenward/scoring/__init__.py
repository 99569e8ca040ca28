"""Scorers, the score store, and scores of one's own text."""
