"""How long a step may be silent follows from the steps before it, and from the keys."""

import pytest

from clip_exp.training.liveness import Liveness
from tests.compose import train_config


@pytest.mark.parametrize(
    ("words", "times", "limit_s"),
    [
        ((), [0.1] * 10, 300),
        ((), [20.0, 20.0, 21.0], 20 * (61 / 3)),
        ((), [60.0] + 9 * [1.0], 300),  # one step that compiled
        (("hang_timeout_s=10", "data.timeout_s=4"), [0.1], 10),
        # A rank waits in its step for another that waits for its data.
        (("hang_timeout_s=10", "data.timeout_s=40"), [0.1], 50),
        (("hang_timeout_s=10", "data.timeout_s=null"), [0.1], 10),
        # A process that is ahead of its GPU waits for ten steps in one.
        (("hang_timeout_s=10", "data.timeout_s=4"), [*[0.1] * 9, 60.0] * 3, 20 * 6.09),
    ],
)
def test_the_limit_of_a_step(words: tuple[str, ...], times: list[float], limit_s: float) -> None:
    liveness = Liveness(train_config("trainer.accelerator=cpu", *words))
    liveness.times.extend(times)
    assert liveness.limit_s == pytest.approx(limit_s)
