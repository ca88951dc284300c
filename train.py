"""Train a CLIP model: `python train.py --help`."""

from clip_exp.cli import main

if __name__ == "__main__":
    main("train")
