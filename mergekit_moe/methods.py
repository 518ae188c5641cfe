"""What `metamoe compare` puts side by side: each method is a change to the recipe, or a vote of whole models."""

from typing import Any, NamedTuple

from mergekit_moe.image_recipe import is_of_images
from mergekit_moe.recipe import Recipe
from mergekit_moe.router_recipe import RouterTraining

ORACLE = "oracle"
_TASK_ALONE = RouterTraining(task_weight=1.0, domain_weight=0.0, batch_size=8, gradient_accumulation=2).model_dump(
    exclude={"bf16"}
)
"""Every setting but the precision, so that none of the recipe's own training is a baseline's. Steps are cut up for the
sake of large models."""
_PUBLISHED = {**_TASK_ALONE, "trains": "router+experts"}
_PUBLISHED_ON_IMAGES = {
    **_PUBLISHED,
    "optimizer": "sgd",
    "momentum": 0.9,
    "learning_rate": 1e-3,
    "batch_size": 128,
    "gradient_accumulation": 1,
    "epochs": 5,
}
_TOP_2 = {"method": "moe", "top_k": 2, "anchor": False, "renormalise": True}


class Method(NamedTuple):
    """One row of the table."""

    label: str
    group: str
    """`reference`, `baseline`, `ours`, `ablation` or `ceiling`."""
    changes: dict[str, Any] | None = None
    """What is changed in the recipe; None for what needs no merge."""
    private: bool = False
    """Whether it reads private rows to unify."""

    @property
    def dense(self) -> bool:
        """Whether it makes one dense model."""
        return (self.changes or {}).get("merge", {}).get("method", "moe") != "moe"


def _metamoe(training: dict[str, Any]) -> dict[str, Any]:
    """Return the changes that make the published method, by the training of its last stage."""
    return {
        "merge": {"method": "moe", "top_k": 1, "anchor": False, "renormalise": False},
        "router": {"start": "means", "context_weight": 0.5, "add_layers": False, "training": training},
    }


METHODS: dict[str, Method] = {
    "seed": Method("seed", "reference"),
    ORACLE: Method("own expert (oracle)", "reference"),
    "soup": Method("model soup", "baseline", {"merge": {"method": "soup"}}),
    "task-arithmetic": Method("task arithmetic", "baseline", {"merge": {"method": "task-arithmetic"}}),
    "ties": Method("TIES", "baseline", {"merge": {"method": "ties"}}),
    "btm": Method("BTM, uniform vote", "baseline"),
    "btm-posterior": Method("BTM, vote by domain posterior", "baseline"),
    "btx": Method(
        "BTX",
        "baseline",
        {
            "merge": {**_TOP_2, "other_weights": "average"},
            "router": {
                "start": "linear",
                "context": "none",
                "add_layers": False,
                "training": {**_TASK_ALONE, "balance_weight": 0.01, "learning_rate": 1e-2, "epochs": 3},
            },
        },
    ),
    "flexolmo": Method(
        "FlexOlmo",
        "baseline",
        {
            "selection": {"method": "top-k"},
            "merge": _TOP_2,
            "router": {
                "start": "flexolmo",
                "context": "none",
                "add_layers": False,
                "training": {**_TASK_ALONE, "learning_rate": 1e-2, "epochs": 3},
            },
        },
    ),
    "metamoe": Method(
        "MetaMoE as published",
        "baseline",
        _metamoe({**_PUBLISHED, "learning_rate": 1e-4, "gradient_accumulation": 4, "epochs": 1}),
    ),
    "ours": Method("ours", "ours", {}),
    "ours-top-1": Method("ours, one expert a token", "ours", {"merge": {"top_k": 1}}),
    "ours-top-2": Method("ours, two experts a token", "ours", {"merge": {"top_k": 2}}),
    "unrestricted": Method("router on private data (ceiling)", "ceiling", {}, private=True),
}
"""In the table's order. Those that are trained are trained on the proxies. BTX and FlexOlmo keep their two experts a
token, for which ours has a row, too; they learn a hundred times faster than our default, which suits routers that start
from something better."""


def methods_of(recipe: Recipe) -> dict[str, Method]:
    """Return all rows of a recipe's table: the experts and the recipe's ablations, too."""
    experts = {f"expert-{e.name}": Method(f"expert {e.name}", "reference") for e in recipe.experts}
    ablations = {
        f"ablation-{name}": Method(name.replace("-", " "), "ablation", changes)
        for name, changes in recipe.comparison.ablations.items()
    }
    out = {f"ours-top-{recipe.merge.top_k}"}  # the recipe's own row is that
    if recipe.matches_labels:
        out.add("btm-posterior")  # to weigh experts by how well they read a text takes models that read
    if any(expert.client is None for expert in recipe.experts):
        out.add("unrestricted")  # nobody's private rows are here
    known = {name: method for name, method in METHODS.items() if name not in out}
    if is_of_images(recipe):
        known["metamoe"] = known["metamoe"]._replace(changes=_metamoe(_PUBLISHED_ON_IMAGES))
    return {"seed": METHODS["seed"], **experts, **known, **ablations}
