"""Write docs/options.md and docs/migrating.md from library/options. `--check` only says whether they are up to date."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Write the pages, or check them; returns the exit code."""
    sys.path.insert(0, str(ROOT))
    from library.options.migrating import migrating_page
    from library.options.page import options_page

    stale = 0
    for name, page in (("options.md", options_page()), ("migrating.md", migrating_page())):
        target = ROOT / "docs" / name
        if "--check" in argv:
            fresh = target.is_file() and target.read_text(encoding="utf-8") == page
            print(f"{target} is {'up to date' if fresh else 'out of date: run python tools/write_docs.py'}")
            stale += not fresh
            continue
        target.parent.mkdir(exist_ok=True)
        target.write_text(page, encoding="utf-8")
        print(f"wrote {target}")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
