"""What mkdocs does beyond its plugins: notebooks as pages, links to sources as links to the reference, all results.

The pages keep the links that work in a checkout; only the site's copies are changed.
"""

import json
import posixpath
import re
from pathlib import Path

PACKAGE = "speechbrain_mifuse/"
# Endings of pages that say more about a table, and what they are shown under.
DETAILS = {"_seeds": "Every seed", "_selection": "Selection without labels"}
LINK = re.compile(r"\[([^\]\[]+)\]\((?!\w+:|#)([^)\s]+?)(#[^)\s]*)?\)")


def notebook_text(path):
    """Write a notebook as Markdown.

    Parameters
    ----------
    path : str or pathlib.Path
        The notebook.

    Returns
    -------
    str
        Its text, and its code in fences.
    """
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    parts = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell in cells
        for text in ["".join(cell["source"])]
    ]
    return "\n\n".join(parts) + "\n"


def nav_with_results(nav, docs):
    """Fill the navigation's results with the tables that runs have left.

    Parameters
    ----------
    nav : list
        The navigation as `mkdocs.yml` gives it.
    docs : str or pathlib.Path
        The folder of the pages.

    Returns
    -------
    list
        The navigation; under `Results` every page of `results/`.
    """
    found = {path.stem: f"results/{path.name}" for path in sorted((Path(docs) / "results").glob("*.md"))}
    grouped: dict[str, list] = {"": [], **{ending: [] for ending in DETAILS}}
    for name, page in found.items():
        ending = next((ending for ending in DETAILS if name.endswith(ending)), "")
        grouped[ending].append({name.removesuffix(ending).replace("_", " "): page})
    filled = grouped[""] + [{title: grouped[ending]} for ending, title in DETAILS.items() if grouped[ending]]
    return [{"Results": filled} if isinstance(entry, dict) and "Results" in entry else entry for entry in nav]


def reference(target):
    """Find where the reference speaks of a source file.

    Parameters
    ----------
    target : str
        Path of a module, from the repository's root.

    Returns
    -------
    str or None
        Page and anchor, from the folder of the pages; `None` for a private module.
    """
    module = target.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for page in sorted((Path(__file__).parent / "api").glob("*.md")):
        shown = re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        # A room that is shown as a whole shows its modules.
        if module in shown or module.rpartition(".")[0] in shown:
            return f"api/{page.name}#{module}"
    return None


def linked(text, page):
    """Turn links that only work in a checkout into links within the site, or into text.

    Parameters
    ----------
    text : str
        Markdown.
    page : str
        Path of its page, from the folder of the pages.

    Returns
    -------
    str
        Markdown.
    """
    folder = posixpath.dirname(page)

    def within_site(link):
        shown, address, anchor = link[1], link[2], link[3] or ""
        target = posixpath.normpath(posixpath.join("docs", folder, address))
        if target.startswith(PACKAGE):
            found = reference(target)
            return shown if found is None else f"[{shown}]({posixpath.relpath(found, folder or '.')})"
        if target.startswith("docs/notebooks/"):
            return f"[{shown}]({address.removesuffix('.ipynb').removesuffix('.md')}.md{anchor})"
        return link[0]

    return LINK.sub(within_site, text)


def on_config(config):
    """Complete the navigation; see `nav_with_results`."""
    config.nav = nav_with_results(config.nav, config.docs_dir)
    return config


def on_files(files, config):
    """Add a page for each notebook."""
    from mkdocs.structure.files import File

    for notebook in sorted((Path(config.docs_dir) / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=notebook_text(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mend links; see `linked`."""
    return linked(markdown, page.file.src_uri)
