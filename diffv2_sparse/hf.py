"""Block-sparse attention for stock Transformers models; importing this registers attn_implementation="diffv2_sparse".

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="diffv2_sparse")
    configure(model.config, SparseAttention(budget=TopK(32)))                    # optional

Every head is an ordinary softmax head: `select_blocks(mode="per_head")` chooses key blocks for each GQA group and
`diff_attention(lam_logit=None)` attends to them. Sequences that the budget covers are computed densely, so a short
prompt gives what "sdpa" gives. Sliding-window layers keep their window and choose nothing. Padded and packed batches
are unpadded first: blocks count from each sequence's first token.

The choice of blocks is strictly causal by default. This form computes the block summaries anew in every call: it saves
attention work, not the reading of the keys, in decoding. Source: the attention and mask interfaces of Transformers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from .attention import diff_attention
from .selectors import TopK, TopP, select_blocks

NAME = "diffv2_sparse"  # of the attention implementation, and of the configuration's attribute that holds the settings
_SPELLED = f"attn_implementation: {NAME!r}"

# What a model may hand to its attention and this one cannot compute; to ignore any of them would give wrong numbers.
_UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "head_mask",
    "cache",
    "indices",
    "block_indices",
    "output_attentions",
)


@dataclass(frozen=True)
class SparseAttention:
    """How a stock model chooses its key blocks; the fields are those of `select_blocks`.

    With `block_m=1` every token chooses for itself, so that a prompt in chunks, or decoded on, gives what one forward
    gives. Longer rows choose less often, but count from the first query of each call, so that their blocks, and with
    them the outputs, depend on where the calls begin.

    `row_queries="all"` scores a row with all of its tokens, later ones included: for prompts that are given, never for
    perplexity. Training always uses "first".
    """

    budget: TopK | TopP = TopK(64)  # noqa: RUF009 (an immutable value)
    block_m: int = 1
    block_n: int = 64
    sink_blocks: int = 1
    local_blocks: int = 2
    row_queries: Literal["first", "all"] = "first"


def configure(config: PreTrainedConfig, sparse: SparseAttention) -> None:
    """Stores the settings on a model's configuration, as plain values that are saved with it and read at every call.

    Raises:
        ValueError: `sparse` is no SparseAttention, or what `select_blocks` would refuse, such as a budget below the
            forced blocks.
    """
    if not isinstance(sparse, SparseAttention):
        raise ValueError(f"sparse: expected a SparseAttention, got {type(sparse).__name__}")
    one_token = torch.zeros(1, 1, 1, 1)
    select_blocks(one_token, one_token, mode="per_head", **_arguments(sparse))  # checks every field
    setattr(config.get_text_config(), NAME, dataclasses.asdict(sparse))


def settings(config: PreTrainedConfig) -> SparseAttention:
    """The settings that `configure` stored, or the defaults."""
    stored = getattr(config.get_text_config(), NAME, None)
    if stored is None:
        return SparseAttention()
    budget = TopP(**stored["budget"]) if "mass" in stored["budget"] else TopK(**stored["budget"])
    return SparseAttention(**{**stored, "budget": budget})


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What Transformers calls in place of its own attention.

    Args:
        module: the attention layer; its `config` holds the settings.
        query: [B, HQ, T, D].
        key, value: [B, H, S, D], the cache included; query t stands at key position S − T + t.
        attention_mask: what `sequence_numbers` made: int32 [B, tokens seen so far] or None. 0 is padding.
        scaling: of the logits.
        sliding_window: a token sees itself and the `sliding_window − 1` before it.
        cu_seq_lens_q, cu_seq_lens_k: int32 [N + 1], bounds of N packed sequences in a batch of one.

    Returns:
        ([B, T, HQ, D], None). Padding tokens get 0.

    Raises:
        ValueError: dropout, attention that is not causal, a mask that is not 2-D, or any of `_UNSUPPORTED`.
    """
    _refuse(module, attention_mask, dropout, is_causal, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave q and k in float32 there, v not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, tokens, heads, D]
    if attention_mask is not None:  # a static cache has room for more keys than it holds
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
    sparse = _sparsity(module, k.shape[1]) if sliding_window is None else None
    attend = functools.partial(_attend, sparse=sparse, scale=scaling, window=sliding_window)
    if cu_seq_lens_q is not None:
        packed = {"cu_seqlens_q": cu_seq_lens_q.int(), "cu_seqlens_k": cu_seq_lens_k.int()}
        return attend(q, k, v, **packed), None
    if attention_mask is None or bool((attention_mask == 1).all()):
        return attend(q, k, v), None
    return _unpadded(attend, q, k, v, attention_mask), None


