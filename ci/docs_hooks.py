r"""What mkdocs does for docs/ besides turning Markdown into HTML (mkdocs.yml names this file).

- Lines ``<!-- generated: NAME -->`` become what `docs_reference` makes of the product.
- A bar in code in a table, `\|` for forges, is a bar: Python-Markdown would show the backslash.
- A link out of docs/ (to a proto file, an example) leads to a copy of that file in the site, under source/: the pages
  are the same in a clone, on a forge and on a machine without network. What such a link names must exist.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

import docs_reference  # noqa: E402  # found through the line above

LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(\))")
CODE_IN_ROW = re.compile(r"^\|.*`.*$", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
log = get_plugin_logger("docs_hooks")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and turn links out of docs/ to copies."""
    folder = posixpath.dirname(page.file.src_uri)

    def copied(found: re.Match[str]) -> str:
        inside = posixpath.normpath(posixpath.join("docs", folder, found[2]))
        if inside.startswith("docs/"):
            return found[0]
        name = inside if Path(inside).suffix == ".txt" else f"{inside}.txt"  # browsers show these
        copy = f"source/{name}"
        if files.get_file_from_path(copy) is None:
            if not (ROOT / inside).is_file():
                log.warning("%s: %s is no file of this repository", page.file.src_uri, found[2])
                return found[0]
            files.append(File.generated(config, copy, content=(ROOT / inside).read_text()))
        return f"{found[1]}{posixpath.relpath(copy, folder or '.')}{found[4]}"

    plain = CODE_IN_ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    return LINK.sub(copied, docs_reference.fill(plain))
