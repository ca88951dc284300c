"""Export of both towers as ONNX graphs with weights, `image.onnx` and `text.onnx`, with preprocessing and tokenizer.

Weights of graphs larger than 1.6 GB are in separate files (`image.onnx.data`), since a protocol buffer is limited to 2
GB.
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
# First opset with GELU; requires onnxruntime 1.17
OPSET = 20


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write the two graphs, `clip_config.json`, `preprocessor_config.json` and the tokenizer's files.

    The batch size is dynamic. So is the length of texts, up to the context length, if `any_length` is True.
    """
    size, length = config.image.image_size, config.text.context_length
    batch = torch.export.Dim("batch")
    trims = any_length(model, config)
    text_axes = {0: batch, 1: torch.export.Dim("length", max=length)} if trims else {0: batch}
    # The batch size of the example must not be 1, since the exporter treats axes of length 1 as constant.
    image, tokens = torch.zeros(2, 3, size, size), torch.zeros(2, length, dtype=torch.int64)
    _write_graph(_tower(model, "image"), image, {0: batch}, folder / IMAGE, not config.image.foreign)
    _write_graph(_tower(model, "text"), tokens, text_axes, folder / TEXT, not config.text.foreign)
    (folder / CONFIG).write_text(json.dumps(_about(model, config, trims), indent=2) + "\n", encoding="utf-8")
    write_preprocessor(folder, config.image)
    write_ready(folder, config.text, trims)


def any_length(model: CLIP, config: ModelConfig) -> bool:
    """Return True if a batch of texts may be truncated to its longest text: the tower is causal and pools at the end of a text."""
    return model.shares_prefixes and config.text.trims


def read(folder: Path, config: ModelConfig) -> Encoders:
    """Load the exported towers with onnxruntime, on the CPU."""
    # Optional dependency
    import onnxruntime

    def runner(name: str) -> Any:
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        feed = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0])

    return Encoders(runner(IMAGE), runner(TEXT))


def _tower(model: CLIP, name: str) -> nn.Module:
    """Return a module with the input of a tower that returns normalized features."""

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
        tower: module to trace.
        example: example input.
        axes: dynamic axes of the input.
        path: path of the graph.
        ours: whether the tower is implemented in clip_exp. Only a strict trace treats `len(x)` as a dynamic axis
            instead of the constant of the example. Towers of other libraries may contain code with side effects, for
            which a strict trace fails.
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
    """Remove metadata with paths of source files on this machine from all nodes."""
    graph.metadata_props.clear()
    for value in graph.inputs:
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _about(model: CLIP, config: ModelConfig, trims: bool) -> dict[str, Any]:
    """Return the values that a program needs to compute probabilities from cosine similarities, and to tokenize texts."""
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
