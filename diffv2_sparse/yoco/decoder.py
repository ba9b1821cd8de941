"""The layers of both halves of the decoder, and the key/value projection between them.

    x = x + mixer(norm(x));  x = x + mlp(norm(x))

Each has a form for whole sequences with gradients, `forward`, and others for what goes through a cache.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cache import RowLists, SelfState, SharedKVCache
from ..selection import BlockSelection
from .attention import Choice, CrossAttention, DiffV2Attention
from .configuration import DiffV2YocoConfig
from .few_tokens import Projection, add_mlp, project
from .layers import RMSNorm, Rotary, SwiGLU
from .layout import Following, Layout
from .reading import Reading
from .retention import GatedRetention


class SelfDecoderLayer(GradientCheckpointingLayer):
    """A layer of the first half: sliding-window DIFF V2 attention or gated retention, then the feed-forward."""

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__()
        if config.self_decoder == "sliding_window":
            self.mixer = DiffV2Attention(config, window=config.sliding_window)
        else:
            self.mixer = GatedRetention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
        hidden = hidden + self.mixer(self.mixer_norm(hidden), rotary, layout)
        return hidden + self.mlp(self.mlp_norm(hidden))

    def extend(self, hidden: Tensor, rotary: Rotary, layout: Layout, state: SelfState) -> tuple[Tensor, SelfState]:
        """`forward` for tokens that follow those in `state`; returns the output and the state after these tokens."""
        mixed, state = self.mixer.extend(self.mixer_norm(hidden), rotary, layout, state)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), state

    def step(self, hidden: Tensor, rotary: Rotary, following: Following, state: SelfState) -> Tensor:
        """`extend` for few tokens, which changes `state` in place."""
        hidden = self.mixer.step(hidden, self.mixer_norm, rotary, following, state)
        return add_mlp(hidden, self.mlp_norm, self.mlp)


class SharedKV(nn.Module):
    """The one key/value projection: `[B, T, hidden_size]` → k, v `[B, T, H, D]`, keys turned by their absolute
    positions.
    """

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__()
        self.config = config
        size = config.num_key_value_heads * config.head_dim
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        turned = self.config.cross_position == "rope"
        both = Projection(self.k_proj, turned=turned), Projection(self.v_proj)
        k, v = project(hidden, self.norm, both, self.config.head_dim, rotary)
        return tuple(x.unflatten(-1, (-1, self.config.head_dim)) for x in (k, v))


class CrossDecoderLayer(GradientCheckpointingLayer):
    """A layer of the second half. The shared k and v are arguments, so that checkpointed gradients reach them, and so
    are the blocks that an earlier layer has chosen, so that a checkpoint reads the same ones when it runs again.
    """

    def __init__(self, config: DiffV2YocoConfig):
        super().__init__()
        self.mixer = CrossAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        k: Tensor,
        v: Tensor,
        summaries: Tensor | None,
        rotary: Rotary,
        layout: Layout,
        chosen: BlockSelection | None,
    ) -> tuple[Tensor, BlockSelection | None]:
        mixed, chosen = self.mixer(self.mixer_norm(hidden), k, v, summaries, rotary, layout, chosen)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), chosen

    def read(
        self,
        hidden: Tensor,
        rotary: Rotary,
        cache: SharedKVCache,
        reading: Reading,
        held: RowLists | None,
        chosen: Choice | None,
    ) -> tuple[Tensor, Choice]:
        """`forward` for the tokens of `reading`, over the shared cache."""
        hidden, chosen = self.mixer.read(hidden, self.mixer_norm, rotary, cache, reading, held, chosen)
        return add_mlp(hidden, self.mlp_norm, self.mlp), chosen
