"""Index a folder of images, then search it by text: python examples/search.py outputs/train/<name>/<time> photos 'two dogs' 'a red car'"""

import sys

import clip_exp

run, folder, *texts = sys.argv[1:]
index = clip_exp.load(run).index(folder, path="photos.index")
for text in texts:
    for match in index.search(text, top_k=10):
        print(f"{text}: {match.score:.4f}  {match.path}")
