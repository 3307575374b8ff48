"""What an index of packages shows: the README with links that work there, and addresses.

All other settings are in pyproject.toml. The repository's address is one of them, under
[tool.ring-swa-jax]; as long as none is there, links into the repository become plain text.
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent


def read_repository() -> str:
    """The address of the repository on a code host, or nothing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["ring-swa-jax"]["repository"].rstrip("/")


def absolute(text: str, repository: str) -> str:
    """A page of Markdown with links that do not depend on where it is shown."""

    def replace(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if not repository:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository}/{kind}/HEAD/{target})"

    return re.sub(r"(!?)\[([^][]*)\]\(([^)\s]+)\)", replace, text)


def project_urls(repository: str) -> dict[str, str]:
    """The addresses of the project."""
    if not repository:
        return {}
    pages = {"Documentation": "tree/HEAD/docs", "Changelog": "blob/HEAD/CHANGELOG.md"}
    below = {name: f"{repository}/{page}" for name, page in pages.items()}
    return {"Repository": repository, **below, "Issues": f"{repository}/issues"}


if __name__ == "__main__":
    from setuptools import setup  # which those who only read the functions above may not have

    repository = read_repository()
    setup(
        long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8"), repository),
        long_description_content_type="text/markdown",
        project_urls=project_urls(repository),
    )
