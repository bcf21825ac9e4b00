"""Clips that show the same, among millions of them.

Perceptual hashes are compared by bands: two hashes of 192 bits that differ in at most d bits agree wholly in at
least one of d + 1 bands. So only clips that agree in a band are compared, and none is missed.
"""

from __future__ import annotations

import numpy as np

HASH_BITS = 192
# In a band that more clips share than this (plain pictures), one found to be a duplicate is not compared further:
# pairs would grow with the square of the group.
_LARGE_GROUP = 64
# Ones in each byte value; numpy has an own function for it only from version 2 on.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


def first_alike(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """For each hash the index of an earlier one that it duplicates, or -1.

    Args:
        hashes: uint8, (number, 24), in order of preference.
        max_distance: bits that may differ.

    Returns:
        int64, (number,). What is returned is never a duplicate itself.
    """
    number = len(hashes)
    duplicate_of = np.full(number, -1, np.int64)
    if number < 2 or max_distance < 0:
        return duplicate_of
    bits = np.unpackbits(hashes, axis=1)
    pairs = [
        _pairs_of_band(bits[:, begin:end], hashes, max_distance)
        for begin, end in _bands(min(max_distance + 1, HASH_BITS))
    ]
    alike = np.unique(np.concatenate(pairs), axis=0)
    # Earlier clips first: whether one stays is known before it can be the original of another.
    for first, second in alike[np.lexsort((alike[:, 0], alike[:, 1]))]:
        if duplicate_of[first] < 0 and duplicate_of[second] < 0:
            duplicate_of[second] = first
    return duplicate_of


def _bands(number: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, HASH_BITS, number + 1).round().astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _pairs_of_band(band: np.ndarray, hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Pairs (earlier, later) of near hashes that agree in this band."""
    packed = np.packbits(band, axis=1)
    keys = packed.view([("", np.uint8)] * packed.shape[1]).ravel()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(order)]]))
    found = [np.empty((0, 2), np.int64)]
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        members = np.sort(order[start : start + size])
        while len(members) > 1:
            first, later = members[0], members[1:]
            near = _ONES[hashes[later] ^ hashes[first]].sum(axis=1) <= max_distance
            found.append(np.stack([np.full(int(near.sum()), first), later[near]], axis=1))
            members = later[~near] if size > _LARGE_GROUP else later
    return np.concatenate(found)
