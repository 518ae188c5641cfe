"""MetaMoE models: a native transformers model whose layers own an MoE block in place of their FFN.

Shipped inside every checkpoint, so it imports nothing but torch and transformers. Nothing is forked:
`MetaMoe<Family>Model`, `MetaMoe<Family>ForCausalLM` and other heads are generated on first use as
subclasses of the native classes; attention, caches, masks, heads and generation stay the library's.

Shapes: B batch, T tokens of this call, H hidden, K experts.
"""

import inspect
import re
from typing import Any, Unpack

import torch
import transformers
from torch import Tensor, nn
from transformers import initialization
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from .configuration_metamoe import config_class
from .dense_metamoe import DenseExperts
from .experts_metamoe import LowRank, form_of
from .layers_metamoe import NORM_AFTER_FFN, MoeFeedForward, MoeLayer, MoePostNormLayer, NormAfterExperts, swapped
from .loading_metamoe import register_disk_layout, register_head_names
from .routing_metamoe import (
    ContextRouter,
    Routing,
    attended_tokens,
    prompt_so_far,
    prompt_tokens,
    refuse_split_sequences,
    router_losses,
    sequence_starts,
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

    _auto_class = "AutoModel"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        super().__init__(config, *args, **kwargs)
        self.install_experts()
        self._use_experts(requested)
        self.post_init()

    def install_experts(self) -> None:
        """Put an MoE block where each layer keeps its FFN.

        Raises:
            ValueError: if no layer has an FFN of a known form.
        """
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
            module.add_experts(self.config, layer_idx, form)
        register_disk_layout(self.config.model_type, form, biased)
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
        return Routing(routed, sequence_start, forced_expert, context, everywhere=everywhere)


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
        **kwargs: Unpack[transformers.utils.TransformersKwargs],
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
                raise ValueError(_NO_CONTINUOUS_BATCHING)
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
        routing = Routing(patches, None, forced_expert, everywhere=True)
        return super().forward(pixel_values=pixel_values, routing=routing, **kwargs)


class MetaMoeHeadMixin(MetaMoeMixin):
    """Any native model with a head: its headless model becomes ours, in place."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        super().__init__(config, *args, **kwargs)
        body = self.base_model
        if not isinstance(body, MetaMoeModelMixin):
            body.__class__ = model_class(_family_of(type(self)), "Model")
            body.install_experts()
            body._use_experts(requested)
            body.post_init()
        register_head_names(self)
        self._use_experts(requested)
        self.post_init()


_NO_CONTINUOUS_BATCHING = (
    "continuous batching can't carry the router's context from step to step; use generate(), "
    "or a model whose router_context is 'none'"
)


class MetaMoeForCausalLMMixin(MetaMoeHeadMixin):
    """Decoder with a language-modelling head."""

    _auto_class = "AutoModelForCausalLM"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Unpack[transformers.utils.TransformersKwargs],
    ) -> tuple | MoeCausalLMOutputWithPast:
        """Run the model; with `output_router_logits`, return them and add the routers' losses to the loss.

        Args beyond the native ones:
            prompt_mask: see `MetaMoeDecoderMixin.forward`. With `labels`, the prompt is what stands before
                the first token to be learnt, in each sequence.
        """
        if self.config.router_context == "prompt":
            if labels is not None and prompt_mask is None:
                mask = kwargs.get("token_mask")
                mask = attention_mask if mask is None else mask
                routed = self.base_model.routed_tokens(input_ids, inputs_embeds, mask)
                starts = None
                if attention_mask is None and past_key_values is None and position_ids is not None:
                    starts = sequence_starts(position_ids)
                prompt_mask = prompt_tokens(labels, routed, starts)
            kwargs["prompt_mask"] = prompt_mask
        kwargs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        if not (self.config.output_router_logits if output_router_logits is None else output_router_logits):
            outputs = super().forward(**kwargs)
            return outputs if isinstance(outputs, tuple) else MoeCausalLMOutputWithPast(**outputs)
        bodies: list[tuple[Any, Tensor]] = []

        # The native head returns nothing of its body's outputs but the states, so look as they pass.
        def look(module: nn.Module, body_args: Any, body_kwargs: dict[str, Any], output: Any) -> None:
            given = inspect.signature(module.forward).bind(*body_args, **body_kwargs).arguments
            mask = given.get("token_mask")
            mask = given.get("attention_mask") if mask is None else mask
            routed = module.routed_tokens(given.get("input_ids"), given.get("inputs_embeds"), mask)
            bodies.append((output.router_logits, routed))

        handle = self.base_model.register_forward_hook(look, with_kwargs=True)
        return_dict = kwargs.pop("return_dict", None)
        try:
            outputs = super().forward(output_router_logits=True, return_dict=True, **kwargs)
        finally:
            handle.remove()
        router_logits, routed = bodies[0]
        aux_loss, z_loss = router_losses(router_logits, routed, self.config.num_experts_per_tok)
        loss = outputs.loss
        if loss is not None:
            added = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
            loss = loss + added.to(loss.device)
        outputs = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # named here, or generate() would refuse embeddings
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        length = (inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]).shape[1]
        masked = attention_mask is not None and attention_mask.ndim == 2
        if masked:
            # With a static cache the mask turns 4-D, which tells no padding: hand on the 2-D one, at each step of
            # one shape and one layout, so that a compiled step stays.
            inputs["token_mask"] = attention_mask[:, -length:].clone(memory_format=torch.contiguous_format)
        elif inputs.get("attention_mask") is not None and attention_mask is None:
            # generate() drops a mask that is all ones, and for a static cache it then makes a 4-D one all the same.
            inputs["token_mask"] = input_ids.new_ones((input_ids.shape[0], length))
        if prompt_mask is not None:
            cache = inputs.get("past_key_values")
            past = 0 if masked or cache is None else int(cache.get_seq_length())
            total = attention_mask.shape[1] if masked else past + length
            seen = prompt_so_far(prompt_mask.bool(), total)[:, -length:]
            inputs["prompt_mask"] = seen.clone(memory_format=torch.contiguous_format)
        return inputs

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.config.router_context == "prompt" and kwargs.get("prompt_mask") is None:
            ids, embeddings = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
            if ids is not None or embeddings is not None:
                mask = kwargs.get("attention_mask")
                kwargs["prompt_mask"] = self.base_model.routed_tokens(ids, embeddings, mask)
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.router_context != "none":
            raise ValueError(_NO_CONTINUOUS_BATCHING)
        return super().init_continuous_batching(*args, **kwargs)


_CLASS_NAME = re.compile(r"MetaMoe(\w+?)(Model|For[A-Z]\w+)")


def _family_of(cls: type) -> str:
    return next(match[1] for base in cls.__mro__ if (match := _CLASS_NAME.fullmatch(base.__name__)))


def _native_class(family: str, head: str) -> type | None:
    # Gemma3TextModel, but Gemma3ForCausalLM: both are of Gemma3TextConfig.
    names = (f"{family}{head}", f"{family.removesuffix('Text')}{head}")
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def _mixin(native: type, head: str) -> type:
    if head == "ForCausalLM":
        return MetaMoeForCausalLMMixin
    if head != "Model":
        return MetaMoeHeadMixin
    inputs = inspect.signature(native.forward).parameters
    if "pixel_values" in inputs:
        return MetaMoeVisionMixin
    is_decoder = "past_key_values" in inputs and "token_type_ids" not in inputs
    return MetaMoeDecoderMixin if is_decoder else MetaMoeEncoderMixin


def model_class(family: str, head: str) -> type:
    """Return `MetaMoe<family><head>`, generated from the native class; `head` is `Model`, `ForCausalLM`, …

    Raises:
        ValueError: if transformers has no such native class.
    """
    name = f"MetaMoe{family}{head}"
    if name not in globals():
        native = _native_class(family, head)
        if native is None:
            raise ValueError(f"transformers has no {family}{head} that {name} could stand on")
        config = config_class(family)
        mixin = _mixin(native, head)
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{native.__name__} with an MoE block in place of each layer's FFN.",
            "config_class": config,
        }
        if issubclass(mixin, MetaMoeModelMixin):
            recorded = {**(native._can_record_outputs or {}), "router_logits": OutputRecorder(ContextRouter, index=0)}
            namespace["_can_record_outputs"] = recorded
        # Named once more, since the library's own classes that generate name it themselves.
        bases = (mixin, native, GenerationMixin) if issubclass(native, GenerationMixin) else (mixin, native)
        globals()[name] = type(name, bases, namespace)
        if head != "Model":
            # Native heads that build their body by AutoModel.from_config find ours.
            transformers.AutoModel.register(config, model_class(family, "Model"), exist_ok=True)
    return globals()[name]


def __getattr__(name: str) -> type:
    match = _CLASS_NAME.fullmatch(name)
    if match is None or _native_class(match[1], match[2]) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(match[1], match[2])
