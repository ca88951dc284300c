"""How tables are to be read: what a run's configuration says of it."""

from dataclasses import asdict, dataclass
from typing import Any

from clip_exp.config.data_schema import DataConfig, OnBadRow


@dataclass(frozen=True)
class TableOptions:
    """How a table is read. Two readings by equal options of an unchanged file give equal rows.

    Attributes:
        image_key, caption_key, label_key: names of the columns; captions and labels are optional.
        separator, encoding: of delimited text: `auto`, or what they are.
        on_bad_row: `error`, or `skip` to leave bad rows out and count them by reason.
        filter: which rows are kept (`tables.filters`); None: all.
        max_rows: stop after that many rows.
    """

    image_key: str = "filepath"
    caption_key: str | None = "title"
    label_key: str | None = None
    separator: str = "auto"
    encoding: str = "auto"
    on_bad_row: OnBadRow = OnBadRow.error
    filter: str | None = None
    max_rows: int | None = None

    @classmethod
    def of(cls, config: DataConfig, *, label_key: str | None = None, max_rows: int | None = None) -> "TableOptions":
        """As a run's configuration says."""
        return cls(
            config.image_key,
            config.caption_key,
            label_key,
            config.separator,
            config.encoding,
            config.on_bad_row,
            config.filter,
            max_rows,
        )

    @property
    def wanted(self) -> dict[str, str]:
        """Key of the configuration (`image_key`, …) to the name of the column."""
        wanted = {"image_key": self.image_key, "caption_key": self.caption_key, "label_key": self.label_key}
        return {setting: name for setting, name in wanted.items() if name is not None}

    def as_json(self) -> dict[str, Any]:
        """For the identity of an index. What happens to bad rows is not part of it: where there are none, the rows are the same."""
        return {name: value for name, value in asdict(self).items() if name != "on_bad_row"}
