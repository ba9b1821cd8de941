"""The configuration of a DIFF V2 YOCO model: Llama's field names, plus the two halves of the decoder and the sparsity
of the second.

The first half of the layers is the self-decoder, the second half the cross-decoder. The sparsity fields (`sparse_*`)
and the backends are read at every call, so one loaded model can be run dense and sparse in turn:
`model.config.sparse_mode = "pair_mean"`.
"""

import math

from transformers import PreTrainedConfig

from ..attention import BACKENDS, PAGED_BACKENDS
from ..selectors import TopK

SELF_DECODERS = ("sliding_window", "gated_retention")
CROSS_POSITIONS = ("rope", "none")
SPARSE_MODES = ("dense", "pair_mean", "per_class")


class DiffV2YocoConfig(PreTrainedConfig):
    """Sizes and choices of `DiffV2YocoModel`.

    Args:
        num_hidden_layers: both halves together; even.
        num_attention_heads: output heads HO. DIFF V2 attention has 2·HO query heads.
        num_key_value_heads: KV heads H; 2·HO / H must be even, so that no differential pair straddles two groups. None
            is HO.
        head_dim: even; None is hidden_size // num_attention_heads.
        max_position_embeddings: tokens the model is meant for; the capacity of a cache that a caller does not size.
        rope_theta: base of the rotary frequencies (interleaved form: adjacent dimensions are a pair); also taken from
            `rope_parameters`, Transformers' spelling. Scaled frequencies are refused.
        self_decoder: "sliding_window" (DIFF V2 attention to the last `sliding_window` tokens) or "gated_retention".
        sliding_window: tokens a query sees in the self-decoder, itself included.
        cross_position: "rope" rotates the queries and the shared keys of the cross-decoder; "none" leaves them.
        sparse_mode: "dense", "pair_mean" (one list of key blocks for both classes) or "per_class" (signal and noise
            choose apart).
        sparse_budget: key blocks per row of queries and KV head, forced ones included.
        sparse_noise_budget: the noise class's budget under "per_class"; None is sparse_budget.
        sparse_block_m: query tokens that share a list; rows stand at absolute multiples of it. 1 is exact per-token
            selection.
        sparse_block_n: tokens per key block, which is also the page of the shared cache.
        sparse_sink_blocks, sparse_local_blocks: blocks always kept, at the start of the sequence and counted back from
            the row's own.
        sparse_row_queries: "first": a row is scored by its first token. "all" is the same for rows of one token and
            refused for longer ones, where later tokens would choose for earlier ones.
        sparse_share_layers: the first of every so many cross-decoder layers chooses the blocks for all of them; 1 is a
            choice of each layer's own. Fewer choices, a little less accurate where the budget is small.
        attn_backend: passed to `diff_attention`.
        paged_backend: passed to `diff_attention_paged`, when the shared cache is read.

    Raises:
        ValueError: the sizes do not fit each other, an unknown choice, or a budget below the blocks that are always
            kept.
    """

    model_type = "diffv2_yoco"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class's convention)
    base_model_tp_plan = {  # noqa: RUF012
        "self_layers.*.mixer.q_proj": "colwise",
        "self_layers.*.mixer.k_proj": "colwise",
        "self_layers.*.mixer.v_proj": "colwise",
        "self_layers.*.mixer.lambda_proj": "colwise",
        "self_layers.*.mixer.gate_proj": "colwise",
        "self_layers.*.mixer.decay_proj": "colwise",
        "self_layers.*.mixer.o_proj": "rowwise",
        "self_layers.*.mlp.gate_proj": "colwise",
        "self_layers.*.mlp.up_proj": "colwise",
        "self_layers.*.mlp.down_proj": "rowwise",
        "shared_kv.k_proj": "colwise",
        "shared_kv.v_proj": "colwise",
        "cross_layers.*.mixer.q_proj": "colwise",
        "cross_layers.*.mixer.lambda_proj": "colwise",
        "cross_layers.*.mixer.o_proj": "rowwise",
        "cross_layers.*.mlp.gate_proj": "colwise",
        "cross_layers.*.mlp.up_proj": "colwise",
        "cross_layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    self_decoder: str = "sliding_window"
    sliding_window: int = 512
    cross_position: str = "rope"

    sparse_mode: str = "dense"
    sparse_budget: int = 16
    sparse_noise_budget: int | None = None
    sparse_block_m: int = 1
    sparse_block_n: int = 64
    sparse_sink_blocks: int = 1
    sparse_local_blocks: int = 2
    sparse_row_queries: str = "first"
    sparse_share_layers: int = 1
    attn_backend: str = "auto"
    paged_backend: str = "auto"

    def __post_init__(self, **kwargs):
        self._expect_ints(1, "hidden_size", "num_attention_heads")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("rope_parameters", "rope_scaling"):  # today's name and the old one
            rope = kwargs.pop(name, None) or {}
            _expect_unscaled(name, rope)
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
        self._check_sizes()
        self.check_sparsity()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        self._expect_ints(1, "vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
        self._expect_ints(1, "max_position_embeddings", "sliding_window")
        if type(self.rope_theta) not in (int, float) or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected a number > 0, got {self.rope_theta!r}")
        if self.num_hidden_layers % 2:
            raise ValueError(f"num_hidden_layers: expected an even number, got {self.num_hidden_layers}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary pairs, got {self.head_dim}")
        if 2 * self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of the {2 * self.num_attention_heads} query heads "
                f"(2 · num_attention_heads), got {self.num_key_value_heads}"
            )
        group = 2 * self.num_attention_heads // self.num_key_value_heads
        if group % 2:
            raise ValueError(
                f"num_key_value_heads: expected an even number of query heads per KV head, as a pair must not straddle "
                f"two groups, got {group} (2 · {self.num_attention_heads} / {self.num_key_value_heads})"
            )
        _expect("self_decoder", self.self_decoder, SELF_DECODERS)
        _expect("cross_position", self.cross_position, CROSS_POSITIONS)

    def check_sparsity(self) -> None:
        """Checks the fields that are read at every call, which may have been set since the last one.

        Raises:
            ValueError: an unknown choice, or sizes that do not fit each other.
        """
        _expect("sparse_mode", self.sparse_mode, SPARSE_MODES)
        _expect("sparse_row_queries", self.sparse_row_queries, ("first", "all"))
        self._expect_ints(1, "sparse_budget", "sparse_block_m", "sparse_block_n", "sparse_local_blocks")
        self._expect_ints(1, "sparse_share_layers")
        self._expect_ints(0, "sparse_sink_blocks")
        if self.sparse_noise_budget is not None:
            self._expect_ints(1, "sparse_noise_budget")
        _expect("attn_backend", self.attn_backend, BACKENDS)
        _expect("paged_backend", self.paged_backend, PAGED_BACKENDS)
        if self.sparse_row_queries == "all" and self.sparse_block_m > 1:
            raise ValueError(
                f"sparse_row_queries: expected 'first' for sparse_block_m = {self.sparse_block_m}, got 'all': later "
                "tokens of a row would choose the blocks of earlier ones, a leak in training"
            )
        overlapped = -(-(self.sparse_block_m - 1) // self.sparse_block_n)
        forced = self.sparse_sink_blocks + self.sparse_local_blocks + overlapped
        for name in ("sparse_budget", "sparse_noise_budget"):
            budget = getattr(self, name)
            if budget is not None and budget < forced:
                raise ValueError(
                    f"{name}: expected at least the {forced} blocks that are always kept (sparse_sink_blocks + "
                    f"sparse_local_blocks + ⌈(sparse_block_m − 1) / sparse_block_n⌉), got {budget}"
                )

    def selection_options(self) -> dict:
        """The sparsity fields as keyword arguments of `select_blocks`."""
        budget = TopK(self.sparse_budget)
        if self.sparse_mode == "per_class":
            noise = self.sparse_noise_budget
            budget = (budget, budget if noise is None else TopK(noise))
        return {
            "mode": self.sparse_mode,
            "budget": budget,
            "block_m": self.sparse_block_m,
            "block_n": self.sparse_block_n,
            "sink_blocks": self.sparse_sink_blocks,
            "local_blocks": self.sparse_local_blocks,
            "row_queries": self.sparse_row_queries,
        }

    def listed_blocks(self) -> int:
        """Room on the lists of one token and KV head: all classes take as much as the largest."""
        if self.sparse_mode == "per_class":
            return 2 * max(self.sparse_budget, self.sparse_noise_budget or 0)
        return self.sparse_budget

    def choice_options(self) -> dict:
        """All that a choice of blocks depends on, to be compared with those of an earlier one."""
        return self.selection_options() | {"share_layers": self.sparse_share_layers}

    def _expect_ints(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an int ≥ {least}, got {value!r}")


def _expect_unscaled(name: str, rope: dict) -> None:
    """`rope` is Transformers' dict of rotary parameters; any but these would change the frequencies."""
    known = {"rope_type": "default", "type": "default"}
    if not isinstance(rope, dict) or any(key != "rope_theta" and known.get(key) != rope[key] for key in rope):
        raise ValueError(f"{name}: expected rope_type 'default' and rope_theta alone, got {rope!r}")


def _expect(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
