"""Encoders of texts and of images: adapters as PEFT publishes them become experts; users load the result as ever."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import IMAGES, TINY, VOCAB, WITHOUT_PACKAGE, randomise, sizes_of, tokens
from merging_tools import base_of, merge, read
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_adapters import spoil_what_training_would_change
from tokenizers import processors
from transformers import CLIPImageProcessorPil, PreTrainedModel, ViTImageProcessorPil, pipeline

from mergekit_moe.architectures import ARCHITECTURES
from mergekit_moe.errors import ExpertError
from mergekit_moe.members import add_expert, drop_expert, inspect_model
from mergekit_moe.merging.baselines import merge_densely
from mergekit_moe.merging.unify import merge_experts
from mergekit_moe.models import load_network, recorded_ffn_inputs, recorded_routers
from mergekit_moe.recipe import Merge, Router
from mergekit_moe.seed import train_tokenizer

CLASSES = {
    "BertModel": "bert",
    "CLIPModel": "clip",
    "ModernBertModel": "modernbert",
    "RobertaModel": "roberta",
    "ViTForImageClassification": "vit",
    "ViTModel": "vit",
}
"""Native classes whose checkpoints are merged -> model_type."""
BYTES = 280
"""Tokens of a tokenizer that knows every byte."""
BOTH_TOWERS = {"target_modules": ["fc1", "fc2"], "exclude_modules": None}
OLD_NAMES = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""What ViT's modules are called now -> in checkpoints, and in adapters of older libraries."""


def saved_base(native: str, folder: Path, vocab_size: int = VOCAB) -> Path:
    family = ARCHITECTURES[CLASSES[native]].class_prefix
    texts = {"vocab_size": vocab_size}
    settings = {**sizes_of(family), **texts}
    if family == "CLIP":
        settings = {**sizes_of(family), "text_config": {**sizes_of(family)["text_config"], **texts}}
    if family == "ModernBert":
        settings["mlp_bias"] = False  # as the published one
    torch.manual_seed(0)
    model = getattr(transformers, native)(getattr(transformers, f"{family}Config")(**settings)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return folder


def write_adapter(native: str, base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    targets = ARCHITECTURES[CLASSES[native]].lora_targets
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **settings})
    model = get_peft_model(getattr(transformers, native).from_pretrained(base), config)
    randomise(model, seed)
    model.save_pretrained(folder)
    spoil_what_training_would_change(folder, seed)
    return folder


def merged_by_peft(native: str, base: Path, adapter: Path) -> PreTrainedModel:
    model = getattr(transformers, native).from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload().eval()


@torch.no_grad()
def answer(model: PreTrainedModel, **kwargs: torch.Tensor) -> torch.Tensor:
    """Return logits, or the last hidden state, for two texts or images; of CLIP the images' logits for three texts."""
    model_type = model.config.model_type.removeprefix("metamoe_")
    given: dict[str, torch.Tensor] = {}
    if ARCHITECTURES[model_type].images:
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    if model_type not in ("vit", "clip"):
        given["input_ids"] = tokens()
    if model_type == "clip":
        given["input_ids"] = tokens(3)
    outputs = model(**given, **kwargs)
    return outputs.get("logits_per_image", outputs.get("logits", outputs[0]))


def loaded(folder: Path) -> PreTrainedModel:
    model = load_network(folder).eval().double()
    model.set_experts_implementation("eager")  # the grouped product of whole FFNs knows no float64
    return model


def settings_for(native: str) -> list[dict[str, Any]]:
    targets = ARCHITECTURES[CLASSES[native]].lora_targets
    grid: list[dict[str, Any]] = [{}, {"use_rslora": True, "r": 3}, {"use_dora": True}]
    if native != "ModernBertModel":  # it has no biases
        grid.append({"lora_bias": True})
    if isinstance(targets["target_modules"], list):
        grid.append({"rank_pattern": {targets["target_modules"][0]: 2}})
    return grid


GRID = [(native, settings) for native in CLASSES for settings in settings_for(native)]


