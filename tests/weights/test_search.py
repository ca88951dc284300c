"""Tests of finding weights in files of various trainers, and of selecting one of several complete candidates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.siglip import SigLIPImageConfig, SigLIPTextConfig
from clip_exp.weights.fit import check_weights, load_weights
from clip_exp.weights.names import to_huggingface, to_open_clip
from tests.models.small import batch, small_config

State = dict[str, Tensor]
CONFIG = small_config()


def drawn(seed: int, config: ModelConfig = CONFIG) -> CLIP:
    torch.manual_seed(seed)
    model = build_model(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def model() -> CLIP:
    return drawn(0)


@pytest.fixture(scope="module")
def other() -> State:
    return drawn(1).state_dict()


def assert_loads(path: Path, expected: CLIP, prefix: str | None = None) -> list[str]:
    """Load into a fresh model, compare features, and return the notes."""
    check_weights(path, CONFIG, prefix)
    loaded = drawn(2)
    notes = load_weights(loaded, path, CONFIG, prefix)
    image_BCHW, tokens_BL = batch(3)
    with torch.inference_mode():
        for encode in ("encode_image", "encode_text"):
            inputs = image_BCHW if encode == "encode_image" else tokens_BL
            actual, wanted = getattr(loaded, encode)(inputs), getattr(expected, encode)(inputs)
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert torch.equal(loaded.logit_scale, expected.logit_scale)
    return notes


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state: State) -> State:
    """Return weights with FSDP's names of a tower and its blocks, under torch.compile."""
    wrapper = "_fsdp_wrapped_module."
    return {
        f"_orig_mod.{name.replace('.resblocks.0.', f'.resblocks.0.{wrapper}').replace('visual.', f'visual.{wrapper}')}": tensor
        for name, tensor in state.items()
    }


ADAM = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
TEACHER = {f"teacher.{name}": torch.ones(2) for name in ("visual.conv1.weight", "head.weight")}  # another architecture

FILES: dict[str, tuple[Callable[[State], Any], str]] = {
    "model_state_dict": (lambda state: {"model_state_dict": state, "optimizer_state_dict": ADAM}, "optimizer_state_dict"),
    "net": (lambda state: {"net": state, "epoch": 1}, ""),
    "any key": (lambda state: {"the clip of mine": state}, ""),
    "two levels": (lambda state: {"checkpoint": {"model": below("module.", state)}}, ""),
    "Lightning's attribute": (lambda state: {"state_dict": below("net.", state), "optimizer_states": [ADAM]}, "optimizer_states"),
    "Lightning next to a teacher": (lambda state: {"state_dict": below("model.", state) | TEACHER}, "teacher (2 tensors)"),
    "an attribute of an attribute": (lambda state: {"state_dict": below("net.clip.", state)}, ""),
    "a loss with parameters": (lambda state: {"state_dict": below("clip.", state) | {"loss.margin": torch.ones(1)}}, "loss"),
    "next to its loss at the top": (lambda state: state | {"criterion.weight": torch.ones(1)}, "criterion"),
    "torch.compile": (lambda state: below("_orig_mod.", state), ""),
    "Lightning, compiled and distributed": (lambda state: {"state_dict": below("model._orig_mod.module.", state)}, ""),
    "Lightning's DeepSpeed": (lambda state: {"module": below("_forward_module.net.", state), "ds_version": "0.14"}, ""),
    "FSDP inside": (lambda state: {"model": wrapped(state)}, ""),
    "an average beside": (lambda state: {"model": state, "ema": {name: 2 * x for name, x in state.items()}}, "ema"),
    "an average alone": (lambda state: {"ema_state_dict": state | {"n_averaged": torch.ones(1)}}, "n_averaged"),
    "numbers of numpy": (lambda state: {"state_dict": state, "best": np.float64(0.5), "mean": np.ones(3), "name": np.array(["a"])}, ""),
    "a state of numpy's generator": (lambda state: {"state_dict": state, "rng": np.random.get_state()}, ""),
}  # fmt: skip


