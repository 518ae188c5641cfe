"""Which expert a token goes to: the context router, and the state that it carries along in the cache.

Shipped inside every checkpoint, so it imports nothing but torch and transformers.

Shapes: B batch, T tokens of this call, H hidden, K experts, k experts per token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


class LayerEvidence:
    """What the routers of the layers so far have said in one forward pass, added up.

    No plain list: tools that move a call's inputs to a layer's device hand each layer a copy of those.
    """

    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def add(self, layer_idx: int, logits: Tensor) -> Tensor:
        """Return the sum of a layer's router logits, (B, T, K), and of all before it.

        Gradients stop at the layer's own: each learns what those before it leave to be told.
        """
        if layer_idx > 0:
            logits = logits + self.totals[layer_idx - 1].to(logits.device)
        if len(self.totals) == layer_idx:  # gradient checkpointing runs a layer again, and finds what it found
            self.totals.append(logits.detach())
        return logits


class Routing(NamedTuple):
    """What the routers need to know of one forward pass, shared by all layers; read-only but for `evidence`."""

    token_mask: Tensor
    """(B, T) bool, or (1, 1) where every token is routed: False for padding and for tokens that no domain owns."""
    sequence_start: Tensor | None
    """(B, T) int: where a token's own packed sequence starts; None where each row is one sequence."""
    forced_expert: Tensor | None
    """(B,) int: the expert that every token of a row goes to, or -1 for the router's own choice."""
    evidence: LayerEvidence
    """What earlier layers said, for routers that count on it."""
    context_mask: Tensor | None = None
    """(B, T) bool: the tokens that count in means; None where those are all that are routed."""
    attended: Tensor | None = None
    """(B, T, T) bool: where a mask of the caller's own says what is each token's context."""
    everywhere: bool = False
    """True where every token is known to be routed and to count, which spares each layer the masks."""


class PrefixSums(NamedTuple):
    """Sums over each token's context, float32."""

    totals: Tensor
    """(B, T, N)"""
    counts: Tensor
    """(B, T, 1) tokens summed."""

    def means(self) -> Tensor:
        """Return (B, T, N); an empty context has mean zero."""
        return self.totals / self.counts.clamp(min=1.0)

    def detach(self) -> "PrefixSums":
        return PrefixSums(self.totals.detach(), self.counts)

    def last(self) -> "PrefixSums":
        """Return the sums at the last token."""
        return self if self.counts.shape[1] == 1 else PrefixSums(self.totals[:, -1:], self.counts[:, -1:])


_CHUNKS = 64
"""How many calls' sums a cache layer holds apart: to join them at each would cost more than to route."""


