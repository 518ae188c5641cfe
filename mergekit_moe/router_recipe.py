"""The parts of the recipe that say how things are trained, and how tokens find their expert."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from mergekit_moe.spec import Spec

NoProxies = Literal["uniform", "random", "arrow"]
NO_PROXIES = get_args(NoProxies)
"""Routers that are made without a pool, by the merge itself."""
BY_STATISTICS = ("lda", "ridge")
"""Routers that are made of each expert's sums over its proxies, which are kept."""
BY_PUBLISHED = ("centroid", "means")
"""Routers that are made of the statistics that experts publish."""


class Training(Spec):
    """One run of the Trainer."""

    epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    """Optimizer steps, over all processes; when positive it wins over `epochs`."""
    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(32, ge=1)
    """Rows a step on each process, before gradient accumulation."""
    gradient_accumulation: int = Field(1, ge=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of SGD; AdamW keeps its own averages."""
    max_grad_norm: float = Field(1.0, ge=0)
    """A step's gradient is shortened to this norm; 0 takes it as it is."""
    bf16: bool = False

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("'momentum' is sgd's, and optimizer is adamw; drop it, or set optimizer to sgd")
        return self


class RouterTraining(Training):
    """Training on the union of the proxies: of the routers, and of the experts where asked for."""

    trains: Literal["router", "router+experts"] = "router"
    """The routers' rows, biases and context weights; or the experts too, as published (the paper's last stage)."""
    learn_context: bool = True
    """Whether each layer's context weight is trained, too; else it stays at `context_weight`."""
    task_weight: float = Field(1.0, ge=0)
    """Weight of the language-modelling loss, which reaches the router straight through."""
    domain_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy to the expert whose proxy a token belongs to, averaged over layers."""
    balance_weight: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss (Switch Transformer), which shares tokens out evenly."""
    z_weight: float = Field(0.0, ge=0)
    """Weight of the z loss (ST-MoE), which keeps the routers' logits small."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations on the held-out proxies without a better loss, and keep the best; there is one
    every twentieth of the way. Without it, training goes all the way."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any((self.task_weight, self.domain_weight, self.balance_weight, self.z_weight)):
            raise ValueError("every loss has weight 0, so that nothing is learnt; raise one, or set training to null")
        return self


class Router(Spec):
    """How tokens find their expert."""

    context: Literal["prefix", "prompt", "mean", "none"] = "prefix"
    """What a token's own scores are mixed with: their running mean over its prefix, their mean over the prompt
    (frozen while the completion is read or written), or nothing. Text encoders see a text at once: theirs is the `mean`
    over the whole text, where nothing is said, and nobody else's."""
    context_weight: float = Field(0.95, gt=0, lt=1)
    """Where lambda starts, in every layer."""
    start: Literal[NoProxies, "lda", "ridge", "centroid", "means", "flexolmo", "hidden", "cheap-embed", "linear"] = (
        "lda"
    )
    """What training starts from, or goes without it. Closed forms of the feature that the router sees on the proxies:
    `lda`, shrunk, or `ridge`. Mean vectors that clients publish: `centroid`, made fair, or `means`, raw as published.
    Unit-length means of what the seed makes of the proxies: of its FFN inputs (`flexolmo`), of its hidden states
    (`hidden`) or of token embeddings (`cheap-embed`), as mergekit-moe has them. `linear` is random, for training to
    replace (BTX). Without any proxy: all experts alike (`uniform`, for `top_k` of all), at `random`, or by the
    direction of the input that each expert's weights answer most (`arrow`)."""
    shrinkage: float = Field(1.0, ge=0, le=1)
    """How far `lda` and `ridge` take the covariance that they divide by towards its diagonal. At 1 every dimension
    stands for itself, which asks least of the proxies: their tokens share contexts, so that they are few beside a
    large model's dimensions, and they aren't the clients' own text. Small models may gain by less."""
    add_layers: bool = False
    """Whether each layer adds to its router's logits those of all layers before it (evidence over layers): for models
    whose later layers tell the domains apart less well than the first, as the image towers that were tried do."""
    leave_out_ambiguous: bool = False
    """Whether `lda` and `ridge` are fitted a second time, without the proxies of which the first fit sends more than
    half elsewhere: some that a client picked may be more like another client's domain, which neither can know. It takes
    another pass over all proxies."""
    training: RouterTraining | None = None
    """Training from the start on, kept only if held-out proxies say that it helped. Without it the start is all: an
    epoch at the default rate takes as long again, and changed nothing on any of the benchmarks."""
    max_length: int = Field(512, ge=16)
    """Tokens of a proxy that are read."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start == "linear" and self.training is None:
            raise ValueError(
                "router.start linear is random until it is trained; give router.training, or start with lda"
            )
        if self.leave_out_ambiguous and self.start not in BY_STATISTICS:
            raise ValueError(f"'leave_out_ambiguous' is for {' and '.join(BY_STATISTICS)}, and start is {self.start}")
        return self
