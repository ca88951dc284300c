"""Benchmark of building a ViT-B/32 zero-shot classifier with 25 ImageNet classes and 80 templates: clip_exp and open_clip_torch.

Both encode the same prompts with the same random weights in float32. clip_exp computes each distinct prefix of the
prompts once (`clip_exp.text.prefixes`) and no padding; open_clip's `build_zero_shot_classifier` pads each prompt to 77
tokens. The two sides run in turns with alternating order. On a shared machine, only the ratio is meaningful.

    python benchmarks/zero_shot_classifier.py --pairs 3
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor

from clip_exp.config.names import named_model
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.sets.class_names import imagenet_classes, templates
from clip_exp.models.clip import build_model
from clip_exp.text.tokenizer import Tokenizer
from clip_exp.weights.names import to_open_clip

TARGET_RATIO = 7.0
TARGET_DIFFERENCE = 1e-5


def timed(build: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    classifier = build().cpu()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="number of pairs after one for warm-up")
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = build_model(named_model("vit_b32")).eval()
    theirs = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).eval()
    theirs.load_state_dict(to_open_clip(model.state_dict()))
    model, theirs = model.to(device), theirs.to(device)
    names = [name for _, name in imagenet_classes()[:: 1000 // args.classes]][: args.classes]
    prompts = templates("openai")
    tokenizer, their_tokenizer = Tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    batch_size = 1024 if device.type == "cuda" else 256

    def ours() -> Tensor:
        return build_classifier(model, tokenizer, names, prompts, batch_size, device)

    def peer() -> Tensor:
        return open_clip.build_zero_shot_classifier(theirs, their_tokenizer, names, prompts, device=device).T

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    difference = 0.0
    for pair in range(args.pairs + 1):
        sides = {"ours": ours, "theirs": peer}
        results = {}
        for side in sorted(sides, reverse=pair % 2 == 1):
            took_s, results[side] = timed(sides[side], device)
            if pair > 0:
                seconds[side].append(took_s)
        difference = max(difference, (results["ours"] - results["theirs"]).abs().max().item())
    ours_s, theirs_s = (statistics.median(seconds[side]) for side in ("ours", "theirs"))
    count = len(names) * len(prompts)
    print(f"{count:,} prompts of {len(names)} classes, {device}")
    print(f"clip_exp:        {ours_s:7.3f} s, {count / ours_s:7.0f} prompts/s")
    print(f"open_clip_torch: {theirs_s:7.3f} s, {count / theirs_s:7.0f} prompts/s")
    print(f"ratio of the medians: {theirs_s / ours_s:.1f}, largest |difference|: {difference:.1e}")
    holds = theirs_s / ours_s >= TARGET_RATIO and difference <= TARGET_DIFFERENCE
    print(f"target (ratio >= {TARGET_RATIO}, difference <= {TARGET_DIFFERENCE:.0e}): {'met' if holds else 'missed'}")


if __name__ == "__main__":
    main()
