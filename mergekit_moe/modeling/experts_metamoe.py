"""Experts around a shared FFN: how native FFNs are recognised, low-rank experts, and the MoE block.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.

Shapes: B batch, T tokens of this call, H hidden, I intermediate, K experts, k experts per token,
R ranks of all experts of one projection together.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_metamoe import expert_rank
from .dense_metamoe import dense_experts_class
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
    """All experts' LoRA matrices of one projection, side by side along the rank: one tensor each.

    On disk they are one pair an expert, as PEFT saves them (loading_metamoe.py).
    """

    def __init__(self, in_features: int, out_features: int, ranks: list[int]) -> None:
        super().__init__()
        self.ranks = ranks
        self.rows = [slice(sum(ranks[:expert]), sum(ranks[: expert + 1])) for expert in range(len(ranks))]
        self.lora_A = nn.Parameter(torch.empty(sum(ranks), in_features))
        self.lora_B = nn.Parameter(torch.empty(sum(ranks), out_features))

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return views of one expert's A, (r, in), and B transposed, (r, out)."""
        rows = self.rows[expert]
        return self.lora_A[rows], self.lora_B[rows]


class Groups(NamedTuple):
    """Pairs of a token and an expert it goes to, brought together by expert."""

    order: Tensor | None
    """(P,) int64: pairs sorted by expert; None where all go to one, and stand in order already."""
    spans: list[tuple[int, int, int]]
    """(expert, first, last) of each expert's run in that order. Number K is the seed's own FFN."""


def grouped_by_expert(expert_of_pair: Tensor, num_experts: int) -> Groups:
    """Return the groups of (P,) expert numbers, 0 to K; K is the seed's own FFN."""
    counts = torch.bincount(expert_of_pair, minlength=num_experts + 1).tolist()
    spans, last = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, last, last + count))
            last += count
    return Groups(None if len(spans) == 1 else expert_of_pair.argsort(stable=True), spans)


