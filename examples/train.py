"""Train a CLIP model on a table of images and captions: python examples/train.py pairs.csv epochs=10"""

import sys

import clip_exp

if __name__ == "__main__":
    table, *overrides = sys.argv[1:]
    run = clip_exp.train("model=vit_tiny", "data=csv", *overrides, data={"train": table})
    print(f"trained: {run}")
