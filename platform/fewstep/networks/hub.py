"""Networks from the Hugging Face hub: its JSON and safetensors files, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from ..texts import one_line

PREFIX = "hub:"
FILES = ["*.json", "*.safetensors"]


def snapshot(repo: str, download: bool = True) -> Path:
    """The folder of a hub repository "owner/name" in the hub's own cache, downloaded if it is not there and asked for.

    Raises ValueError that says what to do by hand where the hub cannot be reached or has no such repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = repo.rpartition("/")[2]
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=not download))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = one_line(error, 200)
        raise ValueError(
            f"teacher: hub repository {repo!r} is neither in the local cache nor to be had from the hub ({why}); "
            f"where there is a network, download its .json and .safetensors to a folder and give that: teacher=./{name}"
        ) from None
