"""YOCO with DIFF V2 attention as a Transformers model; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention import DiffV2Attention
from .configuration import DiffV2YocoConfig
from .modeling import DiffV2YocoForCausalLM, DiffV2YocoModel
from .retention import GatedRetention

AutoConfig.register(DiffV2YocoConfig.model_type, DiffV2YocoConfig, exist_ok=True)
AutoModel.register(DiffV2YocoConfig, DiffV2YocoModel, exist_ok=True)
AutoModelForCausalLM.register(DiffV2YocoConfig, DiffV2YocoForCausalLM, exist_ok=True)

__all__ = ["DiffV2Attention", "DiffV2YocoConfig", "DiffV2YocoForCausalLM", "DiffV2YocoModel", "GatedRetention"]
