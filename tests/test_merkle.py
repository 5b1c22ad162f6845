from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.services import merkle

REFERENCE = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
entries = st.lists(st.binary(max_size=4), max_size=70)


def naive_root(leaves: Sequence[bytes]) -> bytes:
    """MTH of the RFC, word by word."""
    if not leaves:
        return merkle.EMPTY
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return merkle.node_hash(naive_root(leaves[:k]), naive_root(leaves[k:]))


def naive_path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if index < k:
        return [*naive_path(index, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(index - k, leaves[k:]), naive_root(leaves[:k])]


def naive_subproof(old: int, leaves: Sequence[bytes], whole: bool) -> list[bytes]:
    if old == len(leaves):
        return [] if whole else [naive_root(leaves)]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if old <= k:
        return [*naive_subproof(old, leaves[:k], whole), naive_root(leaves[k:])]
    return [*naive_subproof(old - k, leaves[k:], False), naive_root(leaves[:k])]


def subtrees(leaves: Sequence[bytes]) -> merkle.Subtree:
    known = {(0, index): leaf for index, leaf in enumerate(leaves)}
    _, nodes = merkle.extend(0, [], leaves)
    known |= {(node.level, node.index): node.hash for node in nodes}
    return lambda level, index: known[level, index]


def test_the_reference_leaves_of_certificate_transparency_have_the_reference_roots() -> None:
    leaves = [merkle.leaf_hash(data) for data in REFERENCE]
    for size, root in enumerate(ROOTS, start=1):
        peaks, _ = merkle.extend(0, [], leaves[:size])
        assert merkle.root_of(peaks).hex() == root


def test_an_empty_tree_has_the_hash_of_nothing() -> None:
    assert merkle.root_of([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_every_proof_over_the_reference_leaves_holds_and_no_other_root_does() -> None:
    leaves = [merkle.leaf_hash(data) for data in REFERENCE]
    subtree = subtrees(leaves)
    roots = [bytes.fromhex(root) for root in ROOTS]
    for size in range(1, 9):
        for index in range(size):
            path = merkle.inclusion_proof(index, size, subtree)
            for other, root in enumerate(roots, start=1):
                assert merkle.is_included(leaves[index], index, size, path, root) == (other == size)
        for old in range(1, size + 1):
            path = merkle.consistency_proof(old, size, subtree)
            assert merkle.is_consistent(old, roots[old - 1], size, roots[size - 1], path)
            assert not merkle.is_consistent(old, roots[old % 8], size, roots[size - 1], path)


def test_the_published_proofs_of_certificate_transparency_come_out() -> None:
    subtree = subtrees([merkle.leaf_hash(data) for data in REFERENCE])
    assert [node.hex() for node in merkle.inclusion_proof(5, 8, subtree)] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert [node.hex() for node in merkle.consistency_proof(6, 8, subtree)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


@given(entries, st.integers(0, 70))
@settings(max_examples=150, deadline=None)
def test_growing_in_steps_gives_the_root_of_the_whole(data: list[bytes], cut: int) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    cut = min(cut, len(leaves))
    first, some = merkle.extend(0, [], leaves[:cut])
    assert merkle.unpack(cut, merkle.pack(first)) == first
    peaks, more = merkle.extend(cut, first, leaves[cut:])
    assert merkle.root_of(peaks) == naive_root(leaves)
    assert len(some) + len(more) == merkle.node_count(len(leaves))
    for node in (*some, *more):
        start, width = node.index << node.level, 1 << node.level
        assert node.hash == naive_root(leaves[start : start + width])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_proofs_are_those_of_a_naive_implementation(data: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(item) for item in data.draw(entries.filter(bool))]
    index = data.draw(st.integers(0, len(leaves) - 1))
    old = data.draw(st.integers(1, len(leaves)))
    subtree, root = subtrees(leaves), naive_root(leaves)
    path = merkle.inclusion_proof(index, len(leaves), subtree)
    assert path == naive_path(index, leaves)
    assert merkle.is_included(leaves[index], index, len(leaves), path, root)
    proof = merkle.consistency_proof(old, len(leaves), subtree)
    assert proof == naive_subproof(old, leaves, True)
    assert merkle.is_consistent(old, naive_root(leaves[:old]), len(leaves), root, proof)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_proof_with_one_change_does_not_hold(data: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(bytes([n])) for n in range(data.draw(st.integers(2, 40)))]
    size, root = len(leaves), naive_root(leaves)
    index = data.draw(st.integers(0, size - 1))
    path = merkle.inclusion_proof(index, size, subtrees(leaves))
    place, bit = data.draw(st.integers(0, len(path) - 1)), data.draw(st.integers(0, 255))
    changed = list(path)
    changed[place] = (int.from_bytes(path[place]) ^ 1 << bit).to_bytes(merkle.WIDTH)
    assert not merkle.is_included(leaves[index], index, size, changed, root)
    assert not merkle.is_included(leaves[index], index, size, path[:-1], root)
    assert not merkle.is_included(leaves[index], index, size, [*path, root], root)
    assert not merkle.is_included(leaves[index], (index + 1) % size, size, path, root)


@pytest.mark.parametrize(("old", "new"), [(0, 3), (4, 3), (-1, 2)])
def test_no_consistency_proof_runs_backwards(old: int, new: int) -> None:
    with pytest.raises(ValueError, match="not an earlier state"):
        merkle.consistency_proof(old, new, lambda level, index: b"")
    assert not merkle.is_consistent(old, b"", new, b"", [])


def test_peaks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes are not the peaks of a tree of 3"):
        merkle.unpack(3, bytes(32))
