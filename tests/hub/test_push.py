"""Pushing through every fault: the head is the old commit or the whole new one, and one sentence says which."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_tools import TOKEN, environment, hub_with_users, metamoe, the_error
from loopback_hub import Fault, Hub, serve
from safetensors.torch import save_file

from mergekit_moe.workspace import MANIFEST, file_sha256, write_json

PLACES = [
    "GET /api/models/org/law$",
    "POST /api/repos/create",
    "GET /api/models/org/law/tree/",
    "POST /api/validate-yaml",
    "POST /api/models/org/law/preupload/",
    "POST /org/law.git/info/lfs/objects/batch",
    "PUT /lfs/",
    "POST /lfs-verify/",
    "POST /api/models/org/law/commit/",
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = hub_with_users()
    with serve(hub):
        yield hub


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """A folder as `metamoe publish` leaves it."""
    folder = tmp_path / "ws" / "experts" / "law"
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/seed"})
    write_json(folder / "expert.json", {"name": "law", "base_model": "org/seed"})
    write_json(folder / "proxies.json", {"rows": [1, 2, 3]})
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/seed\n---\n# law\n")
    for seed, file in enumerate(("adapter_model.safetensors", "routing_statistics.safetensors")):
        save_file({"x": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))}, folder / file)
    outputs = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in folder.iterdir()}
    write_json(folder / MANIFEST, {"inputs": {"adapter": "0" * 64, "about": ["org/seed", None]}, "outputs": outputs})
    return folder


def push(hub: Hub, expert: Path, *more: object, **others: Any) -> subprocess.CompletedProcess[str]:
    return metamoe(hub, expert.parents[2] / "home", "push", expert, "org/law", *more, **others)


def assert_published(hub: Hub, folder: Path, commits: int = 2) -> None:
    """The head holds the whole folder, and it took one commit after the Hub's own first."""
    repository = hub.model("org/law")
    held = {path: content for path, content in repository.head.files.items() if path != ".gitattributes"}
    assert held == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(repository.commits) == commits


def assert_nothing_published(hub: Hub) -> None:
    for repository in hub.repositories.values():
        assert list(repository.head.files) == [".gitattributes"]


def test_a_push_is_one_private_commit_and_a_second_one_makes_none(hub: Hub, expert: Path) -> None:
    first = push(hub, expert, "--message", "my first")
    assert first.returncode == 0, first.stderr
    assert_published(hub, expert)
    head = hub.model("org/law").head
    assert (hub.model("org/law").private, head.title) == (True, "my first")
    assert f"{hub.address}/org/law/commit/{head.sha}\ncommit: {head.sha}\n" in first.stdout
    hub.log.clear()
    second = push(hub, expert)
    assert f"{hub.address}/org/law/commit/{head.sha} (up to date: no new commit)" in second.stdout
    assert_published(hub, expert)
    assert not [line for line in hub.log if not line.startswith("GET ")], "only looked"


def test_what_changed_is_uploaded_and_weights_of_before_are_deleted(hub: Hub, expert: Path) -> None:
    push(hub, expert)
    (expert / "routing_statistics.safetensors").unlink()
    (expert / "README.md").write_text("---\nlicense: mit\n---\n# other\n")
    hub.log.clear()
    done = push(hub, expert)
    assert "uploading 1 of 6 files, deleting 1" in done.stdout, done.stderr
    assert_published(hub, expert, commits=3)
    assert not [line for line in hub.log if line.startswith("PUT ")]


def test_files_of_others_stay(hub: Hub, expert: Path) -> None:
    push(hub, expert)
    repository = hub.model("org/law")
    repository.commit({**repository.head.files, "picture.jpg": b"theirs"}, "a picture")
    assert push(hub, expert).returncode == 0
    assert repository.head.files["picture.jpg"] == b"theirs"
    assert len(repository.commits) == 3


