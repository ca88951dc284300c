"""Classify images with text labels: python examples/classify.py outputs/train/<name>/<time> a.jpg b.jpg"""

import sys

import clip_exp

clip = clip_exp.load(sys.argv[1])
texts = ["a diagram", "a dog", "a cat"]
for image, probabilities in zip(sys.argv[2:], clip.classify(sys.argv[2:], texts), strict=True):
    best = probabilities.argmax()
    print(f"{image}: {texts[best]} ({probabilities[best]:.1%})")
