"""The recipe: what to unify, from what, and how. One YAML file, checked whole before any work starts."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mergekit_moe.image_recipe import check_images
from mergekit_moe.label_recipe import Matching, check_labels
from mergekit_moe.privacy_recipe import Privacy, forbid_unaccounted
from mergekit_moe.router_recipe import BY_PUBLISHED, NO_PROXIES, Router, Training
from mergekit_moe.seed_recipe import ClipSeed, Seed, TrainedSeed, kind_of_base
from mergekit_moe.source_recipe import DataSource
from mergekit_moe.spec import Spec
from mergekit_moe.task_recipe import Choices, Task

RESERVED_NAMES = ("seed", "soup", "unified")
"""Methods that the results are reported for beside the experts."""
EXPERT_NAME = r"^[a-z0-9][a-z0-9_-]*$"
ANCHOR = "anchor"
"""Name of the expert that is the seed's own FFN."""

ExportFormat = Literal["mixtral", "qwen3_moe", "qwen2_moe", "flex_olmo"]


RandomSeed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every library that draws here takes."""


class ClientRows(DataSource):
    """Rows of a client's domain, to learn from or to judge by, and what they ask."""

    task: Task | None = None
    """What held-out rows are judged by beside the loss: `choices`, or an `answer` to be written. Of choices, the right
    one is learnt."""

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.task is None:
            return self
        if self.prompt is None:
            raise ValueError("'task' asks for an answer to a prompt; give 'prompt' and 'completion' instead of 'text'")
        if isinstance(self.task, Choices) and "{choice}" not in str(self.completion):
            raise ValueError(
                "'completion' has no place for a choice; write {choice} where it stands, such as ' {choice}'"
            )
        return self


class Client(Spec):
    """Data that stays with a client."""

    private: ClientRows
    """What the client's expert is for. Read by `select` and `align`; they leave no copy of a row on disk, but for the
    files of a Hub data set in the Hub's own cache."""
    test: ClientRows | None = None
    """Held-out rows of the same domain, for `evaluate`; without it every tenth private row is held out."""
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Sentences that describe the domain, for `selection.relevance: prompts`."""
    tag: str | None = None
    """The pool's `tag` that fits this client, where it is known: only ever used to judge the selector."""
    privacy: Privacy | None = None
    """What this client's artifacts may tell; the recipe's where not given."""


class ExpertSource(Spec):
    """One expert: published already (`source`), or trained here from a client's data (`client`)."""

    name: str = Field(pattern=EXPERT_NAME)
    source: str | None = None
    """Folder, or Hub id, of a published expert."""
    revision: str | None = None
    client: Client | None = None
    """Inline, or the path of a YAML file that holds it."""
    test: ClientRows | None = None
    """Held-out rows for `evaluate`, for an expert that comes from a `source`."""
    proxies: Literal["published", "expert-gain"] = "published"
    """`expert-gain` picks them here for a `source` that published none: pool texts that it reads better than the base
    model does. So any adapter on the Hub can join; proxies that a client picked fit its domain better."""
    same_base: bool = False
    """You know that the base model which a `source` names is the recipe's: a mirror, or another name of it."""
    license: str | None = None
    """Licence of the expert trained here; the base model's where not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.client is None):
            raise ValueError(f"expert '{self.name}': give either 'source' or 'client'")
        if self.name in RESERVED_NAMES:
            raise ValueError(f"expert name '{self.name}' is a row of the results table; choose another")
        if self.client is not None and self.proxies != "published":
            raise ValueError(f"expert '{self.name}': 'proxies' is for a 'source'; a client's are picked by 'selection'")
        unused = ("test", "revision") if self.client is not None else ("license",)
        for field in unused:
            if getattr(self, field) is not None:
                where = "inside 'client'" if field == "test" else "nothing here"
                raise ValueError(f"expert '{self.name}': '{field}' means {where}; move it, or drop it")
        return self

    @property
    def task(self) -> Task | None:
        """What its held-out rows ask."""
        held_out = (self.client.test or self.client.private) if self.client is not None else self.test
        return held_out.task if held_out is not None else None

    @property
    def rows(self) -> list[DataSource]:
        """All that the recipe gives of its domain's rows."""
        given = [self.client.private, self.client.test] if self.client is not None else [self.test]
        return [source for source in given if source is not None]