@pytest.mark.parametrize(("native", "settings"), GRID, ids=str)
def test_a_pinned_expert_equals_peft_merge_and_unload(tmp_path: Path, native: str, settings: dict[str, Any]) -> None:
    base = saved_base(native, tmp_path / "base")
    adapters = [
        write_adapter(native, base, tmp_path / "0", 1),
        write_adapter(native, base, tmp_path / "1", 2, **settings),
    ]
    model = loaded(merge(base, [read(base, adapter, adapter.name) for adapter in adapters], tmp_path / "moe"))
    answers = [answer(model, forced_expert=torch.tensor([expert] * 2)) for expert in (0, 1)]
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    for given, adapter in zip(answers, adapters, strict=True):
        torch.testing.assert_close(given, answer(merged_by_peft(native, base, adapter)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("native", CLASSES)
def test_identical_experts_equal_the_dense_one_however_they_are_routed(tmp_path: Path, native: str) -> None:
    base = saved_base(native, tmp_path / "base")
    adapter = write_adapter(native, base, tmp_path / "a", 1)
    router = Router(start="random")
    for top_k in (1, 2):
        out = merge(base, [read(base, adapter, name) for name in "ab"], tmp_path / f"{top_k}", router, top_k=top_k)
        expected = answer(merged_by_peft(native, base, adapter))
        torch.testing.assert_close(answer(loaded(out)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("native", CLASSES)
def test_experts_come_and_go_as_if_merged_anew(tmp_path: Path, native: str) -> None:
    base, router = saved_base(native, tmp_path / "base"), Router(start="arrow", context="none")
    adapters = {name: write_adapter(native, base, tmp_path / name, seed) for seed, name in enumerate("abc", 1)}
    experts = [read(base, adapter, name) for name, adapter in adapters.items()]
    three = merge(base, experts, tmp_path / "three", router)
    two = merge(base, experts[:2], tmp_path / "two", router)
    add_expert(two, str(adapters["c"]), tmp_path / "added", name="c", same_base=True, tell=lambda line: None)
    drop_expert(three, "c", tmp_path / "dropped")
    assert weights(tmp_path / "added") == weights(three)
    assert weights(tmp_path / "dropped") == weights(two)
    inside = inspect_model(three)
    assert inside["model_type"] == f"metamoe_{CLASSES[native]}"
    assert [expert["kept"] for expert in inside["experts"]] == ["factored, exact"] * 3


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_vit_checkpoint_and_its_adapters_are_read_by_old_names_and_new(tmp_path: Path) -> None:
    """Adapters that PEFT wrote beside an older transformers, which called the modules as checkpoints still do."""
    base = saved_base("ViTForImageClassification", tmp_path / "base")
    assert "vit.encoder.layer.0.intermediate.dense.weight" in load_file(base / "model.safetensors")
    targets = {"target_modules": ["fc1", "fc2", "q_proj"], "alpha_pattern": {"fc1": 3}}
    new = write_adapter("ViTForImageClassification", base, tmp_path / "new", 1, **targets)
    config = json.loads((new / "adapter_config.json").read_text())
    config["target_modules"], config["alpha_pattern"] = ["dense", "query"], {"intermediate.dense": 3}
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text(json.dumps(config))
    renamed = load_file(new / "adapter_model.safetensors")
    for now, then in OLD_NAMES.items():
        renamed = {name.replace(now, then): tensor for name, tensor in renamed.items()}
    save_file(renamed, old / "adapter_model.safetensors")
    given, expected = read(base, old).updates, read(base, new).updates
    assert given.keys() == expected.keys()
    assert "vit.layers.2.attention.q_proj.weight" in given
    own = base_of(base).weights
    for name in given:
        assert torch.equal(given[name].apply(own.read(name)), expected[name].apply(own.read(name)))


def with_labels(folder: Path, *labels: str) -> Path:
    (folder / "expert.json").write_text(json.dumps({"labels": labels}))
    return folder


def classifiers(folder: Path, native: str) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """Write a ViT seed, with a head of its own or without, and adapters with heads over their own labels."""
    base = saved_base(native, folder / "base")
    labels = {"pets": ("cat", "dog", "bird"), "farm": ("cow", "dog")}
    for seed, (name, own) in enumerate(labels.items(), 1):
        seeded = transformers.ViTForImageClassification.from_pretrained(
            base, num_labels=len(own), ignore_mismatched_sizes=True
        )
        seeded.save_pretrained(folder / f"{name}-seed")
        head = {"modules_to_save": ["classifier"]}
        write_adapter("ViTForImageClassification", folder / f"{name}-seed", folder / name, seed, **head)
        with_labels(folder / name, *own)
    return base, labels


@pytest.mark.parametrize("native", ["ViTModel", "ViTForImageClassification"])
def test_heads_are_joined_label_by_label(tmp_path: Path, native: str) -> None:
    """In the order of the experts; what two of them know is the mean of both."""
    base, labels = classifiers(tmp_path, native)
    moe = merge(base, [read(base, tmp_path / name, name) for name in labels], tmp_path / "moe")
    model = loaded(moe)
    assert list(model.config.id2label.values()) == ["cat", "dog", "bird", "cow"]
    rows = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in labels}
    pets, farm = (rows[name]["base_model.model.classifier.weight"].double() for name in labels)
    expected = torch.stack([pets[0], (pets[1] + farm[1]) / 2, pets[2], farm[0]])
    torch.testing.assert_close(model.classifier.weight.data, expected, atol=1e-7, rtol=0)
    for expert, (name, places) in enumerate({"pets": [0, 2], "farm": [0]}.items()):
        alone = answer(merged_by_peft("ViTForImageClassification", tmp_path / f"{name}-seed", tmp_path / name))
        given = answer(model, forced_expert=torch.tensor([expert, expert]))
        columns = [list(model.config.id2label.values()).index(labels[name][place]) for place in places]
        torch.testing.assert_close(given[:, columns], alone[:, places], atol=1e-6, rtol=0)
    with pytest.raises(ExpertError, match=r"the head of .* joins the labels of all its experts; merge again"):
        drop_expert(moe, "pets", tmp_path / "dropped")


def test_a_soup_of_classifiers_answers_all_labels(tmp_path: Path) -> None:
    base, labels = classifiers(tmp_path, "ViTModel")
    (tmp_path / "soup").mkdir()
    experts = [read(base, tmp_path / name, name) for name in labels]
    merge_densely(base_of(base), experts, Merge(method="soup"), out=tmp_path / "soup")
    model, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "soup", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert list(model.config.id2label.values()) == ["cat", "dog", "bird", "cow"]
    mean = (load_file(base / "model.safetensors")["encoder.layer.0.intermediate.dense.weight"]).double()
    for expert in experts:
        mean += expert.updates["vit.layers.0.mlp.fc1.weight"].difference(torch.zeros_like(mean)) / 2
    torch.testing.assert_close(model.vit.layers[0].mlp.fc1.weight.data.double(), mean, atol=1e-6, rtol=0)


def test_a_fine_tuned_classifier_brings_its_head(tmp_path: Path) -> None:
    base, _ = classifiers(tmp_path, "ViTModel")
    tuned = transformers.ViTForImageClassification.from_pretrained(base, num_labels=2)
    randomise(tuned, 5)
    tuned.save_pretrained(tmp_path / "tuned")
    with_labels(tmp_path / "tuned", "rose", "tulip")
    experts = [read(base, tmp_path / name, name) for name in ("pets", "tuned")]
    model = loaded(merge(base, experts, tmp_path / "moe", other_weights="base"))
    assert torch.equal(model.classifier.weight.data[3:], tuned.classifier.weight.data.double())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"it trained a head of 3 labels, the base has 2, and nothing says which they are"),
        (["cat", "dog"], r"its 2 labels need classifier.weight of shape \[2, 32\], and it has \[3, 32\]"),
        (["cat", "cat", "dog"], r"expert.json has labels = \['cat', 'cat', 'dog'\]; it must be a list of different"),
        ("cat", r"expert.json has labels = 'cat'; it must be a list of different names"),
    ],
)
def test_a_head_whose_labels_are_not_told_is_refused(tmp_path: Path, labels: Any, message: str) -> None:
    base, _ = classifiers(tmp_path, "ViTForImageClassification")
    (tmp_path / "pets" / "expert.json").write_text(json.dumps({} if labels is None else {"labels": labels}))
    with pytest.raises(ExpertError, match=message):
        read(base, tmp_path / "pets", "pets")


