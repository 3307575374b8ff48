"""Prints the least version of each thing that the package needs, as constraints for pip.

They are those of pyproject.toml, of the package, the examples and the tests.
"""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *extras["examples"], *extras["test"]):
    if not requirement.startswith(project["name"]):
        print(requirement.replace(">=", "=="))
