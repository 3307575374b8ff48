"""Compiles programs for GPUs on a machine without one, and reads what the compiler says.

Needs the plug-in of this very jax, without its drivers: `pip install --no-deps
jax-cuda13-pjrt==V jax-cuda13-plugin==V nvidia-cuda-nvcc nvidia-nvvm`, V the installed jax.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

# Read by the plug-in when jax first looks for devices, which is after this import.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

FOLDER = Path(__file__).with_name("targets")
TARGETS = tuple(sorted(path.stem for path in FOLDER.glob("*.textproto")))
OPTIONS = {"xla_gpu_autotune_level": 0}
PTXAS_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<store>\d+) bytes spill stores, "
    r"(?P<load>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
STEP = re.compile(
    r"= \S.*? (?:collective-permute-(start|done)\(|custom-call\(.*?/(ring_swa_[a-z_]+)/)"
)
LAUNCH = re.compile(r'custom-call\(.*op_name="[^"]*/(ring_swa_\w+)/')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one compiled kernel; spills in bytes, the larger of stores and loads."""

    name: str
    registers: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its HLO, the names of its launches of ours, and their kernels."""

    hlo: str
    launches: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    def steps(self):
        """Permutes ("start", "done") and launches of the entry computation, as they will run."""
        assert "is_scheduled=true" in self.hlo.splitlines()[0]
        lines = self.hlo[self.hlo.index("\nENTRY ") :].splitlines()
        return [match[1] or match[2] for line in lines if (match := STEP.search(line))]


def target_text(target):
    """What the compiler is told of a GPU, as a text proto."""
    return (FOLDER / f"{target}.textproto").read_text()


def device_kind(target):
    """The name that a device of the target has, e.g. "NVIDIA L4"."""
    return re.search(r'device_description_str: "(.*)"', target_text(target))[1]


def mesh(devices, target="h100"):
    """Mesh of any number of GPUs with the axis "seq"."""
    return _mesh(target_text(target), devices)


def compile_program(function, arguments, devices, target="h100"):
    """Compiles function(*arguments), shapes with shardings over `mesh(devices)` -> Program."""
    with tempfile.TemporaryDirectory() as folder:
        options = OPTIONS | {
            "xla_dump_to": folder,
            "xla_dump_emitter_re": "ptx",  # ".*" would dump every pass, ten times the time
        }
        # Mosaic GPU compiles on its own.
        with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh(devices, target)):
            patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
            patch.setenv("MOSAIC_GPU_DUMP_TO", folder)
            compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
        hlo = compiled.as_text()
        kernels = [k for path in sorted(Path(folder).glob("*.ptx")) for k in _kernels(path)]
    return Program(hlo, tuple(LAUNCH.findall(hlo)), tuple(kernels))


def shared_memory_request(function, arguments, target):
    """Bytes of shared memory that the one kernel of function(*arguments) asks for.

    The compiler tells them only where they are too many, so it compiles for a GPU that has next to
    none.

    Args:
        function: launches one Triton kernel.
        arguments: `jax.ShapeDtypeStruct`s without shardings.
        target: name of the GPU.
    """
    limit = r"shared_memory_per_block_optin: \d+"
    text, found = re.subn(limit, "shared_memory_per_block_optin: 1024", target_text(target))
    assert found == 1
    with jax.set_mesh(_mesh(text, 1)):
        lowered = jax.jit(function, out_shardings=jax.P()).lower(*arguments)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit") as caught:
            lowered.compile(compiler_options=OPTIONS)
    [request] = re.findall(r"requested:? (\d+)", str(caught.value))
    return int(request)


@functools.cache
def _mesh(text, devices):
    for name in ("jax_plugins.xla_cuda13", "nvidia"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.fail(
                f"there is no {name}: install the packages that tests/helpers/compile_target.py "
                "names"
            )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x1x{max(4, devices)}"
    )
    return Mesh(np.array(topology.devices[:devices]), ("seq",), axis_types=(AxisType.Auto,))


@functools.cache
def _ptxas():
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    found = [path for folder in folders for path in sorted(Path(folder).rglob("bin/ptxas"))]
    assert found, f"nvidia-cuda-nvcc brings no ptxas to {list(folders)}"
    return found[0]


def _kernels(path):
    text = path.read_text()
    if "ring_swa_" not in text:
        return []
    [architecture] = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
    command = [_ptxas(), "-v", "--gpu-name", architecture, path, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reports = PTXAS_REPORT.finditer(done.stderr)
    found = [Kernel(r["name"], int(r["registers"]), max(int(r["store"]), int(r["load"])))
             for r in reports]  # fmt: skip
    return [kernel for kernel in found if kernel.name.startswith("ring_swa_")]
