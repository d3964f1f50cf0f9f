"""Write docs/options.md from the declarations in library/options. `--check` only says whether it is up to date."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "options.md"


def main(argv: list[str]) -> int:
    """Write the page, or check it; returns the exit code."""
    sys.path.insert(0, str(ROOT))
    from library.options.page import options_page

    page = options_page()
    if "--check" in argv:
        fresh = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page
        print(f"{TARGET} is {'up to date' if fresh else 'out of date: run python tools/write_docs.py'}")
        return 0 if fresh else 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
