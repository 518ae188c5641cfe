"""`metamoe find`: what the Hub lists, confirmed by each repository's own files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_adapter
from hub_tools import TOKEN, hub_with_users, metamoe, the_error
from loopback_hub import Fault, Hub, serve
from safetensors.torch import load_file, save_file

CARD = b"---\nbase_model: org/base\nlicense: mit\n---\n"


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path) -> Iterator[Hub]:
    """A base model, and seven repositories whose cards name it."""
    hub = hub_with_users()
    hub.add_folder("org/base", base_folder)
    adapter = write_adapter(base_folder, tmp_path / "law", 1, r=3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    files = {path.name: path.read_bytes() for path in adapter.iterdir()} | {"README.md": CARD}

    def with_config(**fields: object) -> dict[str, bytes]:
        changed = {**config, "base_model_name_or_path": "org/base", "revision": None, **fields}
        return files | {"adapter_config.json": json.dumps(changed).encode()}

    whole = {path.name: path.read_bytes() for path in base_folder.iterdir()} | {"README.md": CARD}
    hub.add("firm/law", with_config() | {"proxies.json": b"{}"}, downloads=500)
    hub.add("firm/tuned", whole, downloads=9000)
    hub.add("firm/other-base", with_config(base_model_name_or_path="org/another"), downloads=40)
    hub.add("firm/prefix", with_config(peft_type="PREFIX_TUNING"), downloads=30)
    pickled = {name: content for name, content in with_config().items() if not name.endswith(".safetensors")}
    hub.add("firm/pickled", pickled | {"adapter_model.bin": b"a pickle"}, downloads=20)
    hub.add("firm/gated", with_config(), downloads=10, gated=True)
    hub.add("org/hidden", with_config(), downloads=5, private=True)
    with serve(hub):
        yield hub


def test_experts_are_listed_and_confirmed_without_their_weights(hub: Hub, tmp_path: Path) -> None:
    done = metamoe(hub, tmp_path / "home", "find", "org/base", "--json", token=None)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["base_model"] == {"source": "org/base", "revision": hub.model("org/base").head.sha}
    found = {expert["source"]: expert for expert in answer["experts"]}
    assert [*found] == ["firm/tuned", "firm/law", "firm/other-base", "firm/prefix", "firm/pickled", "firm/gated"]
    law, tuned = found["firm/law"], found["firm/tuned"]
    assert (law["kind"], law["relation"], law["license"], law["downloads"]) == ("LoRA, rank 3", "adapter", "mit", 500)
    assert (law["sha"], law["proxies"], law["problem"]) == (hub.model("firm/law").head.sha, True, None)
    assert (tuned["kind"], tuned["relation"], tuned["proxies"]) == ("full fine-tune", "finetune", False)
    problems = {source: expert["problem"] for source, expert in found.items() if expert["problem"]}
    assert "says that its base model is org/another, the recipe's is org/base" in problems["firm/other-base"]
    assert problems["firm/prefix"].startswith("adapter_config.json says peft_type 'PREFIX_TUNING'")
    assert "is missing; only safetensors weights are read" in problems["firm/pickled"]
    assert problems["firm/gated"].startswith("firm/gated is gated; ask for access on its page")
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not [path for path in hub.asked if path.endswith((".bin", "tokenizer.json"))]


def test_the_table_has_a_line_an_expert_and_says_what_cannot_be_merged(hub: Hub, tmp_path: Path) -> None:
    done = metamoe(hub, tmp_path / "home", "find", "org/base", COLUMNS="120")
    lines = [line.split() for line in done.stdout.splitlines()]
    sha = hub.model("firm/law").head.sha
    assert ["firm/law", "LoRA,", "rank", "3", "yes", "mit", sha[:7], "500"] in lines
    assert any(line[:5] == ["firm/prefix", "can't", "be", "merged", "no"] for line in lines)
    assert "firm/prefix: adapter_config.json says peft_type 'PREFIX_TUNING'" in done.stdout
    assert ["org/hidden", "LoRA,", "rank", "3", "no", "mit", hub.model("org/hidden").head.sha[:7], "5"] in lines


def test_the_limit_keeps_the_most_downloaded(hub: Hub, tmp_path: Path) -> None:
    done = metamoe(hub, tmp_path / "home", "find", "org/base", "--limit", 2, "--json", token=None)
    assert [expert["source"] for expert in json.loads(done.stdout)["experts"]] == ["firm/tuned", "firm/law"]


@pytest.mark.parametrize("kind", ["status", "drop", "truncate"])
def test_a_search_that_fails_for_a_moment_is_done_again(hub: Hub, tmp_path: Path, kind: str) -> None:
    hub.faults = [Fault("GET /api/models$", kind, 2)]
    done = metamoe(hub, tmp_path / "home", "find", "org/base", "--json")
    assert len(json.loads(done.stdout)["experts"]) == 7, done.stderr


@pytest.mark.parametrize(
    ("place", "status", "token", "message"),
    [
        ("GET /api/models$", 503, TOKEN, "experts of org/base: can't be had: the Hub did not answer (503)"),
        ("GET /api/models/org/base$", 503, TOKEN, "BASE: org/base is no folder here, and can't be had: the Hub did"),
        ("nothing", 0, "hf_unknown", "BASE: org/base can't be asked for: the Hub doesn't know your token"),
    ],
)
def test_what_stays_is_one_sentence(
    hub: Hub, tmp_path: Path, place: str, status: int, token: str, message: str
) -> None:
    hub.faults = [Fault(place, "status", status=status)]
    assert the_error(metamoe(hub, tmp_path / "home", "find", "org/base", token=token)).startswith(message)


def test_weights_that_are_cut_short_are_said_to_be(hub: Hub, tmp_path: Path) -> None:
    repository = hub.model("firm/law")
    cut = repository.head.files["adapter_model.safetensors"][:-4]
    hub.add("firm/law", repository.head.files | {"adapter_model.safetensors": cut})
    experts = json.loads(metamoe(hub, tmp_path / "home", "find", "org/base", "--json").stdout)["experts"]
    (law,) = [expert for expert in experts if expert["source"] == "firm/law"]
    assert "where its header promises" in law["problem"]
    assert sum(expert["problem"] is None for expert in experts) == 2


def test_an_adapter_of_another_size_is_not_confirmed(hub: Hub, tmp_path: Path) -> None:
    narrow = {
        name: tensor[:, :2].clone() if "lora_A" in name else tensor
        for name, tensor in load_file(tmp_path / "law" / "adapter_model.safetensors").items()
    }
    save_file(narrow, tmp_path / "narrow.safetensors")
    files = hub.model("firm/law").head.files | {
        "adapter_model.safetensors": (tmp_path / "narrow.safetensors").read_bytes()
    }
    hub.add("firm/law", files)
    experts = json.loads(metamoe(hub, tmp_path / "home", "find", "org/base", "--json").stdout)["experts"]
    (law,) = [expert for expert in experts if expert["source"] == "firm/law"]
    assert "lora_A.weight" in law["problem"]
