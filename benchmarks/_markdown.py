"""Tables for pages."""


def table(head: list[str], lines: list[list[str]]) -> str:
    """In Markdown; empty where there are no lines."""
    if not lines:
        return ""
    rows = [f"| {' | '.join(row)} |" for row in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])
