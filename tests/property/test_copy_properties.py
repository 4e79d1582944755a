"""Whatever the copies: joined, they give what one after another gives."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon.distributed.copies import Block, Copy, CopyPlan, contiguous

ROWS, COLS = 12, 10
SIZE = ROWS * COLS
NUM_TENSORS = 2


@st.composite
def cuts(draw, size):
    """A dim in parts: equal ones as often as not, which can be joined, and any others."""
    if draw(st.booleans()):
        step = draw(st.integers(1, size))
        return [(start, min(start + step, size)) for start in range(0, size, step)]
    inner = draw(st.sets(st.integers(1, size - 1), max_size=5))
    ends = [0, *sorted(inner), size]
    return list(pairwise(ends))


@st.composite
def apart(draw):
    """Blocks of a flat tensor that do not overlap: the parts of a grid, or a subset of them."""
    boxes = list(product(draw(cuts(ROWS)), draw(cuts(COLS))))
    if draw(st.booleans()):
        boxes = sorted(boxes, key=lambda box: box[::-1])
    kept = draw(st.lists(st.booleans(), min_size=len(boxes), max_size=len(boxes)))
    if draw(st.booleans()):
        kept = [True] * len(boxes)
    return [
        Block(a * COLS + c, (b - a, d - c), (COLS, 1))
        for ((a, b), (c, d)), keep in zip(boxes, kept, strict=True)
        if keep
    ]


@st.composite
def copy_lists(draw):
    """Copies into blocks that are apart, in or out of order, from blocks that may be anywhere."""
    copies = []
    for target in range(draw(st.integers(1, NUM_TENSORS))):
        source = draw(st.integers(0, NUM_TENSORS - 1))
        how = draw(st.sampled_from(["in turn", "alike", "anywhere", "always there"]))
        end = 0
        for put in draw(apart()):
            numel = put.shape[0] * put.shape[1]
            if how == "in turn":
                taken, end = contiguous(end, put.shape), end + numel
            elif how == "alike":
                taken = put
            else:
                start = draw(st.integers(0, SIZE - numel)) if how == "anywhere" else 0
                taken = contiguous(start, put.shape)
            copies.append(Copy(source, taken, target, put))
    # Which is copied from which is arbitrary, but targets must be apart.
    if draw(st.integers(0, 3)) == 0:
        draw(st.randoms(use_true_random=False)).shuffle(copies)
    return copies


def places_of(block):
    """The places of a block's elements, in order."""
    return [
        block.offset + sum(i * stride for i, stride in zip(index, block.strides, strict=True))
        for index in product(*map(range, block.shape))
    ]


def copied_one_by_one(copies, sources, targets):
    found = [target.clone() for target in targets]
    for copy in copies:
        for taken, put in zip(places_of(copy.taken), places_of(copy.put), strict=True):
            found[copy.target][put] = sources[copy.source][taken]
    return found


@settings(max_examples=150, deadline=None)
@given(copy_lists(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_joined_copies_give_what_they_give_one_by_one(copies, dtype):
    # Each tensor begins somewhere in its storage.
    sources = [(torch.arange(7.0 + SIZE) + 1000 * n)[7:] for n in range(NUM_TENSORS)]
    targets = [torch.full((5 + SIZE,), -1.0).to(dtype)[5:] for _ in range(NUM_TENSORS)]
    expected = copied_one_by_one(copies, sources, targets)
    plan = CopyPlan(copies)
    plan.run_(sources, targets)
    assert all(torch.equal(target, e) for target, e in zip(targets, expected, strict=True))
    assert plan.num_blocks <= len(copies)
    # Places may also be keys.
    by_key = {n: torch.full((SIZE,), -1.0).to(dtype) for n in range(NUM_TENSORS)}
    plan.run_(dict(enumerate(sources)), by_key)
    assert all(torch.equal(by_key[n], e) for n, e in enumerate(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_a_regular_grid_of_copies_is_one_copy(num_peers, num_matrices, rows, cols, by_columns):
    """Equal pieces of equal matrices from every peer, as evenly sharded parameters have them."""
    shape = (rows, cols * num_peers) if by_columns else (rows * num_peers, cols)
    copies = []
    for peer, number in product(range(num_peers), range(num_matrices)):
        taken = contiguous((peer * num_matrices + number) * rows * cols, (rows, cols))
        corner = peer * cols if by_columns else peer * rows * shape[1]
        put = Block(number * shape[0] * shape[1] + corner, (rows, cols), (shape[1], 1))
        copies.append(Copy(0, taken, 0, put))
    assert CopyPlan(copies).num_blocks == 1
