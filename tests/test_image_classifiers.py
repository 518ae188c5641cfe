"""ViT on the line: heads of three clients, each over its own labels, become one over the labels of all."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import WITHOUT_PACKAGE
from image_tools import COLOURS, LABELS, PLACES, image_recipe, opened, pictures, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from test_pipeline import metamoe
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mergekit_moe.data import load_rows, split_held_out
from mergekit_moe.models import load_model, load_reader
from mergekit_moe.recipe import DataSource

JOINED = [label for place in PLACES for label in sorted(f"a {colour} {place}" for colour in COLOURS)]
"""In the experts' order, and each one's sorted."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run on a random ViT without a head: the recipe's folder and its workspace."""
    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=16, patch_size=4, initializer_range=0.2, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    recipe = image_recipe(folder) | {"base_model": "vit"}
    metamoe("run", write_recipe(folder, recipe), "--workspace", folder / "ws")
    return folder, folder / "ws"


def published(workspace: Path, name: str) -> Path:
    return workspace / "experts" / name


def test_an_expert_publishes_its_head_and_says_so(finished: tuple[Path, Path]) -> None:
    workspace = finished[1]
    for place in PLACES:
        about = json.loads((published(workspace, place) / "expert.json").read_text())
        assert about["labels"] == sorted(f"a {colour} {place}" for colour in COLOURS), "its own, and none of the pool's"
        weights = load_file(published(workspace, place) / "adapter_model.safetensors")
        assert weights["base_model.model.classifier.weight"].shape == (4, 32)
        assert {key for key in weights if "lora_" not in key} == {
            "base_model.model.classifier.weight",
            "base_model.model.classifier.bias",
        }
        entries = json.loads((published(workspace, place) / "privacy.json").read_text())["artifacts"]
        entry = next(entry for entry in entries if entry["file"] == "expert.json")
        assert (entry["guarantee"], entry["holds"]) == ("residency", "name, base model, licence, labels")
        card = (published(workspace, place) / "README.md").read_text()
        assert "AutoModelForImageClassification.from_pretrained" in card and "num_labels=4" in card


def test_the_unified_head_has_each_expert_s_rows(finished: tuple[Path, Path]) -> None:
    workspace = finished[1]
    model = load_model(workspace / "model")
    assert [model.config.id2label[i] for i in range(12)] == JOINED
    for number, place in enumerate(PLACES):
        weights = load_file(published(workspace, place) / "adapter_model.safetensors")
        own = model.encoder.classifier.weight[4 * number : 4 * (number + 1)]
        torch.testing.assert_close(own, weights["base_model.model.classifier.weight"], atol=0, rtol=0)


