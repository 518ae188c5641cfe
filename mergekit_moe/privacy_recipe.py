"""The recipe's `privacy`: which of a client's artifacts are differentially private, and how much they may tell.

One private row is what is protected: the guarantee compares the client's data with the same data without any one row,
where the number of rows counts as known. What `chunk` splits is several rows, and what k rows have in common is
protected k times less. Noise never comes from the recipe's seed: who builds a folder anew and publishes both has spent
both.
"""

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from mergekit_moe.spec import Spec

if TYPE_CHECKING:
    from mergekit_moe.recipe import Recipe

Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PrivateRelevance(Spec):
    """The relevance classifier by noised gradients; the proxies that it leads to cost nothing more.

    All private rows are embedded, whatever `selection.private_samples` says: the more there are, the less noise.
    """

    epsilon: Epsilon
    """Of the classifier alone, at `privacy.delta`."""


class PrivateStatistics(Spec):
    """The routing statistics: of the proxies, which needs no noise, or of the private rows themselves, noised."""

    private: bool = False
    """Sum what the seed model makes of the private rows, clipped and noised, in place of what the expert makes of its
    proxies."""
    epsilon: Epsilon | None = None
    """Of the statistics alone, at `privacy.delta`; required with `private`."""
    clip: Positive | None = None
    """Greatest norm of what one row adds, over all layers; where not given, the median over public rows. It must not be
    tuned on private rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.private and self.epsilon is None:
            raise ValueError("'private' publishes sums over private rows, which need noise; give 'epsilon', such as 2")
        if not self.private and self.model_fields_set - {"private"}:
            raise ValueError("statistics of proxies take no noise; set 'private: true', or drop 'epsilon' and 'clip'")
        return self


class PrivateExpert(Spec):
    """The expert by DP-SGD: each row's gradient clipped, their sum noised, at every step."""

    epsilon: Epsilon
    """Of all steps together, at `privacy.delta`."""
    clip: Positive = 1.0
    """Greatest norm of one row's gradient. It must not be tuned on private rows."""


class Privacy(Spec):
    """What may be told of any one private row. By default nothing is noised: data residency, no more."""

    delta: float = Field(1e-6, gt=0, lt=1)
    """Of each mechanism and of their composition; it has to be below 1 / (number of private rows)."""
    relevance: PrivateRelevance | None = None
    statistics: PrivateStatistics = PrivateStatistics()
    expert: PrivateExpert | None = None


def forbid_unaccounted(name: str, privacy: Privacy, recipe: "Recipe") -> None:
    """Raise ValueError where something that a client publishes would depend on private rows past the accountant.

    Args:
        name: the expert's name, for the sentence.
    """
    selection, alignment = recipe.selection, recipe.alignment
    if privacy.relevance is not None:
        if selection.relevance != "classifier":
            raise ValueError(
                f"expert '{name}': privacy.relevance noises the classifier, and selection.relevance is "
                f"{selection.relevance}; use classifier, or drop privacy.relevance"
            )
        if selection.alpha == "auto" or selection.method == "auto":
            raise ValueError(
                f"expert '{name}': selection 'auto' judges by private rows, which privacy.relevance doesn't account "
                "for; give a method and an alpha"
            )
        if selection.shorten:
            raise ValueError(
                f"expert '{name}': selection.shorten judges by private rows, which privacy.relevance doesn't account "
                "for; drop it, and choose the budget without looking at them"
            )
        if selection.duplicate_cosine is not None:
            raise ValueError(
                f"expert '{name}': selection.duplicate_cosine tells which pool rows are copies of private ones, which "
                "no noise hides; drop it, or drop privacy.relevance"
            )
    if privacy.expert is not None and alignment.proxies and proxies_tell(privacy, recipe):
        raise ValueError(
            f"expert '{name}': privacy.expert trains on proxies that were picked without noise; give "
            "privacy.relevance an epsilon, use selection.relevance: prompts, or set alignment.proxies: false"
        )


def proxies_tell(privacy: Privacy, recipe: "Recipe") -> bool:
    """Whether the choice of proxies depends on private rows, and no mechanism bounds how much it tells of one."""
    return proxies_depend(recipe) and privacy.relevance is None


def proxies_depend(recipe: "Recipe") -> bool:
    """Whether the choice of proxies depends on private rows at all."""
    selection = recipe.selection
    judged = selection.shorten or "auto" in (selection.method, selection.alpha)
    if judged or selection.duplicate_cosine is not None:
        return True
    if selection.method == "random" and selection.candidates is None:
        return False
    return selection.relevance != "prompts"