def test_experts_with_a_head_and_without_do_not_mix(tmp_path: Path) -> None:
    base, _ = classifiers(tmp_path, "ViTModel")
    plain = write_adapter("ViTModel", base, tmp_path / "plain", 3)
    with pytest.raises(ExpertError, match="expert 'plain': it has no head of its own, and 'pets' has one"):
        merge(base, [read(base, tmp_path / "pets", "pets"), read(base, plain, "plain")], tmp_path / "moe")


def test_a_fine_tune_of_either_tower_of_clip_is_told_apart(tmp_path: Path) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    plain = read(base, write_adapter("CLIPModel", base, tmp_path / "plain", 1), "plain")
    tuned = transformers.CLIPModel.from_pretrained(base)
    for name, parameter in tuned.named_parameters():
        if ".mlp." in name and name.startswith("vision_model"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tuned.save_pretrained(tmp_path / "tuned")
    model = loaded(
        merge(base, [plain, read(base, tmp_path / "tuned", "tuned")], tmp_path / "moe", other_weights="refuse")
    )
    given = answer(model, forced_expert=torch.tensor([1, 1]))
    torch.testing.assert_close(given, answer(tuned.double().eval()), atol=1e-6, rtol=0)
    wider = transformers.CLIPConfig(**{**sizes_of("CLIP"), "vision_config": {**TINY, **IMAGES, "patch_size": 8}})
    transformers.CLIPModel(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(ExpertError, match=r"vision_config.patch_size 8 against 4"):
        read(base, tmp_path / "wider", "wider")


def test_what_an_adapter_does_to_the_text_tower_is_told_and_left_out(tmp_path: Path) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    both = write_adapter("CLIPModel", base, tmp_path / "both", 1, **BOTH_TOWERS)
    expert, told = read(base, both, "both"), []
    (tmp_path / "moe").mkdir()
    merge_experts(base_of(base), [expert] * 2, Merge(), Router(), out=tmp_path / "moe", tell=told.append)
    (line,) = {line for line in told if "outside the FFNs" in line}
    assert line.startswith(
        "expert 'both': changes outside the FFNs, left out: text_model.encoder.layers.*.mlp.fc1.weight (3 tensors"
    )
    assert "vision_model" not in line
    before, after = (
        model.get_text_features(input_ids=tokens()).pooler_output
        for model in (transformers.CLIPModel.from_pretrained(base), load_network(tmp_path / "moe"))
    )
    assert torch.equal(before, after)
    with pytest.raises(ExpertError, match=r"it changed weights outside the FFNs, and merge.other_weights is refuse"):
        merge(base, [expert] * 2, tmp_path / "refused", other_weights="refuse")


def test_an_adapter_of_the_text_tower_alone_is_refused(tmp_path: Path) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    texts = write_adapter("CLIPModel", base, tmp_path / "a", 1, target_modules=r"text_model.*\.fc[12]")
    with pytest.raises(ExpertError, match="expert 'law': it changes no FFN of the image tower"):
        merge(base, [read(base, texts)] * 2, tmp_path / "moe")


def test_an_adapter_that_lacks_a_layer_of_the_image_tower_is_refused(tmp_path: Path) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    adapter = write_adapter("CLIPModel", base, tmp_path / "a", 1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.2." not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ExpertError, match=r"lacks base_model.model.vision_model.encoder.layers.2.mlp.fc1.lora_A.weight"
    ):
        read(base, adapter)


def test_sizes_that_a_config_leaves_out_are_the_library_s_own(tmp_path: Path) -> None:
    """As configs of the base size do that were written as differences from the default."""
    base = saved_base("CLIPModel", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"] = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExpertError, match=r"has shape \[48, 32\] where config.json says \[3072, 768\]"):
        base_of(base)
    config["vision_config"]["num_hidden_layers"] = "many"
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExpertError, match=r"config.json has vision_config.num_hidden_layers = 'many'"):
        base_of(base)


def test_the_text_tower_s_ffns_are_not_looked_at(tmp_path: Path) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    experts = [read(base, write_adapter("CLIPModel", base, tmp_path / str(seed), seed), f"e{seed}") for seed in (1, 2)]
    pictures, seed = torch.randn(5, 3, 16, 16), load_network(base)
    model = load_network(merge(base, experts, tmp_path / "moe", Router(start="random")))
    with recorded_ffn_inputs(seed) as inputs, recorded_routers(model) as calls, torch.no_grad():
        seed(pixel_values=pictures, input_ids=tokens(3))
        model(pixel_values=pictures, input_ids=tokens(3))
    assert [tuple(hidden.shape) for hidden in inputs] == [(5, 17, 32)] * 3
    assert [tuple(call.logits.shape) for call in calls] == [(5, 17, 2)] * 3
    assert model.config.sized.hidden_size == 32


USES = """
import json, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForImageClassification, pipeline
folder = Path(sys.argv[1])
pictures = [Image.open(file) for file in sorted(folder.glob("*.png"))]
models = {
    "clip": AutoModel.from_pretrained(folder / "clip", trust_remote_code=True),
    "vit": AutoModelForImageClassification.from_pretrained(folder / "vit", trust_remote_code=True),
}
assert all("transformers_modules" in type(model).__module__ for model in models.values())
zero_shot = pipeline("zero-shot-image-classification", str(folder / "clip"), trust_remote_code=True)
classifier = pipeline("image-classification", str(folder / "vit"), trust_remote_code=True)
said = {"clip": zero_shot(pictures, candidate_labels=["cat", "dog"]), "vit": classifier(pictures)}
(folder / "said.json").write_text(json.dumps(said))
vectors = {
    name: torch.tensor(SentenceTransformer(str(folder / name), trust_remote_code=True).encode(["a photo", "of a cat"]))
    for name in ("modernbert", "roberta")
}
save_file(vectors, folder / "vectors.safetensors")
"""


def with_tokenizer(base: Path) -> Path:
    """Give a base of sentence-transformers' or of CLIP's kind its tokenizer, which ends a text as theirs do."""
    tokenizer = train_tokenizer(["a photo of a cat and a dog"], BYTES - 1)
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # the last number, by which CLIP finds it
    special = [("<s>", 1), ("<end>", tokenizer.eos_token_id)]
    frame = processors.TemplateProcessing(single="<s> $A <end>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def used_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged models of four families, used in a process that can't import mergekit_moe."""
    folder = tmp_path_factory.mktemp("encoders")
    for shape in ("linear", "radial"):
        picture = getattr(Image, f"{shape}_gradient")("L").resize((30, 20)).convert("RGB")
        picture.save(folder / f"{shape}.png")
    for native in ("CLIPModel", "ViTForImageClassification", "RobertaModel", "ModernBertModel"):
        name = CLASSES[native]
        base = saved_base(native, folder / f"{name}-base", BYTES)
        if name != "vit":
            with_tokenizer(base)
        if name == "clip":
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(base)
        elif name == "vit":
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(base)
        else:
            whole = SentenceTransformer(modules=[Transformer(str(base)), Pooling(32, pooling_mode="mean")])
            whole.save(str(base))
        adapters = [write_adapter(native, base, folder / f"{name}-{seed}", seed) for seed in (1, 2)]
        merge(base, [read(base, a, a.name) for a in adapters], folder / name, Router(start="random"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + USES, folder],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("name", "task", "labels"),
    [
        ("clip", "zero-shot-image-classification", {"candidate_labels": ["cat", "dog"]}),
        ("vit", "image-classification", {}),
    ],
)
def test_pipelines_classify_images_without_the_package(
    used_elsewhere: Path, name: str, task: str, labels: dict[str, list[str]]
) -> None:
    pictures = [Image.open(file) for file in sorted(used_elsewhere.glob("*.png"))]
    expected = pipeline(task, str(used_elsewhere / name))(pictures, **labels)
    said = json.loads((used_elsewhere / "said.json").read_text())[name]
    assert said == expected
    assert len({answer["score"] for answers in said for answer in answers}) > 2


@pytest.mark.parametrize("name", ["modernbert", "roberta"])
def test_sentence_transformers_embed_texts_without_the_package(used_elsewhere: Path, name: str) -> None:
    given = load_file(used_elsewhere / "vectors.safetensors")[name]
    model = SentenceTransformer(str(used_elsewhere / name))
    assert type(model[0].model).__name__.startswith("MetaMoe")
    assert torch.equal(given, torch.tensor(model.encode(["a photo", "of a cat"])))


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_the_image_processor_is_copied_byte_for_byte(used_elsewhere: Path, name: str) -> None:
    files = [used_elsewhere / folder / "preprocessor_config.json" for folder in (f"{name}-base", name)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_command_says_what_is_wrong_with_an_adapter_of_the_text_tower(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    base = saved_base("CLIPModel", tmp_path / "base")
    write_adapter("CLIPModel", base, tmp_path / "image", 1)
    write_adapter("CLIPModel", base, tmp_path / "text", 2, target_modules=r"text_model.*\.fc[12]")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: ./base\nexperts:\n  - {name: pets, source: ./image}\n  - {name: law, source: ./text}\n"
        "router: {start: random}\ncard: {license: mit}\n"
    )
    code, _, error = command("merge", recipe, "--workspace", tmp_path / "ws")
    assert code == 2
    assert "expert 'law': it changes no FFN of the image tower" in " ".join(error.split())
