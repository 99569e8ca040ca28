"""Samples replies from a policy and ranks them."""

from tokenward.sampling.sampler import Reply, Sampler, SamplingSettings, TransformersSampler, sample_replies

__all__ = ["Reply", "Sampler", "SamplingSettings", "TransformersSampler", "sample_replies"]
