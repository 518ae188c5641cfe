"""Experts around a shared FFN: how native FFNs are recognised, low-rank experts, and the MoE block.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.

Shapes: B batch, T tokens of this call, H hidden, I intermediate, K experts, k experts per token,
R ranks of all experts of one projection together.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .routing_metamoe import ContextRouter, Routing, expert_weights, routed_cache_layer


class FeedForward(NamedTuple):
    """How a native FFN names its parts; `output(act(inputs))`, gated or not."""

    inputs: tuple[str, ...]
    """Linear maps of the FFN's input. One that is `gated` holds gate and up side by side, the gate first."""
    output: str
    activation: str
    gated: bool = False
    inner_dropout: str | None = None
    """A dropout module between activation and output."""
    output_dropout: str | None = None
    """A probability, for dropout after the output."""

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


FORMS = (
    FeedForward(("gate_proj", "up_proj"), "down_proj", "act_fn", gated=True),
    FeedForward(("gate_up_proj",), "down_proj", "activation_fn", gated=True),
    FeedForward(("Wi",), "Wo", "act", gated=True, inner_dropout="drop"),
    FeedForward(("fc1",), "fc2", "activation_fn"),
    FeedForward(("c_fc",), "c_proj", "act", output_dropout="residual_dropout"),
    FeedForward(("dense_h_to_4h",), "dense_4h_to_h", "act"),
    FeedForward(("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn"),
)
"""The FFNs that can take experts. A family with another one is added here."""


def form_of(module: nn.Module) -> FeedForward | None:
    """Return how `module` names its FFN's parts, or None if it isn't an FFN that is known."""
    for form in FORMS:
        try:
            if all(isinstance(module.get_submodule(name), nn.Linear) for name in form.projections):
                module.get_submodule(form.activation)
                return form
        except AttributeError:
            continue
    return None


class LowRank(nn.Module):
    """One expert's LoRA matrices for one projection, under the names that PEFT saves them by."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)


class FactoredExperts(nn.ModuleList):
    """K low-rank experts around one shared FFN; expert e of projection p is `experts[e].p`, dots as underscores."""

    def __init__(self, config: Any, sizes: dict[str, tuple[int, int]]) -> None:
        experts = []
        for expert in config.experts:
            ranks = {name: expert["ranks"].get(name, 0) for name in sizes}
            experts.append(nn.ModuleDict({n.replace(".", "_"): LowRank(*sizes[n], r) for n, r in ranks.items() if r}))
        super().__init__(experts)
        self.scales = [float(expert["scale"]) for expert in config.experts]

    def delta(self, name: str, inputs: Tensor, gates: Tensor) -> Tensor | float:
        """Return the sum over experts of gate * scale * B A inputs for projection `name`.

        The experts' factors are laid side by side along the rank, so that two matrix products serve
        all of them; `gates` (B, T, K), zero where an expert was not chosen, silences the others.
        """
        name = name.replace(".", "_")
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


class BlockCall:
    """What a layer tells its MoE block about one call, and the block the norm that follows it."""

    def __init__(self, routing: Routing, cache: Any, norm_follows: bool) -> None:
        self.routing = routing
        self.cache = cache
        self.norm_follows = norm_follows
        self.gain: Tensor | None = None


class MoeBlock(nn.Module):
    """Mixin over a module that owns an FFN: the seed's FFN with a router and experts around it."""

    def add_experts(self, config: Any, layer_idx: int, form: FeedForward) -> None:
        """Give a native FFN its router and experts. Its own weights stay: they are the shared base."""
        linear = {name: self.get_submodule(name) for name in form.projections}
        sizes = {name: (module.in_features, module.out_features) for name, module in linear.items()}
        hidden_size = sizes[form.inputs[0]][0]
        self.form = form
        self.moe_layer_idx = layer_idx
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.input_norm = config.router_input_norm
        self.router = ContextRouter(hidden_size, len(config.experts), config.router_context)
        self.experts = FactoredExperts(config, sizes)
        self.call: BlockCall | None = None

    def mixture(self, hidden: Tensor) -> Tensor:
        """Return the MoE's output, (B, T, H), from the FFN's input.

        The output projection is linear, so the chosen experts' hidden states are combined BEFORE it: the
        base FFN's largest products are shared by the experts, whatever k is.
        """
        call = self.call
        routing, cache_layer = call.routing, None
        if call.cache is not None and self.router.context_logit is not None:
            cache_layer = routed_cache_layer(call.cache, self.moe_layer_idx)
        seen = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6) if self.input_norm else hidden
        logits = self.router(seen, routing, cache_layer)
        weights, indices = expert_weights(logits, routing, self.top_k, self.renormalise)
        routed = routing.token_mask.unsqueeze(-1)
        # A token that no domain owns takes the seed's FFN: weight one, every expert silent.
        first_only = F.one_hot(torch.zeros_like(indices[..., 0]), self.top_k).to(weights.dtype)
        weights = torch.where(routed, weights, first_only)
        if call.norm_follows and self.top_k == 1 and self.renormalise:
            call.gain, weights = weights, weights.detach()

        base = {name: self.get_submodule(name)(hidden) for name in self.form.inputs}
        combined: Tensor | float = 0.0
        output_delta: Tensor | float = 0.0
        for j in range(self.top_k):
            gates = F.one_hot(indices[..., j], len(self.experts)) * routed
            inner = self.activate([base[name] + self.experts.delta(name, hidden, gates) for name in base])
            inner = inner * weights[..., j : j + 1].to(hidden.dtype)
            combined = combined + inner
            output_delta = output_delta + self.experts.delta(self.form.output, inner, gates)
        project = self.get_submodule(self.form.output)
        output = project(combined) + output_delta
        if project.bias is not None and (self.top_k == 1 or not self.renormalise):
            # An expert's output counts by its weight, bias included: in value without renormalisation, in
            # gradient at top-1.
            output = output + (weights.sum(-1, keepdim=True) - 1.0).to(output.dtype) * project.bias
        if self.form.output_dropout is not None:
            output = F.dropout(output, getattr(self, self.form.output_dropout), self.training)
        return output

    def activate(self, inputs: list[Tensor]) -> Tensor:
        """Return the FFN's hidden state, (B, T, I)."""
        act = self.get_submodule(self.form.activation)
        if self.form.gated:
            gate, up = inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inputs[0])
        return inner if self.form.inner_dropout is None else self.get_submodule(self.form.inner_dropout)(inner)
