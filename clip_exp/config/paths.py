"""Where the YAML files are."""

from pathlib import Path

from clip_exp.errors import ConfigError


def conf_dir() -> Path:
    """The folder `conf/`: inside the package when it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(
        f"conf/ is missing: looked in {package / 'conf'} and {package.parent / 'conf'}; reinstall clip_exp."
    )


def options(group: str) -> list[str]:
    """The names of a configuration group's options, sorted: `options("model")` -> ["vit_b16", ...]."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def folder_or_hub_name(name: str) -> str:
    """What Hugging Face's `from_pretrained` takes: a folder that is here, or a name on the hub, which has at most one slash.

    Raises:
        FileNotFoundError: it can only be a folder, and is not there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError("there is no such folder")
    return name
