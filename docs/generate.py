"""Writes docs/cli.md and docs/attar.toml from the command line and the settings; --check fails when they are stale."""

import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse wraps help to the terminal: the page must not depend on it
os.environ["NO_COLOR"] = "1"

from attar.cli import make_parser, make_search_parser
from attar.config import template

HERE = Path(__file__).parent


def cli_page() -> str:
    parser = make_parser()
    verbs = next(action for action in parser._actions if hasattr(action, "choices") and action.choices).choices
    parts = ["# Command line", "", "Made by `make docs`; do not edit.", "", "```", parser.format_help().rstrip(), "```"]
    for verb, sub in [*verbs.items(), ("augment search", make_search_parser())]:
        parts += ["", f"## attar {verb}", "", "```", sub.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def main() -> int:
    pages = {HERE / "cli.md": cli_page(), HERE / "attar.toml": template()}
    if "--check" not in sys.argv:
        for path, text in pages.items():
            path.write_text(text, "utf-8")
        return 0
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
    if stale:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