def test_a_proxy_set_becomes_a_data_set(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "proxy-sets" / "law"
    folder.mkdir(parents=True)
    (folder / "proxies.jsonl").write_text('{"id": "1", "prompt": "", "completion": "public"}\n')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for new in ("", " (up to date: no new commit)"):
        done = metamoe(hub, tmp_path / "home", "push", folder, "org/law-proxies")
        head = hub.repositories["dataset", "org/law-proxies"].head
        assert f"{hub.address}/datasets/org/law-proxies/commit/{head.sha}{new}\n" in done.stdout, done.stderr
        assert head.files["proxies.jsonl"] == (folder / "proxies.jsonl").read_bytes()
    assert ("model", "org/law-proxies") not in hub.repositories


def test_public_is_said_and_never_assumed(hub: Hub, expert: Path) -> None:
    assert "made org/law, public" in push(hub, expert, "--public").stdout
    assert not hub.model("org/law").private
    error = the_error(push(hub, expert))
    assert error == "org/law is public; give --public if that is right, or change it in its settings on the Hub"
    hub.model("org/law").private = True
    assert "org/law is private; leave --public out if that is right" in the_error(push(hub, expert, "--public"))


def test_a_dry_run_lists_every_file_with_its_size_and_asks_nobody(hub: Hub, expert: Path) -> None:
    done = push(hub, expert, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    for path in expert.iterdir():
        assert any(line.split() == [path.name, f"{path.stat().st_size:,}"] for line in done.stdout.splitlines())
    assert "expert for org/law, private: 7 files" in done.stdout
    assert not hub.log


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("kind", "headers"),
    [("status", {}), ("status", {"Retry-After": "1"}), ("drop", {}), ("truncate", {}), ("lose", {})],
)
def test_what_passes_is_waited_for(hub: Hub, expert: Path, place: str, kind: str, headers: dict[str, str]) -> None:
    hub.faults = [Fault(place, kind, 1, status=429 if headers else 503, headers=headers)]
    done = push(hub, expert)
    assert done.returncode == 0, done.stderr
    assert hub.faults[0].seen == 1
    assert_published(hub, expert)
    assert hub.model("org/law").private
    assert hub.model("org/law").head.sha in done.stdout


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "status", "status": 503}, "org/law can't be had: the Hub did not answer (503); try again later"),
        ({"kind": "status", "status": 429}, "it is asked too often (429); try again in a few minutes"),
        ({"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}}, "asks to wait 3600 seconds"),
        ({"kind": "drop"}, "the Hub did not answer (RemoteProtocolError)"),
        ({"kind": "status", "status": 403}, "org/law is closed to your token (403)"),
    ],
)
def test_what_stays_is_one_sentence_and_publishes_nothing(
    hub: Hub, expert: Path, place: str, fault: dict[str, Any], message: str
) -> None:
    hub.faults = [Fault(place, **fault)]
    done = push(hub, expert)
    if done.returncode == 0:
        assert place == "POST /lfs-verify/", "what was stored needs no second word from the Hub"
        assert_published(hub, expert)
        return
    assert message in the_error(done)
    assert_nothing_published(hub)


@pytest.mark.parametrize("place", [place for place in PLACES if not place.startswith("GET")])
def test_a_bit_that_flips_on_its_way_is_never_published(hub: Hub, expert: Path, place: str) -> None:
    hub.faults = [Fault(place, "garble", 1)]
    done = push(hub, expert)
    if done.returncode == 0:  # the card's check, or a commit that was mended by one more
        assert_published(hub, expert, commits=len(hub.model("org/law").commits))
    else:
        assert the_error(done).startswith("org/law ")
        assert_nothing_published(hub)


def test_an_upload_that_was_interrupted_goes_on_with_what_is_there(hub: Hub, expert: Path) -> None:
    sha = file_sha256(expert / "routing_statistics.safetensors")
    hub.faults = [Fault(f"PUT /lfs/{sha}", "status", status=503)]
    the_error(push(hub, expert))
    assert_nothing_published(hub)
    assert list(hub.large) == [file_sha256(expert / "adapter_model.safetensors")]
    hub.faults.clear()
    hub.log.clear()
    assert push(hub, expert).returncode == 0
    assert [line for line in hub.log if line.startswith("PUT ")] == [f"PUT /lfs/{sha}"]
    assert_published(hub, expert)


def test_killed_in_the_middle_of_an_upload_nothing_is_published_and_the_rest_goes_on(hub: Hub, expert: Path) -> None:
    hub.faults = [Fault(f"PUT /lfs/{file_sha256(expert / 'routing_statistics.safetensors')}", "slow", seconds=3)]
    command = [sys.executable, "-m", "mergekit_moe", "push", str(expert), "org/law"]
    process = subprocess.Popen(command, env=environment(hub, expert.parents[2] / "home"), stdout=subprocess.DEVNULL)
    while not (hub.faults[0].seen and hub.large):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert_nothing_published(hub)
    hub.log.clear()
    assert push(hub, expert).returncode == 0
    assert f"PUT /lfs/{file_sha256(expert / 'adapter_model.safetensors')}" not in hub.log
    assert_published(hub, expert)


