"""`${oc.env:NAME}` in a configuration, for variables that are not named like secrets: a run's folder keeps what it resolves to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.resolvers import oc

from clip_exp.errors import ConfigError
from clip_exp.secrets import names_secret

RESOLVER = "oc.env"


@contextmanager
def secrets_refused() -> Iterator[None]:
    """Refuse to resolve secrets meanwhile; a program that uses clip_exp keeps its resolver."""
    resolvers = BaseContainer._resolvers  # OmegaConf can set a resolver, but not return the one that is set
    before = resolvers[RESOLVER]
    OmegaConf.register_new_resolver(RESOLVER, environment_variable, replace=True)
    try:
        yield
    finally:
        resolvers[RESOLVER] = before


def environment_variable(name: str, *default: Any) -> Any:
    """Return what `${oc.env:<name>}` stands for.

    Raises:
        ConfigError: the variable is named like a secret, set or not.
    """
    if names_secret(name):
        raise ConfigError(
            f"${{oc.env:{name}}} is refused: {name} is named like a secret, and a run's folder keeps its configuration. Leave a "
            "secret in the environment, where the library that needs it looks for it; give anything else in a variable with "
            "another name."
        )
    return oc.env(name, *default)