def add_low_rank(base: Tensor, inputs: Tensor, factors: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """Return base + scale * B A inputs, (n, out); without gradients it is written into `base`.

    Args:
        base: (n, out).
        inputs: (n, in).
        factors: see `FactoredExperts.factors`.
    """
    if factors is None:
        return base
    down, up, scale = factors
    low = F.linear(inputs, down)
    if not low.dtype == up.dtype == base.dtype:  # to ask costs less than `to`
        low, up = low.to(base.dtype), up.to(base.dtype)
    return (base.addmm if torch.is_grad_enabled() else base.addmm_)(low, up, alpha=scale)


class FactoredExperts(nn.ModuleDict):
    """K low-rank experts around one shared FFN: projection name (dots as underscores) -> its `LowRank`."""

    def __init__(self, config: Any, layer_idx: int, sizes: dict[str, tuple[int, int]]) -> None:
        ranks = {name: [expert_rank(expert, name, layer_idx) for expert in config.experts] for name in sizes}
        super().__init__({n.replace(".", "_"): LowRank(*sizes[n], ranks[n]) for n in sizes if any(ranks[n])})
        self.scales = [float(expert.get("scale", 1.0)) for expert in config.experts]
        added = sum(sum(ranks[name]) * sum(size) for name, size in sizes.items())
        self.overhead = added / sum(n_in * n_out for n_in, n_out in sizes.values())
        """What products with all experts' factors cost, over the base FFN's own."""

    def factors(self, name: str, expert: int) -> tuple[Tensor, Tensor, float] | None:
        """Return one expert's (A, B transposed, scale) for projection `name`, or None if it adds nothing there.

        Args:
            expert: its number; K is the seed's own FFN.
        """
        low_rank = self._modules.get(name.replace(".", "_"))
        if low_rank is None or expert == len(self.scales) or not low_rank.ranks[expert]:
            return None
        return (*low_rank.factors(expert), self.scales[expert])

    def add_grouped(self, name: str, base: Tensor, inputs: Tensor, groups: Groups) -> Tensor:
        """Return base + scale * B A inputs, each run of rows by its own expert's factors; may write into `base`.

        Args:
            base: (P, out), the projection's own product, in the groups' order.
            inputs: (P, in), likewise.
        """
        low_rank = self._modules.get(name.replace(".", "_"))
        if low_rank is None:
            return base
        pieces = []
        for expert, first, last in groups.spans:
            alone = last - first == len(base)
            rows = (base, inputs) if alone else (base[first:last], inputs[first:last])
            pieces.append(add_low_rank(*rows, self.factors(name, expert)))
        if not torch.is_grad_enabled():
            return base
        # No row for all the factors: experts without tokens get the gradient zero, which data-parallel
        # training waits for, rather than none.
        nothing = F.linear(inputs[:0], low_rank.lora_A).to(base.dtype) @ low_rank.lora_B.to(base.dtype)
        return torch.cat([*pieces, nothing])

    def delta(self, name: str, inputs: Tensor, gates: Tensor) -> Tensor | float:
        """Return the sum over experts of gate * scale * B A inputs for projection `name`, (B, T, out).

        Two products with all experts' factors serve them all; `gates` (B, T, K), zero where an expert was
        not chosen, silences the others.
        """
        name = name.replace(".", "_")
        if name not in self:
            return 0.0
        low_rank = self[name]
        low = F.linear(inputs, low_rank.lora_A)
        gates_R = torch.cat(
            [
                (gates[..., e : e + 1] * scale).expand(*gates.shape[:-1], low_rank.ranks[e])
                for e, scale in enumerate(self.scales)
            ],
            dim=-1,
        )
        return F.linear(low * gates_R.to(low.dtype), low_rank.lora_B.T)


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
        self.num_experts = len(config.experts)
        self.renormalise = config.norm_topk_prob
        self.input_norm = config.router_input_norm
        self.router = ContextRouter(
            hidden_size,
            len(config.experts),
            layer_idx,
            config.router_context,
            config.router_absolute_scores,
            config.router_adds_layers,
        )
        self.experts = FactoredExperts(config, layer_idx, sizes)
        self.dense_numbers = config.dense_experts
        self.shares_ffn = config.shares_ffn
        self.call: BlockCall | None = None
        if not self.dense_numbers:
            return
        if form.inner_dropout is not None and self.get_submodule(form.inner_dropout).p > 0.0:
            raise ValueError(f"dense experts have no dropout inside their FFN; set {form.inner_dropout}'s to 0")
        output = linear[form.output]
        self.experts["dense"] = dense_experts_class(form.gated, output.bias is not None)(
            config, len(self.dense_numbers), hidden_size, output.in_features, self.get_submodule(form.activation)
        )
        if not self.shares_ffn:
            for name in form.projections:
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, None)

    def mixture(self, hidden: Tensor) -> Tensor:
        """Return the MoE's output, (B, T, H), from the FFN's input."""
        call = self.call
        routing, cache_layer = call.routing, None
        if call.cache is not None and self.router.context != "none":
            cache_layer = routed_cache_layer(call.cache, self.moe_layer_idx)
        seen = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6) if self.input_norm else hidden
        logits = self.router(seen, routing, cache_layer)
        weights, indices = expert_weights(logits, routing, self.top_k, self.renormalise)
        if self.shares_ffn and not routing.everywhere:
            # A token that no domain owns takes the seed's FFN: number K, weight one. Without that FFN only
            # padding is left, and nobody reads what becomes of it.
            indices = torch.where(routing.token_mask.unsqueeze(-1), indices, self.num_experts)
        if weights is not None and not routing.everywhere:
            first_only = F.one_hot(torch.zeros_like(indices[..., 0]), self.top_k).to(weights.dtype)
            weights = torch.where(routing.token_mask.unsqueeze(-1), weights, first_only)
        if call.norm_follows and self.top_k == 1 and self.renormalise:
            call.gain, weights = weights, None

        output = (
            self.with_dense(hidden, indices, weights) if self.dense_numbers else self.shared(hidden, indices, weights)
        )
        if self.form.output_dropout is not None:
            output = F.dropout(output, getattr(self, self.form.output_dropout), self.training)
        return output

    def shared(self, hidden: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        """Return the part of experts around the shared FFN, (B, T, H); indices and weights are (B, T, k)."""
        output = (self.grouped if self.groups_pay(hidden) else self.side_by_side)(hidden, indices, weights)
        if weights is None or not (self.top_k == 1 or not self.renormalise or self.dense_numbers):
            return output
        # An expert's output counts by its weight, bias included: in value without renormalisation or
        # beside dense experts, in gradient at top-1.
        bias = self.part(self.form.output).bias
        return output if bias is None else output + (weights.sum(-1, keepdim=True) - 1.0).to(output.dtype) * bias

    def with_dense(self, hidden: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        """Return the sum of the dense experts' part and of the part of those around the shared FFN, if any."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if weights is None:
            weights = torch.ones(indices.shape, device=hidden.device)
        if not self.shares_ffn:  # all are dense: their numbers are their places
            chosen = (indices.reshape(-1, self.top_k), weights.to(hidden.dtype).reshape(-1, self.top_k))
            return self.experts["dense"](tokens, *chosen).reshape(hidden.shape)
        slots = torch.full_like(indices, -1)
        for slot, number in enumerate(self.dense_numbers):
            slots = torch.where(indices == number, slot, slots)
        dense = slots >= 0
        share = (weights * dense).to(hidden.dtype)
        chosen = (slots.clamp(min=0).reshape(-1, self.top_k), share.reshape(-1, self.top_k))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            output = self.experts["dense"](tokens, *chosen)
        else:
            output = torch.zeros_like(tokens)
            rows = dense.any(-1).reshape(-1).nonzero()[:, 0]
            if len(rows):
                output[rows] = self.experts["dense"](tokens[rows], *(part[rows] for part in chosen))
        indices, weights = indices.masked_fill(dense, self.num_experts), weights.masked_fill(dense, 0.0)
        return output.reshape(hidden.shape) + self.shared(hidden, indices, weights)

    def groups_pay(self, hidden: Tensor) -> bool:
        """Whether to give each expert's tokens to that expert alone, rather than silence the others' ranks.

        Groups have sizes that depend on data: no compiled graph can hold them, and an accelerator has to
        wait for them, which is only worth it where the silenced ranks cost more than a twentieth of the FFN.
        """
        if torch.compiler.is_compiling():
            return False
        return hidden.is_cpu or self.experts.overhead > 0.05

    def grouped(self, hidden: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        """Each expert's low-rank products on its own tokens; the base's products once, whatever k is.

        The output projection is linear, so the chosen experts' hidden states are combined BEFORE it.

        Args:
            indices: (B, T, k) expert numbers; K is the seed's own FFN.
            weights: (B, T, k), or None where all are 1.
        """
        if indices.numel() == 1 and weights is None and not torch.is_grad_enabled():
            return self.by_one_expert(hidden[0], int(indices)).unsqueeze(0)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        groups = grouped_by_expert(indices.reshape(-1), self.num_experts)
        order = groups.order
        token = order
        if self.top_k > 1:
            pairs = torch.arange(indices.numel(), device=hidden.device) if order is None else order
            token = pairs // self.top_k
        # With one expert a token the base runs on sorted tokens, and nothing as wide as I is moved.
        inputs = tokens if token is None else tokens[token]
        seen = inputs if self.top_k == 1 else tokens
        base = [self.part(name)(seen) for name in self.form.inputs]
        if self.top_k > 1:
            base = [product[token] for product in base]
        added = zip(self.form.inputs, base, strict=True)
        inner = self.activate([self.experts.add_grouped(name, product, inputs, groups) for name, product in added])
        if weights is not None:
            weight = weights.reshape(-1, 1).to(inner.dtype)
            inner = inner * (weight if order is None else weight[order])
        project, name = self.part(self.form.output), self.form.output
        if self.top_k == 1:
            output = self.experts.add_grouped(name, project(inner), inner, groups)
            if order is not None:
                output = torch.empty_like(output).index_copy(0, order, output)
        else:
            combined = inner.new_zeros(len(tokens), inner.shape[-1]).index_add(0, token, inner)
            output = project(combined)
            silent = output.new_zeros(len(token), output.shape[-1])
            output = output.index_add(0, token, self.experts.add_grouped(name, silent, inner, groups))
        return output.reshape(hidden.shape)

    def by_one_expert(self, tokens: Tensor, expert: int) -> Tensor:
        """The same where one expert takes all of `tokens`, (N, H), with weight 1: a step of generation.

        A step is short enough to feel what groups of a single token cost.
        """
        experts = self.experts

        def project(name: str, inputs: Tensor) -> Tensor:
            return add_low_rank(self.part(name)(inputs), inputs, experts.factors(name, expert))

        return project(self.form.output, self.activate([project(name, tokens) for name in self.form.inputs]))

    def side_by_side(self, hidden: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        """The same with all experts' ranks in one product, those of experts not chosen silenced."""
        base = [self.part(name)(hidden) for name in self.form.inputs]
        combined: Tensor | float = 0.0
        output_delta: Tensor | float = 0.0
        for j in range(self.top_k):
            gates = F.one_hot(indices[..., j], self.num_experts + 1)
            added = zip(self.form.inputs, base, strict=True)
            inner = self.activate([product + self.experts.delta(name, hidden, gates) for name, product in added])
            if weights is not None:
                inner = inner * weights[..., j : j + 1].to(inner.dtype)
            combined = combined + inner
            output_delta = output_delta + self.experts.delta(self.form.output, inner, gates)
        return self.part(self.form.output)(combined) + output_delta

    def part(self, name: str) -> nn.Module:
        """Return the native FFN's part of that name; a step of generation feels what `get_submodule` costs."""
        return self._modules.get(name) or self.get_submodule(name)

    def activate(self, inputs: list[Tensor]) -> Tensor:
        """Return the FFN's hidden state, (B, T, I)."""
        act = self.part(self.form.activation)
        if self.form.gated:
            gate, up = inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inputs[0])
        return inner if self.form.inner_dropout is None else self.get_submodule(self.form.inner_dropout)(inner)
