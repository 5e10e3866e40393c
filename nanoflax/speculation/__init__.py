"""Speculative decoding: several tokens are guessed cheaply, and the model checks them in one pass.

The text is that of `generate.sample`: greedily (temperature=0) the same tokens, else the same distribution.
"""

from nanoflax.speculation.acceptance import accept
from nanoflax.speculation.proposals import Draft, Lookup, Proposer
from nanoflax.speculation.rounds import Round, Speculated, speculate, stream

__all__ = ["Draft", "Lookup", "Proposer", "Round", "Speculated", "accept", "speculate", "stream"]
