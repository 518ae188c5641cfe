"""MetaMoE models: a native transformers model whose layers own an MoE block in place of their FFN.

Shipped inside every checkpoint, so it imports nothing but torch and transformers. Nothing is forked:
`MetaMoe<Family>Model`, `MetaMoe<Family>ForCausalLM` and other heads are generated on first use as
subclasses of the native classes; attention, caches, masks, heads and generation stay the library's.
Whole FFNs stand behind its `@use_experts_implementation` (dense_metamoe.py).

Shapes: B batch, T tokens of this call, H hidden, K experts.
"""

import inspect
import re
from typing import Any, Unpack

import torch
import transformers
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .bodies_metamoe import (
    NO_CONTINUOUS_BATCHING,
    MetaMoeDecoderMixin,
    MetaMoeEncoderMixin,
    MetaMoeMixin,
    MetaMoeModelMixin,
    MetaMoeVisionMixin,
)
from .configuration_metamoe import config_class
from .loading_metamoe import register_head_names
from .routing_metamoe import (
    ContextRouter,
    prompt_so_far,
    prompt_tokens,
    router_losses,
    sequence_starts,
)

HEADS = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""Head of a native class -> the Auto class that loads it."""


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


class MetaMoeTowerMixin(MetaMoeMixin):
    """A native model around an image tower, whose layers own the experts; a text tower beside it stays native."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        # The text tower knows of no experts, and refuses what is asked of them.
        for part in config.sub_configs:
            getattr(config, part)._experts_implementation_internal = None
        super().__init__(config, *args, **kwargs)
        tower = self.vision_model
        tower.__class__ = model_class(type(tower).__name__.removesuffix("Model"), "Model")
        tower.install_experts(config)
        tower.post_init()
        self._use_experts(requested)
        self.post_init()

    def get_text_features(self, *args: Any, forced_expert: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the native text features: no expert has a part in them."""
        return super().get_text_features(*args, **kwargs)


class MetaMoeForCausalLMMixin(MetaMoeHeadMixin):
    """Decoder with a language-modelling head."""

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
        **kwargs: Unpack[TransformersKwargs],
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
            raise ValueError(NO_CONTINUOUS_BATCHING)
        return super().init_continuous_batching(*args, **kwargs)


_CLASS_NAME = re.compile(r"MetaMoe(\w+?)(Model|For[A-Z]\w+)")


def _family_of(cls: type) -> str:
    return next(match[1] for base in cls.__mro__ if (match := _CLASS_NAME.fullmatch(base.__name__)))


def _native_class(family: str, head: str) -> type | None:
    # Gemma3TextModel, but Gemma3ForCausalLM: both are of Gemma3TextConfig.
    names = (f"{family}{head}", f"{family.removesuffix('Text')}{head}")
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def _mixin(native: type, head: str) -> type:
    if "vision_config" in native.config_class.sub_configs:
        return MetaMoeTowerMixin
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
            "_auto_class": HEADS[head],
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
