"""The models that whole-model benchmarks compare: random weights of one shape, made on the device.

    Transformer            pre-norm, GQA, SwiGLU, Llama's layout and rotary form; dense attention by SDPA
    DIFF V2                the same with twice the query heads, and the pair subtracted
    DIFF V2, block-sparse  the same, each row of queries attending to the key blocks that it chooses
    ours                   YOCO with DIFF V2, as the library has it

The first three keep keys and values of every layer, head-major and contiguous, and read a prompt whole or in chunks.
Work that goes token by token runs in parts of PART_TOKENS, with element-wise operations fused where there is a compiler
for the device; attention is one call per layer. Sources: arXiv 2405.05254 (the 3B shape), Transformers' Llama (held to
it by a test).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffv2_sparse import TopK, diff_attention, select_blocks
from diffv2_sparse.adapters import sdpa_attention
from diffv2_sparse.cache import SharedKVCache
from diffv2_sparse.selectors import block_summaries
from diffv2_sparse.yoco import DiffV2YocoConfig, DiffV2YocoForCausalLM, DiffV2YocoModel
from diffv2_sparse.yoco.layers import Rotary, rotary_angles
from diffv2_sparse.yoco.layout import Layout, spans

PART_TOKENS = 16384  # of a layer's token-wise work at a time
HEAD_TOKENS = 2048  # whose logits are held at a time when a prompt is scored
FILLED_TOKENS = 1 << 16  # random keys and values that are written at a time
LARGEST = 2**30  # numbers of queries in one call of attention; KV heads of longer prompts go one after another


@dataclass(frozen=True)
class Shape:
    """Sizes that all models of a run share; `heads` are output heads."""

    hidden: int = 3072
    layers: int = 26
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 8192
    vocab: int = 32768
    window: int = 1024  # of YOCO's self-decoder
    theta: float = 10000.0
    eps: float = 1e-5

    def record(self, dtype: torch.dtype) -> dict:
        """For a record."""
        return {**asdict(self), "dtype": str(dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Sparsity:
    """How a block-sparse model chooses: tokens per row, tokens per key block, blocks per list, which of a row's queries
    score.
    """

    block_m: int
    block_n: int
    blocks: int
    row_queries: str = "first"

    def options(self) -> dict:
        """Keyword arguments of `select_blocks`."""
        cut = {"block_m": self.block_m, "block_n": self.block_n}
        return {"mode": "pair_mean", "budget": TopK(self.blocks), **cut, "row_queries": self.row_queries}

    def config(self) -> dict:
        """The same as a model's configuration has it."""
        return {"sparse_mode": "pair_mean", **{f"sparse_{name}": value for name, value in self.record().items()}}

    def record(self) -> dict:
        own = asdict(self)
        return {"budget": own.pop("blocks"), **own}


# Element-wise operations


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, on a GPU compiled into one kernel, once for all lengths."""

    @functools.cache
    def compiled():
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(x: Tensor, *others) -> Tensor:
        return (compiled() if x.is_cuda else function)(x, *others)

    return call


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotary form: dimension i and i + D / 2 are a pair; x `[B, T, heads, D]`, cos and sin `[B, T, D / 2]`."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def parts(T: int) -> Iterator[slice]:
    for start in range(0, T, PART_TOKENS):
        yield slice(start, min(start + PART_TOKENS, T))


# Attention over head-major keys: q [B, HQ, T, D], k and v [B, H, S, D] -> [B, heads, T, D]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, bottom-right."""
    T, S, HQ, H = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    if 1 < T < S:  # torch offers cuDNN's kernels for squares alone; here it takes its own FlashAttention-2
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa_attention(*inputs, None, scale=q.shape[-1] ** -0.5).transpose(1, 2)
    if q.numel() <= LARGEST:
        return peers.sdpa(q, k, v, causal=T > 1)
    o, G = torch.empty_like(q), HQ // H
    for h in range(H):
        own = slice(h * G, (h + 1) * G)
        o[:, own] = peers.sdpa(q[:, own], k[:, h : h + 1], v[:, h : h + 1], causal=T > 1)
    return o


class Attention(nn.Module):
    """Llama's attention over keys and values that are kept outside."""

    heads_per_output = 1

    def __init__(self, shape: Shape, sparsity: Sparsity | None = None):
        super().__init__()
        self.head_dim, self.sparsity = shape.head_dim, sparsity
        size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, self.heads_per_output * size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(size, shape.hidden, bias=False)

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def logits(self, x: Tensor) -> Tensor:
        """What `attend` and `combine` need of the tokens beside q: here nothing, `[B, T, 0]`."""
        return x[..., :0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lam_logit: Tensor) -> Tensor:
        return dense(q, k, v)

    def combine(self, o: Tensor, lam_logit: Tensor) -> Tensor:
        """`[B, T, heads, D]` -> `[B, T, HO, D]`."""
        return o


