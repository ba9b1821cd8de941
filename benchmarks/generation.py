"""One more token by a whole model on a GPU: latency and tokens a second over caches of 8K … 1M tokens, side by side.

    python benchmarks/generation.py                    # everything, one GPU, about four minutes
    python benchmarks/generation.py --only "batch 1"   # one group, again
    python benchmarks/generation.py --smoke            # tiny shapes, any machine: does it run?

    ours, sparse   YOCO with DIFF V2: 64 pages of 64 keys for each token, by our own kernel ("auto") or by xFormers'
    ours, dense    the same model attending to all of its one cache
    Transformer    the same shape, SDPA (cuDNN's kernels) over contiguous keys and values of every layer

A time is that of one of IN_A_ROW // B steps in a row, as a loop makes them: the host prepares the next while the device
is at one. From IN_A_ROW sequences on, and over offloaded caches, it is of a single step. "graph": the step is one CUDA
graph, the model's own where it makes one (`decode` with `use_graphs`), else captured here over buffers that stay where
they are; "eager": every launch by the host. Caches hold random keys and values. What does not fit the memory has a
record with the reason. "equal memory" gives each kind the largest batch that one budget of memory has room for.
"prompt" reads 512K tokens, the Transformer by one layer times the layers, for the time that a request takes as a whole:
its prompt, then GENERATED_TOKENS more. "offloaded" is of caches in the host's memory, up to 10M tokens (offloaded.py).
Results go to benchmarks/results/generation_MACHINE.json after each group.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import prefill
import torch
from bars import GENERATION, TRANSFORMER, YOCO, evaluate
from cases import Benchmark, Case
from models import Attention, Shape, Sparsity, fill, random_decoder, random_yoco, weight_bytes
from offloaded import offloaded
from records import OURS, tokens_name
from timing import Run, captured
from torch import Tensor

from diffv2_sparse import diff_attention, diff_attention_paged, select_blocks
from diffv2_sparse.cache import PagedKV, SharedKVCache
from diffv2_sparse.yoco import DiffV2YocoForCausalLM
from diffv2_sparse.yoco.layers import rotary_angles

ON_GPU = torch.cuda.is_available()
IN_A_ROW = 8  # steps of one sequence that are timed together
STEPPING = 5  # cases that append to one cache: of `Problem.ours`, all but the static steps over xFormers
RESERVE_GIB = 6  # for activations, graphs and a compiler's scratch


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    device: str
    dtype: torch.dtype
    rounds: tuple[int, int]
    matrix: int
    shape: Shape
    sparsity: Sparsity
    backends: tuple[str, ...]  # of paged attention; the first also attends densely
    lengths: dict[int, tuple[int, ...]]  # by batch size; of the same batch sizes in every run
    offloaded: tuple[int, ...]  # tokens of the caches in the host's memory
    requested: int  # tokens of the prompt of a request, and of the caches in equal memory
    memory_gib: float  # what a run may hold, weights included
    prompts: prefill.Sizes

    @property
    def room(self) -> int:
        """Tokens that are appended at most while steps over one cache are timed."""
        calls = 3 + 2 * self.rounds[1]  # one that is checked, and pairs whose second is timed
        return STEPPING * calls * IN_A_ROW

    def rehearsal(self) -> Sizes:
        return self


_SOME = tuple(1 << n for n in (13, 15, 17, 19, 20))
FULL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(3, 10),
    matrix=8192,
    shape=Shape(),
    sparsity=Sparsity(1, 64, 64),
    backends=("auto", "xformers"),
    lengths={1: tuple(1 << n for n in range(13, 21)), 8: _SOME, 32: _SOME},
    offloaded=(1 << 20, 4 << 20, 10 << 20),
    requested=1 << 19,
    memory_gib=130,
    prompts=prefill.FULL,
)
CPU_SMOKE = Sizes(
    device="cpu",
    dtype=torch.float32,
    rounds=(1, 1),
    matrix=64,
    shape=prefill.CPU_SMOKE.shape,
    sparsity=prefill.CPU_SMOKE.token,
    backends=("auto",),
    lengths={1: (64, 128), 8: (64,), 32: (64,)},
    offloaded=(64, 1024),
    requested=256,
    memory_gib=RESERVE_GIB + 6e-3,
    prompts=prefill.CPU_SMOKE,
)
GPU_SMOKE = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    rounds=(1, 1),
    matrix=64,
    shape=prefill.GPU_SMOKE.shape,
    sparsity=prefill.GPU_SMOKE.token,
    backends=("auto", "xformers"),
    lengths={1: (512, 1024), 8: (512,), 32: (512,)},
    offloaded=(512, 1024),
    requested=2048,
    memory_gib=RESERVE_GIB + 0.06,
    prompts=prefill.GPU_SMOKE,
)
SMOKE = GPU_SMOKE if ON_GPU else CPU_SMOKE


# One step


def makes_graphs(model: DiffV2YocoForCausalLM) -> bool:
    """Whether the model captures its steps by itself."""
    return model.device.type == "cuda"


class StaticStep:
    """The last token of every sequence once more, over buffers that stay where they are, as a CUDA graph needs it.

    The model's own layers in the model's order: what `decode` computes for that token. All sequences are equally long
    and at least as long as the window; `rings` are the windows' keys and values before the token, `options` those of
    `select_blocks`, None to attend to everything.
    """

    def __init__(
        self,
        model: DiffV2YocoForCausalLM,
        cache: SharedKVCache,
        rings: list[tuple[Tensor, Tensor]],
        ids: Tensor,
        options: dict | None,
        backend: str,
    ):
        (S,) = set(cache.tokens)
        spec, config = cache.spec, model.config
        if spec.window > S or config.self_decoder != "sliding_window":
            raise ValueError(f"cache: expected full sliding windows of {spec.window} tokens, got {S} tokens")
        self.model, self.rings, self.ids, self.backend = model, rings, ids, backend
        position = torch.full((len(ids), 1), S - 1, device=spec.device)
        self.rotary = rotary_angles(position, spec.head_dim, config.rope_theta, spec.dtype)
        self.slot_in_ring, self.slot = (S - 1) % spec.window, (S - 1) % spec.block_n
        table = cache.page_table[:, :, : -(-S // spec.block_n)]
        self.open_page = table[:, :, -1].long()
        self.pages = PagedKV(cache.k_pages, cache.v_pages, table, cache.lengths.clone())
        self.summaries, self.options = cache.full_summaries(), options

    @torch.no_grad()
    def __call__(self) -> Tensor:
        decoder = self.model.model
        hidden = decoder.embed_tokens(self.ids)
        for layer, ring in zip(decoder.self_layers, self.rings):
            mixer, x = layer.mixer, layer.mixer_norm(hidden)
            q, *new = mixer._project(x, self.rotary)
            for old, own in zip(ring, new):
                old[:, :, self.slot_in_ring] = own[:, 0]
            k, v = (x.transpose(1, 2) for x in ring)
            o = diff_attention(q, k, v, mixer.lambda_proj(x))  # a token of its own sees all of its window, in any order
            hidden = hidden + mixer.o_proj(o.flatten(-2))
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        for pages, own in zip((self.pages.k_pages, self.pages.v_pages), decoder.shared_kv(hidden, self.rotary)):
            pages[self.open_page, self.slot] = own[:, 0]
        for layer in decoder.cross_layers:
            mixer, x = layer.mixer, layer.mixer_norm(hidden)
            hidden = hidden + mixer.o_proj(self._attend(mixer._queries(x, self.rotary), mixer.lambda_proj(x)))
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        return self.model.lm_head(decoder.norm(hidden))

    def _attend(self, q: Tensor, lam_logit: Tensor) -> Tensor:
        lists = None
        if self.options is not None:
            lists = select_blocks(q, summaries=self.summaries, key_tokens=self.pages.lengths, **self.options)
        return diff_attention_paged(q, lam_logit, self.pages, lists, backend=self.backend).flatten(-2)


# Cases


class Models:
    """Both models, each made when it is first needed."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    @functools.cached_property
    def yoco(self) -> DiffV2YocoForCausalLM:
        return random_yoco(self.sizes.shape, self.sizes.sparsity, self.sizes.device, self.sizes.dtype)

    @functools.cached_property
    def transformer(self):
        return random_decoder(self.sizes.shape, Attention, None, self.sizes.device, self.sizes.dtype)

    @functools.cached_property
    def weights_gib(self) -> dict[str, float]:
        there = Models(replace(self.sizes, device="meta"))
        return {YOCO: weight_bytes(there.yoco) / 2**30, TRANSFORMER: weight_bytes(there.transformer) / 2**30}

    def cache_gib(self, kind: str, B: int, S: int) -> float:
        sizes = replace(self.sizes.prompts, shape=self.sizes.shape, dtype=self.sizes.dtype, token=self.sizes.sparsity)
        group = {YOCO: "yoco", TRANSFORMER: "transformer"}[kind]
        return B * prefill.Kind(sizes, group).cache_bytes(S + self.sizes.room * (kind == YOCO)) / 2**30

    def most_sequences(self, kind: str, S: int) -> int:
        """The largest batch that fits by itself; while ours captures a step there are three of its windows."""
        left = self.sizes.memory_gib - RESERVE_GIB - self.weights_gib[kind]
        shape, each = self.sizes.shape, self.cache_gib(kind, 1, S)
        if kind == YOCO:
            window = 2 * shape.window * shape.kv_heads * shape.head_dim * self.sizes.dtype.itemsize
            each += 2 * (shape.layers // 2) * window / 2**30
        return max(1, int(left / each))


class Problem:
    """Equally long sequences, and the steps of all kinds over them; caches are made when the first step is."""

    def __init__(self, models: Models, B: int, S: int, kinds: tuple[str, ...] = (YOCO, TRANSFORMER), case: str = ""):
        self.models, self.sizes, self.B, self.S, self.kinds = models, models.sizes, B, S, kinds
        self.case_name = case or f"{tokens_name(S)} tokens, batch {B}"

    @functools.cached_property
    def ids(self) -> Tensor:
        generator = torch.Generator(self.sizes.device).manual_seed(1)
        return torch.randint(self.sizes.shape.vocab, (self.B, 1), device=self.sizes.device, generator=generator)

    @functools.cached_property
    def cache(self) -> SharedKVCache:
        return fill(self.models.yoco.new_cache(self.B, self.S + self.sizes.room), self.S)

    @functools.cached_property
    def rings(self) -> list[tuple[Tensor, Tensor]]:
        return [tuple(x.clone() for x in state) for state in self.cache.states]

    @functools.cached_property
    def keys_and_values(self):
        cache = self.models.transformer.new_cache(self.B, self.S)
        for pair in cache:
            for x in pair:
                x.normal_()
        return cache

    def heats(self, how: tuple[str, ...] = ("graph", "eager")) -> Iterator[list[Case]]:
        """A model's own graph is of one way to attend, so that these come one after another."""
        first, *others = self.sizes.backends
        theirs = self.transformer(how) if TRANSFORMER in self.kinds else []
        if YOCO not in self.kinds:
            yield theirs
            return
        yield [*self.ours("sparse", first, how[:1]), *theirs]
        yield self.ours("dense", first, how[:1])
        rest = [case for backend in others for case in self.ours("sparse", backend, how)]
        rest += [case for attention in ("sparse", "dense") for case in self.ours(attention, first, how[1:])]
        if rest:
            yield rest

    def ours(self, attention: str, backend: str, how: tuple[str, ...]) -> list[Case]:
        build = {"graph": self._graph, "eager": self._eager}
        return [
            self._case(f"{attention}, {one}", OURS, backend, functools.partial(build[one], attention, backend))
            for one in how
        ]

    def transformer(self, how: tuple[str, ...]) -> list[Case]:
        build = {"graph": lambda: self._captured(self._transformer()), "eager": self._transformer}
        return [self._case(f"dense, {one}", TRANSFORMER, None, build[one]) for one in how]

    def _case(self, phase: str, kind: str, backend: str | None, build: Callable[[], Run]) -> Case:
        shape = {"B": self.B, "T": 1, "S": self.S, **self.sizes.shape.record(self.sizes.dtype)}
        shape |= self.sizes.sparsity.record() if phase.startswith("sparse") else {}
        weights = self.models.weights_gib
        each = {own: weights[own] + self.models.cache_gib(own, self.B, self.S) for own in self.kinds}
        own = YOCO if kind == OURS else kind
        facts = {"weights_gib": weights[own], "cache_gib": each[own] - weights[own]}
        together = sum(each.values())
        if kind == OURS and TRANSFORMER in self.kinds:  # ours goes alone where both do not fit
            together = each[YOCO]
        needed = together + RESERVE_GIB

        def checked() -> Run:
            if needed > self.sizes.memory_gib:
                raise MemoryError(f"needs {needed:.0f} GiB, the run has {self.sizes.memory_gib:.0f}")
            step = build()
            return lambda: [step() for _ in range(steps)][-1]

        steps = max(1, IN_A_ROW // self.B)
        return Case(self.case_name, phase, kind, backend, shape, checked, facts=facts, steps=steps, **prefill.ALONE)

    # Each returns the call to be timed

    def _graph(self, attention: str, backend: str) -> Run:
        model = self.models.yoco
        if makes_graphs(model) and backend != "xformers":
            return self._as_called(attention, backend, use_graphs=True)
        options = self.sizes.sparsity.options() if attention == "sparse" else None
        return self._captured(StaticStep(model, self.cache, self.rings, self.ids, options, backend))

    def _eager(self, attention: str, backend: str) -> Run:
        return self._as_called(attention, backend, use_graphs=False)

    def _as_called(self, attention: str, backend: str, use_graphs: bool) -> Run:
        model, cache, ids = self.models.yoco, self.cache, self.ids
        mode = "dense" if attention == "dense" else self.sizes.sparsity.config()["sparse_mode"]

        def step() -> Tensor:
            model.config.sparse_mode, model.config.paged_backend = mode, backend
            return model.decode(ids, cache, use_graphs=use_graphs)

        return step

    def _transformer(self) -> Run:
        model, ids, cache = self.models.transformer, self.ids, self.keys_and_values
        return lambda: model.extend(ids, cache, self.S - 1)

    def _captured(self, step: Run) -> Run:
        return captured(step) if self.sizes.device == "cuda" else step


def decoding(B: int, sizes: Sizes) -> Iterator[list[Case]]:
    models = Models(sizes)
    for S in sizes.lengths[B]:
        yield from Problem(models, B, S).heats()


def equal_memory(sizes: Sizes) -> Iterator[list[Case]]:
    for kind in (YOCO, TRANSFORMER):
        models, S = Models(sizes), sizes.requested
        case = f"{tokens_name(S)} tokens, equal memory"
        yield from Problem(models, models.most_sequences(kind, S), S, (kind,), case).heats(("graph",))


def prompt(sizes: Sizes) -> Iterator[list[Case]]:
    yoco, transformer = (prefill.Kind(sizes.prompts, group) for group in ("yoco", "transformer"))
    case = yoco.prefill(sizes.requested, sizes.prompts.yoco_chunk)
    yield [replace(case, kind=YOCO, backend=None, warmed=True)]
    yield [transformer.one_layer(sizes.requested // 16)]  # compiles
    yield [transformer.one_layer(sizes.requested)]


def completed(group: str, records: list[dict]) -> list[dict]:
    """Adds tokens a second and the Transformer's time over ours to the steps; and its prompt with all layers."""
    steps = [record for record in records if "median_ms" in record and record["shape"].get("T") == 1]
    theirs = {(r["shape"]["B"], r["shape"]["S"], r["phase"]): r for r in steps if r["kind"] == TRANSFORMER}
    for record in steps:
        shape = record["shape"]
        record["tokens_per_s"] = round(1e3 * shape["B"] / record["median_ms"], 1)
        peer = theirs.get((shape["B"], shape["S"], record["phase"].replace("sparse", "dense")))
        if record["kind"] == OURS and peer:
            record["ratios"] = {TRANSFORMER: round(peer["median_ms"] / record["median_ms"], 3)}
    if group != "prompt":
        return []
    return prefill.completed("transformer", records[-1:])


def tables(records: list[dict]) -> dict[str, list[dict]]:
    """Milliseconds of a step, a row per batch and length; eager ones in brackets."""
    steps: dict[str, dict[str, dict]] = {}
    for record in records:
        if "tokens_per_s" in record:
            attention, how = record["phase"].split(", ")
            name = f"{attention} {record['backend']}" if record["kind"] == OURS else record["kind"]
            steps.setdefault(record["case"], {}).setdefault(name, {})[how] = record
    rows = []
    for case, found in steps.items():
        row = {"case": case}
        for name, own in found.items():
            ms = [f"{own[how]['median_ms']:.2f}" for how in ("graph", "eager") if how in own]
            row[f"{name}, ms"] = ms[0] + "".join(f" ({x})" for x in ms[1:])
            if "graph" in own and not name.startswith("dense"):
                row[f"{name}, tokens/s"] = own["graph"]["tokens_per_s"]
        rows.append(row)
    return {"a step in a CUDA graph (eager), and tokens a second": rows} if rows else {}


def groups(sizes: Sizes) -> dict:
    """The heats of a group take the seconds behind it."""
    found = {"equal memory": (equal_memory, 0.4)}  # before others have left anything in memory
    found |= {f"batch {B}": (functools.partial(decoding, B), 0.4) for B in sizes.lengths}
    return found | {"offloaded": (offloaded, 0.4), "prompt": (prompt, 0)}


BENCHMARK = Benchmark(
    name="generation",
    groups=groups(FULL),
    full=FULL,
    smoke=SMOKE,
    bars=lambda records: evaluate(GENERATION, records),
    finish=completed,
    tables=tables,
)


if __name__ == "__main__":
    from runner import main

    sys.exit(main(BENCHMARK, __doc__))