def test_somebody_else_s_commit_in_between_is_noticed(hub: Hub, expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(hub, expert)
    repository = hub.model("org/law")
    (expert / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")

    class Meanwhile(Fault):
        """Does no harm but to let somebody else be first."""

        def strikes(self, method: str, path: str) -> bool:
            if method == "POST" and "/commit/" in path and len(repository.commits) == 2:
                repository.commit({**repository.head.files, "README.md": b"theirs"}, "theirs")
            return False

    hub.faults = [Meanwhile(".", "drop")]
    error = the_error(push(hub, expert))
    assert error.startswith("org/law was changed by somebody else while this was being uploaded, and nothing of it was")
    assert (repository.head.title, repository.head.files["README.md"]) == ("theirs", b"theirs")


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        (None, "org/law", "org/law can't be written without a token; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "org/law", "org/law can't be asked for: the Hub doesn't know your token; log in"),
        ("hf_reader", "org/law", "org/law is closed to your token (403); give the token that right in its settings"),
        ("hf_stranger", "org/law", "org/law is closed to your token (403)"),
        (TOKEN, "law", "law is no name of a repository; give org/name"),
        (TOKEN, "org/", "org/ is no name of a repository; give org/name"),
    ],
)
def test_who_may_not_write_is_told_why(
    hub: Hub, expert: Path, token: str | None, repository: str, message: str
) -> None:
    done = metamoe(hub, expert.parents[2] / "home", "push", expert, repository, token=token)
    assert the_error(done).startswith(message)
    assert not hub.repositories


def test_a_card_that_the_hub_does_not_take_is_told_and_nothing_is_published(hub: Hub, expert: Path) -> None:
    (expert / "README.md").write_text("---\nlicense: [1, 2]\n---\n")
    error = the_error(push(hub, expert))
    assert error == 'org/law isn\'t taken by the Hub: Invalid metadata in README.md. - "license" must be a string'
    assert_nothing_published(hub)


def test_offline_nothing_is_pushed(hub: Hub, expert: Path) -> None:
    assert "offline mode" in the_error(push(hub, expert, HF_HUB_OFFLINE="1"))
    assert not hub.log


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def _code(folder: Path) -> None:
    (folder / "modeling_other.py").write_text("")


def _private_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("{}")


def _link(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


def _subfolder(folder: Path) -> None:
    (folder / ".git").mkdir()


def _of_the_client(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "inputs": {"alignment": {}, "private": "0" * 64}})


def _changed_weights(folder: Path) -> None:
    save_file({"x": torch.zeros(64, 64)}, folder / "adapter_model.safetensors")


def _a_path(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent)})


def _no_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_pickle, "pytorch_model.bin is none of the files that are pushed as 'expert'"),
        (_code, "modeling_other.py is none of the files that are pushed as 'expert'"),
        (_private_rows, "rows.jsonl is none of the files that are pushed as 'expert'"),
        (_link, "README.md is a link, and what it leads to may be anything"),
        (_subfolder, ".git is a folder, and what is pushed as 'expert' has none"),
        (_of_the_client, "manifest.json is of a folder that isn't made to be published"),
        (_changed_weights, "isn't what manifest.json says that it was when it was made"),
        (_a_path, "adapter_config.json names a folder of this machine"),
        (_no_adapter, "is nothing that can be pushed; known by their files are: expert ("),
        (_no_folder, "is not a folder; give one that metamoe made"),
    ],
)
@pytest.mark.parametrize("way", [[], ["--dry-run"]])
def test_what_is_not_ours_to_publish_is_refused_before_anybody_is_asked(
    hub: Hub, expert: Path, spoil: Callable[[Path], None], message: str, way: list[str]
) -> None:
    spoil(expert)
    assert message in the_error(push(hub, expert, *way))
    assert not hub.log


def test_a_manifest_that_names_a_place_stays_here(hub: Hub, expert: Path) -> None:
    manifest = json.loads((expert / MANIFEST).read_text())
    write_json(expert / MANIFEST, {**manifest, "inputs": {"base": str(expert)}})
    done = push(hub, expert)
    assert "note: manifest.json stays here: it names a path, a user or a machine" in done.stdout
    assert MANIFEST not in hub.model("org/law").head.files
    assert "expert.json" in hub.model("org/law").head.files
