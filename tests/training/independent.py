"""A training run computed once more, from the papers and docs/*.md: one process, the whole batch, float64, plain loops.

The towers' modules and the batches come from clip_exp; loss, gradient clipping, optimizers, schedules, rates, freezing, adapters,
averaging and random numbers are written here, from their formulas. Nothing below knows of a strategy: whatever the ranks do must
amount to this. ResNets are computed in float32: batch normalization over few samples, and ReLUs of what is nearly zero, make the
fourth digit of a gradient's norm depend on how the features are rounded.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.config.model import ModelConfig
from clip_exp.data.loader import Batch
from clip_exp.models.clip import CLIP, build_model

STEPS, BATCH = 8, 12
FREEZE_TOWERS_STEPS = 3
MAX_LOGIT_SCALE = {"softmax": math.log(100), "sigmoid": math.inf}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's pixels
RATES = {"adamw": 1e-3, "adam": 1e-3, "sgd": 0.05}
UNCLIPPED_SGD_RATE = 0.005  # where norms are a hundred, and a larger one magnifies rounding threefold in every step
WEIGHT_DECAY = 0.1
MOMENTUM, BETAS, EPS = 0.9, (0.9, 0.98), 1e-6
LORA_RANK, LORA_ALPHA = 4, 12.0
ADAPTED = {"lora": ("image", "text"), "lora of the text": ("text",)}  # towers
FROZEN: dict[str, dict[str, int | None]] = {  # towers, with their last blocks that learn; None: nothing learns
    "image frozen": {"image": None},
    "image frozen but two blocks": {"image": 2},
    "text frozen but its end": {"text": 0},
}


@dataclass(frozen=True)
class Recipe:
    """Options of a run. The first group decides what is computed; the second must not."""

    loss: str = "softmax"  # sigmoid
    matches: str = "own pair"  # equal captions, equal images, both
    captions: str = "random"  # all
    tower: str = "vit"  # resnet
    start: str = "random"  # weights
    logit_scale: float | None = None  # natural logarithm at the start; None: the loss's default
    tuning: str = "everything"  # see FROZEN and ADAPTED; or LP-FT
    lora_dropout: float = 0.0
    lr_factor: float = 1.0  # of the image tower
    layer_decay: float = 1.0  # of both towers
    optimizer: str = "adamw"  # see RATES
    schedule: str = "cosine"  # linear, constant
    final_factor: float = 0.0
    warmup: int | None = None  # steps; None: a tenth of them
    clip: float | None = 1.0
    ema: tuple[float, int] | None = None  # decay, steps between updates
    dropout: float = 0.0
    patch_dropout: float = 0.0
    micro_batch: int | None = None

    strategy: str = "auto"
    ranks: int = 1
    compiled: bool = False
    resumed: str = "never"  # under the same strategy, under another one


@dataclass
class Computed:
    """The outcome of a run: a value for each step, and the weights after the last one."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    logit_scale: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    averaged: dict[str, Tensor] = field(default_factory=dict)
    repeated: int = 0  # pairs that match although they are not the same pair
    limited: int = 0  # steps after which the logit scale was at a limit


# ------------------------------------------------------------------------------------------------------------ the loss


def matching(recipe: Recipe, batch: Batch) -> Tensor:
    """Which image (row) and text (column) of the batch belong together, by their pixels and tokens: bool [B, B]."""
    match = torch.eye(len(batch.tokens), dtype=torch.bool)
    if recipe.matches in ("equal captions", "both"):
        match |= (batch.tokens[:, None] == batch.tokens[None]).all(dim=2)
    if recipe.matches in ("equal images", "both"):
        pixels = batch.image.flatten(1)
        match |= (pixels[:, None] == pixels[None]).all(dim=2)
    return match


def contrastive_loss(
    loss: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, match: Tensor
) -> Tensor:
    """Softmax: Radford et al. 2021, figure 3, with a uniform target over the matches. Sigmoid: Zhai et al. 2023, algorithm 1."""
    image, text = (features / features.norm(dim=1, keepdim=True) for features in (image, text))
    logits = scale * image @ text.T
    if loss == "sigmoid":
        labels = match.to(logits) * 2 - 1
        return -F.logsigmoid(labels * (logits + bias)).sum() / len(logits)
    target = match / match.sum(dim=1, keepdim=True)
    to_text, to_image = (target * logits.log_softmax(dim=1)), (target * logits.T.log_softmax(dim=1))
    return -(to_text.sum() + to_image.sum()) / (2 * len(logits))


# ----------------------------------------------------------------------------------------------- what learns, how fast


def is_projection(name: str) -> bool:
    """Whether a weight maps a tower's channels to the shared space; in a ResNet the attention pooling does."""
    return name.startswith(("image.projection", "image.pool", "text.projection"))


