"""Full fine-tunes as experts: whole or factored, beside adapters, and what they changed outside their FFNs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FFN, PROJECTIONS, randomise, tiny_dense, tokens, write_adapter
from merging_tools import base_of, merge, read
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_moe.errors import ExpertError
from mergekit_moe.merging.compression import low_rank
from mergekit_moe.merging.unify import REPORT, merge_experts
from mergekit_moe.models import load_model
from mergekit_moe.recipe import Compression, Merge, Router

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def is_ffn(name: str, family: str = "Llama") -> bool:
    return any(f".{projection}." in name for projection in FFN.get(family, PROJECTIONS))


def fine_tune(
    base: Path, folder: Path, seed: int, family: str = "Llama", others: bool = False, rank: int | None = None
) -> Path:
    """Save the base with other FFNs, and with other weights of every kind where `others`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_ffn(name, family) or others:
                change = 0.1 * torch.randn(parameter.shape, generator=generator)
                if rank is not None and change.ndim == 2:
                    left = torch.randn(len(change), rank, generator=generator)
                    change = 0.1 * left @ torch.randn(rank, change.shape[1], generator=generator)
                parameter.add_(change)
    model.save_pretrained(folder)
    return folder


def saved_base(folder: Path, family: str) -> Path:
    dense = tiny_dense(family)
    randomise(dense)
    dense.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    model = load_model(folder).eval().double()
    if model.config.model_type.startswith("metamoe"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


@torch.no_grad()
def pinned(model: PreTrainedModel, expert: int) -> torch.Tensor:
    return model(tokens(), forced_expert=torch.tensor([expert, expert])).logits


def test_a_pinned_fine_tune_equals_the_model_it_was(tmp_path: Path, family: str) -> None:
    base = saved_base(tmp_path / "base", family)
    tuned = [fine_tune(base, tmp_path / str(seed), seed, family) for seed in range(3)]
    model = load(merge(base, [read(base, folder, folder.name) for folder in tuned], tmp_path / "moe"))
    for number, folder in enumerate(tuned):
        with torch.no_grad():
            torch.testing.assert_close(pinned(model, number), load(folder)(tokens()).logits, atol=1e-6, rtol=0)


def test_the_seed_ffn_is_written_only_if_an_expert_needs_it(base_folder: Path, tmp_path: Path) -> None:
    tuned = [read(base_folder, fine_tune(base_folder, tmp_path / str(seed), seed), str(seed)) for seed in range(2)]
    for anchor in (False, True):
        out = merge(base_folder, tuned, tmp_path / f"moe-{anchor}", anchor=anchor)
        written = {name for shard in out.glob("*.safetensors") for name in load_file(shard)}
        assert ("model.layers.0.mlp.up_proj.weight" in written) == anchor
        assert "model.layers.0.mlp.experts.1.up_proj.weight" in written
        assert len(load_model(out).config.experts) == 2 + anchor


def test_one_model_of_adapters_fine_tunes_and_an_anchor(base_folder: Path, tmp_path: Path) -> None:
    adapters = [write_adapter(base_folder, tmp_path / f"a{rank}", rank, r=rank) for rank in (2, 5)]
    folded = write_adapter(base_folder, tmp_path / "dora", 3, use_dora=True)
    tuned = fine_tune(base_folder, tmp_path / "tuned", 4)
    folders = [adapters[0], tuned, folded, adapters[1]]
    experts = [read(base_folder, folder, folder.name) for folder in folders]
    model = load(merge(base_folder, experts, tmp_path / "moe", anchor=True, top_k=2))
    alone = [load(merge(base_folder, [expert] * 2, tmp_path / f"alone-{expert.name}")) for expert in experts]
    for number, single in enumerate(alone):
        torch.testing.assert_close(pinned(model, number), pinned(single, 0), atol=1e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(pinned(model, 4), load(base_folder)(tokens()).logits, atol=1e-6, rtol=0)


def test_changes_outside_the_ffns_are_told_by_module_and_size(base_folder: Path, tmp_path: Path) -> None:
    tuned = read(base_folder, fine_tune(base_folder, tmp_path / "t", 1, others=True), "tuned")
    adapter = read(base_folder, write_adapter(base_folder, tmp_path / "a", 1, target_modules=["q_proj", "up_proj"]))
    told: list[str] = []
    out = tmp_path / "moe"
    out.mkdir()
    merge_experts(base_of(base_folder), [tuned, adapter], Merge(), Router(), out=out, tell=told.append)
    report = {entry["name"]: entry["other_weights"] for entry in json.loads((out / REPORT).read_text())["experts"]}
    weights = base_of(base_folder).weights
    names = [name for name in weights if name.endswith("self_attn.q_proj.weight")]
    for expert in (tuned, adapter):
        (found,) = [d for d in report[expert.name] if d["module"] == "model.layers.*.self_attn.q_proj.weight"]
        old = torch.stack([weights.read(name).double() for name in names])
        new = torch.stack([expert.updates[name].apply(weights.read(name).double()) for name in names])
        assert found["relative"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert (found["tensors"], found["parameters"]) == (3, old.numel())
    assert len(report["law"]) == 1
    assert len(report["tuned"]) == 9  # q, k, v, o, two norms a layer; embedding, last norm and head
    assert any("expert 'law': changes outside the FFNs, left out: model.layers.*.self_attn.q_proj" in t for t in told)


def test_other_weights_are_the_base_s_or_the_mean_of_all(base_folder: Path, tmp_path: Path) -> None:
    experts = [
        read(base_folder, fine_tune(base_folder, tmp_path / "t", 1, others=True), "tuned"),
        read(base_folder, fine_tune(base_folder, tmp_path / "u", 2), "ffn-only"),
        read(base_folder, write_adapter(base_folder, tmp_path / "a", 1, target_modules=["q_proj", "up_proj"])),
    ]
    weights = base_of(base_folder).weights
    for policy in ("base", "average"):
        out = merge(base_folder, experts, tmp_path / f"moe-{policy}", other_weights=policy)
        merged = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        for name in weights:
            base = weights.read(name).double()
            if is_ffn(name):  # the base's own, which the adapter's factors are added to
                assert torch.equal(merged[name].double(), base)
                continue
            changes = [e.updates[name].apply(base) - base if name in e.updates else 0 * base for e in experts]
            expected = base + sum(changes) / 3 if policy == "average" else base
            torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=0)


def test_other_weights_that_all_changed_alike_make_the_fine_tune_whole_again(base_folder: Path, tmp_path: Path) -> None:
    """BTX's policy: where every expert is the same model, the merged one is that model."""
    tuned = fine_tune(base_folder, tmp_path / "t", 1, others=True)
    out = merge(base_folder, [read(base_folder, tuned)] * 2, tmp_path / "moe", other_weights="average")
    with torch.no_grad():
        torch.testing.assert_close(load(out)(tokens()).logits, load(tuned)(tokens()).logits, atol=1e-5, rtol=0)


def test_other_weights_refused_name_what_was_changed(base_folder: Path, tmp_path: Path) -> None:
    tuned = read(base_folder, fine_tune(base_folder, tmp_path / "t", 1, others=True), "tuned")
    same = read(base_folder, fine_tune(base_folder, tmp_path / "u", 2), "ffn-only")
    with pytest.raises(
        ExpertError, match=r"expert 'tuned': it changed weights outside the FFNs, and merge.other_weights"
    ):
        merge(base_folder, [tuned, same], tmp_path / "moe", other_weights="refuse")
    merge(base_folder, [same, same], tmp_path / "fits", other_weights="refuse")


def test_a_change_of_low_rank_is_compressed_without_loss(base_folder: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base_folder, tmp_path / "t", 1, rank=3)
    for compress in ({"rank": 3}, {"energy": 0.999999}):
        out = merge(base_folder, [read(base_folder, tuned)] * 2, tmp_path / str(compress), compress=compress)
        (expert, _) = json.loads((out / "config.json").read_text())["experts"]
        assert expert["ranks"] == dict.fromkeys(PROJECTIONS, 3)
        with torch.no_grad():
            torch.testing.assert_close(load(out)(tokens()).logits, load(tuned)(tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(40, 30), (700, 300), (300, 900)])
def test_factors_are_the_best_of_their_rank_and_tell_their_error(shape: tuple[int, int]) -> None:
    """Against float64 LAPACK; the larger matrices go the randomised way."""
    generator = torch.Generator().manual_seed(sum(shape))
    noise = torch.randn(shape, generator=generator)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    matrix = (left * 0.9 ** torch.arange(min(shape))) @ right
    values = torch.linalg.svdvals(matrix.double())
    for compress in (Compression(rank=9), Compression(energy=0.9), Compression(energy=0.9999)):
        factors = low_rank(matrix, compress, seed=1)
        rank = len(factors.lora_A)
        best = float(values[rank:].square().sum() / values.square().sum()) ** 0.5
        given = float((matrix - factors.lora_B @ factors.lora_A).norm() / matrix.norm())
        assert given == pytest.approx(best, abs=1e-4)
        assert factors.error == pytest.approx(given, abs=1e-3)
        if compress.energy is not None:
            kept = values.square().cumsum(0) / values.square().sum()
            assert abs(rank - (int((kept < compress.energy).sum()) + 1)) <= 1
        again = low_rank(matrix, compress, seed=1)
        assert torch.equal(factors.lora_A, again.lora_A)


def test_compression_keeps_ranks_that_differ_by_matrix(base_folder: Path, tmp_path: Path) -> None:
    """`energy` gives every matrix its own rank; the error of each stands in the report."""
    experts = [read(base_folder, fine_tune(base_folder, tmp_path / str(s), s), f"e{s}") for s in range(2)]
    out = merge(base_folder, experts, tmp_path / "moe", compress={"energy": 0.7})
    config = json.loads((out / "config.json").read_text())
    assert any(
        len(set(ranks)) > 1 for e in config["experts"] for ranks in e["ranks"].values() if isinstance(ranks, list)
    )
    report = json.loads((out / REPORT).read_text())["experts"]
    weights = base_of(base_folder).weights
    model = load_model(out)
    for number, expert in enumerate(experts):
        assert report[number]["kept"].startswith("factored by SVD, relative error")
        for name, error in report[number]["svd_errors"].items():
            assert 0.3 < error < 0.3**0.5 + 1e-3
            block, _, projection = name.removesuffix(".weight").rpartition(".")
            experts_of_layer = model.get_submodule(block).experts[projection]
            lora_A, lora_B = experts_of_layer.factors(number)
            change = expert.updates[name].difference(weights.read(name))
            assert float((lora_B.T @ lora_A - change).norm() / change.norm()) == pytest.approx(error, rel=1e-2)


def test_the_result_can_be_of_another_type(base_folder: Path, tmp_path: Path) -> None:
    experts = [read(base_folder, write_adapter(base_folder, tmp_path / "a", 1))]
    experts.append(read(base_folder, fine_tune(base_folder, tmp_path / "t", 1), "tuned"))
    model = load_model(merge(base_folder, experts, tmp_path / "moe", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.router.weight.dtype == torch.float32
    single = load_model(merge(base_folder, experts, tmp_path / "single"))
    for name, tensor in single.state_dict().items():
        wanted = tensor if ".router." in name else tensor.bfloat16()
        assert torch.equal(model.state_dict()[name], wanted), name


def test_a_result_that_overflows_its_type_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Every weight of the inputs is finite; in float16 one isn't any more."""
    tuned = fine_tune(base_folder, tmp_path / "t", 1)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    experts = [read(base_folder, tuned, "tuned")] * 2
    merge(base_folder, experts, tmp_path / "wide", dtype="bfloat16")
    with pytest.raises(ExpertError, match=r"layers.1.mlp.experts.0.up_proj.weight holds NaN or infinity as float16"):
        merge(base_folder, experts, tmp_path / "narrow", dtype="float16")


def edit(folder: Path, **fields: Any) -> None:
    """Set fields of a config.json; a value of None is written as null, `...` takes the field out."""
    values = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


V4 = {"rope_parameters": ..., "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "base", "tuned"),
    [
        ("Llama", V4, {}),
        ("Llama", {"rope_parameters": ...}, {}),
        ("Llama", V4 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": LINEAR}),
        ("Llama", {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": None}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 32768}, {"sliding_window": None}),
        ("Gemma", {"tie_word_embeddings": ...}, {}),
    ],
    ids=str,
)
def test_configs_that_say_the_same_in_other_words_are_the_same(
    tmp_path: Path, family: str, base: dict[str, Any], tuned: dict[str, Any]
) -> None:
    saved_base(tmp_path / "base", family)
    fine_tune(tmp_path / "base", tmp_path / "t", 1, family)
    edit(tmp_path / "base", **base)
    edit(tmp_path / "t", **tuned)
    assert read(tmp_path / "base", tmp_path / "t").updates


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (V4 | {"rope_theta": 5e5}, {}, "rope_parameters .*10000.0.* against .*500000.0"),
        ({"rope_parameters": ...}, V4 | {"rope_theta": 1e6}, "rope_parameters .*1000000.0.* against .*10000.0"),
        ({}, {"rope_parameters": LINEAR}, "rope_parameters .*linear.* against .*default"),
        ({"rms_norm_eps": ...}, {"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001 against 1e-06"),
    ],
    ids=str,
)
def test_configs_that_differ_by_what_one_leaves_out_are_refused(
    base_folder: Path, tmp_path: Path, base: dict[str, Any], tuned: dict[str, Any], message: str
) -> None:
    fine_tune(base_folder, tmp_path / "t", 1)
    edit(base_folder, **base)
    edit(tmp_path / "t", **tuned)
    with pytest.raises(ExpertError, match=message):
        read(base_folder, tmp_path / "t")


def test_a_tied_head_on_disk_is_the_embedding_once_more(base_folder: Path, tmp_path: Path) -> None:
    """A soup of one model twice is that model, whichever of the two has its head stored."""
    tiny_dense(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tuned = fine_tune(tmp_path / "base", tmp_path / "t", 1, others=True)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    out = merge(tmp_path / "base", [read(tmp_path / "base", tuned)] * 2, tmp_path / "moe", other_weights="average")
    with torch.no_grad():
        torch.testing.assert_close(load(out)(tokens()).logits, load(tuned)(tokens()).logits, atol=1e-5, rtol=0)


def test_buffers_of_older_checkpoints_are_neither_checked_nor_kept(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "GPTNeoX")
    tuned = fine_tune(base, tmp_path / "t", 1, "GPTNeoX")
    tensors = load_file(base / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(float("-inf"))
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = merge(base, [read(base, tuned)] * 2, tmp_path / "moe")
    written = {name for shard in out.glob("*.safetensors") for name in load_file(shard)}
    assert not [name for name in written if "masked_bias" in name or "inv_freq" in name]


def test_an_index_left_beside_a_whole_model_is_passed_over(base_folder: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base_folder, tmp_path / "t", 1)
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert read(base_folder, tuned).updates


def test_compression_heeds_biases_only_where_they_changed(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "Phi")
    tuned = fine_tune(base, tmp_path / "t", 1, "Phi", rank=2)
    tensors, own = load_file(tuned / "model.safetensors"), load_file(base / "model.safetensors")
    tensors.update({name: own[name] for name in own if name.endswith("bias")})
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    out = merge(base, [read(base, tuned)] * 2, tmp_path / "moe", compress={"rank": 2})
    with torch.no_grad():
        torch.testing.assert_close(load(out)(tokens()).logits, load(tuned)(tokens()).logits, atol=1e-4, rtol=0)
    assert json.loads((out / "config.json").read_text())["experts"][0]["ranks"] == {"fc1": 2, "fc2": 2}
    told: list[str] = []
    changed = read(base, fine_tune(base, tmp_path / "u", 2, "Phi"), "changed")
    (tmp_path / "whole").mkdir()
    settings = Merge(compress=Compression(rank=2))
    merge_experts(base_of(base), [changed] * 2, settings, Router(), out=tmp_path / "whole", tell=told.append)
    assert (
        "expert 'changed': it changed model.layers.0.mlp.fc1.bias, and factors hold no bias: its FFNs are kept whole"
        in told
    )


def test_nothing_tells_where_a_base_lay(base_folder: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base_folder, tmp_path / "t", 1)
    edit(base_folder, _name_or_path="/home/somebody/secret/llama")
    out = merge(base_folder, [read(base_folder, tuned)] * 2, tmp_path / "moe")
    assert "somebody" not in (out / "config.json").read_text()
