"""MetaMoE models: a native transformers decoder whose layers own an MoE block in place of their FFN.

Shipped inside every checkpoint, so it imports nothing but torch and transformers. Nothing is forked:
`MetaMoe<Family>Model` and `MetaMoe<Family>ForCausalLM` are generated on first use as subclasses of the
native classes; attention, caches, masks, heads and generation stay the library's.

Shapes: B batch, T tokens of this call, H hidden, I intermediate, K experts, k experts per token,
R ranks of all experts of one projection together.
"""

import functools
import re
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization
from transformers.masking_utils import find_packed_sequence_indices

from .configuration_metamoe import FAMILIES, PROJECTIONS, config_class


class Routing(NamedTuple):
    """What the routers need to know of one forward pass. Read-only, shared by all layers."""

    token_mask: Tensor
    """(B, T) bool: True where a token is routed; False for padding and for tokens that no domain owns."""
    sequence_start: Tensor | None
    """(B, T) int: where a token's own packed sequence starts; None where each row is one sequence."""
    forced_expert: Tensor | None
    """(B,) int: the expert that every token of a row goes to, or -1 for the router's own choice."""


@functools.cache
def _with_router_sums(native: type) -> type:
    """Return a subclass of a cache layer class that carries the router's running sums wherever the keys go.

    `router_sums` is (B, tokens so far, K + 1): the prefix sums of the K router scores and of the token
    count, at every position, so that a cropped cache (assisted decoding) still knows its own prefix.
    """

    class RoutedCacheLayer(native):
        _layer_type = None  # else the library would take this for its own layer of that type
        router_sums: Tensor | None = None

        def append_router_sums(self, sums: Tensor) -> None:
            self.router_sums = sums if self.router_sums is None else torch.cat([self.router_sums, sums], dim=1)

        def reset(self) -> None:
            super().reset()
            self.router_sums = None

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            if self.router_sums is not None and tokens_to_remove != 0:
                self.router_sums = self.router_sums[:, : -abs(tokens_to_remove)]

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            if self.router_sums is not None:
                self.router_sums = self.router_sums.index_select(0, beam_idx.to(self.router_sums.device))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            if self.router_sums is not None:
                self.router_sums = self.router_sums.repeat_interleave(repeats, dim=0)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            if self.router_sums is not None:
                self.router_sums = self.router_sums[indices]

    RoutedCacheLayer.__name__ = f"Routed{native.__name__}"
    return RoutedCacheLayer


def routed_cache_layer(cache: Any, layer_idx: int) -> Any:
    """Return the cache's layer `layer_idx`, taught once to carry router sums along."""
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "append_router_sums"):
        layer.__class__ = _with_router_sums(type(layer))
    return layer


def sequence_starts(position_ids: Tensor) -> Tensor | None:
    """Return (B, T), where each token's packed sequence starts, or None if every row is one sequence."""
    sequence_ids = find_packed_sequence_indices(position_ids)
    if sequence_ids is None:
        return None
    new = torch.diff(sequence_ids, prepend=sequence_ids[:, :1], dim=-1) != 0
    places = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)
    return torch.where(new, places, 0).cummax(dim=-1).values


def prefix_sums(values: Tensor, routing: Routing, past: Tensor | None = None) -> Tensor:
    """Sum `values` (B, T, N) and the count over each token's prefix, itself included.

    Returns float32 (B, T, N + 1); the last column is the count. Tokens outside `routing.token_mask`
    add nothing; packed sequences start again from zero; `past` (B, N + 1) continues a cached prefix.
    """
    mask = routing.token_mask.unsqueeze(-1).float()
    sums = torch.cat([values.float() * mask, mask], dim=-1).cumsum(dim=1)
    if routing.sequence_start is not None:
        start = routing.sequence_start.unsqueeze(-1).expand_as(sums)
        sums = sums - F.pad(sums, (0, 0, 1, 0)).gather(1, start)
    return sums if past is None else sums + past.unsqueeze(1)


def mean_of(sums: Tensor) -> Tensor:
    """Turn sums with a trailing count column into means; an empty prefix has mean zero."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=1.0)


class ContextRouter(nn.Module):
    """Linear router with context (MetaMoE, section 3.3): (1 - lam) W h_t + lam * mean over the prefix of W h.

    The router is linear, so averaging its K scores equals averaging the hidden states: all that
    generation has to carry is K sums and a count. Always float32: in bfloat16 near-ties flip.
    """

    def __init__(self, hidden_size: int, num_experts: int, context: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32))
        self.context_logit = nn.Parameter(torch.zeros((), dtype=torch.float32)) if context == "prefix" else None

    def forward(self, hidden: Tensor, routing: Routing, cache_layer: Any = None) -> Tensor:
        """Return router logits, float32 (B, T, K), from the FFN's input (B, T, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.blend(hidden, routing, cache_layer)

    def blend(self, hidden: Tensor, routing: Routing, cache_layer: Any) -> Tensor:
        """Mix each token's scores with the mean of its prefix's."""
        scores = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.context_logit is None:
            return scores
        past = None
        if cache_layer is not None and cache_layer.router_sums is not None:
            past = cache_layer.router_sums[:, -1]
        sums = prefix_sums(scores, routing, past)
        if cache_layer is not None:
            cache_layer.append_router_sums(sums.detach())
        context_weight = torch.sigmoid(self.context_logit.float())
        return torch.lerp(scores, mean_of(sums), context_weight)


