"""Bad input to `metamoe merge`: one sentence that names the expert, the file and the field; exit code 2; nothing left.

The first part is the second table of the peers' failures, row by row.
"""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import VOCAB, tiny_dense, write_adapter
from safetensors.torch import load_file, save_file
from test_fine_tunes import fine_tune
from transformers import AutoModelForCausalLM

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.checkpoint import INDEX, WEIGHTS

Run = Callable[..., tuple[int, str, str]]
SHARD = "model-00001-of-00001.safetensors"


class Bench:
    """A folder with a base, an adapter `law` and a fine-tune `tuned` of it, and a recipe that merges them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.law = write_adapter(base, folder / "law", 1)
        self.tuned = fine_tune(base, folder / "tuned", 2)
        self.recipe: dict[str, Any] = {
            "base_model": "base",
            "experts": [{"name": "law", "source": "law"}, {"name": "tuned", "source": "tuned"}],
            "router": {"start": "random"},
        }

    def write(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def edit(self, folder: Path, file: str = "config.json", **fields: Any) -> None:
        """Set fields of a JSON file; None takes one out."""
        values = {**json.loads((folder / file).read_text()), **fields}
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    def change(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> None:
        """Change a file's tensors."""
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    def shard(self, folder: Path) -> None:
        """Save a model in many shards."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size="20KB")

    def other(self, name: str, **settings: Any) -> Path:
        """Put a model of other sizes in an expert's place."""
        shutil.rmtree(self.folder / name)
        tiny_dense(**{"vocab_size": 300, "eos_token_id": 2, **settings}).save_pretrained(self.folder / name)
        return self.folder / name


def index(bench: Bench, text: str) -> None:
    """Give the fine-tune an index of one's own, over its only shard."""
    (bench.tuned / WEIGHTS).rename(bench.tuned / SHARD)
    (bench.tuned / INDEX).write_text(text)


