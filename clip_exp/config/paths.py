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
