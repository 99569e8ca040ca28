"""Replies sampled from a policy."""

from tokenward.sampling.sampler import Reply, SamplingSettings, sample_replies

__all__ = ["Reply", "SamplingSettings", "sample_replies"]
