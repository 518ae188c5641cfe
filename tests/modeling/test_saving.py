"""Saved by anybody's hand, loaded in a fresh process without the package; and what users do with it then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DECODERS, ENCODERS, WITHOUT_PACKAGE, tiny_moe, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_encoders import VISION, inputs
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from mergekit_moe.models import routers_of

LOAD_ALL = """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto = AutoModelForCausalLM if (folder / "decoder").exists() else AutoModel
    model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert "transformers_modules" in type(model).__module__
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        outputs = model.eval()(**load_file(folder / "inputs"))
    save_file({"outputs": outputs[0].contiguous()}, folder / "outputs")
"""


@torch.no_grad()
def first(model: torch.nn.Module, **kwargs: torch.Tensor) -> torch.Tensor:
    """Return logits, or an encoder's last hidden state."""
    return model(**(kwargs or {"input_ids": tokens()}))[0].contiguous()


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family, saved here and loaded in one process that can't import mergekit_moe."""
    folder = tmp_path_factory.mktemp("families")
    for name in (*DECODERS, *ENCODERS):
        model = tiny_moe(name, (2, None, 0, 3))
        model.save_pretrained(folder / name)
        save_file(inputs(name), folder / name / "inputs")
        if name in DECODERS:
            (folder / name / "decoder").touch()
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + LOAD_ALL, folder],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_it_loads_without_the_package_with_equal_outputs(name: str, loaded_elsewhere: Path) -> None:
    model = tiny_moe(name, (2, None, 0, 3))
    given = load_file(loaded_elsewhere / name / "outputs")["outputs"]
    assert torch.equal(given, first(model, **inputs(name)))


def save_and_load(model: PreTrainedModel, folder: Path, **settings: object) -> PreTrainedModel:
    auto = AutoModelForCausalLM if "CausalLM" in type(model).__name__ else AutoModel
    return auto.from_pretrained(folder, **settings).eval()


@pytest.mark.parametrize("settings", [{}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str)
def test_shards_load_as_one(settings: dict[str, object], tmp_path: Path) -> None:
    model = tiny_moe("Qwen3", (2, None, 3))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = save_and_load(model, tmp_path, **settings)
    assert torch.equal(first(loaded), first(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    model = tiny_moe("Llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = save_and_load(model, tmp_path)
    same = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert same is tied
    assert torch.equal(first(loaded), first(model))


def test_on_the_meta_device_nothing_is_allocated() -> None:
    config = tiny_moe("Llama", (2, None)).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_half_precision_keeps_routers_whole(tmp_path: Path) -> None:
    model = tiny_moe("Llama", (2, None))
    model.save_pretrained(tmp_path)
    half = save_and_load(model, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for router in routers_of(half) for p in router.parameters()} == {torch.float32}
    assert half.model.layers[0].mlp.experts["dense"].down_proj.dtype == torch.bfloat16
    assert first(half).isfinite().all()


def test_new_tokens_can_be_added() -> None:
    model = tiny_moe("Llama")
    before = first(model)
    model.resize_token_embeddings(105, mean_resizing=False)
    torch.testing.assert_close(first(model)[..., :97], before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("ranks", [(2, 3), (2, None)], ids=str)
def test_an_adapter_on_top_trains_and_comes_back(
    targets: str | list[str], ranks: tuple[int | None, ...], tmp_path: Path
) -> None:
    given = {"input_ids": tokens(), "labels": tokens()}
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    assert_trains_and_comes_back("Llama", ranks, config, given, tmp_path, lr=5.0)


@pytest.mark.parametrize("ranks", [(2, 3), (2, None)], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_adapter_on_an_encoder_trains_and_comes_back(
    name: str, ranks: tuple[int | None, ...], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    assert_trains_and_comes_back(name, ranks, config, inputs(name), tmp_path, lr=0.1)


def assert_trains_and_comes_back(
    name: str,
    ranks: tuple[int | None, ...],
    config: LoraConfig,
    given: dict[str, torch.Tensor],
    folder: Path,
    lr: float,
) -> None:
    read = {key: value for key, value in given.items() if key != "labels"}
    model = tiny_moe(name, ranks)
    frozen = {key: p.clone() for key, p in model.named_parameters()}
    adapted = get_peft_model(model, config)
    trainable = {key for key, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=lr)
    for _ in range(2):
        outputs = adapted(**given)
        (outputs.loss if "labels" in given else outputs[0][..., 0].sum()).backward()
        optimizer.step()
    assert trainable
    assert all("lora_" in key for key in trainable)
    for key, parameter in adapted.get_base_model().named_parameters():
        if (key := key.replace(".base_layer", "")) in frozen:
            assert torch.equal(parameter, frozen[key]), key
    adapted.eval().save_pretrained(folder)
    again = PeftModel.from_pretrained(tiny_moe(name, ranks), folder).eval()
    expected = first(adapted, **read)
    assert torch.equal(first(again, **read), expected)
    assert (expected - first(tiny_moe(name, ranks), **read)).abs().max() > 1e-4


def test_a_step_changes_what_should_train_and_nothing_else(family: str) -> None:
    for routers_only in (False, True):
        moe = tiny_moe(family, (2, None, 3), num_experts_per_tok=3).train()  # so that every expert has tokens
        if routers_only:
            moe.requires_grad_(False)
            for router in routers_of(moe):
                router.requires_grad_(True)
        before = {name: p.clone() for name, p in moe.named_parameters()}
        moe(tokens(4, 16), labels=tokens(4, 16)).loss.backward()
        torch.optim.SGD([p for p in moe.parameters() if p.requires_grad], lr=1.0).step()
        changed = {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if not routers_only or ".router." in name}


def test_images_and_texts_are_both_among_the_encoders() -> None:
    assert set(VISION) < set(ENCODERS)


def test_pipeline_writes_what_generate_writes(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    moe = tiny_moe("Llama", (2, None, 3), vocab_size=len(tokenizer))
    moe.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    writer = pipeline("text-generation", str(tmp_path / "moe"))
    given = writer("the quick brown", max_new_tokens=8, do_sample=False, return_tensors=True)
    ids = tokenizer("the quick brown", return_tensors="pt")
    assert given[0]["generated_token_ids"] == moe.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
