"""Some processes in one gloo group, that run functions of test modules together."""

import datetime
import importlib
import os
import queue
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT_S = 60  # of one function, and of a collective a little less

# Processes begin as copies of a server, which has made the imports that take seconds.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "peft", "pytest",
        "selectflow.selector", "selectflow.run.loop",
    ]
)  # fmt: skip


class Processes:
    """`num` processes, started once; `run` calls a function in all of them at once."""

    def __init__(self, num):
        self.num = num
        self._start()

    def _start(self):
        self._store = tempfile.TemporaryDirectory()
        self._asked = [CONTEXT.Queue() for _ in range(self.num)]
        self._answers = CONTEXT.Queue()
        address = f"file://{Path(self._store.name) / 'store'}"
        self._processes = [
            CONTEXT.Process(
                target=_serve, args=(rank, self.num, address, asked, self._answers), daemon=True
            )
            for rank, asked in enumerate(self._asked)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *args, limit_s=LIMIT_S):
        """What `function(*args)` returned, by rank; the first error with its rank, if any."""
        for asked in self._asked:
            asked.put((function.__module__, function.__name__, args))
        found, errors = {}, {}
        try:
            while len(found) + len(errors) < self.num:
                rank, value, error = self._answers.get(timeout=limit_s)
                if error is None:
                    found[rank] = value
                else:
                    errors[rank] = error
        except queue.Empty:
            missing = sorted(set(range(self.num)) - set(found) - set(errors))
            self.stop()
            self._start()
            told = "".join(errors.values())
            raise AssertionError(
                f"ranks {missing} did not come back in {limit_s} s; {told}"
            ) from None
        if errors:
            self.stop()  # the group may be out of step
            self._start()
            raise AssertionError("".join(f"rank {r}: {text}" for r, text in errors.items()))
        return [found[rank] for rank in range(self.num)]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._store.cleanup()


def _serve(rank, num, address, asked, answers):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT_S * 0.8)
    dist.init_process_group("gloo", address, rank=rank, world_size=num, timeout=limit)
    while True:
        module, name, args = asked.get()
        try:
            value = getattr(importlib.import_module(module), name)(*args)
            answers.put((rank, value, None))
        except BaseException:  # sent on, whatever it is
            answers.put((rank, None, traceback.format_exc()))


def execute(code, arguments, env, cwd):
    """Run code in a new process, as `python -c` would: its exit status."""
    process = CONTEXT.Process(target=_execute, args=(code, arguments, env, cwd))
    process.start()
    process.join()
    return process.exitcode


def _execute(code, arguments, env, cwd):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes that this process gives to them."""

    def __init__(self):
        super().__init__()
        self.num, self.num_bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.num += 1
            self.num_bytes += sum(t.nbytes for t in _tensors(args))
        return func(*args, **(kwargs or {}))


def _tensors(tree):
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in _tensors(child)]
    return [tree] if hasattr(tree, "nbytes") else []
