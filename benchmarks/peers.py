"""What a user would run instead: other packages' attention over all HQ heads, and the subtraction as a kernel of its
own, compiled.

    o[p] = o_2p − sigmoid(lam_logit[p]) · o_2p+1

Each function here takes the inputs of `diff_attention`, does once what need not be repeated (importing, masks, block
tables) and returns the call that is timed. It raises where the package is missing or does not take the shape. On a CPU,
to see that the benchmark works, SDPA and FlexAttention run there and nothing is compiled.

Sources: the documentation of torch's scaled_dot_product_attention and flex_attention, of flash-attn 2 and 4 (the latter
imports as `flash_attn.cute`) and of xFormers' `fmha`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from diffv2_sparse import BlockSelection, diff_attention
from diffv2_sparse.adapters import combine_pairs
from diffv2_sparse.cache import PagedKV
from diffv2_sparse.xformers_paged import load_fmha

DENSE = f"{'cuDNN' if torch.cuda.is_available() else 'SDPA'} + subtraction"
FA4_DENSE, FLASH_DENSE = "FA4 dense + subtraction", "flash-attn + subtraction"
FLEX, FA4 = "FlexAttention + subtraction", "FA4 block-sparse + subtraction"
XFORMERS = "xFormers + subtraction"

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # FA4 keeps on disk what it compiles


@dataclass
class Inputs:
    """Tensors of one problem, T = S: q `[B, T, HQ, D]`, k and v `[B, T, H, D]`, lam_logit `[B, T, HQ // 2]`, and the
    upstream gradient where the problem is to be differentiated.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lam_logit: Tensor
    do: Tensor | None = None
    masks: list = field(default_factory=list)  # (selection, BlockMask), one for FlexAttention and FA4 alike

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.lam_logit

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    def block_mask(self, selection: BlockSelection):
        for known, mask in self.masks:
            if known is selection:
                return mask
        mask = selection.to_block_mask(self.tokens, self.tokens, self.q.shape[2])
        self.masks.append((selection, mask))
        return mask


Call = Callable[[], Tensor]


def subtract(o: Tensor, lam_logit: Tensor) -> Tensor:
    """The pairs of `[B, T, HQ, D]` combined; on a GPU compiled once per head layout, not per length."""
    if not o.is_cuda:
        return combine_pairs(o, lam_logit)
    if o.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(o, 1)
        torch._dynamo.maybe_mark_dynamic(lam_logit, 1)
    return _compiled_subtraction()(o, lam_logit)


@functools.cache
def _compiled_subtraction():
    return _compiled(combine_pairs)


def _compiled(function, **options):
    torch._dynamo.config.recompile_limit = 256  # beyond it dynamo raises, as fullgraph has it
    return torch.compile(function, fullgraph=True, **options)


def with_gradients(call: Call, x: Inputs) -> Call:
    """Forward and backward: the gradients of q, k, v and lam_logit."""
    return lambda: torch.autograd.grad(call(), x.all, x.do)


def gradients_alone(call: Call, x: Inputs) -> Call:
    """The backward of one forward, which is not timed."""
    o = call()
    return lambda: torch.autograd.grad(o, x.all, x.do, retain_graph=True)


# Dense


def dense(x: Inputs) -> Call:
    """torch's SDPA: on a GPU cuDNN's kernels, else as it comes."""

    def attend() -> Tensor:
        return sdpa(*(tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v)), causal=True).transpose(1, 2)

    return lambda: subtract(attend(), x.lam_logit)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Over `[B, heads, tokens, D]`."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def flash_dense(x: Inputs) -> Call:
    """flash-attn 2, dense."""
    from flash_attn import flash_attn_func

    return lambda: subtract(flash_attn_func(x.q, x.k, x.v, causal=True), x.lam_logit)


def fa4_dense(x: Inputs) -> Call:
    """FlashAttention-4, dense."""
    from flash_attn.cute import flash_attn_func

    return lambda: subtract(flash_attn_func(x.q, x.k, x.v, causal=True)[0], x.lam_logit)


# Over the same lists


