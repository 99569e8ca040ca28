"""Token-level preference alignment of language models."""