class DiffAttention(Attention):
    """DIFF V2: pairs of heads, dense, subtracted by a kernel of its own."""

    heads_per_output = 2

    def __init__(self, shape: Shape, sparsity: Sparsity | None = None):
        super().__init__(shape, sparsity)
        self.lambda_proj = nn.Linear(shape.hidden, shape.heads, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.lambda_proj(x)

    def combine(self, o: Tensor, lam_logit: Tensor) -> Tensor:
        return peers.subtract(o, lam_logit)


class SparseDiffAttention(DiffAttention):
    """DIFF V2 over chosen key blocks, by the library's kernels."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lam_logit: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        selection = select_blocks(q, k, **self.sparsity.options())
        return diff_attention(q, k, v, lam_logit, selection).transpose(1, 2)

    def combine(self, o: Tensor, lam_logit: Tensor) -> Tensor:
        return o


class Layer(nn.Module):
    def __init__(self, shape: Shape, attention: Attention):
        super().__init__()
        self.eps, self.attention = shape.eps, attention
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden))

    def forward(self, hidden: Tensor, rotary: Rotary, k: Tensor, v: Tensor, start: int) -> None:
        """Changes `hidden` `[B, T, hidden]` in place; writes the keys and values of its tokens, which stand at `start`
        and after, into k and v `[B, H, capacity, D]`.
        """
        own, T = self.attention, hidden.shape[1]
        q = hidden.new_empty(hidden.shape[0], own.q_proj.out_features // own.head_dim, T, own.head_dim)
        lam_logits = []
        for part in parts(T):
            x, angles = rms_norm(hidden[:, part], self.attention_norm, self.eps), [x[:, part] for x in rotary]
            stored = slice(start + part.start, start + part.stop)
            q[:, :, part] = rotate(own.heads(own.q_proj, x), *angles).transpose(1, 2)
            k[:, :, stored] = rotate(own.heads(own.k_proj, x), *angles).transpose(1, 2)
            v[:, :, stored] = own.heads(own.v_proj, x).transpose(1, 2)
            lam_logits.append(own.logits(x))
        lam_logit = torch.cat(lam_logits, 1)
        o = own.attend(q, k[:, :, : start + T], v[:, :, : start + T], lam_logit).transpose(1, 2)
        del q
        for part in parts(T):
            combined = own.combine(o[:, part], lam_logit[:, part])
            hidden[:, part] += own.o_proj(combined.flatten(-2))
            x = rms_norm(hidden[:, part], self.mlp_norm, self.eps)
            hidden[:, part] += self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


Cache = list[tuple[Tensor, Tensor]]  # of every layer, k and v [B, H, capacity, D]


class Decoder(nn.Module):
    """A language model of any of the first three kinds."""

    def __init__(self, shape: Shape, attention: type[Attention] = Attention, sparsity: Sparsity | None = None):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, attention(shape, sparsity)) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def new_cache(self, B: int, capacity: int, layers: int | None = None) -> Cache:
        like, size = self.norm, (B, self.shape.kv_heads, capacity, self.shape.head_dim)
        return [(like.new_empty(size), like.new_empty(size)) for _ in range(layers or len(self.layers))]

    def rotary(self, start: int, T: int) -> Rotary:
        positions = torch.arange(start, start + T, device=self.norm.device)[None]
        return rotary_angles(positions, self.shape.head_dim, self.shape.theta, self.norm.dtype)

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: Cache, start: int) -> Tensor:
        """Logits `[B, 1, vocab]` of the last of the tokens `[B, T]`, which stand at `start` and after."""
        hidden, rotary = self.embed_tokens(ids), self.rotary(start, ids.shape[1])
        for layer, (k, v) in zip(self.layers, cache):
            layer(hidden, rotary, k, v, start)
        return self.lm_head(rms_norm(hidden[:, -1:], self.norm, self.shape.eps))

    def prefill(self, ids: Tensor, chunk_tokens: int) -> tuple[Tensor, Cache]:
        """Logits `[B, 1, vocab]` of the prompt's last token, and the keys and values of all layers."""
        cache = self.new_cache(*ids.shape)
        for start in range(0, ids.shape[1], chunk_tokens):
            logits = self.extend(ids[:, start : start + chunk_tokens], cache, start)
        return logits, cache

    @torch.no_grad()
    def one_layer(self, hidden: Tensor) -> Tensor:
        """The first layer over a whole prompt `[B, T, hidden]`, in place."""
        ((k, v),) = self.new_cache(*hidden.shape[:2], layers=1)
        self.layers[0](hidden, self.rotary(0, hidden.shape[1]), k, v, 0)
        return hidden


# Making them


def random_decoder(
    shape: Shape, attention: type[Attention], sparsity: Sparsity | None, device: str, dtype: torch.dtype
) -> Decoder:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Decoder(shape, attention, sparsity)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("norm"):
                weight.normal_(0, 0.02)
    return model.eval()


def random_yoco(shape: Shape, sparsity: Sparsity, device: str, dtype: torch.dtype) -> DiffV2YocoForCausalLM:
    config = DiffV2YocoConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        sliding_window=shape.window,
        rope_theta=shape.theta,
        rms_norm_eps=shape.eps,
        bos_token_id=None,
        eos_token_id=None,
        **sparsity.config(),
    )
    torch.manual_seed(0)
    with torch.device(device):
        return DiffV2YocoForCausalLM._from_config(config, dtype=dtype).eval()


