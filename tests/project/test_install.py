"""What the notebooks' first cell installs on which machine, and the warning of an old plug-in."""

import subprocess
import sys
from importlib import metadata

import pytest

from notebooks import install
from ring_swa_jax import _plugins

SMI = """
| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {cuda}     |
"""


def machine(monkeypatch, *, smi=None, installed=(), accelerators=()):
    """A machine whose nvidia-smi answers ``smi``, with some distributions and TPU devices."""
    answer = subprocess.CompletedProcess([], 0, stdout=smi)
    monkeypatch.setattr(install.shutil, "which", lambda name: smi and f"/usr/bin/{name}")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(install, "has", lambda name: name in installed)
    monkeypatch.setattr(install.glob, "glob", lambda pattern: list(accelerators))
    monkeypatch.delenv("TPU_NAME", raising=False)


@pytest.mark.parametrize(
    ("there", "extra"),
    [
        (dict(), None),
        (dict(smi="NVIDIA-SMI has failed"), None),
        (dict(smi=SMI.format(cuda="12.4")), "cuda12"),
        (dict(smi=SMI.format(cuda="13.0")), "cuda13"),
        (dict(smi=SMI.format(cuda="13.0"), installed=["jax-cuda12-plugin"]), "cuda12"),
        (dict(accelerators=["/dev/accel0"]), "tpu"),
    ],
)
def test_extra_of_a_machine(there, extra, monkeypatch):
    machine(monkeypatch, **there)
    assert install.accelerator() == extra
    extras = "examples" if extra is None else f"examples,{extra}"
    assert install.command()[-1] == f"{install.PROJECT}[{extras}]"


def test_nothing_is_installed_twice(monkeypatch):
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: pytest.fail("installs"))
    install.install()


def test_a_module_that_is_loaded_and_changes_stops_the_notebook(monkeypatch):
    machine(monkeypatch)
    versions = iter(["2.0", "2.1"])
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install, "LOADED_ONCE", ("numpy",))
    monkeypatch.setattr(install, "version", lambda name: next(versions))
    with pytest.raises(RuntimeError, match=r"numpy changed .* Restart the runtime"):
        install.install()


def with_versions(monkeypatch, **versions):
    def version(name):
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(_plugins.metadata, "version", version)


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
def test_a_plugin_of_another_version(plugin, monkeypatch):
    with_versions(monkeypatch, jax="0.12.0", jaxlib="0.12.0", **{plugin: "0.7.2"})
    extra = plugin.split("_")[1]
    with pytest.warns(RuntimeWarning, match="0.7.2 does not match jaxlib 0.12.0") as caught:
        _plugins.warn_of_mismatch()
    message = str(caught[0].message)
    assert f'pip install "jax[{extra}]==0.12.0"' in message
    assert "\n" not in message


@pytest.mark.parametrize("plugins", [{}, dict(jax_cuda12_plugin="0.12.0")])
def test_no_warning_where_a_plugin_fits_or_none_is_there(plugins, monkeypatch):
    with_versions(monkeypatch, jax="0.12.0", jaxlib="0.12.0", **plugins)
    assert _plugins.mismatched_plugin() is None


def test_install_is_a_script_too():
    done = subprocess.run(
        [sys.executable, "notebooks/install.py"],
        cwd=install.PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "-m pip install" in done.stdout
