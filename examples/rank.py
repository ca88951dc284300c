"""Find the 32 images in a folder that match a text best: python examples/rank.py outputs/train/<name>/<time> 'two dogs' photos"""

import sys

import clip_exp

run, text, folder = sys.argv[1:]
clip = clip_exp.load(run)
for match in clip.rank(text, folder, top_k=32):
    print(f"{match.score:.4f}  {match.path}")
