"""Evaluate a CLIP model: `python evaluate.py --help`."""

from clip_exp.cli import main

if __name__ == "__main__":
    main("evaluate")
