"""Both towers as ONNX graphs, `image.onnx` and `text.onnx`, each with its weights, and what else a program needs.

Graphs larger than 1.6 GB keep their weights beside them (`image.onnx.data`): a protocol buffer ends at 2 GB.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_exp.config.base import plain
from clip_exp.config.model import ModelConfig
from clip_exp.export.compare import Encoders
from clip_exp.export.preprocessor import write_preprocessor
from clip_exp.export.tokenizer_files import write_ready
from clip_exp.models.clip import CLIP

IMAGE, TEXT, CONFIG = "image.onnx", "text.onnx", "clip_config.json"
OPSET = 20  # the first with GELU; onnxruntime 1.17 and later


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write the two graphs, `clip_config.json`, `preprocessor_config.json` and the tokenizer's files.

    The batch is of any size. So is a text's length up to the context, see `any_length`.
    """
    size, length = config.image.image_size, config.text.context_length
    batch = torch.export.Dim("batch")
    trims = any_length(model, config)
    text_axes = {0: batch, 1: torch.export.Dim("length", max=length)} if trims else {0: batch}
    # Not 1 long: the exporter takes an axis of length 1 for one that is always so.
    image, tokens = torch.zeros(2, 3, size, size), torch.zeros(2, length, dtype=torch.int64)
    _write_graph(_tower(model, "image"), image, {0: batch}, folder / IMAGE, not config.image.foreign)
    _write_graph(_tower(model, "text"), tokens, text_axes, folder / TEXT, not config.text.foreign)
    (folder / CONFIG).write_text(json.dumps(_about(model, config, trims), indent=2) + "\n", encoding="utf-8")
    write_preprocessor(folder, config.image)
    write_ready(folder, config.text, trims)


def any_length(model: CLIP, config: ModelConfig) -> bool:
    """Whether a batch of texts may be cut to its longest: the tower is causal and pooled at the end of a text."""
    return model.shares_prefixes and config.text.trims


def read(folder: Path, config: ModelConfig) -> Encoders:
    """The towers as onnxruntime runs them from what was written, on the CPU."""
    import onnxruntime  # an extra

    def runner(name: str) -> Any:
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        feed = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0])

    return Encoders(runner(IMAGE), runner(TEXT))


def _tower(model: CLIP, name: str) -> nn.Module:
    """A module that takes what the tower takes, and returns its features with unit norm."""

    class ImageEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Tensor:
            return self.model.encode_image(image, normalize=True)

    class TextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model.encode_text(tokens, normalize=True)

    return ImageEncoder() if name == "image" else TextEncoder()


def _write_graph(tower: nn.Module, example: Tensor, axes: dict[int, Any], path: Path, ours: bool) -> None:
    """Trace a tower and write its graph.

    Args:
        axes: of the input, those of any length.
        ours: traced strictly, since only so `len(x)` is understood as an axis, and not as the number that it is for the
            example. Other libraries do things besides computing, which a strict trace refuses.
    """
    name = "image" if path.name == IMAGE else "tokens"
    shapes = {name: axes}
    program = torch.export.export(tower.eval(), (example,), dynamic_shapes=shapes, strict=ours)
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=[name],
        output_names=[f"{path.stem}_features"],
        opset_version=OPSET,
        verbose=False,
    )
    assert onnx_program is not None
    _forget_origins(onnx_program.model.graph)
    onnx_program.save(path)


def _forget_origins(graph: Any) -> None:
    """Take out where in this machine's files each node was defined."""
    graph.metadata_props.clear()
    for value in graph.inputs:
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _about(model: CLIP, config: ModelConfig, trims: bool) -> dict[str, Any]:
    """What a program needs to turn cosines into probabilities, and texts into tokens."""
    return {
        "model": config.name,
        "embed_dim": config.embed_dim,
        "image_size": config.image.image_size,
        "context_length": config.text.context_length,
        "text_length": "any" if trims else "context_length",
        "logit_scale": float(model.logit_scale.exp()),
        "logit_bias": None if model.logit_bias is None else float(model.logit_bias),
        "activation": plain(config.activation),
    }