def header(path: Path, fields: Any, size: int = 0) -> None:
    """Write a safetensors file with a header of one's own."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = float("inf")


def _deeper_adapter(bench: Bench) -> None:
    deep = bench.folder / "deep"
    tiny_dense(num_hidden_layers=4, vocab_size=300, eos_token_id=2).save_pretrained(deep)
    shutil.rmtree(bench.law)
    write_adapter(deep, bench.law, 1)


def _missing_shard(bench: Bench) -> None:
    bench.shard(bench.tuned)
    sorted(bench.tuned.glob("model-*.safetensors"))[1].unlink()


def _truncated_shard(bench: Bench) -> None:
    bench.shard(bench.tuned)
    shard = sorted(bench.tuned.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def _everyone_s_intermediate_size(bench: Bench) -> None:
    other = bench.other("tuned", intermediate_size=64)
    shutil.rmtree(bench.law)
    write_adapter(other, bench.law, 1)


def _recipe(**fields: Any) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        bench.recipe.update(fields)

    return change


def _occupied(bench: Bench) -> None:
    (bench.folder / "ws" / "merged").mkdir(parents=True)
    (bench.folder / "ws" / "merged" / "stale.safetensors").write_text("mine")


PEERS: list[tuple[str, Callable[[Bench], Any], list[str]]] = [
    (
        "vocabulary",
        lambda b: b.other("tuned", vocab_size=VOCAB),
        ["expert 'tuned'", "config.json", "vocab_size 97 against 300"],
    ),
    (
        "hidden size",
        lambda b: b.other("tuned", hidden_size=64),
        ["expert 'tuned'", "config.json", "hidden_size 64 against 32"],
    ),
    (
        "intermediate size",
        lambda b: b.other("tuned", intermediate_size=64),
        ["expert 'tuned'", "config.json", "intermediate_size 64 against 48"],
    ),
    (
        "intermediate size of all",
        _everyone_s_intermediate_size,
        [
            "expert 'law'",
            "intermediate_size 64, the recipe's base has 48",
            "expert 'tuned'",
            "intermediate_size 64 against",
        ],
    ),
    (
        "deeper model",
        lambda b: b.other("tuned", num_hidden_layers=4),
        ["expert 'tuned'", "config.json", "num_hidden_layers 4 against 3"],
    ),
    ("deeper adapter", _deeper_adapter, ["expert 'law'", ADAPTER, "model.layers.3.mlp"]),
    ("shard missing", _missing_shard, ["expert 'tuned'", "model-00002-of-", "is missing"]),
    ("shard truncated", _truncated_shard, ["expert 'tuned'", "model-00002-of-", "where its header promises"]),
    (
        "NaN",
        lambda b: b.change(b.tuned, _nan),
        ["expert 'tuned'", "model.layers.1.mlp.up_proj.weight holds NaN", WEIGHTS],
    ),
    (
        "changed attention",
        lambda b: (
            shutil.rmtree(b.tuned),
            fine_tune(b.base, b.tuned, 3, others=True),
            _recipe(merge={"other_weights": "refuse"})(b),
        ),
        ["expert 'tuned'", "merge.other_weights is refuse", "model.layers.*.self_attn.q_proj.weight (3 tensors"],
    ),
    ("gate mode", _recipe(router={"start": "hiden"}), ["router.start", "'lda'", "'arrow'", "got 'hiden'"]),
    ("dtype", _recipe(merge={"dtype": "bf16"}), ["merge.dtype", "'bfloat16'", "got 'bf16'"]),
    ("misspelled", _recipe(merge={"topk": 2}), ["merge", "unknown key 'topk'; did you mean 'top_k'?"]),
    ("output folder not empty", _occupied, ["merged is not empty and was not made by mergekit_moe"]),
]

MORE: list[tuple[str, Callable[[Bench], Any], list[str]]] = [
    (
        "infinity in the base",
        lambda b: b.change(b.base, _infinite),
        ["base_model", "layers.2.self_attn.v_proj.weight holds"],
    ),
    (
        "pickle as safetensors",
        lambda b: torch.save({}, b.law / ADAPTER),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "pickle only",
        lambda b: ((b.tuned / WEIGHTS).unlink(), torch.save({}, b.tuned / "pytorch_model.bin")),
        ["expert 'tuned'", "pytorch_model.bin is not read, since pickles can run code"],
    ),
    (
        "header bomb",
        lambda b: (b.law / ADAPTER).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "no header",
        lambda b: (b.law / ADAPTER).write_bytes(b"\0" * 8),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    ("empty file", lambda b: (b.law / ADAPTER).write_bytes(b""), ["expert 'law'", ADAPTER, "not a safetensors file"]),
    (
        "deeply nested header",
        lambda b: header(b.law / ADAPTER, b"[" * 100_000),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "tensors that overlap",
        lambda b: header(
            b.law / ADAPTER, {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}, 8
        ),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "a shape that isn't its bytes",
        lambda b: header(b.law / ADAPTER, {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "unknown type",
        lambda b: header(b.law / ADAPTER, {"a": {"dtype": "F12", "shape": [2], "data_offsets": [0, 3]}}, 3),
        ["expert 'law'", ADAPTER, "not a safetensors file"],
    ),
    (
        "bytes after the last tensor",
        lambda b: (b.tuned / WEIGHTS).write_bytes((b.tuned / WEIGHTS).read_bytes() + b"?"),
        ["expert 'tuned'", WEIGHTS, "where its header promises"],
    ),
    (
        "float8",
        lambda b: b.change(b.tuned, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()})),
        ["expert 'tuned'", WEIGHTS, "as F8_E4M3, which can't be merged"],
    ),
    (
        "a shard outside",
        lambda b: index(b, json.dumps({"weight_map": {"a": "../base/model.safetensors"}})),
        ["expert 'tuned'", INDEX, "'../base/model.safetensors', which is not a plain file name"],
    ),
    (
        "a shard by its absolute path",
        lambda b: index(b, json.dumps({"weight_map": {"a": "/etc/passwd"}})),
        ["expert 'tuned'", INDEX, "'/etc/passwd', which is not a plain file name"],
    ),
    (
        "an index that names a missing tensor",
        lambda b: index(b, json.dumps({"weight_map": {"a": SHARD}})),
        ["expert 'tuned'", f"{INDEX} puts a in {SHARD}, which doesn't have it"],
    ),
    (
        "an index that is a list",
        lambda b: index(b, "[]"),
        ["expert 'tuned'", INDEX, "not a JSON object"],
    ),
    (
        "an index without a map",
        lambda b: index(b, '{"weight_map": ["a"]}'),
        ["expert 'tuned'", INDEX, "has no weight_map"],
    ),
    (
        "a link out of the folder",
        lambda b: (
            shutil.move(b.tuned / WEIGHTS, b.folder / "elsewhere.safetensors"),
            (b.tuned / WEIGHTS).symlink_to(b.folder / "elsewhere.safetensors"),
        ),
        ["expert 'tuned'", WEIGHTS, "is a link out of its folder"],
    ),
    (
        "no config",
        lambda b: (b.tuned / "config.json").unlink(),
        ["expert 'tuned'", "has neither adapter_config.json, of an adapter, nor config.json"],
    ),
    (
        "broken JSON",
        lambda b: (b.tuned / "config.json").write_text("{"),
        ["expert 'tuned'", "config.json is not valid JSON"],
    ),
    (
        "a list as config",
        lambda b: (b.base / "config.json").write_text("[]"),
        ["base_model", "config.json is not a JSON object"],
    ),
    (
        "an unknown family",
        lambda b: b.edit(b.base, model_type="bloom"),
        ["base_model", "model_type is 'bloom'; supported are"],
    ),
    (
        "another family",
        lambda b: b.edit(b.tuned, model_type="mistral"),
        ["expert 'tuned'", "config.json", "model_type 'mistral' against 'llama'"],
    ),
    (
        "a quantised expert",
        lambda b: b.edit(b.tuned, quantization_config={"bits": 4}),
        ["expert 'tuned'", "config.json has a quantization_config"],
    ),
    (
        "a quantised base",
        lambda b: b.edit(b.base, quantization_config={"bits": 4}),
        ["base_model", "config.json has a quantization_config"],
    ),
    (
        "other rotary embeddings",
        lambda b: b.edit(b.tuned, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        ["expert 'tuned'", "config.json", "rope_parameters {'rope_theta': 500000.0"],
    ),
    (
        "another norm",
        lambda b: b.edit(b.tuned, rms_norm_eps=1e-3),
        ["expert 'tuned'", "config.json", "rms_norm_eps 0.001 against 1e-06"],
    ),
    (
        "a config that its weights don't have",
        lambda b: b.edit(b.base, num_hidden_layers=5),
        ["base_model", "lacks model.layers.3.mlp.gate_proj.weight"],
    ),
    (
        "a config of other sizes than its weights",
        lambda b: b.edit(b.base, intermediate_size=50),
        ["base_model", "model.layers.0.mlp.gate_proj.weight has shape [48, 32] where config.json says [50, 32]"],
    ),
    (
        "a tensor too few",
        lambda b: b.change(b.tuned, lambda t: t.pop("model.norm.weight")),
        ["expert 'tuned'", "lacks model.norm.weight"],
    ),
    (
        "a tensor too many",
        lambda b: b.change(b.tuned, lambda t: t.update(extra=torch.zeros(2))),
        ["expert 'tuned'", "holds extra, which the base doesn't have"],
    ),
    (
        "a tensor of another size",
        lambda b: b.change(b.tuned, lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
        ["expert 'tuned'", "model.norm.weight has shape [31], the base's has [32]"],
    ),
    (
        "another tokenizer",
        lambda b: (b.tuned / "tokenizer.json").write_text(
            (b.base / "tokenizer.json").read_text().replace('"the"', '"eht"')
        ),
        ["expert 'tuned'", "tokenizer.json gives 1 of the base's", "another number or none, the first of them 'the'"],
    ),
    (
        "not LoRA",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, peft_type="IA3"),
        ["expert 'law'", ADAPTER_CONFIG, "peft_type 'IA3'"],
    ),
    (
        "a variant",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, alora_invocation_tokens=[1]),
        ["expert 'law'", ADAPTER_CONFIG, "alora_invocation_tokens = [1], a variant of LoRA"],
    ),
    (
        "a base-mutating start",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, init_lora_weights="pissa_niter_4"),
        ["expert 'law'", ADAPTER_CONFIG, "init_lora_weights = 'pissa_niter_4'"],
    ),
    (
        "alpha in words",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, lora_alpha="16"),
        ["expert 'law'", "lora_alpha = '16'; it must"],
    ),
    (
        "a pattern that is none",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, alpha_pattern={"(": 3}),
        ["expert 'law'", ADAPTER_CONFIG, "alpha_pattern '(', no regular expression"],
    ),
    (
        "DoRA without magnitudes",
        lambda b: b.edit(b.law, ADAPTER_CONFIG, use_dora=True),
        ["expert 'law'", ADAPTER, "lora_magnitude_vector, which DoRA needs"],
    ),
    (
        "A without B",
        lambda b: b.change(
            b.law, lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"), ADAPTER
        ),
        ["expert 'law'", ADAPTER, "lacks base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"],
    ),
    (
        "ranks that don't meet",
        lambda b: b.change(
            b.law,
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.zeros(48, 3)}),
            ADAPTER,
        ),
        ["expert 'law'", "layers.0.mlp.up_proj.lora_A.weight has rank 4 and", "has 3"],
    ),
    (
        "shards of ZeRO-3",
        lambda b: b.change(
            b.law,
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(0)}),
            ADAPTER,
        ),
        ["expert 'law'", "layers.0.mlp.up_proj.lora_A.weight has shape [0]; a LoRA matrix has two dimensions"],
    ),
    (
        "a tensor of no meaning",
        lambda b: b.change(b.law, lambda t: t.update({"base_model.model.ia3_l": torch.zeros(2)}), ADAPTER),
        ["expert 'law'", ADAPTER, "holds base_model.model.ia3_l, which is no tensor of a LoRA adapter"],
    ),
    (
        "a bias that the base has no place for",
        lambda b: b.change(
            b.law,
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": torch.zeros(48)}),
            ADAPTER,
        ),
        ["expert 'law'", ADAPTER, "lora_B.bias, a bias, and the base's model.layers.0.mlp.up_proj has none"],
    ),
    (
        "layers of a shallower base",
        lambda b: b.change(b.law, lambda t: [t.pop(k) for k in list(t) if ".layers.2." in k], ADAPTER),
        ["expert 'law'", ADAPTER, "lacks base_model.model.model.layers.2.mlp.gate_proj", "the base has 3 layers"],
    ),
    (
        "no FFN",
        lambda b: (shutil.rmtree(b.law), write_adapter(b.base, b.law, 1, target_modules=["q_proj"])),
        ["expert 'law'", "it changes no FFN", "use merge.method soup, or drop it"],
    ),
    (
        "attention of an adapter, refused",
        lambda b: (
            shutil.rmtree(b.law),
            write_adapter(b.base, b.law, 1, target_modules=["q_proj", "up_proj"]),
            _recipe(merge={"other_weights": "refuse"})(b),
        ),
        ["expert 'law'", "it changes 3 tensors outside the FFNs, such as model.layers.0.self_attn.q_proj.weight"],
    ),
    (
        "tokens that aren't numbers",
        lambda b: (b.law / "expert.json").write_text('{"domain_free_token_ids": ["<s>"]}'),
        ["expert 'law'", "expert.json has domain_free_token_ids = ['<s>']"],
    ),
    (
        "another base's weights",
        lambda b: (b.law / "expert.json").write_text(json.dumps({"base_weights": "f" * 64})),
        ["expert 'law'", "it was trained on another base model", "expert.json"],
    ),
    (
        "no such folder",
        _recipe(experts=[{"name": "law", "source": "./lwa"}, {"name": "tuned", "source": "tuned"}]),
        ["expert 'law'", "./lwa is not a folder"],
    ),
    (
        "one expert",
        _recipe(experts=[{"name": "law", "source": "law"}]),
        ["experts: one expert can't be merged; give two or more"],
    ),
    (
        "one name twice",
        _recipe(experts=[{"name": "law", "source": "law"}] * 2),
        ["expert name 'law' is used more than once"],
    ),
    ("too many of K", _recipe(merge={"top_k": 3}), ["merge.top_k is 3 but there are 2 experts; lower it"]),
    (
        "uniform top-1",
        _recipe(router={"start": "uniform"}),
        ["router.start uniform gives every expert the same weight; set merge.top_k to all 2"],
    ),
    ("a router on proxies, without a pool", _recipe(router={}), ["router.start is lda, which is fitted on proxies"]),
    (
        "training without a pool",
        _recipe(router={"start": "random", "training": {"epochs": 1}}),
        ["router.training is on proxies from public_pool"],
    ),
    (
        "compression by nothing",
        _recipe(merge={"compress": {"rank": 4, "energy": 0.9}}),
        ["merge.compress", "give either 'rank' or 'energy'"],
    ),
    (
        "a setting of another method",
        _recipe(merge={"method": "ties", "top_k": 2}, router=None),
        ["merge", "'top_k' means nothing to method ties"],
    ),
    (
        "the anchor's name",
        _recipe(
            merge={"anchor": True}, experts=[{"name": "anchor", "source": "law"}, {"name": "b", "source": "tuned"}]
        ),
        ["expert name 'anchor' is the base's own FFN's, by merge.anchor"],
    ),
]


@pytest.mark.parametrize(("damage", "parts"), [case[1:] for case in PEERS + MORE], ids=[c[0] for c in PEERS + MORE])
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, base_folder: Path, command: Run, damage: Callable[[Bench], Any], parts: list[str]
) -> None:
    bench = Bench(tmp_path, base_folder)
    damage(bench)
    bench.recipe = {key: value for key, value in bench.recipe.items() if value is not None}
    recipe, workspace = bench.write(), tmp_path / "ws"
    before = sorted(workspace.rglob("*"))
    code, _, stderr = command("merge", recipe, "--workspace", workspace)
    told = [line for line in stderr.splitlines() if "Loading weights" not in line and "Writing model" not in line]
    named = [part for part in parts if part.startswith("expert '")]
    assert code == 2, stderr
    assert all(line.startswith("error: ") for line in told), stderr
    assert len(told) == max(1, len(named)), stderr
    for part in parts:
        assert part in stderr
    assert "Traceback" not in stderr
    assert sorted(workspace.rglob("*")) == before


def test_all_problems_of_a_recipe_are_told_at_once(tmp_path: Path, base_folder: Path, command: Run) -> None:
    bench = Bench(tmp_path, base_folder)
    bench.edit(bench.law, ADAPTER_CONFIG, peft_type="IA3")
    bench.edit(bench.tuned, rms_norm_eps=1e-3, num_attention_heads=2)
    bench.recipe["experts"].append({"name": "third", "source": "./none"})
    code, _, stderr = command("merge", bench.write(), "--workspace", tmp_path / "ws")
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert [line.split("'")[1] for line in lines] == ["law", "tuned", "third"]
    assert "num_attention_heads 2 against 4, rms_norm_eps 0.001 against 1e-06" in lines[1]


def test_biases_of_attention_and_ffn_are_kept(tmp_path: Path, command: Run) -> None:
    """What the peer drops in silence: the merged model of two equal fine-tunes is the fine-tune."""
    model = tiny_dense(vocab_size=300, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    fine_tune(tmp_path / "base", tmp_path / "tuned", 1)
    experts = [{"name": name, "source": "tuned"} for name in ("a", "b")]
    recipe = {"base_model": "base", "experts": experts, "merge": {"top_k": 2}, "router": {"start": "uniform"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_moe", "merge", tmp_path / "r.yaml", "--workspace", tmp_path / "ws"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ws" / "merged").eval()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-5, rtol=1e-5)


def test_two_merges_give_the_same_bytes_and_the_base_s_own_tokenizer(
    tmp_path: Path, base_folder: Path, command: Run
) -> None:
    """Deterministic without a seed in the recipe; the tokenizer byte for byte; one tensor an expert on disk."""
    recipe = Bench(tmp_path, base_folder).write()
    (base_folder / "added_tokens.json").write_text("{}")  # as older bases without a tokenizer.json have it
    for workspace in ("one", "two"):
        command("merge", recipe, "--workspace", tmp_path / workspace)
    one, two = (sorted((tmp_path / workspace / "merged").iterdir()) for workspace in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    for left, right in zip(one, two, strict=True):
        assert left.read_bytes() == right.read_bytes(), left.name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"):
        assert (tmp_path / "one" / "merged" / name).read_bytes() == (base_folder / name).read_bytes()
    written = {k for file in one if file.suffix == ".safetensors" for k in load_file(file)}
    assert "model.layers.2.mlp.experts.1.down_proj.weight" in written
    assert "model.layers.2.mlp.experts.0.down_proj.lora_A.weight" in written


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["metamoe", "merge", sys.argv[1], "--workspace", sys.argv[2]]
from mergekit_moe.cli import main
main()
"""


