"""Headless models: swap their layers' classes, and work out once a call which tokens are routed.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.

Shapes: B batch, T tokens of this call, H hidden, K experts.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .dense_metamoe import DenseExperts
from .experts_metamoe import LowRank, form_of
from .layers_metamoe import NORM_AFTER_FFN, MoeFeedForward, MoeLayer, MoePostNormLayer, NormAfterExperts, swapped
from .loading_metamoe import register_disk_layout
from .routing_metamoe import (
    ContextRouter,
    LayerEvidence,
    Routing,
    attended_tokens,
    refuse_split_sequences,
    sequence_starts,
)

NO_CONTINUOUS_BATCHING = (
    "continuous batching can't carry the router's context from step to step; use generate(), "
    "or a model whose router_context is 'none'"
)


class MetaMoeMixin:
    """What the headless model and the models with a head share."""

    _keep_in_fp32_modules_strict = ["router"]

    @property
    def supports_context_parallel(self) -> bool:
        return self.config.router_context == "none" and super().supports_context_parallel

    _experts_installed = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for `@use_experts_implementation` in this file; it stands in another

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> str | None:
        # Native classes that are being built know of no experts, and refuse whatever is asked of them.
        if not self._experts_installed:
            return None
        return super()._check_and_adjust_experts_implementation(experts_implementation)

    def _use_experts(self, requested: str | None) -> None:
        """Install what was asked for as soon as all classes are ours."""
        self._experts_installed = True
        self.config._experts_implementation_internal = self._check_and_adjust_experts_implementation(requested)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ContextRouter):
            for parameter in module.parameters():
                initialization.zeros_(parameter)
        elif isinstance(module, LowRank):
            initialization.normal_(module.lora_A, std=self.config.initializer_range)
            initialization.zeros_(module.lora_B)
        elif isinstance(module, DenseExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    initialization.zeros_(parameter)
                else:
                    initialization.normal_(parameter, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class MetaMoeModelMixin(MetaMoeMixin):
    """Headless model: swaps its layers' classes, and works out once a call which tokens are routed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        super().__init__(config, *args, **kwargs)
        self.install_experts()
        self._use_experts(requested)
        self.post_init()

    def install_experts(self, config: Any = None) -> None:
        """Put an MoE block where each layer keeps its FFN.

        Args:
            config: says which experts there are; None: the model's own does. A tower's stands in the whole model's.

        Raises:
            ValueError: if no layer has an FFN of a known form.
        """
        config = self.config if config is None else config
        found = [(name, module, form) for name, module in self.named_modules() if (form := form_of(module)) is not None]
        if not found:
            raise ValueError(
                f"{type(self).__name__}: no layer of {self.config.model_type!r} owns an FFN of a known form; "
                "a family is added in FORMS of experts_metamoe.py"
            )
        for layer_idx, (name, module, form) in enumerate(found):
            if "." in form.output:
                module.__class__ = swapped(MoePostNormLayer, type(module))
            else:
                layer = self.get_submodule(name.rpartition(".")[0])
                layer.__class__ = swapped(MoeLayer, type(layer))
                module.__class__ = swapped(MoeFeedForward, type(module))
                if (norm := getattr(layer, NORM_AFTER_FFN, None)) is not None:
                    norm.__class__ = swapped(NormAfterExperts, type(norm))
            biased = module.get_submodule(form.output).bias is not None
            module.add_experts(config, layer_idx, form)
        register_disk_layout(config.model_type, form, biased)
        # A class that was swapped in after __init__ isn't in the library's registry yet.
        _CAN_RECORD_REGISTRY[self] = self._can_record_outputs

    def routed_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return (B, T) bool: True for tokens that are neither padding nor excluded from routing."""
        tokens = inputs_embeds[..., 0] if input_ids is None else input_ids
        routed = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "the router can't tell padding from an attention_mask that is not 2-D, or that is 4-D and looks "
                    "back into a cache; pass token_mask, (batch, tokens), too"
                )
            routed &= mask[:, -tokens.shape[1] :].to(tokens.device).bool()
        for token_id in self.config.router_excluded_token_ids:
            if input_ids is not None:
                routed &= input_ids != token_id
            else:
                token = torch.tensor(token_id, device=tokens.device)
                excluded = self.get_input_embeddings()(token).to(inputs_embeds.dtype)
                routed &= (inputs_embeds != excluded).any(dim=-1)
        return routed

    def routing(
        self,
        routed: Tensor,
        forced_expert: Tensor | None,
        sequence_start: Tensor | None = None,
        prompt_mask: Tensor | None = None,
    ) -> Routing:
        """Return what all layers' routers need to know of this call; `prompt_mask` as in `forward`."""
        context = None
        if prompt_mask is not None and self.config.router_context == "prompt":
            context = routed & prompt_mask[:, -routed.shape[1] :].to(routed.device).bool()
        # To look costs an accelerator more than the masks do.
        look = routed.device.type == "cpu" and not torch.compiler.is_compiling()
        everywhere = look and bool((routed if context is None else context).all())
        everywhere = everywhere and sequence_start is None
        return Routing(routed, sequence_start, forced_expert, LayerEvidence(), context, everywhere=everywhere)


class MetaMoeDecoderMixin(MetaMoeModelMixin):
    """Headless decoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        forced_expert: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Run the decoder.

        Args beyond the native ones:
            token_mask: (B, T or past + T), 0 at padding. Needed where `attention_mask` is 4-D and there is a
                cache; without one, a 4-D mask says itself what each token's context is.
            prompt_mask: (B, T or past + T), 1 at tokens of the prompt, over which a `prompt` context is
                averaged. A call without it is all prompt.
            forced_expert: (B,) int, the expert for every token of a row; -1 leaves the choice to the router.
        """
        if self.config.router_context != "none":
            refuse_split_sequences(self.config)
            if kwargs.get("cache") is not None:
                raise ValueError(NO_CONTINUOUS_BATCHING)
        starts = attended = None
        if attention_mask is None and past_key_values is None and position_ids is not None:
            starts = sequence_starts(position_ids)
        mask = attention_mask if token_mask is None else token_mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == mask.shape[-2]:
            attended = attended_tokens(mask)
            mask = attended.diagonal(dim1=-2, dim2=-1)
        routing = self.routing(self.routed_tokens(input_ids, inputs_embeds, mask), forced_expert, starts, prompt_mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing._replace(attended=attended),
            **kwargs,
        )


class MetaMoeEncoderMixin(MetaMoeModelMixin):
    """Headless text encoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_mask: Tensor | None = None,
        forced_expert: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder; `token_mask` and `forced_expert` as for decoders."""
        mask = attention_mask if token_mask is None else token_mask
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            routing=self.routing(self.routed_tokens(input_ids, inputs_embeds, mask), forced_expert),
            **kwargs,
        )


class MetaMoeVisionMixin(MetaMoeModelMixin):
    """Headless image encoder: every patch is routed."""

    def forward(self, pixel_values: Tensor | None = None, forced_expert: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the encoder; `forced_expert` as for decoders."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing; give (batch, channels, height, width)")
        patches = torch.ones(1, 1, dtype=torch.bool, device=pixel_values.device)
        routing = Routing(patches, None, forced_expert, LayerEvidence(), everywhere=True)
        return super().forward(pixel_values=pixel_values, routing=routing, **kwargs)
