import pathlib

import huggingface_hub
import pytest

from sct_jax import errors
from sct_jax.interop import hub


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = hub.local_folder("owner/name", flag="--from")
    assert found == pathlib.Path("owner/name")


def test_a_name_is_stored_without_pickles_and_code(tmp_path, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append((name, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.local_folder("owner/name-1.7B", flag="--from") == tmp_path
    assert calls == [("owner/name-1.7B", ["*.json", "*.safetensors"])]


def test_a_hub_that_is_not_reached_is_named(monkeypatch):
    def download(name, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(errors.UserError) as caught:
        hub.local_folder("owner/name", flag="--hf")
    assert str(caught.value) == (
        "--hf: 'owner/name' is not a folder, and cannot be had from the Hugging Face "
        "hub (no route to host); give the folder of a checkpoint"
    )


@pytest.mark.parametrize("path", ["nowhere", "/no/where", "a/b/c", "../a", "a b/c"])
def test_what_cannot_be_a_name_is_no_folder(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(errors.UserError, match=r"--from: .* is not a folder"):
        hub.local_folder(path, flag="--from")
