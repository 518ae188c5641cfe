"""Models from the Hub, over HTTP: one commit for all files, no pickles, one sentence when it can't be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_adapter
from loopback_hub import SHA, loopback_hub

from mergekit_moe.errors import ExpertError
from mergekit_moe.hub import Resolved, resolve_model

_FETCH = """
import sys
from pathlib import Path
from mergekit_moe.errors import MetaMoeError
from mergekit_moe.hub import resolve_model
try:
    resolved = resolve_model(sys.argv[1], sys.argv[2] or None, Path(sys.argv[3]), "expert 'law'")
except MetaMoeError as error:
    sys.exit(str(error))
print(resolved.folder, resolved.public_name, resolved.revision, sep="\\n")
"""


def fetch(address: str, cache: Path, name: str, revision: str = "") -> subprocess.CompletedProcess[str]:
    """Resolve a model in a process of its own: the Hub's address is read when huggingface_hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", _FETCH, name, revision, str(cache)]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, "HF_HOME": str(cache)})


@pytest.fixture
def published(base_folder: Path, tmp_path: Path) -> Path:
    folder = write_adapter(base_folder, tmp_path / "law", 1)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def test_an_expert_is_fetched_at_one_commit_without_pickles_or_code(published: Path, tmp_path: Path) -> None:
    with loopback_hub({"firm/law": published}) as (address, asked):
        done = fetch(address, tmp_path / "cache", "firm/law", "main")
    assert done.returncode == 0, done.stderr
    folder, name, revision = done.stdout.split()
    assert (name, revision) == ("firm/law", SHA)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(folder) / file).read_bytes() == (published / file).read_bytes()
    assert not [path for path in asked if path.endswith((".bin", ".py"))]


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "firm/none",
            "",
            "expert 'law': firm/none is no folder here, and is no repository on the Hub",
        ),
        ("firm/law", "v9", "expert 'law': firm/law has no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    published: Path, tmp_path: Path, name: str, revision: str, message: str
) -> None:
    with loopback_hub({"firm/law": published}) as (address, _):
        done = fetch(address, tmp_path / "cache", name, revision)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)


def test_a_hub_that_is_down_is_one_sentence(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", tmp_path / "cache", "firm/law")
    assert "expert 'law': firm/law is no folder here, and can't be had: the Hub did not answer" in done.stderr


def test_a_folder_is_taken_as_it_is_and_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    assert resolve_model("law", None, tmp_path, "x") == Resolved(tmp_path / "law", "law", None)
    with pytest.raises(ExpertError, match="expert 'law': 'revision' is for Hub repositories, and law is a folder"):
        resolve_model("law", "main", tmp_path, "expert 'law'")


def test_what_looks_like_a_path_is_never_looked_up(tmp_path: Path) -> None:
    for source in ("./law", "/nowhere/law", "a/b/c", "~/law"):
        with pytest.raises(ExpertError, match="is not a folder; give a model's folder or a Hub id"):
            resolve_model(source, None, tmp_path, "x")


_READ = """
import sys
from pathlib import Path
from mergekit_moe.data import load_rows
from mergekit_moe.errors import MetaMoeError
from mergekit_moe.recipe import DataSource
source = DataSource(dataset=sys.argv[1], text="{text}", limit=2, streaming=sys.argv[2] == "streaming")
try:
    print(*load_rows([source], Path(sys.argv[3]), "public_pool", public=True)["completion"], sep="\\n")
except MetaMoeError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("way", ["streaming", "whole"])
def test_a_pool_is_read_from_a_hub_data_set_at_one_commit(tmp_path: Path, way: str) -> None:
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "train.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(5)))
    with loopback_hub({"org/mix": tmp_path / "mix"}) as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HOME"] = str(tmp_path / way)
        runs = [
            subprocess.run(
                [sys.executable, "-c", _READ, name, way, str(tmp_path)], capture_output=True, text=True, env=environment
            )
            for name in ("org/mix", "org/none")
        ]
    assert runs[0].stdout.split("\n")[:2] == ["text 0", "text 1"], runs[0].stderr[-3000:]
    assert f"/datasets/org/mix/resolve/{SHA}/train.jsonl" in asked
    assert runs[1].returncode == 1
    assert runs[1].stderr.startswith("public_pool: org/none is no folder here, and is no repository on the Hub")