@functools.cache
def _with_router_sums(native: type) -> type:
    """Return a subclass of a cache layer class that carries the router's running sums wherever the keys go.

    It keeps the prefix sums of the K router scores at every position, so that a cropped cache (assisted
    decoding) still knows its own prefix.
    """

    class RoutedCacheLayer(native):
        _layer_type = None  # else the library would take this for its own layer of that type
        # Plain tuples: tools that walk a cache (torch.export's) build what they find anew.
        router_sums: list[tuple[Tensor, Tensor]] | None = None

        def last_router_sums(self) -> PrefixSums | None:
            return PrefixSums(*self.router_sums[-1]).last() if self.router_sums else None

        def append_router_sums(self, sums: PrefixSums) -> None:
            if self.router_sums is None:
                self.router_sums = []
            if not self.is_compileable:
                self.router_sums.append((sums.totals, sums.counts))
                if len(self.router_sums) == _CHUNKS:
                    self.change_router_sums(lambda joined: joined)
            elif not self.router_sums:  # static: buffers that stay where they are, and nothing to crop
                totals, counts = sums.last()
                self.router_sums.append((totals.clone(), counts.clone()))
            else:
                for buffer, part in zip(self.router_sums[0], sums.last(), strict=True):
                    buffer.copy_(part)

        def change_router_sums(self, change: Callable[[Tensor], Tensor]) -> None:
            if self.router_sums:
                totals, counts = (torch.cat(parts, dim=1) for parts in zip(*self.router_sums, strict=True))
                self.router_sums = [(change(totals), change(counts))]

        def reset(self) -> None:
            super().reset()
            self.router_sums = None

        def crop(self, tokens_to_remove: int) -> None:
            # Older releases take how many tokens are kept for how many go; what went is what they agree on.
            before = self.get_seq_length()
            super().crop(tokens_to_remove)
            removed = before - self.get_seq_length()
            if removed and self.get_seq_length() == 0:
                self.router_sums = None
            elif removed:
                self.change_router_sums(lambda sums: sums[:, :-removed])

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.change_router_sums(lambda sums: sums.index_select(0, beam_idx.to(sums.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.change_router_sums(lambda sums: sums.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.change_router_sums(lambda sums: sums[indices])

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


def attended_tokens(mask: Tensor) -> Tensor:
    """Return (B, T, T) bool from an attention mask (B, 1, T, T), boolean, of zeros and ones, or additive."""
    return (mask >= 0 if mask.is_floating_point() else mask.bool())[:, 0]


def refuse_split_sequences(config: Any) -> None:
    """Refuse context parallelism: each rank would take its own piece of a text for the whole context.

    Both kinds put an attention function of their own in place: torch's (accelerate uses it) instead of
    SDPA while its context lasts, DeepSpeed's Ulysses in the library's table of attention functions.

    Raises:
        ValueError: if texts are split over ranks.
    """
    if torch.compiler.is_compiling():
        return
    for attention in (F.scaled_dot_product_attention, ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)):
        module = getattr(attention, "__globals__", {}).get("__name__", "")
        if "context_parallel" in module or "sequence_parallel" in module:
            raise ValueError(
                "context or sequence parallelism splits a text over ranks, and the router's context needs it "
                "whole; set cp_size and sp_size to 1, or use a model whose router_context is 'none'"
            )


def prompt_tokens(labels: Tensor, routed: Tensor, sequence_start: Tensor | None) -> Tensor:
    """Return (B, T) bool: True before the first token that is to be learnt, in each packed sequence.

    A sequence that has no routed token there has no prompt, and is True throughout.

    Args:
        labels: (B, T), -100 for tokens that are not to be learnt.
        routed: (B, T) bool.
        sequence_start: see `Routing`.
    """
    start = torch.zeros_like(labels) if sequence_start is None else sequence_start

    def within(values: Tensor) -> Tensor:
        """Return each token's running sum over its own sequence."""
        sums = values.long().cumsum(dim=1)
        return sums - F.pad(sums, (1, 0)).gather(1, start)

    prompt = within(labels != -100) == 0
    has_prompt = torch.zeros_like(start).scatter_reduce(1, start, (prompt & routed).long(), "amax")
    return prompt | (has_prompt.gather(1, start) == 0)


def prompt_so_far(prompt_mask: Tensor, total: int) -> Tensor:
    """Return (B, total) bool from that of the prompt, (B, P), for the tokens that there are by now.

    What was generated is no prompt, but where there was none: as in training.
    """
    completion = ~prompt_mask.any(dim=1, keepdim=True)
    return torch.cat([prompt_mask, completion.expand(-1, max(total - prompt_mask.shape[1], 0))], dim=1)[:, :total]


def prefix_sums(values: Tensor, routing: Routing, past: PrefixSums | None = None) -> PrefixSums:
    """Sum `values` (B, T, N) and count tokens over each token's prefix, itself included.

    Only tokens in `routing.context_mask` add; packed sequences start again from zero; `past`, (B, 1, N) and
    (B, 1, 1), continues a cached prefix.
    """
    values = values.float()
    if routing.everywhere and past is not None and values.shape[1] == 1:  # a step of generation
        return PrefixSums(past.totals + values, past.counts + 1.0)
    mask = routing.token_mask if routing.context_mask is None else routing.context_mask
    if routing.attended is not None:
        seen = (routing.attended & mask.unsqueeze(1)).float()
        return PrefixSums(seen @ values, seen.sum(-1, keepdim=True))
    counts = mask.unsqueeze(-1).float().expand(*values.shape[:-1], 1)
    sums = [values * counts, counts]
    if values.shape[1] > 1:
        sums = [part.cumsum(dim=1) for part in sums]
    if routing.sequence_start is not None:
        start = routing.sequence_start.unsqueeze(-1)
        sums = [part - F.pad(part, (0, 0, 1, 0)).gather(1, start.expand_as(part)) for part in sums]
    if past is not None:
        sums = [part + before for part, before in zip(sums, past, strict=True)]
    return PrefixSums(*sums)


def context_mean(
    values: Tensor, routing: Routing, context: str, past: PrefixSums | None = None
) -> tuple[Tensor, PrefixSums]:
    """Return the mean of `values` (B, T, N) that each token's router mixes in, and the sums behind it.

    `prefix`: over the token's own prefix; `prompt`: over the part of it that is prompt; `mean`: over the whole
    row, for models that see it whole anyway.
    """
    sums = prefix_sums(values, routing, past)
    if routing.everywhere and context != "mean":
        return sums.totals / sums.counts, sums
    return (sums.last() if context == "mean" else sums).means(), sums


class ContextRouter(nn.Module):
    """Linear router with context (MetaMoE, section 3.3): (1 - lam) W h_t + lam * mean over the context of W h.

    The router is linear, so averaging its K scores equals averaging the hidden states: all that
    generation has to carry is K sums and a count. Always float32: in bfloat16 near-ties flip.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, layer_idx: int, context: str, absolute: bool, adds_layers: bool
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.absolute = absolute
        self.adds_layers = adds_layers
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32))
        self.context = context
        self.context_logit = nn.Parameter(torch.zeros((), dtype=torch.float32)) if context != "none" else None

    def forward(self, hidden: Tensor, routing: Routing, cache_layer: Any = None) -> Tensor:
        """Return router logits, float32 (B, T, K), from the FFN's input (B, T, H)."""
        if not torch.is_autocast_enabled(hidden.device.type):  # to ask costs less than to switch it off
            logits = self.blend(hidden, routing, cache_layer)
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                logits = self.blend(hidden, routing, cache_layer)
        return routing.evidence.add(self.layer_idx, logits) if self.adds_layers else logits

    def blend(self, hidden: Tensor, routing: Routing, cache_layer: Any) -> Tensor:
        """Mix each token's scores with the mean over its context."""
        scores = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.absolute:
            scores = scores.abs()
        if self.context_logit is None:
            return scores
        past = None if cache_layer is None else cache_layer.last_router_sums()
        mean, sums = context_mean(scores, routing, self.context, past)
        if cache_layer is not None:
            cache_layer.append_router_sums(sums if not scores.requires_grad else sums.detach())
        return torch.lerp(scores, mean, torch.sigmoid(self.context_logit.float()))


def expert_weights(logits: Tensor, routing: Routing, top_k: int, renormalise: bool) -> tuple[Tensor | None, Tensor]:
    """Choose each token's experts and their weights.

    Args:
        logits: router logits, (B, T, K).

    Returns:
        weights, float32 (B, T, k), or None where all are 1 and no gradient asks for them; and expert
        indices, int64 (B, T, k).
    """
    forced = routing.forced_expert
    if forced is not None:
        own = F.one_hot(forced.clamp(min=0), logits.shape[-1]).bool()
        pinned = torch.zeros_like(logits[:, :1]).masked_fill(~own[:, None, :], -torch.inf)
        logits = torch.where((forced >= 0)[:, None, None], pinned, logits)
    if top_k == 1 and renormalise and not logits.requires_grad:
        return None, logits.argmax(dim=-1, keepdim=True)
    chosen, indices = logits.topk(top_k, dim=-1)
    if not renormalise:
        return logits.softmax(dim=-1).gather(-1, indices), indices
    if top_k > 1:
        return chosen.softmax(dim=-1), indices
    # Straight-through: the value is exactly 1, so that a token gets exactly its expert, yet the
    # task loss reaches the router. p / p would make the gradient vanish (the published trap).
    weights = logits.softmax(dim=-1).gather(-1, indices)
    return weights / weights.detach(), indices


def router_losses(router_logits: tuple[Tensor, ...], routed: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the load-balancing loss (Switch Transformer, Eq. 4 to 6) and the z loss (ST-MoE, Eq. 5).

    Args:
        router_logits: (B, T, K) a layer.
        routed: (B, T) bool; only these tokens count.
    """
    flat = tuple(logits.flatten(0, 1) for logits in router_logits)
    balance = load_balancing_loss_func(flat, router_logits[0].shape[-1], top_k, routed.to(torch.long))
    squares = [(logits.logsumexp(-1).square() * routed.to(logits.device)).sum() for logits in router_logits]
    device = router_logits[0].device
    total = sum(square.to(device) for square in squares)
    return balance, total / (len(squares) * routed.sum().clamp(min=1).to(device))
