"""Settings of the whole suite."""

import os

# The models are tiny: threads would cost more than they gain, here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
# Whoever runs the suite may have W&B switched off, or elsewhere.
for name in ("MODE", "DIR", "PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "TAGS", "NAME", "RUN_ID"):
    os.environ.pop(f"WANDB_{name}", None)
