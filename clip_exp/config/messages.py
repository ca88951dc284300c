"""Messages for errors of Hydra and OmegaConf that the user can fix."""

from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from clip_exp.config import words
from clip_exp.config.base import GLOBAL_GROUPS
from clip_exp.config.files import options
from clip_exp.config.names import names
from clip_exp.errors import ConfigError, nearest


def from_resolver(error: BaseException | None) -> ConfigError | None:
    """Return the ConfigError that a resolver raised and OmegaConf wrapped; None if there is none."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def explain(error: BaseException) -> str | None:
    """Return a message for an error that the user can fix: of clip_exp, Hydra or OmegaConf, or a missing permission. Else return None."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename}: permission denied. Change its permissions, or give another path."
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and (refused := from_resolver(cause)) is not None:
            return str(refused)
        if isinstance(cause, OverrideParseException):
            return f"cannot parse the override {cause.override}: write key=value, and quote special characters: \"key='value'\"."
        if isinstance(cause, MissingConfigException):
            return _missing_option(cause)
    for cause in reversed(chain):
        if isinstance(cause, OmegaConfBaseException) and (cause.full_key or cause.key) is not None:
            return f"{cause.full_key or cause.key}: {str(getattr(cause, 'msg', None) or cause).splitlines()[0]}"
    return next((" ".join(str(cause).split()) for cause in chain if isinstance(cause, HydraException)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing_option(error: MissingConfigException) -> str:
    file = error.missing_cfg_file or ""
    group, _, name = file.rpartition("/")
    # Hydra gives no options if the override was a list.
    found = error.options or (options(group) if group else [])
    recipes, _, of_group = group.partition("/")
    if not found and recipes in GLOBAL_GROUPS and name in options(of_group):
        return (
            f"a recipe of {recipes} selects {of_group}: {name} without a leading slash. Write '- override /{of_group}: {name}' in its "
            "defaults."
        )
    if not found:
        return " ".join(str(error).split())
    if file.startswith("model/") and not file.startswith(("model/image/", "model/text/")):
        # The name may contain a slash: ViT-B/32.
        name = file.removeprefix("model/")
        return f"model={name} does not exist: {nearest(name, {*found, *names()})}"
    choice = f"{group}={name}"
    return f"{choice} does not exist: {words.of_value(group, name) or nearest(name, found)}"
