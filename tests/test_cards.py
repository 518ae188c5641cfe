"""Cards: what they say word for word, metadata that the Hub's own classes read, and no licence made up."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from mergekit_moe import cards
from mergekit_moe.errors import RecipeError
from mergekit_moe.recipe import Recipe, Selection

SNAPSHOTS = Path(__file__).parent / "snapshots"
SHA = "0123456789abcdef0123456789abcdef01234567"
FACTS: dict[str, dict[str, Any]] = {
    "expert": {
        "metadata": cards.model_metadata(
            library="peft",
            license="apache-2.0",
            base_models=["org/seed"],
            relation="adapter",
            datasets=["org/pool"],
            tags=["lora", "mergekit_moe", "moe-expert"],
        ),
        "name": "law",
        "encoder": False,
        "base_model": "org/seed",
        "base_revision": SHA,
        "license": "apache-2.0",
        "labels": 0,
        "rank": 16,
        "alpha": 32,
        "projections": ["down_proj", "gate_proj", "up_proj"],
        "proxies": 500,
        "pool": [f"org/pool@{SHA}"],
        "silent_tokens": [1],
        "ledger": [
            {"file": "adapter_model.safetensors", "holds": "weights", "can_reveal": "rows", "guarantee": "residency"},
            {"file": "proxies.json", "holds": "ids", "can_reveal": "topics", "guarantee": "(2, 1e-05)-DP"},
        ],
        "total": "residency",
        "unit": "one private row.",
        "caveats": ["Each time that a folder is published, its mechanisms are spent again."],
    },
    "proxies": {
        "metadata": cards.dataset_metadata(license="unknown", rows=500, sources=["org/pool"], file="proxies.jsonl"),
        "name": "law",
        "rows": 500,
        "pool": {f"org/pool@{SHA}": "cc-by-4.0", "wiki.jsonl": "unknown"},
        "pool_rows": 20000,
        "selection": Selection(),
        "embedder": "sentence-transformers/all-MiniLM-L6-v2",
        "images": False,
        "guarantee": "residency",
    },
    "model": {
        "metadata": cards.model_metadata(
            library="transformers",
            license="apache-2.0",
            base_models=["org/seed", "firm/law"],
            relation="merge",
            datasets=["org/pool"],
            tags=["mergekit_moe", "metamoe", "moe", "merge"],
            language=["en"],
            name="unified",
            losses={"law": {"loss": 1.25, "perplexity": 3.49}},
        ),
        "name": "unified",
        "task": "text-generation",
        "encoder": False,
        "base_model": "org/seed",
        "base_revision": SHA,
        "base_license": "apache-2.0",
        "license": "apache-2.0",
        "experts": [
            {
                "name": "law",
                "source": "firm/law",
                "revision": SHA,
                "published_as": "LoRA, rank 16",
                "kept": "factored, exact",
                "license": "apache-2.0",
                "proxies": 500,
                "guarantee": "(2, 1e-05)-DP",
            },
            {
                "name": "news",
                "source": "news",
                "revision": None,
                "published_as": "full fine-tune",
                "kept": "whole FFNs",
                "license": "apache-2.0",
                "proxies": 400,
                "guarantee": "not stated",
            },
        ],
        "pool": [f"org/pool@{SHA}"],
        "top_k": 1,
        "context": "prefix",
        "silent_tokens": [1],
        "anchor": True,
        "router_fitted": True,
        "other_weights": ["news: `model.norm.weight` (0.01 of the base's norm); left out"],
        "judged_by": "loss",
        "loss_table": "| method | law |\n| --- | ---: |\n| seed | 2.0000 |",
        "domain_table": "| domain | retention |\n| --- | ---: |\n| law | 0.950 |",
        "accuracy_table": "| method | law |\n| --- | ---: |\n| seed | 0.250 |",
        "proxy_table": "",
        "router": "Linear in each layer's FFN input, with no context.",
        "recipe": "base_model: org/seed",
    },
}


@pytest.mark.parametrize("name", FACTS)
def test_a_card_says_what_it_said_when_somebody_read_it(name: str) -> None:
    """To change a card is to read it: delete its file in tests/snapshots, run this once, and read the new one."""
    text, snapshot = cards.render(f"{name}.md.j2", **FACTS[name]), SNAPSHOTS / f"{name}.md"
    if not snapshot.is_file():
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(text, encoding="utf-8")
        pytest.fail(f"{snapshot.name} was not there and is written now; read it, and run again")
    assert text == snapshot.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "loads"),
    [
        ("text-generation", "AutoModelForCausalLM.from_pretrained("),
        ("sentence-similarity", "SentenceTransformer("),
        ("zero-shot-image-classification", 'pipeline("zero-shot-image-classification", '),
        ("image-classification", 'pipeline("image-classification", '),
        ("image-feature-extraction", 'pipeline("image-feature-extraction", '),
    ],
)
def test_a_model_s_card_loads_it_as_its_users_do(task: str, loads: str) -> None:
    text = cards.render("model.md.j2", **{**FACTS["model"], "task": task})
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert f'model = {loads}"path/to/this/folder", trust_remote_code=True)' in code


def test_metadata_is_read_by_the_hub_s_own_classes() -> None:
    model = ModelCard(cards.render("model.md.j2", **FACTS["model"])).data
    assert model.base_model == ["org/seed", "firm/law"]
    assert model.to_dict()["base_model_relation"] == "merge"
    assert (model.license, model.datasets, model.language) == ("apache-2.0", ["org/pool"], ["en"])
    assert {(r.dataset_name, r.metric_type): r.metric_value for r in model.eval_results} == {
        ("law", "loss"): 1.25,
        ("law", "perplexity"): 3.49,
    }
    expert = ModelCard(cards.render("expert.md.j2", **FACTS["expert"])).data
    assert (expert.library_name, expert.to_dict()["base_model_relation"]) == ("peft", "adapter")
    proxies = DatasetCard(cards.render("proxies.md.j2", **FACTS["proxies"])).data
    assert (proxies.size_categories, proxies.source_datasets) == (["n<1K"], ["org/pool"])


def test_a_recipe_is_shown_without_private_data_and_places() -> None:
    recipe = Recipe.model_validate(
        {
            "base_model": "/somewhere/seed",
            "public_pool": {"dataset": "/somewhere/pool.jsonl", "text": "{text}"},
            "experts": [
                {"name": "law", "source": "/somewhere/law", "same_base": True, "test": {"dataset": "a", "text": "{t}"}},
                {"name": "art", "client": {"private": {"dataset": "/secret/art.jsonl", "text": "{text}"}}},
            ],
        }
    )
    shown = yaml.safe_load(cards.public_recipe(recipe))
    assert shown["base_model"] == "seed" and shown["public_pool"]["dataset"] == "pool.jsonl"
    assert shown["experts"] == [{"name": "law", "source": "law", "same_base": True}, {"name": "art"}]


def test_a_base_in_a_folder_is_no_hub_id() -> None:
    metadata = cards.model_metadata(
        library="transformers", license="mit", base_models=[], relation="merge", datasets=[], tags=["moe"]
    )
    assert yaml.safe_load(metadata).keys() == {"library_name", "license", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("given", "inputs", "expected"),
    [
        (None, {"base": "mit", "law": "mit"}, "mit"),
        ("other", {"base": "mit", "law": "unknown"}, "other"),
        (None, {"base": "mit", "law": "apache-2.0"}, None),
        (None, {"base": "unknown", "law": "unknown"}, None),
    ],
)
def test_a_licence_is_the_inputs_own_or_the_recipe_s(
    given: str | None, inputs: dict[str, str], expected: str | None
) -> None:
    if expected is not None:
        assert cards.require_license(given, inputs) == expected
        return
    with pytest.raises(RecipeError, match=f"base {inputs['base']}, law {inputs['law']}"):
        cards.require_license(given, inputs)
