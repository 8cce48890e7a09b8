"""What this installation is, where it can train and how precisely, and what its extras lack."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.requirements import Requirement

_PACKAGE = "selectflow"


def examine() -> Iterator[str]:
    """Lines on versions, devices, precision, and each extra."""
    yield "versions"
    yield f"  selectflow {_version(_PACKAGE) or 'from its source, not installed'}"
    yield f"  python {platform.python_version()}, {platform.platform()}"
    yield f"  torch {torch.__version__}, built for {_built_for()}"
    yield "devices"
    yield from (f"  {line}" for line in _devices())
    yield "packages"
    yield from (f"  {line}" for line in _packages())


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"


def _devices() -> Iterator[str]:
    """Each device with the types that `train.autocast` and the look-ahead can use there."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield f"cpu: {capability}, {threads} threads; float32, float64, bfloat16"
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "bfloat16" if native else "bfloat16 by emulation, slow"
        memory = f"{known.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}: {known.name}, {memory}; float32, float64, {bf16}"
    if torch.version.cuda and not torch.cuda.is_available():
        yield "cuda: none that this build of torch can use (no device, or its driver is too old)"
    if torch.backends.mps.is_available():
        yield "mps: float32, bfloat16 from macOS 14 on; no float64"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        yield from (
            f"xpu:{i}: {torch.xpu.get_device_name(i)}" for i in range(torch.xpu.device_count())
        )


def _packages() -> Iterator[str]:
    """What is needed and what each extra needs: there, or what is missing and how to get it."""
    try:
        texts = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield "not known: selectflow is not installed; pip install -e . in its folder"
        return
    needed = [Requirement(text) for text in texts]
    always = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    yield f"needed: {_state(always, _PACKAGE)}"
    for extra in metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []:
        own = [
            each
            for each in needed
            if each not in always and each.marker and each.marker.evaluate({"extra": extra})
        ]
        if extra != "dev":
            yield f"extra {extra}: {_state(own, f'{_PACKAGE}[{extra}]')}"


def _state(needed: list[Requirement], what: str) -> str:
    wrong = [problem for each in needed for problem in _problems(each)]
    return f"lacks {', '.join(wrong)}; pip install '{what}'" if wrong else "all there"


def _problems(needed: Requirement) -> Iterator[str]:
    """What is wrong with a requirement, its own extras included; nothing where it is met."""
    held = _version(needed.name)
    if held is None:
        yield f"{needed.name}{needed.specifier}"
    elif not needed.specifier.contains(held, prereleases=True):
        yield f"{needed.name}{needed.specifier} (has {held})"
    for extra in needed.extras if held else ():
        for each in map(Requirement, metadata.requires(needed.name) or []):
            is_always = each.marker is None or each.marker.evaluate({"extra": ""})
            if not is_always and each.marker and each.marker.evaluate({"extra": extra}):
                yield from _problems(each)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