@pytest.mark.parametrize("trainer", FILES)
@pytest.mark.parametrize("layout", ["ours", "open_clip", "transformers"])
def test_weights_are_found_in_files_of_all_trainers(trainer: str, layout: str, model: CLIP, tmp_path: Path) -> None:
    write, left = FILES[trainer]
    config = small_config()
    states = {
        "ours": model.state_dict,
        "open_clip": lambda: to_open_clip(model.state_dict()),
        "transformers": lambda: to_huggingface(model.state_dict(), config),
    }
    torch.save(write(states[layout]()), tmp_path / "last.ckpt")
    notes = assert_loads(tmp_path / "last.ckpt", model)
    assert [left in note for note in notes] == ([True] if left else [])


def test_prefixes_are_found_in_safetensors_too(model: CLIP, tmp_path: Path) -> None:
    state = below("module.net.", to_open_clip(model.state_dict())) | {"module.loss.scale": torch.ones(1)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "any.safetensors")
    (note,) = assert_loads(tmp_path / "any.safetensors", model)
    assert note.endswith("any.safetensors (net); left out: loss.")


STUDENTS: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    "prefixes": (lambda a, b: {"state_dict": below("student.", a) | below("teacher.", b)}, "state_dict.student", "state_dict.teacher"),
    "keys": (lambda a, b: {"student": a, "teacher": b}, "student", "teacher"),
    "at the top": (lambda a, b: a | below("teacher.", b), "''", "teacher"),
}  # fmt: skip


@pytest.mark.parametrize("where", STUDENTS)
def test_if_two_candidates_fit_both_are_named_and_one_can_be_selected(
    where: str, model: CLIP, other: State, tmp_path: Path
) -> None:
    write, first, second = STUDENTS[where]
    path = tmp_path / "last.ckpt"
    torch.save(write(to_open_clip(model.state_dict()), to_open_clip(other)), path)
    for refused in (lambda: load_weights(drawn(2), path, CONFIG), lambda: check_weights(path, CONFIG)):
        with pytest.raises(CheckpointError) as caught:
            refused()
        assert str(caught.value) == (
            f"{path} has 2 complete sets of weights of the model. Select one: pretrained_prefix={first}, pretrained_prefix={second}."
        )
    teacher = build_model(CONFIG).eval()
    teacher.load_state_dict(other)
    assert_loads(path, model, first.strip("'"))
    assert_loads(path, teacher, second)
    (note,) = assert_loads(path, teacher, "teacher.")
    assert ("student" if "student" in first else "visual") in note


def test_of_two_sizes_that_of_the_model_is_read(model: CLIP, tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"image": CONFIG.image.model_copy(update={"width": 80})})
    torch.save(
        below("student.", model.state_dict()) | below("teacher.", drawn(1, wide).state_dict()), tmp_path / "a.pt"
    )
    (note,) = assert_loads(tmp_path / "a.pt", model)
    assert "teacher (" in note


