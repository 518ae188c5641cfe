"""Tiny models and data that every test builds for itself: nothing is downloaded."""

import atexit
import os
import shutil
import tempfile

# Before any Hugging Face import: a test that reaches for the network is a wrong test.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)  # a developer's own is nobody's business, and no loopback Hub knows it
# A home of the tests' own, so that what a stage leaves outside its workspace can be seen and goes away.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mergekit_moe-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny products, here and in the processes that tests start: a second thread costs more than it does.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mergekit_moe import cli
from mergekit_moe.modeling import DECODERS, ENCODERS, config_class, model_class
from mergekit_moe.seed import train_tokenizer

BOS, PAD, VOCAB = 1, 0, 97
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
# What a family needs beside TINY; windows are shorter than the tests' texts, so that they matter.
IMAGES = {"image_size": 16, "patch_size": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "CLIP": {"projection_dim": 16, "vision_config": {**TINY, **IMAGES}, "text_config": {**TINY, "eos_token_id": 2}},
    "CLIPVision": IMAGES,
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 6},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2, "mlp_bias": True},
    "Qwen3": {"head_dim": 8},
    "ViT": IMAGES,
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("fc1", "fc2")
FFN = {
    "Bert": ("intermediate.dense", "output.dense"),
    "CLIP": PLAIN,
    "CLIPVision": PLAIN,
    "GPTNeoX": ("dense_h_to_4h", "dense_4h_to_h"),
    "ModernBert": ("Wi", "Wo"),
    "Phi": PLAIN,
    "Phi3": ("gate_up_proj", "down_proj"),
    "Roberta": ("intermediate.dense", "output.dense"),
    "Starcoder2": ("c_fc", "c_proj"),
    "ViT": PLAIN,
}

WITHOUT_PACKAGE = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mergekit_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Forbidden())
"""
"""Begins a script for a process that can't import mergekit_moe."""


@pytest.fixture(params=DECODERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> str:
    return request.param


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give routers and LoRA factors values that matter; blank ones would let wrong code pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at zero, where one that is lost would go unnoticed.
            if "router" in name or ".experts." in name or "lora_" in name or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def sizes_of(family: str) -> dict[str, Any]:
    """Return the settings of a tiny configuration; a model of two towers has them in its parts."""
    special = SPECIAL.get(family, {})
    return special if "vision_config" in special else {**TINY, **special}


def tiny_moe(family: str, ranks: tuple[int | None, ...] = (2, 4, 3), **settings: Any) -> transformers.PreTrainedModel:
    """Return a random MoE of `family`, an expert for each rank (0: without any difference; None: dense)."""
    projections = FFN.get(family, PROJECTIONS)
    experts = [
        {"name": f"e{i}", "kind": "dense"}
        if rank is None
        else {"name": f"e{i}", "scale": 1.5, "ranks": dict.fromkeys(projections, rank) if rank else {}}
        for i, rank in enumerate(ranks)
    ]
    settings = {"router_excluded_token_ids": [BOS], **settings}
    torch.manual_seed(0)
    config = config_class(family)(**{**sizes_of(family), "experts": experts, **settings})
    model = model_class(family, "ForCausalLM" if family in DECODERS else "Model")(config).eval()
    randomise(model)
    return model


def tiny_dense(family: str = "Llama", seed: int = 0, **settings: Any) -> transformers.PreTrainedModel:
    """Return a random model of `family` without experts: the native class."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**sizes_of(family), **settings})
    head = "ForCausalLM" if family in DECODERS else "Model"
    return getattr(transformers, f"{family}{head}".replace("3TextFor", "3For"))(config).eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Return random (batch, length) ids that start with BOS."""
    ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A dense Llama with a tokenizer, saved as anybody would save it."""
    folder = tmp_path / "base"
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog 0123456789"] * 3, 300)
    tiny_dense(vocab_size=len(tokenizer), eos_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """Save a random LoRA adapter of the base in `folder`, by PEFT itself."""
    torch.manual_seed(seed)
    plain = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS)}
    config = LoraConfig(**{**plain, **settings})
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metamoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        output = capsys.readouterr()
        return int(leaving.value.code or 0), output.out, output.err

    return run
