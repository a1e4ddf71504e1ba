"""Sources: the folder of a model, from the name that a user passes.

Pipeline: name, path or hub id -> [models.loading.sources] -> folder.
"""

import os
import pathlib
import re

RANDOM = "random:"
_HUB = "hf://"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Files to download from a repository. Code and pickle are not downloaded.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_BUNDLED = pathlib.Path(__file__).resolve().parents[2] / "data"


def is_random(name: str | os.PathLike[str]) -> bool:
    """Whether a name selects random weights, as "random:llama-3-8b" does."""
    return os.fspath(name).startswith(RANDOM)


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with the package, sorted."""
    return tuple(sorted(file.parent.name for file in _BUNDLED.glob("*/config.json")))


def bundled_path(name: str) -> pathlib.Path:
    """Folder of a bundled model, in Hugging Face layout.

    Raises:
      ValueError: no bundled model has this name.
    """
    if name not in bundled_models():
        raise ValueError(
            f"name: expected a bundled model, one of {bundled_models()}, got {name!r}; "
            "for a model of your own, pass its folder instead"
        )
    return _BUNDLED / name


def find_folder(name: str | os.PathLike[str]) -> pathlib.Path:
    """Folder of a model: a path, the name of a bundled model, or a hub id.

    A hub id is "org/name" or "hf://org/name". huggingface_hub finds it in its cache or
    downloads it. An existing folder "org/name" has precedence over the hub.

    Raises:
      FileNotFoundError: there is no such folder, or the hub does not provide the model.
    """
    text = os.fspath(name)
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB).strip("/"))
    if text in bundled_models():
        return bundled_path(text)
    folder = pathlib.Path(text).expanduser()
    if folder.is_dir():
        return folder
    if not folder.exists() and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _download(text)
    raise FileNotFoundError(
        f"model: {text}: no such folder; expected a folder in Hugging Face layout, a "
        f"bundled model ({', '.join(bundled_models())}) or a hub id (org/name or "
        "hf://org/name)"
    )


def _download(hub_id: str) -> pathlib.Path:
    """Folder of a hub model in huggingface_hub's cache."""
    if not _HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(
            f"model: expected a hub id like org/name, got {hub_id!r}"
        )
    manual = f"download it elsewhere: hf download {hub_id} --local-dir FOLDER"
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"model: {hub_id}: no such folder, and hub ids need huggingface_hub: "
            f"pip install 'jpaged[hub]'; or {manual}"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=_PATTERNS)
    # Its errors and those of its HTTP libraries have no common base class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"model: {hub_id}: no such folder, and the hub did not provide it "
            f"({reason:.300}). Check the id and the connection to the hub, or {manual}"
        ) from error
    return pathlib.Path(folder)
