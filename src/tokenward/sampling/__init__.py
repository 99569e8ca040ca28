"""Replies sampled from a policy, and what ranks them."""

from tokenward.sampling.sampler import (
    Reply,
    Sampler,
    SamplingSettings,
    TransformersSampler,
    sample_replies,
)

__all__ = ["Reply", "Sampler", "SamplingSettings", "TransformersSampler", "sample_replies"]
