"""Block-sparse differential attention (DIFF V2) over a YOCO shared cache."""

from .attention import diff_attention, diff_attention_paged
from .selection import BlockSelection
from .selectors import TopK, TopP, select_blocks

__all__ = ["BlockSelection", "TopK", "TopP", "diff_attention", "diff_attention_paged", "select_blocks"]
