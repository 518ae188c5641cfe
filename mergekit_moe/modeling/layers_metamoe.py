"""What stands in place of a native layer, of its FFN and of the norm after it.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.
"""

from typing import Any

from torch import Tensor, nn

from .experts_metamoe import BlockCall, FeedForward, MoeBlock
from .routing_metamoe import Routing


class MoeFeedForward(MoeBlock):
    """Mixin over an FFN that is a module of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mixture(hidden)


class NormAfterExperts(nn.Module):
    """Mixin over the norm that some families (Gemma 2, OLMo 2) put between FFN and residual.

    It undoes any scaling of the FFN's output, and so would take from the router the gradient that the
    straight-through weight carries: that weight, whose value is 1, is applied after it.
    """

    call: BlockCall | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        normed = super().forward(hidden)
        return normed if self.call is None or self.call.gain is None else normed * self.call.gain.to(normed.dtype)


NORM_AFTER_FFN = "post_feedforward_layernorm"


def tell(module: nn.Module, call: BlockCall | None) -> None:
    """Set `module.call` past nn.Module's search for parameters, which a step of generation feels."""
    object.__setattr__(module, "call", call)


class MoeLayer(nn.Module):
    """Mixin over a native layer: hands the routing facts to its MoE block."""

    def forward(self, hidden_states: Tensor, *args: Any, routing: Routing, **kwargs: Any) -> Any:
        # The native layer calls its FFN with no way to pass more. Set here, inside the layer's own
        # forward, it is set again when gradient checkpointing runs the layer a second time.
        block, norm = self.moe_block(), self._modules.get(NORM_AFTER_FFN)
        call = BlockCall(routing, kwargs.get("past_key_values", kwargs.get("layer_past")), norm is not None)
        tell(block, call)
        if norm is not None:
            tell(norm, call)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            tell(block, None)
            if norm is not None:
                tell(norm, None)

    def moe_block(self) -> MoeBlock:
        return next(child for child in self._modules.values() if isinstance(child, MoeBlock))


class MoePostNormLayer(MoeLayer, MoeBlock):
    """Mixin over a layer of the BERT kind, whose FFN is its own `intermediate` and `output`."""

    def add_experts(self, config: Any, layer_idx: int, form: FeedForward) -> None:
        super().add_experts(config, layer_idx, form)
        self.chunk_size_feed_forward = 0  # chunks of a text don't know the whole text's mean

    def moe_block(self) -> MoeBlock:
        return self

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        mixed = self.output.dropout(self.mixture(attention_output))
        return self.output.LayerNorm(mixed + attention_output)


_SWAPPED: dict[tuple[type, type], type] = {}


def swapped(mixin: type, native: type) -> type:
    """Return `native` with `mixin` in front, under the native name (FSDP and _no_split_modules go by it)."""
    if (mixin, native) not in _SWAPPED:
        _SWAPPED[mixin, native] = type(native.__name__, (mixin, native), {"__module__": __name__})
    return _SWAPPED[mixin, native]
