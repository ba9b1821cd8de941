"""What Transformers' `generate` asks of the model beyond `forward`: a cache of ours, and the inputs of each step."""

from __future__ import annotations

from torch import Tensor

from ..cache import SharedKVCache


class SharedCacheGeneration:
    """`generate` over a `SharedKVCache`, for a model with `config` and `new_cache`.

    `GenerationMixin`, which it comes before, has to be among the model's own bases.
    """

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict:
        """Called by `generate`. Tokens that it has generated are none of them padding, so that no mask has to be read
        back from the device.
        """
        generated = next_sequence_length is not None and not is_first_iteration
        if generated and kwargs.get("past_key_values") is not None:
            kwargs["attention_mask"] = None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """Called by `generate`: the cache is ours, with room for the prompt and what will be generated."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation: expected None, got {generation_config.cache_implementation!r}")
        given, max_rollback = model_kwargs.get("past_key_values"), 0
        if generation_mode == "assisted_generation":
            max_rollback = generation_config.prompt_lookup_num_tokens or 0
            self._check_rollback(given, max_rollback)
        if given is None and generation_config.use_cache is not False:
            sequences = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            capacity = max_cache_length + max_rollback  # the last candidates may reach past the end
            model_kwargs["past_key_values"] = self.new_cache(sequences, capacity, max_rollback=max_rollback)

    def _check_rollback(self, cache: SharedKVCache | None, max_rollback: int) -> None:
        """Raises ValueError unless candidates that are not accepted can be taken back."""
        if self.config.sparse_mode != "dense" and self.config.sparse_block_m > 1:
            raise ValueError(
                f"assistant_model, prompt_lookup_num_tokens: expected sparse_block_m = 1, as tokens cannot be taken "
                f"back into earlier rows, got {self.config.sparse_block_m}"
            )
        if cache is None and max_rollback == 0:
            raise ValueError(
                "assistant_model: expected past_key_values = model.new_cache(..., max_rollback=n) with n no less than "
                "the assistant's tokens at a time, got None"
            )
