"""The commands, snippets and links of the README and of docs/ work.

Every block of Python or of a shell is run, unless a line right before it says why not:
`<!-- not run: needs two hosts -->`. A block of Python must print the text of the block of text
right after it, if there is one. `<!-- test adds: examples/train_lm.py --steps=2 -->` puts the
flags after that name in a command, to scale it down.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, free_port

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\S+)\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    flags=re.DOTALL | re.MULTILINE,
)
# The README's two main commands: .ci/run follows them in fresh environments.
RUN_BY_CI = {
    'pip install -e ".[examples]" && python examples/train_lm.py\n',
    'pip install -e ".[test]" && pytest\n',
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment before it and the output after it."""

    page: str
    line: int
    language: str
    code: str
    mark: str
    output: str | None

    @property
    def runs(self):
        return not self.mark.startswith("not run: ") and self.code not in RUN_BY_CI

    def scaled_down(self):
        """The commands with the flags that the test adds."""
        if not self.mark.startswith("test adds: "):
            return self.code
        name, flags = self.mark.removeprefix("test adds: ").split(" ", 1)
        assert name in self.code
        return self.code.replace(name, f"{name} {flags}")


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        parts = found.groupdict() | {"mark": found["mark"] or ""}
        yield Block(str(page.relative_to(ROOT)), line, **parts)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def to_run(*languages):
    """The blocks to run; those of docs/, and the longest of the README, are slow."""
    return [
        pytest.param(
            block,
            id=f"{block.page}:{block.line}",
            marks=[pytest.mark.slow]
            if block.page.startswith("docs") or "layer_settings" in block.code
            else [],
        )
        for block in BLOCKS
        if block.language in languages and block.runs
    ]


def run(command, folder, **more):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what a command leaves behind can be ended too
    )
    try:
        out, err = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # A shell that waits for several processes does not say that they failed.
    failed = process.returncode != 0 or "Traceback" in err
    assert not failed, out[-1000:] + err[-3000:]
    return out


def test_no_block_is_forgotten():
    known = {"", "not run", "test adds"}
    for block in BLOCKS:
        where = f"{block.page}:{block.line}"
        if block.language in ("python", "console", "bash"):
            assert block.mark.split(": ")[0] in known, where
        else:
            assert block.language in ("text", "diff") or block.language.startswith("{"), where
    assert len(to_run("python")) >= 10


@pytest.mark.parametrize("block", to_run("python"))
def test_python(block, tmp_path):
    printed = run([sys.executable, "-c", block.code], tmp_path)
    assert printed == (block.output or "")


@pytest.mark.parametrize("block", to_run("console", "bash"))
def test_command(block, tmp_path):
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    commands = block.scaled_down().replace(":4711", f":{free_port()}")
    # Compiling is most of the time.
    run(["bash", "-ec", commands], tmp_path, XLA_FLAGS="--xla_backend_optimization_level=0")


def prose_of(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page):
    """The names that GitHub and Sphinx give to the headings."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link
