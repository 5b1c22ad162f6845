"""The Merkle tree of RFC 9162, section 2.1: roots, proofs, and what a growing log keeps. Pure arithmetic.

A tree is known by its peaks: the complete subtrees it is made of, largest first, as many as its size has one
bits. Subtrees are addressed by (level, index); level 0 holds the leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

LEAF_PREFIX = b"\x00"
NODE_PREFIX = b"\x01"
WIDTH = 32
EMPTY = hashlib.sha256(b"").digest()
Subtree = Callable[[int, int], bytes]
"""The hash of a complete subtree by level and index."""


class Node(NamedTuple):
    """A complete subtree above the leaves."""

    level: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    hash: bytes


def leaf_hash(data: bytes) -> bytes:
    """The hash of an entry."""
    return hashlib.sha256(LEAF_PREFIX + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two neighbours."""
    return hashlib.sha256(NODE_PREFIX + left + right).digest()


def extend(size: int, peaks: Iterable[bytes], leaves: Iterable[bytes]) -> tuple[list[bytes], list[Node]]:
    """The peaks after more leaves, and the subtrees that these leaves completed, in order."""
    stack, nodes = list(peaks), list[Node]()
    for position, leaf in enumerate(leaves, start=size):
        level, index, node = 0, position, leaf
        while index & 1:
            level, index, node = level + 1, index >> 1, node_hash(stack.pop(), node)
            nodes.append(Node(level, index, node))
        stack.append(node)
    return stack, nodes


def root_of(peaks: Sequence[bytes]) -> bytes:
    """The tree's hash."""
    if not peaks:
        return EMPTY
    *others, root = peaks
    for peak in reversed(others):
        root = node_hash(peak, root)
    return root


def pack(peaks: Iterable[bytes]) -> bytes:
    """Peaks as they are stored."""
    return b"".join(peaks)


def unpack(size: int, packed: bytes) -> list[bytes]:
    """Stored peaks of a tree of this size.

    Raises:
        ValueError: they cannot be those of a tree of this size.
    """
    if len(packed) != WIDTH * size.bit_count():
        raise ValueError(f"{len(packed)} bytes are not the peaks of a tree of {size} leaves")
    return [packed[start : start + WIDTH] for start in range(0, len(packed), WIDTH)]


def node_count(size: int) -> int:
    """How many complete subtrees above the leaves a tree of this size has."""
    return size - size.bit_count()


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """That leaf `index` is in the tree of the first `size` leaves (2.1.3.1).

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    path, start, end = list[bytes](), 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_hash(middle, end, subtree))
            end = middle
        else:
            path.append(_hash(start, middle, subtree))
            start = middle
    return path[::-1]


def consistency_proof(old: int, new: int, subtree: Subtree) -> list[bytes]:
    """That the tree of `old` leaves is the beginning of the tree of `new` leaves (2.1.4.1).

    Raises:
        ValueError: the older tree is empty or the larger one.
    """
    if not 0 < old <= new:
        raise ValueError(f"a tree of {old} leaves is not an earlier state of one of {new}")
    path, start, end, whole = list[bytes](), 0, new, True
    while old != end:
        middle = start + _split(end - start)
        if old <= middle:
            path.append(_hash(middle, end, subtree))
            end = middle
        else:
            path.append(_hash(start, middle, subtree))
            start, whole = middle, False
    return path[::-1] if whole else [_hash(start, end, subtree), *path[::-1]]


def is_included(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Check an inclusion proof (2.1.3.2)."""
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and found == root


def is_consistent(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Check a consistency proof (2.1.4.2)."""
    if not 0 < old <= new:
        return False
    if old == new:
        return not path and old_root == new_root
    proof = list(path) if old & (old - 1) else [old_root, *path]
    if not proof:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    older = newer = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and older == old_root and newer == new_root


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _hash(start: int, end: int, subtree: Subtree) -> bytes:
    return root_of(_peaks(start, end, subtree))


def _peaks(start: int, end: int, subtree: Subtree) -> list[bytes]:
    peaks = list[bytes]()
    while start < end:
        level = (end - start).bit_length() - 1
        peaks.append(subtree(level, start >> level))
        start += 1 << level
    return peaks
