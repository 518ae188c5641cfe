"""Dense experts: whole FFNs of their own, run by transformers' experts interface (eager, batched, grouped).

Shipped inside every checkpoint, so it imports nothing but torch and transformers.

Shapes: N tokens, H hidden, I intermediate, E dense experts, k experts per token.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation


class DenseExperts(nn.Module):
    """E FFNs, fused under the names and in the layout that the experts interface asks for.

    Gated: `gate_up_proj` (E, 2I, H), the gate first; else `up_proj` (E, I, H); then `down_proj` (E, H, I);
    each with a `…_bias` where the family has biases.
    """

    has_gate: bool
    has_bias: bool

    def __init__(self, config: Any, num_experts: int, hidden: int, intermediate: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = act_fn
        inputs, width = ("gate_up_proj", 2 * intermediate) if self.has_gate else ("up_proj", intermediate)
        for name, shape in ((inputs, (width, hidden)), ("down_proj", (hidden, intermediate))):
            setattr(self, name, nn.Parameter(torch.empty(num_experts, *shape)))
            if self.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(num_experts, shape[0])))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (N, H): the eager way, expert by expert.

        Args:
            hidden: (N, H).
            top_k_index: (N, k) numbers of dense experts.
            top_k_weights: (N, k).
        """
        output = torch.zeros_like(hidden)
        inputs = "gate_up_proj" if self.has_gate else "up_proj"
        for expert in top_k_index.unique().tolist():
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            inner = self.activate(self.project(inputs, expert, hidden[token]))
            result = self.project("down_proj", expert, inner) * top_k_weights[token, choice, None]
            output = output.index_add(0, token, result.to(output.dtype))
        return output

    def one_token(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same without gradients for one token, (1, H): nothing has to be brought together by expert."""
        output = torch.zeros_like(hidden)
        inputs = "gate_up_proj" if self.has_gate else "up_proj"
        for choice, expert in enumerate(top_k_index[0].tolist()):
            inner = self.activate(self.project(inputs, expert, hidden))
            output += self.project("down_proj", expert, inner) * top_k_weights[:, choice, None]
        return output

    def activate(self, inner: Tensor) -> Tensor:
        """Return the FFN's hidden state, (n, I), from the product with its input."""
        if not self.has_gate:
            return self.act_fn(inner)
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """Return one expert's linear map of (n, in)."""
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(inputs, getattr(self, name)[expert], bias)


@functools.cache
def dense_experts_class(has_gate: bool, has_bias: bool) -> type[DenseExperts]:
    """Return the class for one kind of FFN; the interface reads these facts off the decorated class."""
    namespace = {"__module__": __name__, "has_gate": has_gate, "has_bias": has_bias}
    kind = type("DenseExperts", (DenseExperts,), namespace)
    # The decorator replaces what it finds on the class: each kind needs methods of its own.
    kind.__init__, kind.forward = _own(DenseExperts.__init__), _own(DenseExperts.forward)
    kind = use_experts_implementation(kind, has_gate=has_gate, has_bias=has_bias)
    kind.forward = _shorter_for_one_token(kind.forward)
    return kind


_IMPLEMENTATIONS = {"eager", "batched_mm", "grouped_mm"}


def _shorter_for_one_token(forward: Any) -> Any:
    """Return the interface's forward, but for a step of generation on a CPU, which is `DenseExperts.one_token`.

    The interface's grouped way spends three tenths of its time on sorting one token by expert. An accelerator would
    have to wait for the experts' numbers, and an implementation that somebody has registered stays their choice.
    """

    @functools.wraps(forward)
    def shorter(self: DenseExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        short = len(hidden) == 1 and hidden.is_cpu and not torch.is_grad_enabled()
        short = short and not (torch.compiler.is_compiling() or self._is_expert_parallel)
        if short and self.config._experts_implementation in _IMPLEMENTATIONS:
            return self.one_token(hidden, top_k_index, top_k_weights)
        return forward(self, hidden, top_k_index, top_k_weights)

    return shorter


def _own(method: Any) -> Any:
    @functools.wraps(method)
    def own(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return own