class Selection(Spec):
    """How each client's proxies are picked from the public pool."""

    method: Literal["dpp", "auto", "top-k", "random", "mmr", "facility-location", "k-means"] = "dpp"
    """`auto` tries the DPP at each alpha and facility location, and judges as `alpha: auto` does."""
    budget: int = Field(500, ge=1)
    """Proxies a client; with `shorten` the most that there can be."""
    shorten: bool = False
    """Keep only the first so many picks as lie nearest to private texts that were held out (least squared MMD): a pool
    may hold fewer rows that are like a client's than the budget, and the picks after those teach the routers a domain
    that isn't the client's."""
    candidates: int | None = Field(None, ge=1)
    """Consider only the so many most relevant rows, as published (3000); by default the whole pool."""
    alpha: Annotated[float, Field(ge=0)] | Literal["auto"] = 1.0
    """Exponent on the relevance in the DPP kernel: higher favours relevance over diversity. `auto` tries 0.5, 1,
    2, 4 and 8 and judges by private texts that it held out: by discrepancy (MMD) and coverage."""
    epsilon: float = Field(0.1, ge=0)
    """Nugget on the similarity kernel; 0 is the published objective, large is top-k."""
    relevance: Literal["classifier", "centroid", "prompts"] = "classifier"
    """Client's texts against the pool, by a classifier; closeness to the mean of the client's texts; or to the nearest
    of a few sentences that describe its domain (`client.prompts`), which tell nothing of private text."""
    private_samples: int = Field(500, ge=10)
    """At most so many private texts are embedded to fit the relevance classifier."""
    duplicate_cosine: Annotated[float, Field(gt=0, le=1)] | None = None
    """Never pick pool rows this close to one of the sampled private texts, nor exact copies of any. Off by default:
    who can plant a text in the pool, and sees that of all texts like it this one is never picked, knows that it
    is private. Copies are scored as if they weren't private instead."""
    draw_private: bool = False
    """Draw held-out private texts on the map of pool and proxies, too. It stays in the client's workspace."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub id, folder, or `package:NAME` for an installed package with a `get_model_path()`. For images a CLIP-style
    one, or `seed`, the base model's own image tower, which is their default."""
    embedder_max_length: int | None = Field(None, ge=8)
    """Tokens; the embedder's own limit where not given."""
    embedder_backend: Literal["auto", "torch", "openvino"] = "auto"
    """What computes the embeddings; `auto` is OpenVINO on CPUs where it is installed, else torch."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """Of the pool's embeddings on disk. At 16 bits the DPP keeps about 99 picks of 100 with `epsilon` 0.1."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.shorten and self.method == "k-means":
            raise ValueError("'shorten' keeps the first picks, and k-means picks all at once; choose another method")
        return self


class Alignment(Training):
    """LoRA on the FFN projections, on a client's private rows and its proxies (METHOD: proxy-aligned expert)."""

    epochs: float = Field(10.0, gt=0)
    warmup_steps: int = Field(200, ge=0)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    max_length: int = Field(512, ge=16)
    """Tokens; longer rows are cut."""
    proxies: bool = True
    """Train on the proxies too; without them the expert doesn't know the text it is routed by."""
    domain_free_bos: bool = True
    """Switch the adapter off on BOS, which stands before every domain and so belongs to none."""


