"""Sources: from what a user calls a model to the folder that holds it.

Place on the road: name, path or hub id -> [models.sources] -> checkpoint.
"""

import os
import pathlib
import re

from jpaged.models.loading import bundled

RANDOM = "random:"
_HUB = "hf://"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What is read of a repository; code and pickle are not even downloaded.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def is_random(name: str | os.PathLike[str]) -> bool:
    """Whether a name asks for random weights: "random:llama-3-8b"."""
    return os.fspath(name).startswith(RANDOM)


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """Folder of a model: a path, a bundled model's name, or a hub id.

    A hub id, "org/name" or "hf://org/name", is downloaded by huggingface_hub into its
    cache, or found there. A folder of that name comes before the hub.

    Raises:
      FileNotFoundError: no such folder, or a hub id that cannot be had.
    """
    text = os.fspath(name)
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB).strip("/"))
    if text in bundled.bundled_models():
        return bundled.bundled_path(text)
    folder = pathlib.Path(text).expanduser()
    if folder.is_dir():
        return folder
    if not folder.exists() and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _download(text)
    raise FileNotFoundError(
        f"model: {text}: no such folder, and no bundled model of that name (bundled: "
        f"{', '.join(bundled.bundled_models())}). A model is a folder in Hugging Face "
        "layout, or a hub id: org/name or hf://org/name"
    )


def _download(hub_id: str) -> pathlib.Path:
    """The hub's snapshot of a model in huggingface_hub's cache."""
    if not _HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(
            f"model: expected a hub id like org/name, got {hub_id!r}"
        )
    by_hand = f"download it elsewhere: hf download {hub_id} --local-dir FOLDER"
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"model: {hub_id}: no such folder, and hub ids need huggingface_hub: "
            f"pip install 'jpaged[hub]'; or {by_hand}"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=_PATTERNS)
    # Its errors, and those of the HTTP libraries below it, share no class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"model: {hub_id}: no such folder, and the hub did not give it "
            f"({reason:.300}); is the id right, and can the hub be reached? Or "
            f"{by_hand}"
        ) from error
    return pathlib.Path(folder)
