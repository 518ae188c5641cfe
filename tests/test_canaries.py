"""Strings that occur nowhere else, planted in what is private: after a whole run they are in nothing that it made."""

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import write_jsonl
from PIL import Image
from test_pipeline import sentences, tiny_recipe

TEXT, FILE, FOLDER, TOKEN, USER = (f"canary{kind}qzx" for kind in ("text", "file", "folder", "token", "user"))
CLIENTS = ("cooking", "sailing", "algebra")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the workspace of a run on planted data, and all that it printed."""
    data = tmp_path_factory.mktemp("canaries") / FOLDER
    recipe = tiny_recipe(data)
    values = yaml.safe_load(recipe.read_text())
    for expert in values["experts"]:
        name = expert["name"]
        (data / f"{name}.jsonl").unlink()
        rows = [
            {**row, "text": f"{row['text']} {TEXT}{i}", "id": f"{TEXT}-id-{i}"} for i, row in enumerate(private(name))
        ]
        write_jsonl(data / f"{FILE}-{name}.jsonl", rows)
        expert["client"]["private"]["dataset"] = f"{FILE}-{name}.jsonl"
    values["export"] = ["mixtral"]
    recipe.write_text(yaml.safe_dump(values))
    workspace = tmp_path_factory.mktemp("workspace") / "ws"
    home = tmp_path_factory.mktemp("homes") / USER
    home.mkdir()
    environment = {**os.environ, "HF_TOKEN": f"hf_{TOKEN}", "USER": USER, "LOGNAME": USER, "HOME": str(home)}
    command = [sys.executable, "-m", "mergekit_moe", "run", str(recipe), "--workspace", str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return workspace, done.stdout + done.stderr


def private(name: str) -> list[dict[str, str]]:
    return sentences(name, 60, 1)


def opened(content: bytes) -> Iterator[bytes]:
    """Yield a file's bytes, and those inside it where it is compressed."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from opened(archive.read(name))
    if content.startswith(b"\x1f\x8b"):
        yield from opened(gzip.decompress(content))
    if content.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(content)) as image:
            yield json.dumps({key: str(value) for key, value in image.info.items()}).encode()
            yield image.tobytes()


def holds(content: bytes, secret: str) -> bool:
    return any(secret.encode(encoding) in part for part in opened(content) for encoding in ("utf-8", "utf-16-le"))


@pytest.mark.parametrize("secret", [TEXT, FILE, FOLDER, TOKEN, USER])
def test_no_file_and_no_line_that_a_run_leaves_holds_a_canary(run: tuple[Path, str], secret: str) -> None:
    workspace, printed = run
    files = [path for path in workspace.rglob("*") if path.is_file()]
    assert len(files) > 60
    assert not [path for path in files if holds(path.read_bytes(), secret)]
    assert not [path for path in workspace.rglob("*") if secret in str(path.relative_to(workspace))]
    assert secret not in printed


def test_no_file_that_a_run_leaves_holds_a_private_text_or_a_place_of_this_machine(run: tuple[Path, str]) -> None:
    workspace, _ = run
    secrets = [row["text"] for name in CLIENTS for row in private(name)][::7]
    secrets += [str(workspace), str(workspace.parent), str(Path.home())]
    for path in workspace.rglob("*"):
        if path.is_file():
            assert not [secret for secret in secrets if holds(path.read_bytes(), secret)], path


def test_the_search_would_find_them() -> None:
    """In plain bytes, in a compressed file, inside an archive, and among what a picture says of itself."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", f"xx{TEXT}" * 9)
    for content in (f"..{TEXT}".encode(), gzip.compress(TEXT.encode() * 9), archive.getvalue()):
        assert holds(content, TEXT)
    assert not holds(gzip.compress(b"nothing"), TEXT)
