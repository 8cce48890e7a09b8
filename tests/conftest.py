"""Settings of the whole suite."""

import os

# The models are tiny: threads would cost more than they gain, here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
