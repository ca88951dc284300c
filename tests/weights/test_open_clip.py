import torch

from clip_exp.models import build_model
from clip_exp.weights import from_open_clip, to_open_clip
from tests.models.small import open_clip_twin, small_config


def test_weights_go_to_open_clip_and_back_unchanged() -> None:
    model = build_model(small_config())
    twin = open_clip_twin(model)  # loads strictly
    back = from_open_clip(twin.state_dict())
    model.load_state_dict(back, strict=True)
    theirs, again = twin.state_dict(), to_open_clip(back)
    assert again.keys() == theirs.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].shape == tensor.shape for name, tensor in theirs.items()
    )


def test_bias_of_the_sigmoid_loss_has_no_axis_there_and_one_here() -> None:
    model = build_model(small_config(), init_logit_bias=-10.0)
    theirs = to_open_clip(model.state_dict())
    assert theirs["logit_scale"].shape == theirs["logit_bias"].shape == torch.Size([])
    ours = from_open_clip(theirs)
    assert ours["logit_scale"].shape == ours["logit_bias"].shape == torch.Size([1])


def test_prefix_of_distributed_training_and_what_is_no_weight_are_left_out() -> None:
    state = build_model(small_config()).state_dict()
    theirs = {f"module.{name}": tensor for name, tensor in to_open_clip(state).items()}
    theirs |= {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    ours = from_open_clip(theirs)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