def depths(names: Iterable[str], tower: str) -> tuple[dict[str, int], int]:
    """The depth of each weight of a tower: 0 for the embeddings, i for block i, L + 1 for what follows the L blocks; and L."""
    after = ("image.ln_post", "text.ln_final")
    block_of = {
        name: found[0] if (found := re.match(r"\w+\.(transformer\.blocks\.\d+|stages\.\d+\.\d+)\.", name)) else None
        for name in names
        if name.startswith(f"{tower}.")
    }
    blocks = list(dict.fromkeys(block for block in block_of.values() if block))
    return {
        name: blocks.index(block) + 1 if block else (len(blocks) + 1) * (is_projection(name) or name.startswith(after))
        for name, block in block_of.items()
    }, len(blocks)


def learns(recipe: Recipe, name: str, names: list[str]) -> bool:
    tower = name.split(".")[0]
    if tower not in ("image", "text"):
        return True  # the logit scale and bias
    if recipe.tuning in ADAPTED:
        return name.endswith((".A", ".B"))
    kept = FROZEN.get(recipe.tuning, {})
    if tower not in kept:
        return True
    of, blocks = depths(names, tower)
    unfrozen = kept[tower]
    return unfrozen is not None and of[name] > blocks - unfrozen


def base_rate(recipe: Recipe) -> float:
    return UNCLIPPED_SGD_RATE if recipe.optimizer == "sgd" and recipe.clip is None else RATES[recipe.optimizer]


def peak_rate(recipe: Recipe, name: str, names: list[str]) -> float:
    """The highest learning rate of a weight: slower towards the input (Clark et al. 2020), the base rate outside of the towers."""
    tower = name.split(".")[0]
    if tower not in ("image", "text"):
        return base_rate(recipe)
    of, blocks = depths(names, tower)
    lr_factor = recipe.lr_factor if tower == "image" else 1.0
    return base_rate(recipe) * lr_factor * recipe.layer_decay ** (blocks + 1 - of[name])


def is_decayed(name: str, weight: Tensor) -> bool:
    return weight.ndim >= 2 and "positional_embedding" not in name


def schedule(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step 0, 1, … over its peak: linear warm-up, then the decay of Loshchilov and Hutter 2017, or another."""
    warmup = steps // 10 if recipe.warmup is None else recipe.warmup
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    decay = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[recipe.schedule]
    return recipe.final_factor + (1 - recipe.final_factor) * decay


def rate(recipe: Recipe, step: int, name: str) -> float:
    """The learning rate of a weight over its peak. With LP-FT, towers have the schedule of the steps after the first ones."""
    if recipe.tuning == "LP-FT" and name.startswith(("image.", "text.")) and not is_projection(name):
        return (
            0.0
            if step < FREEZE_TOWERS_STEPS
            else schedule(recipe, step - FREEZE_TOWERS_STEPS, STEPS - FREEZE_TOWERS_STEPS)
        )
    return schedule(recipe, step, STEPS)


# ---------------------------------------------------------------------------------------------------------- optimizers


class Optimizer:
    """One weight's AdamW (Loshchilov and Hutter 2019), Adam (Kingma and Ba 2015) or SGD with momentum."""

    def __init__(self, kind: str, weight: Tensor, decay: float) -> None:
        self.kind, self.weight, self.decay = kind, weight, decay
        self.mean, self.square, self.steps = torch.zeros_like(weight), torch.zeros_like(weight), 0

    def step(self, gradient: Tensor, lr: float) -> None:
        self.steps += 1
        if self.kind == "adamw":
            self.weight *= 1 - lr * self.decay
        else:
            gradient = gradient + self.decay * self.weight
        if self.kind == "sgd":
            self.mean = MOMENTUM * self.mean + gradient
            self.weight -= lr * self.mean
            return
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** self.steps), self.square / (1 - BETAS[1] ** self.steps)
        self.weight -= lr * mean / (square.sqrt() + EPS)


# ----------------------------------------------------------------------------------------------------------- the model


class Adapted(nn.Module):
    """A linear layer W with a low-rank addition, W x + alpha / rank * B A x (Hu et al. 2022)."""

    def __init__(self, linear: nn.Linear, dropout: float) -> None:
        super().__init__()
        # Drawn as `peft` draws them: both as linear layers, then A once more; B starts at zero.
        self.A = nn.Linear(linear.in_features, LORA_RANK, bias=False).weight
        self.B = nn.Linear(LORA_RANK, linear.out_features, bias=False).weight
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        self.linear, self.dropout = linear, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.addition(F.dropout(x, self.dropout, self.training) if self.dropout else x)

    def addition(self, x: Tensor) -> Tensor:
        return LORA_ALPHA / LORA_RANK * (x @ self.A.T @ self.B.T)


def start(recipe: Recipe, config: ModelConfig, weights: Path, seed: int) -> CLIP:
    """The model before the first step: random weights are drawn from the run's seed, adapters after them."""
    torch.manual_seed(seed)
    scale = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10)}[recipe.loss]
    model = build_model(
        config,
        init_logit_scale=scale if recipe.logit_scale is None else recipe.logit_scale,
        init_logit_bias=-10.0 if recipe.loss == "sigmoid" else None,
    )
    if recipe.start == "weights":
        model.load_state_dict(load_file(weights), strict=False)  # which have no bias
    for tower in ADAPTED.get(recipe.tuning, ()):
        for block in model.get_submodule(f"{tower}.transformer.blocks"):
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    block.set_submodule(name, Adapted(layer, recipe.lora_dropout))
    return model.float() if recipe.tower == "resnet" else model.double()


