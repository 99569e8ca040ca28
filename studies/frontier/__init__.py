"""Reward against KL: which method gets how much reward at which distance from the start."""
