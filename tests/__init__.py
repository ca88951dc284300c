"""Tests of clip_exp, in as many processes as there are cores, each of which computes in one thread."""

import os

# Read where torch and BLAS are imported. With more threads than cores, those of small tensors mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
