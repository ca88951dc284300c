"""Tests of averages of a fine-tuned run and its initial weights: exact at both ends, and never confused with either."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_exp.api import evaluate, load
from clip_exp.config.commands import ExportConfig
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import InferenceConfig
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.inference.index import Entries, read_recipe, recipe_of, write_index
from clip_exp.loading import find_source, load_model
from clip_exp.models.clip import CLIP, build_model
from clip_exp.weights.find import hash_weights
from tests.small_runs import write_run


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "start.safetensors"
    save_file(build_model(named_model("vit_nano")).state_dict(), path)
    return path


@pytest.fixture
def tuned(tmp_path: Path, nano: CLIP, start: Path) -> Path:
    """Train a run that starts from `start`."""
    folder = write_run(tmp_path / "tuned", nano)
    record = {"pretrained": {"path": str(start), "sha256": hash_weights(start)}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def mixture(run: Path, share: float) -> dict[str, torch.Tensor]:
    return load_model(find_source(InferenceConfig(run=str(run), wise_ft=share))).state_dict()


def test_fraction_0_is_the_initial_weights_and_fraction_1_the_run_to_the_bit(
    tuned: Path, start: Path, nano: CLIP
) -> None:
    for share, expected in ((0.0, load_file(start)), (1.0, nano.state_dict())):
        found = mixture(tuned, share)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_fraction_0_5_is_the_mean_and_0_25_lies_between(tuned: Path, start: Path, nano: CLIP) -> None:
    before, after = load_file(start), nano.state_dict()
    half, quarter = mixture(tuned, 0.5), mixture(tuned, 0.25)
    for name in after:
        assert torch.equal(half[name], (before[name] + after[name]) / 2)
        torch.testing.assert_close(quarter[name], torch.lerp(before[name], after[name], 0.25))


def test_every_command_with_a_model_supports_it(tuned: Path) -> None:
    checkpoint = tuned / "checkpoints" / "step-000001"
    mix = find_source(InferenceConfig(ckpt=str(checkpoint), wise_ft=0.5)).mix
    assert mix is not None
    assert mix == find_source(ExportConfig(run=str(tuned), wise_ft=0.5)).mix


def test_features_of_different_fractions_are_never_confused(tuned: Path, tmp_path: Path) -> None:
    sources = [find_source(InferenceConfig(run=str(tuned), wise_ft=share)) for share in (None, 0.0, 0.5, 1.0)]
    assert len({source.sha256() for source in sources}) == 4
    # An index remembers its mixture, and opens with it.
    recipe = recipe_of(sources[2], "32-true", 8)
    one = torch.ones(1, dtype=torch.int64)
    write_index(tmp_path / "some.index", recipe, Entries(["a.png"], one, one.clone(), one.clone(), torch.ones(1, 64)))
    assert read_recipe(tmp_path / "some.index").source.mix == sources[2].mix
    assert read_recipe(tmp_path / "some.index").source.sha256() == sources[2].sha256()


def test_an_evaluation_records_the_average_and_does_not_replace_scores_of_the_run(tuned: Path, tmp_path: Path) -> None:
    common = (f"run={tuned}", "task=digits", f"output_dir={tmp_path}", "accelerator=cpu", "num_workers=0")
    scores = [evaluate(*common, f"wise_ft={share}")["digits"] for share in (0.0, 0.5)]
    assert [score["protocol"]["wise_ft"]["share"] for score in scores] == [0.0, 0.5]
    assert scores[0]["metrics"] != scores[1]["metrics"]  # the cache kept both apart
    assert not (tuned / "eval").exists()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(tuned: Path, share: float) -> None:
    with pytest.raises(ConfigError, match=r"from 0 to 1"):
        load(tuned, wise_ft=share)
    with pytest.raises(ConfigError, match=rf"wise_ft={share} must be at (least 0|most 1)\."):
        compose("evaluate", [f"run={tuned}", f"wise_ft={share}"])


def test_a_run_from_random_weights_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no `pretrained`"):
        find_source(InferenceConfig(run=str(run_dir), wise_ft=0.5))


def test_weights_without_a_run_are_refused(start: Path) -> None:
    with pytest.raises(ConfigError, match=r"wise_ft needs run=DIR"):
        find_source(InferenceConfig(model=named_model("vit_nano"), pretrained=str(start), wise_ft=0.5))


def test_missing_or_changed_initial_weights_are_refused(tuned: Path, start: Path, nano: CLIP) -> None:
    save_file(nano.state_dict(), start)
    with pytest.raises(CheckpointError, match=r"have changed"):
        find_source(InferenceConfig(run=str(tuned), wise_ft=0.5))
    start.unlink()
    with pytest.raises(CheckpointError, match=r"not found: restore"):
        find_source(InferenceConfig(run=str(tuned), wise_ft=0.5))


def test_the_python_api_supports_it(tuned: Path, start: Path) -> None:
    found = load(tuned, wise_ft=0.5).model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in mixture(tuned, 0.5).items())
    with pytest.raises(ConfigError, match="wise_ft needs a run"):
        load("vit_nano", pretrained=start, wise_ft=0.5)