class Compression(Spec):
    """Full fine-tunes as factored experts: what they changed in each FFN matrix, by truncated SVD."""

    rank: int | None = Field(None, ge=1)
    """Of every matrix."""
    energy: float | None = Field(None, gt=0, le=1)
    """Or: the least rank that keeps this share of the change's squared norm, matrix by matrix."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either 'rank' or 'energy'")
        return self


class Merge(Spec):
    """Experts to one checkpoint."""

    method: Literal["moe", "soup", "task-arithmetic", "ties", "dare"] = "moe"
    """`moe` is what this is for; the others make one dense model, to compare with."""
    top_k: int = Field(1, ge=1)
    renormalise: bool = True
    """Divide the chosen experts' weights by their sum; False is Eq. 6 as published."""
    anchor: bool = False
    """One more expert, the base's own FFN, for text of no expert's domain."""
    other_weights: Literal["base", "average", "refuse"] = "base"
    """Of what experts changed outside their FFNs, which one model can hold only once: the base's own weights, the base
    plus the mean of the changes (BTX), or no merge. What was changed is printed either way."""
    compress: Compression | None = None
    """Full fine-tunes as factored experts; as whole FFNs where not given."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the result; the base's own, and the adapters', where not given."""
    scaling: float | None = Field(None, gt=0)
    """Weight of the sum of the experts' changes; 1 for TIES, 0.4 for task arithmetic and DARE where not given."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each change that is kept; 0.2 for TIES, 0.1 for DARE where not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = {
            "moe": {"top_k", "renormalise", "anchor", "other_weights", "compress"},
            "soup": set[str](),
            "task-arithmetic": {"scaling"},
            "ties": {"scaling", "density"},
            "dare": {"scaling", "density"},
        }[self.method] | {"method", "dtype"}
        for field in sorted(self.model_fields_set - taken):
            raise ValueError(f"'{field}' means nothing to method {self.method}; drop it, or choose another method")
        return self


class Evaluation(Spec):
    """Held-out losses of the seed, each expert, the plain average and the unified model."""

    max_rows: int = Field(500, ge=1)
    """Rows a domain, the first ones."""
    max_length: int = Field(512, ge=16)
    batch_size: int = Field(16, ge=1)


class Comparison(Spec):
    """What `metamoe compare` puts side by side, beside the methods that it knows."""

    seeds: list[RandomSeed] = Field([0, 1, 2], min_length=1)
    """Random seeds. Each selects, aligns and unifies anew; all start from one seed model and one pool."""
    ablations: dict[Annotated[str, Field(pattern=EXPERT_NAME)], dict[str, Any]] = {}
    """Name -> what is changed in this recipe. `selection` changes the proxies that routers are fitted on, and the
    experts stay those of the recipe; `alignment` trains experts of their own. `experts` is by name here."""
    strangers: dict[Annotated[str, Field(pattern=EXPERT_NAME)], DataSource] = {}
    """Held-out text of no expert's domain."""
    ceiling_rows: int = Field(1000, ge=1)
    """Private rows a client, picked at random, that the ceiling's routers are fitted on."""


class Card(Spec):
    """What the model card says that no file can tell."""

    license: str | None = None
    """Licence of the unified model; needed where the inputs' own differ, or one is unknown."""
    language: list[str] = []


