"""Random numbers that are functions of what they are for, and not of what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator of its own for each seed, purpose and position.

    Python's ``hash`` differs between processes, and no generator promises that neighbouring seeds give
    independent streams, so the three are mixed by a stable hash.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
