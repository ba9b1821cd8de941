"""How the warps of a program agree on one question: each consumer votes, and all learn whether anyone said yes."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .queries import CONSUMERS


class Ballot(NamedTuple):
    votes: gl.shared_memory_descriptor
    closed: gl.shared_memory_descriptor  # barrier: every consumer has voted


@gluon.jit
def new_ballot():
    votes = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    closed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(closed, count=CONSUMERS)
    return Ballot(votes, closed)


@gluon.jit
def vote(ballot, consumer: gl.constexpr, rows):
    """Yes, if any of the consumer's rows says so."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ballot.votes.index(consumer).store(gl.full([1], gl.max(rows.to(gl.int32), 0), gl.int32, LAYOUT))
    mbarrier.arrive(ballot.closed, count=1)


@gluon.jit
def outcome(ballot, WARPS: gl.constexpr):
    """Whether anyone said yes, once all have voted. WARPS: of the job that asks."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(ballot.closed, 0)
    yes = ballot.votes.index(0).load(LAYOUT)
    for consumer in gl.static_range(1, CONSUMERS):
        yes |= ballot.votes.index(consumer).load(LAYOUT)
    return gl.max(yes, 0) != 0
