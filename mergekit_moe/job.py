"""A recipe at work: where its models, rows and experts are, each resolved and read at most once."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe import data, hub
from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.architectures import classifies
from mergekit_moe.checkpoint import identity, license_of, stamp, weights_fingerprint
from mergekit_moe.errors import DataError, ExpertError
from mergekit_moe.experts import PROXIES, STATISTICS, Base, Expert, read_base, read_expert, read_proxies
from mergekit_moe.image_recipe import SEED_EMBEDDER, embedder_of, is_of_images
from mergekit_moe.recipe import ClipSeed, DataSource, ExpertSource, Recipe, Router, TrainedSeed
from mergekit_moe.selection.embedding import choose_backend, embedder_fingerprint, load_embedder, resolve_embedder
from mergekit_moe.workspace import Workspace, digest, file_sha256

if TYPE_CHECKING:
    from datasets import Dataset

    from mergekit_moe.matching import Labels

POOL = "public_pool"
"""How errors name the pool."""
SEED_ROWS = "base_model.rows"
"""How errors name what a seed that is trained here learns from, where that isn't the pool."""


class Job:
    """A recipe at work: its sources, resolved and read at most once."""

    def __init__(self, recipe: Recipe, name: str, workspace: Workspace) -> None:
        self.recipe = recipe
        self.name = name
        self.workspace = workspace
        self.data_dir = Path(recipe.data_dir)
        self.clients = [expert for expert in recipe.experts if expert.client is not None]
        self.foreign = [expert for expert in recipe.experts if expert.proxies == "expert-gain"]
        """Experts of whom nothing is known but their weights."""
        self.model = "model" if recipe.fits_routers else "merged"
        """The folder that holds the unified model in the end."""
        self._resolved: dict[tuple[str, str | None], tuple[hub.Resolved, bool]] = {}
        self._seen: dict[str, Expert] = {}
        """Experts on the Hub whose headers were fetched."""
        self._rows: dict[str, tuple[Dataset | None, Dataset | None]] = {}
        self._proxy_rows: dict[str, Dataset] = {}
        self._picked: dict[str, Sequence[int]] = {}

    @functools.cached_property
    def base(self) -> hub.Resolved:
        """The base model, its weights fetched."""
        return self._resolve_base(weights=True)

    @functools.cached_property
    def base_headers(self) -> Base:
        """What config and headers say of the base model; its weights may still lie on the Hub."""
        return read_base(self._resolve_base(weights=False))

    @functools.cached_property
    def base_model(self) -> Base:
        return read_base(self.base)

    def _resolve_base(self, *, weights: bool) -> hub.Resolved:
        if isinstance(self.recipe.base_model, TrainedSeed):
            return hub.Resolved(self.workspace.folder("seed"), f"{self.name}-seed", None)
        return self._resolve(self.recipe.base_model, self.recipe.revision, "base_model", weights=weights)

    def _resolve(self, source: str, revision: str | None, what: str, *, weights: bool) -> hub.Resolved:
        """Return a model, looked up once: a branch that moves while a run lasts doesn't change what is merged."""
        pinned, fetched = self._resolved.get((source, revision), (None, False))
        if pinned is None or (weights and not fetched):
            at = pinned.revision if pinned is not None else revision
            tell = self.workspace.report
            pinned = hub.resolve_model(source, at, self.data_dir, what, weights=weights, tell=tell)
            self._resolved[source, revision] = pinned, weights
        return pinned

    @functools.cached_property
    def base_weights(self) -> str:
        return weights_fingerprint(self.base.folder, "base_model")

    @functools.cached_property
    def base_identity(self) -> str:
        """One digest of all that makes the base model."""
        base = self._resolve_base(weights=False)
        if base.revision is not None:
            return digest([base.source, base.revision])
        return identity(self.base.folder, self.base_weights)

    @property
    def base_stamp(self) -> str:
        """The same for a merge, which is soon done again, without reading the weights."""
        base = self._resolve_base(weights=False)
        if base.revision is not None:
            return self.base_identity
        return identity(base.folder, stamp(base.folder, "base_model"))

    @property
    def encodes(self) -> bool:
        """Whether the base model is an encoder, of texts or of images."""
        if isinstance(self.recipe.base_model, TrainedSeed):
            return isinstance(self.recipe.base_model, ClipSeed)
        return self.base_headers.architecture.encoder

    @property
    def classifies(self) -> bool:
        """Whether each expert has a head over its own labels, rather than names to compare with."""
        return isinstance(self.recipe.base_model, str) and classifies(self.base_headers.config)

    @property
    def router(self) -> Router:
        """The recipe's router, with the context that suits the base model where the recipe names none."""
        router = self.recipe.router
        return router.model_copy(update={"context": "mean"}) if self.encodes and not _names_context(router) else router

    @functools.cached_property
    def label_names(self) -> list[str]:
        """Every label that any expert's rows have, of all domains together: what each text is judged against."""
        rows = [self.rows(expert) for expert in self.recipe.experts if self.recipe.matches_labels]
        return data.label_names(*(part for pair in rows for part in pair if part is not None))

    @property
    def base_license(self) -> str:
        if isinstance(self.recipe.base_model, TrainedSeed):
            return self.recipe.base_model.license
        return license_of(self.base_headers.source.folder)

    @property
    def embeds_itself(self) -> bool:
        """Whether the base model's own image tower embeds the pool."""
        return embedder_of(self.recipe) == SEED_EMBEDDER

    @functools.cached_property
    def embedder(self) -> hub.Resolved:
        if self.embeds_itself:
            return self.base
        return resolve_embedder(self.recipe.selection.embedder, self.data_dir, self.workspace.report)

    def embedder_identity(self) -> dict[str, Any]:
        """Return what the embeddings depend on besides the texts."""
        settings = self.recipe.selection
        if self.embeds_itself:
            return {"embedder": [SEED_EMBEDDER, self.base_identity], "dtype": settings.embedding_dtype}
        version = self.embedder.revision or embedder_fingerprint(self.embedder.folder)
        return {
            "embedder": [settings.embedder, version, self._embedder_backend],
            "max_length": settings.embedder_max_length,
            "dtype": settings.embedding_dtype,
        }

    @functools.cached_property
    def loaded_embedder(self) -> Any:
        if self.embeds_itself:
            from mergekit_moe.selection.seed_tower import SeedTower

            return SeedTower(self.base.folder)
        length, images = self.recipe.selection.embedder_max_length, is_of_images(self.recipe)
        return load_embedder(self.embedder.folder, length, self._embedder_backend, images=images)

    @property
    def _embedder_backend(self) -> str:
        return "torch" if is_of_images(self.recipe) else choose_backend(self.recipe.selection.embedder_backend)

    @property
    def seed_sources(self) -> list[DataSource]:
        """What a seed that is trained here learns from; nothing for another base model."""
        base = self.recipe.base_model
        if isinstance(base, str):
            return []
        return base.rows if isinstance(base, ClipSeed) else self.recipe.pool_sources

    @functools.cached_property
    def seed_rows(self) -> "Dataset":
        if not isinstance(self.recipe.base_model, ClipSeed):
            return self.pool
        tell = self.workspace.report
        return data.load_rows(self.seed_sources, self.data_dir, SEED_ROWS, public=True, tell=tell)

    @property
    def seed_fingerprint(self) -> str:
        return digest(data.fingerprint(self.seed_sources, self.data_dir, SEED_ROWS, tell=self.workspace.report))

    @functools.cached_property
    def pool(self) -> "Dataset":
        tell = self.workspace.report
        return data.load_rows(self.recipe.pool_sources, self.data_dir, POOL, public=True, tell=tell)

    @functools.cached_property
    def pool_fingerprint(self) -> str:
        return digest(data.fingerprint(self.recipe.pool_sources, self.data_dir, POOL, tell=self.workspace.report))

    def rows(self, expert: ExpertSource) -> tuple["Dataset | None", "Dataset | None"]:
        """Return an expert's rows to learn from and its held-out rows, None where the recipe gives none."""
        if expert.name not in self._rows:
            self._rows[expert.name] = self._load_rows(expert)
        return self._rows[expert.name]

    def _load_rows(self, expert: ExpertSource) -> tuple["Dataset | None", "Dataset | None"]:
        what = f"expert '{expert.name}'"
        client = expert.client
        test = client.test if client is not None else expert.test
        held_out = data.load_rows([test], self.data_dir, f"{what}, test") if test is not None else None
        if client is None:
            return None, held_out
        tell = self.workspace.report
        private = data.load_rows([client.private], self.data_dir, f"{what}, private", tell=tell)
        learnt, held_out = (private, held_out) if held_out is not None else data.split_held_out(private)
        return data.without_task(learnt), held_out

    def use_rows(self, expert: ExpertSource, private: "Dataset", held_out: "Dataset | None") -> None:
        """Take these for an expert's rows, whatever the recipe says: an audit plants texts among them."""
        self._rows[expert.name] = private, held_out

    def private_rows(self, expert: ExpertSource) -> "Dataset":
        rows = self.rows(expert)[0]
        assert rows is not None
        return rows

    def private_fingerprint(self, expert: ExpertSource) -> str:
        """Return one digest of the rows that an expert learns from; it tells nothing of where they lie."""
        assert expert.client is not None
        rows = data.fingerprint([expert.client.private], self.data_dir, f"expert '{expert.name}', private")
        return digest([rows, "some held out" if expert.client.test is None else "all"])

    def held_out_fingerprint(self, expert: ExpertSource) -> str:
        """Return one digest of an expert's held-out rows."""
        test = expert.test if expert.client is None else expert.client.test or expert.client.private
        return digest(data.fingerprint([test] if test else [], self.data_dir, f"expert '{expert.name}', test"))

    def expert(self, source: ExpertSource, *, weights: bool = True) -> Expert:
        """Return a published expert, checked against the base.

        Args:
            weights: False to look at its headers alone, wherever they lie.

        Raises:
            ExpertError: naming the expert and what doesn't fit.
        """
        if not weights and source.name in self._seen:
            return self._seen[source.name]
        base = self.base_model if weights else self.base_headers
        if source.source is None:
            folder = f"experts/{source.name}"
            resolved = hub.Resolved(self.workspace.folder(folder), folder, None)
        else:
            resolved = self._resolve(source.source, source.revision, f"expert '{source.name}'", weights=weights)
        here = weights or base.source.revision is None
        expert = read_expert(
            source.name,
            resolved,
            base,
            base_weights=(lambda: self.base_weights) if here else None,
            same_base=source.same_base,
        )
        if not weights and resolved.revision is not None:
            self._seen[source.name] = expert
        return expert if source.source is not None else expert._replace(source=resolved.source)

    def experts(self) -> list[Expert]:
        return [self.expert(source) for source in self.recipe.experts]

    def expert_identities(self) -> list[list[Any]]:
        """Return what changes whenever an expert does."""
        matters = ("base_weights", "domain_free_token_ids", "labels")
        experts = [self.expert(source, weights=False) for source in self.recipe.experts]
        identities: list[list[Any]] = [
            [e.name, e.revision, [e.about.get(key) for key in matters], e.revision or published_files(e)]
            for e in experts
        ]
        picked = [self.workspace.digest_of(f"proxies/{source.name}", "select", (PROXIES,)) for source in self.foreign]
        return identities + ([picked] if picked else [])

    def labels(self) -> "Labels | None":
        """Return what rows are told apart by: the labels of all experts, by name or by the rows of their heads.

        Raises:
            DataError: if a held-out row has a label that no expert's head knows.
            ExpertError: if some experts have a head and others don't.
        """
        from mergekit_moe.matching import Labels
        from mergekit_moe.merging.heads import joined_head
        from mergekit_moe.models import load_labels

        if not self.classifies or not self.label_names:
            return load_labels(self.base.folder, self.label_names, self.recipe.matching.temperature)
        head = joined_head(self.experts())
        unknown = sorted(set(self.label_names) - set(head.labels if head is not None else ()))
        if head is None or unknown:
            raise DataError(
                f"held-out rows have the label '{unknown[0]}', which no expert's head knows; leave them out"
            )
        weight, bias = (planned.make().float() for planned in head.tensors)
        return Labels(list(head.labels), weight, 1.0, bias)

    def licenses(self) -> dict[str, str]:
        """Return the licence of the base and of each expert, `unknown` where nothing states one."""
        licenses = {"base": self.base_license}
        for source in self.recipe.experts:
            own = source.license or self.base_license
            if source.client is None:
                own = self.expert(source, weights=False).license or "unknown"
            licenses[source.name] = own
        return licenses

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out text to judge a unified model by."""
        if self.recipe.merge.method != "moe":
            return False
        return any(source.test is not None or source.client is not None for source in self.recipe.experts)

    def anchor_rows(self) -> "Dataset":
        """Return the anchor's proxies: random public rows, as many as an expert has, and none of theirs."""
        import random

        taken = [self.proxies(expert)["rows"] for expert in self.experts()]
        free = sorted(set(range(len(self.pool))).difference(*taken, *self._picked.values()))
        count = min(len(free), sum(map(len, taken)) // len(taken))
        if count == 0:
            raise ExpertError("merge.anchor: the experts' proxies take the whole public_pool; give a larger pool")
        return self.pool.select(sorted(random.Random(self.recipe.seed).sample(free, count)))

    def proxies(self, expert: Expert) -> dict[str, Any]:
        """Return what an expert published of its proxies, or what was picked here for it."""
        picked_here = expert.name in {source.name for source in self.foreign}
        folder = self.workspace.folder(f"proxies/{expert.name}") if picked_here else expert.folder
        return read_proxies(folder, expert.name)

    def use_proxies(self, name: str, rows: "Dataset", picked: Sequence[int] = ()) -> None:
        """Take these rows for an expert's proxies, whatever it published.

        Args:
            picked: their numbers, where they are of the pool: the anchor gets others.
        """
        self._proxy_rows[name] = rows
        self._picked[name] = picked

    def proxy_rows(self, expert: Expert) -> "Dataset":
        """Return the pool's rows that are an expert's proxies.

        Raises:
            ExpertError: if it has none, or they were picked from another pool.
        """
        if expert.name in self._proxy_rows:
            return self._proxy_rows[expert.name]
        proxies = self.proxies(expert)
        if proxies["pool"]["fingerprint"] != self.pool_fingerprint:
            raise ExpertError(
                f"expert '{expert.name}': its proxies were picked from another pool "
                f"({', '.join(proxies['pool']['sources'])}) than the recipe's public_pool; "
                "use the same pool and templates"
            )
        return self.pool.select(proxies["rows"])


def _names_context(router: Router) -> bool:
    return "context" in router.model_fields_set


def published_files(expert: Expert) -> str:
    """Return one digest of all of an expert's files that matter to a merge."""
    files = [expert.folder / name for name in (ADAPTER, ADAPTER_CONFIG, PROXIES, STATISTICS, "config.json")]
    weights = None if expert.is_adapter else stamp(expert.folder, f"expert '{expert.name}'")
    return digest([weights, [file_sha256(file) for file in files if file.is_file()]])