def sequence_numbers(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """What Transformers calls, once per forward, to turn padding and packing into the mask that the layers receive.

    Args:
        q_length, q_offset: the queries stand at positions q_offset … q_offset + q_length − 1.
        kv_length, kv_offset: the keys, of which a static cache has more than there are tokens, begin at kv_offset.
        mask_function: (batch, head, query position, key position) → bool, without the padding.
        attention_mask: bool [B, tokens seen so far], False for padding.

    Returns:
        int32 [B, tokens seen so far, from kv_offset on]: 0 for padding, else the number of the packed sequence, from 1.
        None when every key is a token of one sequence.

    Raises:
        ValueError: the model asks for a mask that is not causal, windowed or packed; or `attention_mask` is too short.
    """
    if use_vmap or getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(f"{_SPELLED} takes causal and sliding-window masks, got a custom or chunked one; use 'sdpa'")
    first = int(q_offset)
    seen = first + q_length
    follows = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)  # does token t see token t − 1?
    if q_length > 1:
        batch = torch.arange(batch_size, device=device)[:, None]
        token = torch.arange(first, seen, device=device)[None]
        head = torch.zeros((), dtype=torch.long, device=device)
        follows[:, 1:] = mask_function(batch, head, token[:, 1:], token[:, :-1])
        if bool(torch.as_tensor(mask_function(batch, head, token[:, :-1], token[:, 1:])).any()):
            raise ValueError(f"{_SPELLED} is causal, got a mask where tokens see later ones; use 'sdpa'")
    if attention_mask is not None:
        if attention_mask.shape[1] < seen:
            raise ValueError(f"attention_mask: expected [B, {seen}] or longer, got {tuple(attention_mask.shape)}")
        numbers = attention_mask[:, kv_offset:seen].int()
    elif bool(follows.all()):
        numbers = torch.ones(batch_size, seen - kv_offset, dtype=torch.int32, device=device)
    else:
        numbers = 1 + (~follows).cumsum(1, dtype=torch.int32)
    if not bool(follows.all()) and (attention_mask is not None or numbers.shape[1] != kv_length):
        raise ValueError(f"{_SPELLED} takes packed sequences without a cache or padding only; use 'sdpa'")
    return None if numbers.shape[1] == kv_length and bool((numbers == 1).all()) else numbers


def _refuse(module: nn.Module, attention_mask, dropout: float, is_causal: bool | None, extras: dict) -> None:
    if dropout:
        raise ValueError(f"{_SPELLED} has no dropout, got {dropout}; set config.attention_dropout = 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{_SPELLED} is causal, got is_causal=False from {type(module).__name__}; use 'sdpa'")
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.is_floating_point()):
        raise ValueError(
            f"attention_mask: {_SPELLED} takes the model's 2-D padding mask, got {attention_mask.dtype} "
            f"{tuple(attention_mask.shape)}; use 'sdpa' for masks of your own"
        )
    for name in _UNSUPPORTED:
        given = extras.get(name)
        if given is not None and given is not False:
            raise ValueError(f"{name}: not supported by {_SPELLED}, got {type(given).__name__}; use 'eager'")


def _sparsity(module: nn.Module, longest: int) -> SparseAttention | None:
    """The layer's settings; None, which is dense, where the budget covers the longest sequence."""
    sparse = settings(module.config)
    if isinstance(sparse.budget, TopK) and sparse.budget.blocks * sparse.block_n >= longest:
        return None
    return dataclasses.replace(sparse, row_queries="first") if module.training else sparse


def _arguments(sparse: SparseAttention) -> dict[str, object]:
    return {field.name: getattr(sparse, field.name) for field in dataclasses.fields(sparse)}


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sparse: SparseAttention | None,
    scale: float | None,
    window: int | None,
    **packed: Tensor,
) -> Tensor:
    selection = None
    with torch.autocast(q.device.type, enabled=False):  # scores and softmax keep the precision they were given
        if sparse is not None:
            selection = select_blocks(q, k, mode="per_head", scale=scale, **_arguments(sparse), **packed)
        return diff_attention(q, k, v, None, selection, scale=scale, window=window, **packed)


def _unpadded(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    """Runs `attend` over the real tokens alone, sequences end to end; the queries are each row's last T tokens."""
    B, T = q.shape[:2]
    most = int(numbers.max())
    sequence = torch.arange(B, device=q.device)[:, None] * most + numbers - 1  # [B, S]; counted over the whole batch
    real_k, real_q = (x.flatten().nonzero().squeeze(1) for x in (numbers, numbers[:, -T:]))
    if not len(real_q):
        return torch.zeros_like(q)

    def bounds(sequence: Tensor, real: Tensor) -> Tensor:
        tokens = torch.bincount(sequence.flatten()[real], minlength=B * most)
        return nn.functional.pad(tokens.cumsum(0, dtype=torch.int32), (1, 0))

    o = attend(
        q.flatten(0, 1)[real_q][None],
        k.flatten(0, 1)[real_k][None],
        v.flatten(0, 1)[real_k][None],
        cu_seqlens_q=bounds(sequence[:, -T:], real_q),
        cu_seqlens_k=bounds(sequence, real_k),
    )
    return torch.zeros_like(q).flatten(0, 1).index_copy(0, real_q, o[0]).unflatten(0, (B, T))


AttentionInterface.register(NAME, sparse_attention_forward)
AttentionMaskInterface.register(NAME, sequence_numbers)