def flex(x: Inputs, selection: BlockSelection) -> Call:
    """FlexAttention with the selection as a BlockMask, compiled for this very length; blocks of 128."""
    if not x.q.is_cuda:
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # is meant
        return lambda: diff_attention(*x.all, selection, backend="flex")
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = x.block_mask(selection)
    compiled = _compiled(flex_attention, dynamic=False)

    def attend() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return lambda: subtract(attend(), x.lam_logit)


def fa4(x: Inputs, selection: BlockSelection) -> Call:
    """FlashAttention-4 with a list of blocks per head, as it does not pack the heads of a group over lists.

    The blocks that every token of the row sees whole are passed apart, those on the diagonal go through a mask.
    """
    import cutlass.cute as cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def causal(batch, head, query, key, lengths, tensors):
        return key <= query

    mask = x.block_mask(selection)
    rows = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    columns = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    size = (selection.block_m, selection.block_n)
    options = {"mask_mod": causal, "block_sparse_tensors": BlockSparseTensorsTorch(*rows, block_size=size)}
    if x.do is not None:
        options["block_sparse_tensors_bwd"] = BlockSparseTensorsTorch(*columns, block_size=size)
    return lambda: subtract(flash_attn_func(x.q, x.k, x.v, **options)[0], x.lam_logit)


# Decoding


def dense_decode(q: Tensor, lam_logit: Tensor, pages: PagedKV) -> Call:
    """One token of each sequence against all keys, by SDPA; cuDNN's kernels on a GPU.

    Reads the pages as they lie: they must be those of equally long sequences, one after another.
    """
    B, H, NP = pages.page_table.shape
    k, v = (x.view(B, H, NP * pages.block_n, x.shape[-1]) for x in (pages.k_pages, pages.v_pages))
    rows = q.transpose(1, 2)
    return lambda: subtract(sdpa(rows, k, v, causal=False).transpose(1, 2), lam_logit)


class XFormersDecode:
    """Sparse decoding through xFormers' paged split-K kernel: each KV head of each sequence is a batch entry whose
    block table holds the pages that its list names.

    The bias takes lengths from the host, so it is built once; a call writes the tables of a selection into it.
    """

    def __init__(self, pages: PagedKV, blocks: int):
        B, H, NP = pages.page_table.shape
        page, device = pages.block_n, pages.page_table.device
        if page % 64:  # its kernel reads beyond smaller pages
            raise ValueError(f"xFormers takes pages of a multiple of 64 keys, not of {page}")
        (self._fmha, self._operator, bias), self._pages = load_fmha(), pages
        self._bias = bias.from_seqlens(
            q_seqlen=[1] * (B * H),
            kv_seqlen=[min(blocks, NP) * page] * (B * H),
            block_tables=torch.zeros(B * H, blocks, dtype=torch.int32, device=device),
            page_size=page,
            device=device,
        )

    def __call__(self, q: Tensor, lam_logit: Tensor, selection: BlockSelection) -> Tensor:
        """q `[B, 1, HQ, D]` and its selection (C = 1, block_m 1) -> `[B, 1, HO, D]`."""
        pages, bias = self._pages, self._bias
        B, H, _ = pages.page_table.shape
        page, D = pages.block_n, q.shape[-1]
        G = q.shape[2] // H
        chosen = pages.page_table.gather(2, selection.indices[:, 0, :, 0].long())
        bias.block_tables.copy_(chosen.flatten(0, 1))
        keys = selection.counts[:, 0, :, 0] * page - (-pages.lengths % page)[:, None]  # the last page may be partial
        bias.k_seqinfo.seqlen.copy_(keys.flatten())
        k, v = (x.view(1, -1, 1, 1, D).expand(-1, -1, -1, G, -1) for x in (pages.k_pages, pages.v_pages))
        o = self._attend(q.view(1, B * H, 1, G, D), k, v)
        return subtract(o.view(B, 1, H * G, D), lam_logit)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # the operator itself: the public function refuses all where the package's C library does not load, which this
        # operator has no need of
        inputs = self._fmha.Inputs(query=q, key=k, value=v, attn_bias=self._bias)
        return self._operator.apply(inputs, needs_gradient=False)[0]