def test_averaged_weights_are_read_if_selected(model: CLIP, other: State, tmp_path: Path) -> None:
    torch.save({"state_dict": other, "state_dict_ema": below("module.", model.state_dict())}, tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt", model, "state_dict_ema")
    (note,) = load_weights(drawn(2), tmp_path / "a.pt")
    assert note.endswith("state_dict_ema. For averaged weights, set pretrained_prefix=state_dict_ema.")


def refusal(content: Any, path: Path, prefix: str | None = None) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as early:
        check_weights(path, CONFIG, prefix)
    with pytest.raises(CheckpointError) as caught:
        load_weights(drawn(2), path, CONFIG, prefix)
    assert str(early.value) == str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_named_under_the_nearest_prefix(model: CLIP, tmp_path: Path) -> None:
    state = to_open_clip(model.state_dict())
    del state["logit_scale"], state["ln_final.weight"]
    message = refusal({"state_dict": below("net.", state) | TEACHER}, tmp_path / "a.pt")
    assert (
        "a.pt (state_dict.net) does not fit the model.\n  missing in the file: logit_scale, text.ln_final.weight\n"
        in message
    )
    assert message.endswith("weights.")
    assert "select the model" not in message


def test_weights_of_a_larger_model_are_not_cut_to_a_smaller_one(tmp_path: Path) -> None:
    deep = CONFIG.model_copy(update={"text": CONFIG.text.model_copy(update={"layers": 3})})
    message = refusal({"state_dict": below("net.", drawn(0, deep).state_dict())}, tmp_path / "a.pt")
    assert "not in the model: text.transformer.blocks.2.* (12 weights)" in message


def test_an_unknown_prefix_is_reported_with_the_available_ones(model: CLIP, tmp_path: Path) -> None:
    message = refusal({"state_dict": below("net.", model.state_dict())}, tmp_path / "a.pt", "student")
    assert message.endswith(
        "pretrained_prefix=student matches no weights of the model. The file has pretrained_prefix=state_dict.net."
    )
    message = refusal({"a": torch.ones(1)}, tmp_path / "a.pt", "a")
    assert message.endswith("The file has none.")


def test_an_object_next_to_weights_is_still_refused(model: CLIP, tmp_path: Path) -> None:
    message = refusal({"state_dict": model.state_dict(), "path": Path("a")}, tmp_path / "a.pt")
    assert "unsafe: its pickle loads pathlib" in message


@pytest.mark.parametrize("below_latest", [True, False])
def test_a_lightning_folder_of_deepspeed_is_read(below_latest: bool, model: CLIP, tmp_path: Path) -> None:
    checkpoint = tmp_path / "epoch=0-step=10.ckpt" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("checkpoint\n")
    content = {"module": below("net.", to_open_clip(model.state_dict())), "optimizer": None, "global_steps": 10}
    torch.save(content, checkpoint / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": ADAM}, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_loads(checkpoint.parent if below_latest else checkpoint, model)


def test_shards_of_deepspeed_are_refused_with_the_command_that_merges_them(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("checkpoint")
    (tmp_path / "checkpoint").mkdir()
    shard = tmp_path / "checkpoint" / "mp_rank_01_model_states.pt"
    for file in (shard, shard.with_name("mp_rank_00_model_states.pt")):
        file.touch()
    with pytest.raises(CheckpointError, match="model parallelism over 2 ranks"):
        check_weights(tmp_path, CONFIG)
    shard.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"shards of DeepSpeed ZeRO-3.*python .*zero_to_fp32\.py"):
        check_weights(tmp_path, CONFIG)


def test_a_siglip_of_transformers_is_found_under_a_prefix(tmp_path: Path) -> None:
    text = SigLIPTextConfig(context_length=77, vocab_size=500, width=48, layers=2, heads=3, tokenizer="none")
    image = SigLIPImageConfig(image_size=32, patch_size=8, width=64, layers=2, heads=4)
    config = CONFIG.model_copy(update={"image": image, "text": text, "embed_dim": 64})
    source, loaded = drawn(0, config), drawn(1, config)
    torch.save({"state_dict": below("model.net.", to_open_clip(source.state_dict(), config))}, tmp_path / "a.ckpt")
    check_weights(tmp_path / "a.ckpt", config)
    load_weights(loaded, tmp_path / "a.ckpt", config)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("missing", ["visual.class_embedding", "token_embedding.weight"])
def test_what_an_incomplete_file_lacks_is_named_by_our_names(missing: str, tmp_path: Path) -> None:
    """Also if the kind of tower is recognized by the missing weight."""
    state = to_open_clip(drawn(0, CONFIG).state_dict(), CONFIG)
    del state[missing]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        check_weights(tmp_path / "a.pt", CONFIG)
    ours = {"visual.class_embedding": "image.class_embedding"}.get(missing, f"text.{missing}")
    assert f"missing in the file: {ours}" in str(caught.value)
    assert "not in the model" not in str(caught.value)
    assert "the file is incomplete" in str(caught.value)
