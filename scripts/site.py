"""A hook of MkDocs: README.md is the site's first page, and files outside docs/ that pages link to are in it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    files.append(File.generated(config, "index.md", abs_src_path=str(pages[0])))
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and DOCS not in path.parents and path != pages[0] and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from one page to another as the site's folders have them: docs/ is its root."""
    name = {"index.md": "README.md"}.get(page.file.src_uri, page.file.src_uri)
    place = (DOCS / name if (DOCS / name).exists() else ROOT / name).parent

    def moved(link: re.Match) -> str:
        path = (place / link[1]).resolve()
        if ROOT not in path.parents or not path.is_file() or place not in (ROOT, DOCS):
            return link[1]
        if path == ROOT / "README.md":
            return "index.md"
        return path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()

    return LINK.sub(moved, markdown)
