"""Bundled models: the folders of the small models that come with the package.

Place on the road: name of a model -> [bundled] -> its folder -> models, text.
"""

import pathlib

_DATA = pathlib.Path(__file__).resolve().parents[2] / "data"


def bundled_models() -> tuple[str, ...]:
    """Names of the bundled models, sorted."""
    return tuple(sorted(file.parent.name for file in _DATA.glob("*/config.json")))


def bundled_path(name: str) -> pathlib.Path:
    """Folder of a bundled model, in Hugging Face layout.

    Raises:
      ValueError: no bundled model has this name.
    """
    if name not in bundled_models():
        raise ValueError(
            f"name: expected a bundled model, one of {bundled_models()}, got {name!r}; "
            "for a model of your own pass its folder instead"
        )
    return _DATA / name
