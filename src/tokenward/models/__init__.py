"""Loading causal language models, and the one path from a model to per-token log-probabilities."""
