"""Classify images with text labels: python examples/classify.py outputs/train/<name>/<time> a.jpg b.jpg"""

import sys

import clip_exp

clip = clip_exp.load(sys.argv[1])
labels = ["a diagram", "a dog", "a cat"]
for image, probabilities in zip(sys.argv[2:], clip.classify(sys.argv[2:], labels), strict=True):
    best = probabilities.argmax()
    print(f"{image}: {labels[best]} ({probabilities[best]:.1%})")