def expert_weights(logits: Tensor, routing: Routing, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their weights.

    Args:
        logits: router logits, (B, T, K).

    Returns:
        weights, float32 (B, T, k), and expert indices, int64 (B, T, k).
    """
    probabilities = logits.softmax(dim=-1)
    forced = routing.forced_expert
    if forced is not None:
        own = F.one_hot(forced.clamp(min=0), logits.shape[-1]).to(logits.dtype)
        probabilities = torch.where((forced >= 0)[:, None, None], own[:, None, :], probabilities)
    weights, indices = probabilities.topk(top_k, dim=-1)
    if not renormalise:
        return weights, indices
    if top_k == 1:
        # Straight-through: the value is exactly 1, so that a token gets exactly its expert, yet the
        # task loss reaches the router. p / p would make the gradient vanish (the published trap).
        return weights / weights.detach(), indices
    return weights / weights.sum(dim=-1, keepdim=True), indices


class LowRank(nn.Module):
    """One expert's LoRA matrices for one projection, under the names that PEFT saves them by."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)


class FactoredExperts(nn.ModuleList):
    """K low-rank experts around one shared FFN; expert e of projection p is `experts[e].p`."""

    def __init__(self, config: Any, sizes: dict[str, tuple[int, int]]) -> None:
        experts = []
        for expert in config.experts:
            ranks = {name: expert["ranks"].get(name, 0) for name in sizes}
            experts.append(nn.ModuleDict({n: LowRank(*sizes[n], r) for n, r in ranks.items() if r}))
        super().__init__(experts)
        self.scales = [float(expert["scale"]) for expert in config.experts]

    def delta(self, name: str, inputs: Tensor, gates: Tensor) -> Tensor | float:
        """Return the sum over experts of gate * scale * B A inputs for projection `name`.

        The experts' factors are laid side by side along the rank, so that two matrix products serve
        all of them; `gates` (B, T, K), zero where an expert was not chosen, silences the others.
        """
        chosen = [(e, expert[name]) for e, expert in enumerate(self) if name in expert]
        if not chosen:
            return 0.0
        down = torch.cat([factors.lora_A.weight for _, factors in chosen], dim=0)
        up = torch.cat([factors.lora_B.weight for _, factors in chosen], dim=1)
        gates_R = torch.cat(
            [
                (gates[..., e : e + 1] * self.scales[e]).expand(*gates.shape[:-1], factors.lora_A.out_features)
                for e, factors in chosen
            ],
            dim=-1,
        )
        return F.linear(F.linear(inputs, down) * gates_R.to(inputs.dtype), up)


class MoeFeedForward(nn.Module):
    """Mixin over a native gated FFN (gate_proj, up_proj, down_proj): the seed's FFN with experts around it."""

    def add_experts(self, config: Any, layer_idx: int) -> None:
        """Give a native FFN its router and experts. Its own weights stay: they are the shared base."""
        sizes = {}
        for name in PROJECTIONS:
            projection = getattr(self, name)
            sizes[name] = (projection.in_features, projection.out_features)
        self.layer_idx = layer_idx
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.router = ContextRouter(config.hidden_size, len(config.experts), config.router_context)
        self.experts = FactoredExperts(config, sizes)
        self.call: tuple[Routing, Any] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MoE's output, (B, T, H).

        down_proj is linear, so the chosen experts' hidden states are combined BEFORE it: the base FFN's
        largest products are shared by the experts, whatever k is.
        """
        routing, cache = self.call
        cache_layer = None
        if cache is not None and self.router.context_logit is not None:
            cache_layer = routed_cache_layer(cache, self.layer_idx)
        logits = self.router(hidden, routing, cache_layer)
        weights, indices = expert_weights(logits, routing, self.top_k, self.renormalise)
        routed = routing.token_mask.unsqueeze(-1)
        # A token that no domain owns takes the seed's FFN: weight one, every expert silent.
        first_only = F.one_hot(torch.zeros_like(indices[..., 0]), self.top_k).to(weights.dtype)
        weights = torch.where(routed, weights, first_only)

        base_gate, base_up = self.gate_proj(hidden), self.up_proj(hidden)
        combined: Tensor | float = 0.0
        down_delta: Tensor | float = 0.0
        for j in range(self.top_k):
            gates = F.one_hot(indices[..., j], len(self.experts)) * routed
            gate = base_gate + self.experts.delta("gate_proj", hidden, gates)
            up = base_up + self.experts.delta("up_proj", hidden, gates)
            inner = self.act_fn(gate) * up * weights[..., j : j + 1].to(hidden.dtype)
            combined = combined + inner
            down_delta = down_delta + self.experts.delta("down_proj", inner, gates)
        return self.down_proj(combined) + down_delta


class MoeDecoderLayer(nn.Module):
    """Mixin over a native decoder layer: hands the routing facts to its MoE block."""

    def forward(self, hidden_states: Tensor, *args: Any, routing: Routing, **kwargs: Any) -> Any:
        # The native layer calls `mlp(hidden)` with no way to pass more. Set here, inside the layer's own
        # forward, it is set again when gradient checkpointing runs the layer a second time.
        self.mlp.call = (routing, kwargs.get("past_key_values"))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.mlp.call = None


class MetaMoeMixin:
    """What the headless model and the model with a head share."""

    _auto_class = "AutoModel"
    _keep_in_fp32_modules_strict = ["router"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ContextRouter):
            for parameter in module.parameters():
                initialization.zeros_(parameter)
        elif isinstance(module, LowRank):
            initialization.normal_(module.lora_A.weight, std=self.config.initializer_range)
            initialization.zeros_(module.lora_B.weight)
        else:
            super()._init_weights(module)


class MetaMoeModelMixin(MetaMoeMixin):
    """Headless decoder: swaps its layers' classes, and works out once a call which tokens are routed."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.__class__ = _swapped(MoeDecoderLayer, type(layer))
            layer.mlp.__class__ = _swapped(MoeFeedForward, type(layer.mlp))
            layer.mlp.add_experts(config, layer_idx)
        self.post_init()

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
        **kwargs: Any,
    ) -> Any:
        """Run the decoder.

        Args beyond the native ones:
            token_mask: (B, T or past + T), 0 at padding. Needed only where `attention_mask` is not 2-D.
            forced_expert: (B,) int, the expert for every token of a row; -1 leaves the choice to the router.
        """
        starts = None
        if attention_mask is None and past_key_values is None and position_ids is not None:
            starts = sequence_starts(position_ids)
        routing = Routing(
            token_mask=self.routed_tokens(
                input_ids, inputs_embeds, attention_mask if token_mask is None else token_mask
            ),
            sequence_start=starts,
            forced_expert=forced_expert,
        )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            **kwargs,
        )

    def routed_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return (B, T) bool: True for tokens that are neither padding nor excluded from routing."""
        tokens = inputs_embeds[..., 0] if input_ids is None else input_ids
        routed = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "the router can't tell padding from a 4-D attention_mask; pass token_mask, (batch, tokens), too"
                )
            routed &= mask[:, -tokens.shape[1] :].to(tokens.device).bool()
        for token_id in self.config.router_excluded_token_ids:
            if input_ids is not None:
                routed &= input_ids != token_id
            else:
                excluded = self.get_input_embeddings().weight[token_id].to(inputs_embeds.dtype)
                routed &= (inputs_embeds != excluded).any(dim=-1)
        return routed


class MetaMoeForCausalLMMixin(MetaMoeMixin):
    """Decoder with a language-modelling head."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = model_class(_family_of(type(self)), "Model")(config)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        # With a static cache the mask below turns 4-D, which no longer tells padding: keep the 2-D one.
        token_mask = kwargs.get("attention_mask")
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if token_mask is not None and token_mask.ndim == 2:
            inputs["token_mask"] = token_mask
        return inputs


