"""Write docs/options.md and docs/migrating.md from library/options."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--check", action="store_true", help="only say whether they are up to date")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or check them; returns the exit code."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.options.migrating import migrating_page
    from library.options.page import options_page

    stale = 0
    for name, page in (("options.md", options_page()), ("migrating.md", migrating_page())):
        target = ROOT / "docs" / name
        if given.check:
            fresh = target.is_file() and target.read_text(encoding="utf-8") == page
            print(f"{target} is {'up to date' if fresh else 'out of date: run python tools/write_docs.py'}")
            stale += not fresh
            continue
        target.parent.mkdir(exist_ok=True)
        target.write_text(page, encoding="utf-8")
        print(f"wrote {target}")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