def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path: Path, base_folder: Path) -> None:
    """No file may grow beyond 100 kB: the kernel ends the write as a full disk would."""
    recipe = Bench(tmp_path, base_folder).write()
    command = [sys.executable, "-c", _LIMITED, recipe, tmp_path / "ws"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'ws'} can't be written: File too large; make room")
    assert len(done.stderr.splitlines()) == 1
    assert [file for file in (tmp_path / "ws").rglob("*") if file.is_file()] == []


def test_a_disk_that_is_too_small_is_found_before_a_byte_is_written(
    tmp_path: Path, base_folder: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Bench(tmp_path, base_folder).write()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, stderr = command("merge", recipe, "--workspace", tmp_path / "ws")
    assert code == 2
    assert "MB free; make room, or choose another --workspace" in stderr
    assert [file for file in (tmp_path / "ws").rglob("*") if file.is_file()] == []


def test_a_workspace_that_cannot_be_made_is_one_sentence(tmp_path: Path, base_folder: Path, command: Run) -> None:
    recipe = Bench(tmp_path, base_folder).write()
    (tmp_path / "file").write_text("")
    code, _, stderr = command("merge", recipe, "--workspace", tmp_path / "file" / "ws")
    assert code == 2
    assert "can't be written: Not a directory; make room, or choose another place" in stderr