_SWAPPED: dict[type, type] = {}


def _swapped(mixin: type, native: type) -> type:
    """Return `native` with `mixin` in front, under the native name (FSDP and _no_split_modules go by it)."""
    if native not in _SWAPPED:
        _SWAPPED[native] = type(native.__name__, (mixin, native), {"__module__": __name__})
    return _SWAPPED[native]


_MIXINS = {"Model": MetaMoeModelMixin, "ForCausalLM": MetaMoeForCausalLMMixin}
_CLASS_NAME = re.compile(rf"MetaMoe({'|'.join(FAMILIES)})({'|'.join(_MIXINS)})")


def _family_of(cls: type) -> str:
    return next(match[1] for base in cls.__mro__ if (match := _CLASS_NAME.fullmatch(base.__name__)))


def model_class(family: str, head: str) -> type:
    """Return `MetaMoe<family><head>`, generated from the native class; `head` is `Model` or `ForCausalLM`."""
    name = f"MetaMoe{family}{head}"
    if name not in globals():
        native = getattr(transformers, f"{family}{head}")
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{native.__name__} with an MoE block in place of each layer's FFN.",
            "config_class": config_class(family),
        }
        globals()[name] = type(name, (_MIXINS[head], native), namespace)
    return globals()[name]


def __getattr__(name: str) -> type:
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(match[1], match[2])
