"""Times callables side by side, in turns, so that a machine whose clock drifts drifts for all of them.

On a GPU the device's own events tell the time. `compare` prepares every candidate, times those that work and keeps the
reason of each that does not: a peer that is not installed, does not take the shape, runs out of memory or computes
something else never stops the others.
"""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch

AGREEMENT = 0.05  # most relative difference between 16-bit kernels that compute the same; another mask gives about 1
ROUNDS = (3, 20)  # least and most
HEAD_START = 5 * 10**8  # cycles, about a third of a second, that the host has to prepare a call nobody has warmed

Run = Callable[[], object]


class DeviceLostError(RuntimeError):
    """After an error in a kernel the device answers nothing any more: the process has to end."""


@dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Attributes:
        build: prepares the call, untimed, and returns it.
        same_as: candidates with an equal value compute the same tensor, and are compared with the first of them that
            runs; None for no comparison.
        steps: how many equal steps one call makes; times are given for one.
        calls: for calls that take seconds, by which a card's clock settles by itself: they are timed so many times,
            each as it comes. None times as many as there is time for, each after one that is not timed.
        warmed: whether a call comes before those `calls`.
        head_start: whether the device starts each of them late, so that the host can prepare a shape that it has not
            seen; it also hides what launches cost, so it is for calls of few and long kernels.
    """

    build: Callable[[], Run]
    same_as: Hashable | None = None
    steps: int = 1
    calls: int | None = None
    warmed: bool = True
    head_start: bool = False


def host_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_seconds(run: Run) -> float:
    """The time between two events on the GPU around a second call: the first one takes the card, whose clock follows
    its power, from what ran before to a state of its own.
    """
    run()
    return _between_events(run)


def _between_events(run: Run, wait_cycles: int = 0) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if wait_cycles:
        torch.cuda._sleep(wait_cycles)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_interleaved(
    kinds: Mapping[Hashable, Run], rounds: int, seconds: Callable[[Run], float] = host_seconds
) -> dict[Hashable, list[float]]:
    """Calls each kind `rounds` times, in turns whose order is drawn anew; returns the seconds of every call. Warm up
    first.
    """
    taken = {kind: [] for kind in kinds}
    order, shuffled = list(kinds), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for kind in order:
            taken[kind].append(seconds(kinds[kind]))
    return taken


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    return {f"{name}_ms": round(1e3 * cuts[i], 4) for name, i in (("median", 4), ("p20", 1), ("p80", 7))}


def compare(
    candidates: Mapping[Hashable, Candidate],
    *,
    budget_s: float,
    device: str = "cpu",
    report: Callable[[str, Hashable | None], None] = lambda doing, name: None,
    rounds: tuple[int, int] = ROUNDS,
) -> dict[Hashable, dict]:
    """Times the candidates in turns, for about `budget_s` seconds in all.

    Args:
        candidates: by name. One whose preparation or first call fails is left out of the rounds.
        device: whose time is taken, "cuda" or "cpu".
        report: told what is being done, and with which candidate.
        rounds: least and most, whatever the budget.

    Returns:
        For each name `{"median_ms", "p20_ms", "p80_ms", "rounds"}`, on a GPU also "peak_gib", the most that one call
        holds, its result included; or `{"error": reason}`.

    Raises:
        DeviceLostError: the GPU is unusable after one candidate's error.
    """
    on_gpu = device == "cuda"
    seconds = device_seconds if on_gpu else host_seconds
    outcomes, ready, expected, once_s = {}, {}, {}, 0.0
    for name, candidate in candidates.items():
        report("preparing", name)
        try:
            run = candidate.build()
            if candidate.calls is not None:
                outcomes[name] = _timed_calls(run, candidate, on_gpu)
                continue
            _check_same(run(), candidate, expected)
            before = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            once_s += (2 if on_gpu else 1) * seconds(run)
            peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
        except Exception as error:  # whatever a peer's packages raise: its record says it
            outcomes[name] = {"error": reason(error)}
            if on_gpu:
                _check_device()
        else:
            ready[name] = run
            outcomes[name] = {} if peak_gib is None else {"peak_gib": round(peak_gib, 3)}
    if not ready:
        return outcomes
    count = min(max(int(budget_s / once_s), rounds[0]), rounds[1])
    report(f"{count} rounds", None)
    for name, taken in time_interleaved(ready, count, seconds).items():
        steps = candidates[name].steps
        outcomes[name] = quantiles_ms([one / steps for one in taken]) | {"rounds": count} | outcomes[name]
    return outcomes


def _timed_calls(run: Run, candidate: Candidate, on_gpu: bool) -> dict:
    """The outcome of a candidate whose `calls` are given."""
    if candidate.warmed:
        run()
    if not on_gpu:
        taken = [host_seconds(run) for _ in range(candidate.calls)]
        return quantiles_ms(taken) | {"rounds": candidate.calls}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wait_cycles = HEAD_START if candidate.head_start else 0
    taken = [_between_events(run, wait_cycles) for _ in range(candidate.calls)]
    peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    return quantiles_ms(taken) | {"rounds": candidate.calls, "peak_gib": round(peak_gib, 3)}


def reason(error: BaseException) -> str:
    """An error in one line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:300]


def captured(steps: Callable[[], object]) -> Run:
    """A CUDA graph of all that `steps` launches, as a call that replays it and returns what was captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills allocators
            steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = steps()

    def replay(read_by_the_graph=steps):
        """Keeps alive what `steps` refers to: the graph reads it at the same addresses again."""
        graph.replay()
        return result

    return replay


def _check_same(result: object, candidate: Candidate, expected: dict[Hashable, torch.Tensor]) -> None:
    """Raises ArithmeticError if a result is not what the first candidate of its kind computed."""
    tensor = result[0] if isinstance(result, tuple | list) else result
    if candidate.same_as is None or not isinstance(tensor, torch.Tensor):
        return
    ends = torch.cat([tensor[:, :1024], tensor[:, -1024:]], 1).float()  # of [B, tokens, …]
    if not bool(ends.isfinite().all()):
        raise ArithmeticError("the result is not finite")
    known = expected.setdefault(candidate.same_as, ends)
    difference = float((ends - known).norm() / known.norm())
    if not difference <= AGREEMENT:  # NaN, too: zeros on both sides prove nothing
        raise ArithmeticError(f"computes something else: relative difference {difference:.2g}")


def _check_device() -> None:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is lost ({reason(error)}); the same command continues") from error