def plain_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, adapters added to the layers that they belong to."""
    plain = {name.replace(".linear.", "."): value.clone() for name, value in state.items()}
    for name in [name for name in plain if name.endswith(".A")]:
        layer = name.removesuffix(".A")
        a, b = plain.pop(f"{layer}.A"), plain.pop(f"{layer}.B")
        plain[f"{layer}.weight"] += LORA_ALPHA / LORA_RANK * b @ a
    return plain


def set_modes(model: CLIP, learning: set[str], towers_frozen: bool) -> None:
    """What has weights of which none learns runs as in evaluation, and so do the frozen towers of LP-FT."""
    model.train(not towers_frozen)
    for path, module in model.named_modules():
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        if names and not learning & set(names):
            module.eval()


# ---------------------------------------------------------------------------------------------------------- one forward


def initial_random_states(seed: int, ranks: int) -> list[Tensor]:
    """What dropout draws from: a generator for each rank."""
    return [torch.Generator().manual_seed(seed + 1 + rank).get_state() for rank in range(ranks)]


def encode(tower: nn.Module, x: Tensor, micro_batch: int | None) -> Tensor:
    """Features of a rank's samples, in the chunks that batch normalization takes its statistics from and dropout is drawn for."""
    return torch.cat([tower(chunk) for chunk in x.split(micro_batch or len(x))])


def features(recipe: Recipe, model: CLIP, batch: Batch, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of the whole batch, which the ranks share in order; running statistics are those of the first one."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    pixels = ((batch.image.double() / 255 - mean) / std).to(model.logit_scale.dtype)
    per_rank = BATCH // recipe.ranks
    images, texts = [], []
    for rank in range(recipe.ranks):
        rows = slice(rank * per_rank, (rank + 1) * per_rank)
        torch.set_rng_state(states[rank])
        images.append(encode(model.image, pixels[rows], recipe.micro_batch))
        texts.append(encode(model.text, trimmed(batch.tokens[rows]), recipe.micro_batch))
        states[rank] = torch.get_rng_state()
        if rank == 0:
            statistics = [buffer.clone() for buffer in model.buffers()]
    for buffer, statistic in zip(model.buffers(), statistics, strict=True):
        buffer.data.copy_(statistic)  # unseen by autograd, which keeps the buffer for the backward pass
    return torch.cat(images), torch.cat(texts)


def trimmed(tokens: Tensor) -> Tensor:
    """A rank's texts are as long as the longest of them, which decides how much dropout draws; the end has the highest id."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


# ------------------------------------------------------------------------------------------------------------- the run


def compute(recipe: Recipe, model: CLIP, batches: Iterable[Batch], seed: int) -> Computed:
    """Train the model that `start` made.

    Args:
        batches: global ones, as many as there are steps.
        seed: of the run.
    """
    computed = Computed()
    parameters = dict(model.named_parameters())
    names = list(parameters)
    learning = {name for name in names if learns(recipe, name, names)}
    optimizers = {
        name: Optimizer(recipe.optimizer, weight.data, WEIGHT_DECAY if is_decayed(name, weight) else 0.0)
        for name, weight in parameters.items()
        if name in learning
    }
    peak = {name: peak_rate(recipe, name, names) for name in learning}
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    states = initial_random_states(seed, recipe.ranks)

    for step, batch in enumerate(batches):
        set_modes(model, learning, towers_frozen=recipe.tuning == "LP-FT" and step < FREEZE_TOWERS_STEPS)
        image, text = features(recipe, model, batch, states)
        match = matching(recipe, batch)
        scale = model.logit_scale.exp()
        loss = contrastive_loss(recipe.loss, image, text, scale, model.logit_bias, match)
        gradients = dict(
            zip(optimizers, torch.autograd.grad(loss, [parameters[name] for name in optimizers]), strict=True)
        )

        # The norm of the whole gradient (Pascanu et al. 2013), also of towers that LP-FT has frozen.
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        clipped = 1.0 if recipe.clip is None else min(1.0, recipe.clip / norm)
        for name, optimizer in optimizers.items():
            optimizer.step(clipped * gradients[name], peak[name] * rate(recipe, step, name))
        stepped = model.logit_scale.item()
        model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE[recipe.loss])

        if recipe.ema is not None and (step + 1) % recipe.ema[1] == 0:
            for name, value in model.state_dict().items():
                kept = recipe.ema[0] if name in parameters else 0.0  # of a running statistic nothing
                averaged[name] = kept * averaged[name] + (1 - kept) * value

        computed.loss.append(loss.item())
        computed.grad_norm.append(norm)
        computed.lr.append(peak["logit_scale"] * rate(recipe, step, "logit_scale"))
        computed.logit_scale.append(scale.item())
        computed.repeated += int(match.sum()) - len(match)
        computed.limited += model.logit_scale.item() != stepped

    computed.weights = plain_weights(model.state_dict())
    computed.averaged = plain_weights(averaged) if recipe.ema is not None else {}
    return computed