@torch.no_grad()
def test_labels_that_are_corrected_are_merged_anew(
    finished: tuple[Path, Path], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder, workspace = finished
    experts = []
    for place in PLACES:
        shutil.copytree(published(workspace, place), tmp_path / place)
        experts.append({"name": place, "source": str(tmp_path / place)})
    values = {"base_model": str(folder / "vit"), "experts": experts, "router": {"start": "arrow"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))

    def labels() -> list[str]:
        code, _, error = command("merge", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
        assert code == 0, error
        return list(json.loads((tmp_path / "ws/merged/config.json").read_text())["id2label"].values())

    before = labels()
    place = next(iter(PLACES))
    about = json.loads((tmp_path / place / "expert.json").read_text())
    changed = about | {"labels": about["labels"][::-1]}
    (tmp_path / place / "expert.json").write_text(json.dumps(changed))
    assert labels() == [*before[:4][::-1], *before[4:]]


def test_every_expert_is_judged_by_the_labels_of_all(finished: tuple[Path, Path]) -> None:
    """Against PEFT and transformers alone: the adapter's body, and the rows of all heads."""
    folder, workspace = finished
    heads = [load_file(published(workspace, place) / "adapter_model.safetensors") for place in PLACES]
    weight = torch.cat([head["base_model.model.classifier.weight"] for head in heads]).double()
    bias = torch.cat([head["base_model.model.classifier.bias"] for head in heads]).double()
    results = json.loads((workspace / "evaluation" / "results.json").read_text())["methods"]
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    for expert in recipe["experts"]:
        base = AutoModelForImageClassification.from_pretrained(folder / "vit", num_labels=4)
        alone = PeftModel.from_pretrained(base, str(published(workspace, expert["name"]))).double().eval()
        for other in recipe["experts"]:
            source = DataSource.model_validate(other["client"]["private"])
            held_out = split_held_out(load_rows([source], folder, "x"))[1]
            pixels = load_reader(folder / "vit").pixels([row["image"].convert("RGB") for row in held_out])
            states = alone.vit(torch.from_numpy(np.asarray(pixels)).double()).last_hidden_state[:, 0]
            said = (states @ weight.T + bias).log_softmax(-1)
            own = torch.tensor([JOINED.index(label) for label in held_out["label"]])
            given = results[expert["name"]][other["name"]]
            assert given["loss"] == pytest.approx(-said.gather(1, own[:, None]).mean().item(), abs=1e-4)
            assert given["accuracy"] == pytest.approx((said.argmax(1) == own).double().mean().item())


def test_experts_learn_and_the_unified_model_keeps_it(finished: tuple[Path, Path]) -> None:
    results = json.loads((finished[1] / "evaluation" / "results.json").read_text())
    accuracy = {m: {d: s["accuracy"] for d, s in by_domain.items()} for m, by_domain in results["methods"].items()}
    assert sum(accuracy[place][place] - accuracy["seed"][place] for place in PLACES) > 0.6
    assert results["retention"]["unified"]["mean"] > 0.8


CLASSIFY = """
import json
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1], trust_remote_code=True)
assert type(classify.model).__name__ == "MetaMoeViTForImageClassification", type(classify.model)
print(json.dumps([classify(Image.open(f"{sys.argv[2]}/{i}.png"))[0]["label"] for i in range(6)]))
"""


@torch.no_grad()
def test_a_pipeline_says_the_same_without_the_package(finished: tuple[Path, Path], tmp_path: Path) -> None:
    folder, workspace = finished
    shown = [row for place in PLACES for row in pictures(place, 2, 9)]
    for i, row in enumerate(shown):
        (tmp_path / f"{i}.png").write_bytes(row["picture"])
    pixels = torch.from_numpy(load_reader(folder / "vit").pixels([opened(row["picture"]) for row in shown]))
    said = load_model(workspace / "model").eval()(pixel_values=pixels).logits.argmax(-1).tolist()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(workspace / "model"), str(tmp_path)]
    command = [sys.executable, "-c", WITHOUT_PACKAGE + CLASSIFY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [JOINED[i] for i in said]
    card = (workspace / "model" / "README.md").read_text()
    assert "An image has the label whose row of the head says most" in card
    assert 'pipeline("image-classification", "path/to/this/folder", trust_remote_code=True)' in card


def test_what_a_head_cannot_know_is_one_sentence(
    finished: tuple[Path, Path], command: Callable[..., tuple[int, str, str]]
) -> None:
    folder, workspace = finished
    recipe: dict[str, Any] = yaml.safe_load((folder / "tiny.yaml").read_text())
    sentences = {"selection": {"budget": 5, "relevance": "prompts"}}
    for expert in recipe["experts"]:
        expert["client"]["prompts"] = ["a place"]
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe | sentences))
    code, _, error = command("check", folder / "bad.yaml", "--workspace", folder / "bad")
    assert (code, "base_model is a vit, which reads none" in " ".join(error.split())) == (2, True)
    datasets.Dataset.from_list(pictures("day", 4, 3)).to_parquet(folder / "test.parquet")
    day = recipe["experts"][1]
    recipe["experts"] = [
        {"name": place, "source": str(published(workspace, place)), "license": None} for place in PLACES
    ]
    recipe["experts"][1]["test"] = {**day["client"]["private"], "dataset": "test.parquet", "label": "a {colour} dusk"}
    for expert in recipe["experts"]:
        del expert["license"]
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("run", folder / "bad.yaml", "--workspace", folder / "bad")
    assert (code, "'a blue dusk', which no expert's head knows" in " ".join(error.split())) == (2, True)
    assert set(LABELS) == set(JOINED)
