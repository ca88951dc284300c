"""The mark of a mandatory value, as OmegaConf spells it. Schemas take it from here, so that importing one loads no OmegaConf."""

from typing import Any

MISSING: Any = "???"
