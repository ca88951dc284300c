"""An index of pictures that is open for questions."""

from pathlib import Path
from typing import TYPE_CHECKING

from clip_exp.errors import ConfigError
from clip_exp.evaluation.metrics import require_finite
from clip_exp.inference.index import full_path, read_entries, stored_path
from clip_exp.inference.media import Picture
from clip_exp.inference.ranking import Match, best, cosines

if TYPE_CHECKING:
    from clip_exp.inference.pipeline import Pipeline


class PictureIndex:
    """Made by `Pipeline.index`, or `clip-exp search`. Its features stay in the file, which is mapped into memory.

    Args:
        path: of the file.
        clip: the model that made it.
    """

    def __init__(self, path: Path, clip: "Pipeline") -> None:
        self.path, self.clip = path, clip
        self._entries = read_entries(path)

    def __len__(self) -> int:
        return len(self._entries.paths)

    @property
    def paths(self) -> list[str]:
        """Of the pictures and videos, sorted; relative to the current folder where they are below it."""
        return [self._shown(index) for index in range(len(self))]

    def search(self, text: str | None = None, *, image: Picture | None = None, top: int = 10) -> list[Match]:
        """The pictures that fit a text, or are most like a picture or video: by exact cosine, best first.

        Raises:
            ConfigError: not exactly one of text and image, or `top` is below 1.
            DataError: the picture cannot be read.
        """
        if (text is None) == (image is None) or top < 1:
            raise ConfigError('give a text or a picture, and a top above 0: search("two dogs"), search(image="a.jpg").')
        query = self.clip.encode_text(text) if text is not None else self.clip.encode_image(image)  # type: ignore[arg-type]
        require_finite(query, "features of the query")
        scores = cosines(self._entries.features, query[0])
        return [Match(self._shown(index), scores[index].item(), index) for index in best(scores, top).tolist()]

    def _shown(self, index: int) -> str:
        return stored_path(full_path(self._entries.paths[index], self.path.parent), Path.cwd())