def weight_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def fill(cache: SharedKVCache, tokens: int) -> SharedKVCache:
    """Appends `tokens` random keys and values to every sequence, and makes the windows random."""
    spec, B = cache.spec, cache.batch_size
    left, chunk = tokens, max(1, FILLED_TOKENS // B)
    size = (B * min(chunk, tokens), spec.kv_heads, spec.head_dim)
    k, v = (torch.empty(size, dtype=spec.dtype, device=spec.device) for _ in range(2))
    while left:
        n = min(chunk, left)
        for x in (k, v):  # anew: blocks that repeat would tie when they are chosen
            x.normal_()
        sequence, position = spans((n,) * B, cache.tokens, spec.device)
        cache.append(k[: B * n], v[: B * n], sequence, position, (n,) * B, n)
        left -= n
    for state in cache.states:
        for x in state:
            x.normal_()
    return cache


# All logits of a prompt


@torch.no_grad()
def cross_decode(decoder: DiffV2YocoModel, hidden: Tensor, rotary: Rotary, k: Tensor, v: Tensor) -> Tensor:
    """The cross-decoder for the last T of S tokens: hidden `[1, T, hidden]`, k and v `[1, S, H, D]`, in rows."""
    config = decoder.config
    summaries = block_summaries(k, config.sparse_block_n)
    for layer in decoder.cross_layers:
        mixer, x = layer.mixer, layer.mixer_norm(hidden)
        q = mixer._queries(x, rotary)
        lists = select_blocks(q, summaries=summaries, key_tokens=k.shape[1], **config.selection_options())
        o = diff_attention(q, k, v, mixer.lambda_proj(x), lists, backend=config.attn_backend)
        hidden = hidden + mixer.o_proj(o.flatten(-2))
        hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    return hidden


@torch.no_grad()
def score_prompt(model: DiffV2YocoForCausalLM, ids: Tensor, chunk_tokens: int) -> Tensor:
    """The log-likelihood of every token but the first given those before it, float32 `[1, T - 1]`.

    Both halves of the decoder run for every token, in chunks of whole rows; all cross-decoder layers read one K/V and
    its summaries. Logits are held for HEAD_TOKENS tokens at a time.
    """
    decoder, config, T = model.model, model.config, ids.shape[1]
    if chunk_tokens % config.sparse_block_m or ids.shape[0] != 1:
        raise ValueError(f"score_prompt: expected one prompt and chunks of whole rows, got {list(ids.shape)}")
    spec = decoder.cache_spec()
    states = [spec.empty_state(1, 0) for _ in decoder.self_layers]
    k, v = (torch.empty(1, T, spec.kv_heads, spec.head_dim, dtype=spec.dtype, device=spec.device) for _ in range(2))
    scores = []
    for start in range(0, T, chunk_tokens):
        own = ids[:, start : start + chunk_tokens]
        end = start + own.shape[1]
        layout = Layout.of(own, None, (start,))
        rotary = rotary_angles(layout.positions, config.head_dim, config.rope_theta, spec.dtype)
        hidden = decoder.embed_tokens(own)
        for i, layer in enumerate(decoder.self_layers):
            hidden, states[i] = layer.extend(hidden, rotary, layout, states[i])
        k[:, start:end], v[:, start:end] = decoder.shared_kv(hidden, rotary)
        hidden = cross_decode(decoder, hidden, rotary, k[:, :end], v[:, :end])
        hidden, targets = decoder.norm(hidden)[0], ids[0, start + 1 : end + 1]
        for at in range(0, len(targets), HEAD_TOKENS):
            wanted = targets[at : at + HEAD_TOKENS]
            logits = model.lm_head(hidden[at : at + len(wanted)]).float()
            scores.append(-F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(scores)[None]
