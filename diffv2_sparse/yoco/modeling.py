"""YOCO with DIFF V2 attention: a self-decoder, one shared key/value projection, and a cross-decoder that reads it.

    h = embed(tokens);  h = self_layers(h);  k, v = shared_kv(h);  h = cross_layers(h, k, v);  logits = lm_head(norm(h))

Its layers are in decoder.py. Only the self-decoder must see a whole prompt: the cross-decoder runs for the positions
whose logits are asked for. `forward` computes all positions at once and carries gradients; `prefill` and `decode` go
through a cache and do not. Source: YOCO, arXiv 2405.05254.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..cache import CacheSpec, RowLists, SharedKVCache
from ..pages import sent
from ..selectors import block_summaries
from .arguments import check_labels, loss_arguments, tokens_or_embeddings
from .configuration import DiffV2YocoConfig
from .decoder import CrossDecoderLayer, SelfDecoderLayer, SharedKV
from .generation import SharedCacheGeneration
from .graphs import ModelGraphs, can_capture
from .layers import RMSNorm, Rotary, rotary_angles
from .layout import Layout
from .memory import ChunkMemory
from .reading import Kept, Reading, locate

CHUNK_TOKENS = 4096  # columns of a prompt that `prefill` reads at once


class DiffV2YocoPreTrainedModel(PreTrainedModel):
    """What Transformers asks of both classes below."""

    config_class = DiffV2YocoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SelfDecoderLayer", "CrossDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_attention_backend = True


class DiffV2YocoModel(DiffV2YocoPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__(config)
        half = config.num_hidden_layers // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.self_layers = nn.ModuleList(SelfDecoderLayer(config) for _ in range(half))
        self.shared_kv = SharedKV(config)
        self.cross_layers = nn.ModuleList(CrossDecoderLayer(config) for _ in range(half))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.graphs = ModelGraphs()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SharedKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        use_graphs: bool = True,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, K, hidden_size]` of what is kept. Arguments as in `DiffV2YocoForCausalLM.forward`."""
        if past_key_values is None and not use_cache:
            hidden = self._all_positions(input_ids, attention_mask, inputs_embeds, logits_to_keep)
        elif attention_mask is None and past_key_values is not None and inputs_embeds is None:
            hidden = self.decode(input_ids, past_key_values, logits_to_keep=logits_to_keep, use_graphs=use_graphs)
        else:
            hidden, past_key_values = self.prefill(
                input_ids, attention_mask, past_key_values, inputs_embeds=inputs_embeds, logits_to_keep=logits_to_keep
            )
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _all_positions(self, input_ids, attention_mask, inputs_embeds, logits_to_keep) -> Tensor:
        """Both halves over whole sequences, with gradients and without a cache."""
        self.config.check_sparsity()
        inputs = tokens_or_embeddings(self.config, input_ids, inputs_embeds)
        layout = Layout.of(inputs, attention_mask)
        every = type(logits_to_keep) is int and logits_to_keep == 0
        kept = None if every else Kept.of(layout, logits_to_keep)
        hidden = layout.pack(self._embed(inputs))
        if sum(layout.counts):  # else padding only
            hidden = self._layers(hidden, layout)
        if kept is None:
            return layout.unpack(hidden)
        positions, places = kept.within(layout)
        return _placed(hidden.flatten(0, 1)[locate(layout, positions)[0]], places, len(layout.counts), kept.width)

    def _layers(self, hidden: Tensor, layout: Layout) -> Tensor:
        rotary = self.rotary(layout.positions)
        for layer in self.self_layers:
            hidden = layer(hidden, rotary, layout)
        k, v = self.shared_kv(hidden, rotary)
        summaries = None
        if self.config.sparse_mode != "dense":
            summaries = block_summaries(k.detach(), self.config.sparse_block_n, layout.cu_seqlens)
        for i, layer in enumerate(self.cross_layers):
            if i % self.config.sparse_share_layers == 0:
                chosen = None
            hidden, chosen = layer(hidden, k, v, summaries, rotary, layout, chosen)
        return self.norm(hidden)

    def read(
        self,
        hidden: Tensor,
        rotary: Rotary,
        cache: SharedKVCache,
        reading: Reading,
        held: Sequence[RowLists | None],
    ) -> tuple[Tensor, tuple[RowLists | None, ...]]:
        """The cross-decoder over the shared cache, for the tokens of `reading`, `[1, M, hidden_size]`, and their
        angles; `held` and the second result are each layer's lists of the rows that are open, before and after.
        """
        open_rows = []
        for i, (layer, rows) in enumerate(zip(self.cross_layers, held)):
            if i % self.config.sparse_share_layers == 0:
                chosen = None
            hidden, chosen = layer.read(hidden, rotary, cache, reading, rows, chosen)
            open_rows.append(chosen.open)
        return self.norm(hidden), tuple(open_rows)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SharedKVCache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        logits_to_keep: int | Tensor = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, SharedKVCache]:
        """As `DiffV2YocoForCausalLM.prefill`, but for hidden states `[B, K, hidden_size]`."""
        self.config.check_sparsity()
        inputs = tokens_or_embeddings(self.config, input_ids, inputs_embeds)
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected a positive int, got {chunk_tokens!r}")
        B, T = inputs.shape[:2]
        if cache is None:
            cache = self.new_cache(B, max(T, self.config.max_position_embeddings))
        if not isinstance(cache, SharedKVCache):
            raise ValueError(f"cache: expected a SharedKVCache, as from `new_cache`, got {type(cache).__name__}")
        cache.check(self.cache_spec(), B)
        layout = Layout.of(inputs, attention_mask, cache.tokens)
        cache.check_room(layout.counts)
        kept = Kept.of(layout, logits_to_keep)
        cache.check_sparse(self.config.sparse_mode != "dense" or not any(map(len, kept.positions)))
        if attention_mask is not None:
            attention_mask = attention_mask[:, -T:]
        hidden, places, memory = [], [], ChunkMemory(cache.spec.device)
        with cache.transaction():
            for start in range(0, T, chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                with memory.chunk(inputs[:, chunk].shape[1]):
                    own_mask = None if layout.index is None else attention_mask[:, chunk]
                    own = Layout.of(inputs[:, chunk], own_mask, cache.tokens)
                    positions, own_places = kept.within(own)
                    hidden.append(self._extend(self._embed(inputs[:, chunk]), own, cache, positions))
                places.extend(own_places)
                if progress is not None:
                    progress(min(start + chunk_tokens, T), T)
        return _placed(torch.cat(hidden), places, B, kept.width), cache

    @torch.no_grad()
    def decode(
        self, input_ids: Tensor, cache: SharedKVCache, *, logits_to_keep: int | Tensor = 0, use_graphs: bool = True
    ) -> Tensor:
        """As `DiffV2YocoForCausalLM.decode`, but for hidden states `[B, K, hidden_size]`."""
        one_graph = use_graphs and isinstance(cache, SharedKVCache) and type(logits_to_keep) is int
        if one_graph and logits_to_keep >= 0:
            self.config.check_sparsity()
            T = tokens_or_embeddings(self.config, input_ids, None).shape[1]
            if can_capture(self, cache, T):
                cache.check(self.cache_spec(), input_ids.shape[0])
                return self.graphs.decode(self, input_ids, cache)[:, -logits_to_keep:]
        return self.prefill(input_ids, cache=cache, logits_to_keep=logits_to_keep)[0]

    def _extend(self, embeds: Tensor, layout: Layout, cache: SharedKVCache, asked: list[Sequence[int]]) -> Tensor:
        """Reads more tokens into the cache; hidden states `[K, hidden_size]` of those asked for, by sequence."""
        if not sum(layout.counts):  # padding only
            nothing = embeds.new_zeros(0, cache.spec.kv_heads, cache.spec.head_dim)
            cache.append(nothing, nothing, *layout.located, layout.counts, layout.width)
            return embeds.new_zeros(0, embeds.shape[-1])
        hidden, rotary, states = layout.pack(embeds), self.rotary(layout.positions), []
        for layer, state in zip(self.self_layers, cache.states):
            hidden, state = layer.extend(hidden, rotary, layout, state)
            states.append(state)
        k, v = (x.flatten(0, 1) for x in self.shared_kv(hidden, rotary))
        cache.append(k, v, *layout.located, layout.counts, layout.width)
        cache.states = tuple(states)
        choice, block_m = {}, 1
        if self.config.sparse_mode != "dense" and self.config.sparse_block_m > 1:
            block_m = self.config.sparse_block_m
            choice = self.config.choice_options()
            cache.check_held(choice, block_m, layout.starts)
        reading = Reading.of(layout, asked, block_m)
        held = cache.held if choice == cache.held_choice else (None,) * len(self.cross_layers)  # then no row is open
        if reading.tokens.shape[0]:
            rotary = self.rotary(reading.positions)
            (hidden,), held = self.read(hidden.flatten(0, 1)[reading.tokens][None], rotary, cache, reading, held)
        else:
            hidden = hidden.new_zeros(0, hidden.shape[-1])
        cache.held, cache.held_choice = held, choice
        return hidden if reading.asked is None else hidden[reading.asked]

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        blocks: int | None = None,
        max_rollback: int = 0,
        offload: str | None = None,
        resident_blocks: int | None = None,
    ) -> SharedKVCache:
        """As `DiffV2YocoForCausalLM.new_cache`."""
        if offload is not None and resident_blocks is None:
            resident_blocks = batch_size * self._resident_blocks(max_rollback)
        sizes = {"blocks": blocks, "max_rollback": max_rollback}
        return SharedKVCache(
            self.cache_spec(), batch_size, capacity, **sizes, offload=offload, resident_blocks=resident_blocks
        )

    def _resident_blocks(self, max_rollback: int) -> int:
        """Room on the lists of one sequence in a step: of every layer that chooses, and of what one call reads."""
        config = self.config
        blocks = config.listed_blocks()
        choices = -(-len(self.cross_layers) // config.sparse_share_layers)
        return blocks * max(choices, 1 + max_rollback, 3)  # 3: a token, its row's first and the open row's first

    def cache_spec(self) -> CacheSpec:
        config, weight = self.config, self.shared_kv.k_proj.weight
        return CacheSpec(
            self_decoder=config.self_decoder,
            window=config.sliding_window,
            self_layers=len(self.self_layers),
            cross_layers=len(self.cross_layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            position=f"{config.cross_position} {config.rope_theta}",
            block_n=config.sparse_block_n,
            dtype=weight.dtype,
            device=weight.device,
            owner=weakref.ref(self),
        )

    def _embed(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.ndim == 3 else self.embed_tokens(inputs)

    def rotary(self, positions: Tensor) -> Rotary:
        """The angles of positions `[B, T]`."""
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta, self.dtype)


def _placed(hidden: Tensor, places: list[int], B: int, K: int) -> Tensor:
    """`[len(places), hidden_size]` at its places in `[B, K, hidden_size]`, zeros elsewhere."""
    index = sent(places, torch.long, hidden.device)
    return hidden.new_zeros(B * K, hidden.shape[-1]).index_copy(0, index, hidden).unflatten(0, (B, K))


class DiffV2YocoForCausalLM(DiffV2YocoPreTrainedModel, SharedCacheGeneration, GenerationMixin):
    """`DiffV2YocoModel` with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__(config)
        self.model = DiffV2YocoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SharedKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        use_graphs: bool = True,
        **loss_args,
    ) -> CausalLMOutputWithPast:
        """Logits and, with `labels`, the loss.

        Without a cache all positions are computed at once, with gradients; with one, see `prefill`.

        Args:
            input_ids: int64 `[B, T]`; or `inputs_embeds` `[B, T, hidden_size]`.
            attention_mask: `[B, T]`, zeros where a token is padding, on either side; or wider, when it also covers
                columns that the cache holds. Positions count real tokens only.
            past_key_values: the cache of the tokens before these, from `new_cache` or an earlier call; the new ones are
                appended.
            labels: int64 `[B, T]`, −100 where there is no target; shifted by one here. Only with logits_to_keep = 0
                and, while gradients are enabled, without a cache.
            use_cache: True makes a cache for `max_position_embeddings` tokens where none is given; None makes none.
            logits_to_keep: 0 is all T columns; n > 0 each sequence's last n tokens; an integer tensor those columns.
            use_graphs: as in `decode`; also an argument of `generate`.
            loss_args: `num_items_in_batch` (from Trainer) and `ignore_index`, for the loss.

        Returns:
            logits `[B, K, vocab_size]`; those of padding mean nothing.

        Raises:
            ValueError: shapes or dtypes disagree; the cache is full or another model's; an argument that this model
                does not have.
        """
        loss_args = loss_arguments(loss_args)
        if labels is not None:
            check_labels(logits_to_keep, cached=bool(use_cache) or past_key_values is not None)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            use_graphs=use_graphs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_args)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SharedKVCache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        logits_to_keep: int | Tensor = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, SharedKVCache]:
        """Reads a prompt, or more of it, into a cache. The cross-decoder runs only for the positions whose logits are
        kept.

        Args:
            input_ids, attention_mask, inputs_embeds, logits_to_keep: as in `forward`.
            cache: continued; None makes one for `max_position_embeddings` tokens, or the prompt's if it is longer.
            chunk_tokens: columns read at once; the logits do not depend on it.
            progress: called with (columns read, columns in all) after each chunk.

        Returns:
            logits `[B, K, vocab_size]` and the cache.

        Raises:
            ValueError: as `forward`.
            torch.OutOfMemoryError: a chunk did not fit; with a size to try. Whatever is raised, a cache that was passed
                in stays as it was, so the call can be made again with smaller chunks.
        """
        hidden, cache = self.model.prefill(
            input_ids,
            attention_mask,
            cache,
            inputs_embeds=inputs_embeds,
            chunk_tokens=chunk_tokens,
            logits_to_keep=logits_to_keep,
            progress=progress,
        )
        return self.lm_head(hidden), cache

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: SharedKVCache, *, use_graphs: bool = True) -> Tensor:
        """Appends t tokens to every sequence: input_ids `[B, t]` → logits `[B, t, vocab_size]`. Errors as `prefill`.

        Args:
            use_graphs: on CUDA up to 1 + max_rollback tokens are one CUDA graph per t, captured at the second call and
                again when the cache's tensors, the weights or the options have moved or changed. Hooks of modules do
                not run in it, and modules may not be replaced by others. Rows of one token only (`sparse_block_m`).
        """
        if cache is None:
            raise ValueError("cache: expected a SharedKVCache, as from `new_cache` or `prefill`, got None")
        return self.lm_head(self.model.decode(input_ids, cache, use_graphs=use_graphs))

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        blocks: int | None = None,
        max_rollback: int = 0,
        offload: str | None = None,
        resident_blocks: int | None = None,
    ) -> SharedKVCache:
        """An empty cache in the model's dtype and on its device; arguments as `SharedKVCache`, but that by default the
        lists of all layers that choose blocks are resident.
        """
        sizes = {"blocks": blocks, "max_rollback": max_rollback}
        return self.model.new_cache(batch_size, capacity, **sizes, offload=offload, resident_blocks=resident_blocks)