class Recipe(Spec):
    """One merge, from the clients' data to the model card."""

    base_model: Annotated[
        Annotated[str, Tag("(name)")] | Annotated[Seed, Tag("(seed)")] | Annotated[ClipSeed, Tag("(clip)")],
        Discriminator(kind_of_base),
    ]
    """Folder or Hub id of the seed model; or the settings of a small one to be trained: a language model on the pool,
    a CLIP model (`kind: clip`) on labelled images of its own."""
    revision: str | None = None
    public_pool: (
        Annotated[
            Annotated[DataSource, Tag("(one)")] | Annotated[list[DataSource], Tag("(several)")],
            Discriminator(lambda value: "(several)" if isinstance(value, list) else "(one)"),
        ]
        | None
    ) = None
    """One data set, or several taken together; none for a merge with a router that needs no proxies."""
    experts: list[ExpertSource] = Field(min_length=1)
    """One is enough for a client's own commands; `merge` and what follows need two."""
    data_dir: str = "."
    """Where relative data paths start; itself relative to the recipe."""
    seed: RandomSeed = 0
    """Seeds everything random."""
    selection: Selection = Selection()
    alignment: Alignment = Alignment()
    matching: Matching = Matching()
    privacy: Privacy = Privacy()
    """What each client's artifacts may tell, where the client says nothing else."""
    merge: Merge = Merge()
    router: Router = Router()
    evaluation: Evaluation = Evaluation()
    comparison: Comparison = Comparison()
    card: Card = Card()
    export: list[ExportFormat] = []
    """Native families to write the model as, too: folders that load without remote code."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [expert.name for expert in self.experts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expert name '{twice[0]}' is used more than once; give each expert its own")
        if self.revision is not None and isinstance(self.base_model, TrainedSeed):
            raise ValueError("'revision' is for a base model on the Hub, and this one is trained here; drop it")
        for expert in self.experts if isinstance(self.base_model, TrainedSeed) else ():
            if expert.proxies == "expert-gain":
                raise ValueError(
                    f"expert '{expert.name}': proxies by expert-gain need a base_model that exists, "
                    "and this recipe's is trained here; name a folder or a Hub id"
                )
        for expert in self.experts if self.selection.relevance == "prompts" else ():
            if expert.client is not None and not expert.client.prompts:
                raise ValueError(
                    f"expert '{expert.name}': selection.relevance is prompts, but the client has none; "
                    "give client.prompts, a few sentences such as a user would write"
                )
        for expert in self.experts:
            if expert.client is not None:
                forbid_unaccounted(expert.name, self.privacy_of(expert), self)
        check_labels(self)
        check_images(self)
        self._check_merge(names)
        if self.public_pool is None:
            self._check_without_pool()
        return self

    def _check_merge(self, names: list[str]) -> None:
        """Raise ValueError for a merge that its experts don't allow."""
        if self.merge.anchor and ANCHOR in names:
            raise ValueError(f"expert name '{ANCHOR}' is the base's own FFN's, by merge.anchor; choose another")
        count = len(names) + self.merge.anchor
        if self.merge.top_k > count:
            raise ValueError(f"merge.top_k is {self.merge.top_k} but there are {count} experts; lower it")
        if self.merge.method != "moe":
            for field in ("router", "export"):
                if field in self.model_fields_set:
                    raise ValueError(
                        f"merge.method {self.merge.method} makes a dense model; '{field}' is for moe, drop it"
                    )
        elif self.merge.anchor and self.router.start in BY_PUBLISHED:
            raise ValueError(
                f"router.start {self.router.start} is of what experts publish, and merge.anchor's publishes nothing; "
                "start with lda or ridge, or drop merge.anchor"
            )
        elif self.router.start == "uniform" and self.merge.top_k != count:
            raise ValueError(
                f"router.start uniform gives every expert the same weight; set merge.top_k to all {count}, or start "
                "with random or arrow"
            )

    def _check_without_pool(self) -> None:
        """Raise ValueError for what needs a public pool, in a recipe that has none."""
        if isinstance(self.base_model, Seed):
            raise ValueError("base_model: a seed is trained on public_pool; give one, or name a base model")
        for expert in self.experts:
            if expert.client is not None or expert.proxies == "expert-gain":
                raise ValueError(f"expert '{expert.name}': its proxies are picked from public_pool; give one")
        if self.merge.method != "moe":
            return
        if self.router.start not in NO_PROXIES:
            raise ValueError(
                f"router.start is {self.router.start}, which is fitted on proxies from public_pool; give one, or start "
                f"with {', '.join(NO_PROXIES[:-1])} or {NO_PROXIES[-1]}, which need none"
            )
        if "training" in self.router.model_fields_set and self.router.training is not None:
            raise ValueError("router.training is on proxies from public_pool; give one, or drop it")
        if self.export:
            raise ValueError("'export' fits gates on proxies from public_pool; give one, or use `metamoe export` after")

    def privacy_of(self, expert: ExpertSource) -> Privacy:
        """Return what a client's artifacts may tell: its own setting, or the recipe's."""
        return (expert.client and expert.client.privacy) or self.privacy

    @property
    def pool_sources(self) -> list[DataSource]:
        if self.public_pool is None:
            return []
        return self.public_pool if isinstance(self.public_pool, list) else [self.public_pool]

    @property
    def matches_labels(self) -> bool:
        """Whether the experts' rows have labels: what they are judged by is a text encoder's choice among those."""
        return any(source.label is not None for expert in self.experts for source in expert.rows)

    @property
    def fits_routers(self) -> bool:
        """Whether the routers are fitted, or trained, on proxies; else the merge makes them."""
        return self.merge.method == "moe" and self.public_pool is not None
