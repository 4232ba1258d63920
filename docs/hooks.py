"""Hooks of mkdocs: the table of settings, the page of results, formulas, and links to files outside docs/.

Without the hooks, for example on a site that shows the repository's files, the pages lack only what is generated: the
tables of settings, the reference, and the results, which are in benchmarks/RESULTS.md.
"""

import html
import inspect
import re
import sys
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llada_jax.cli import config_help  # noqa: E402  (needs neither JAX nor an installed llada_jax)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that the pages link to, under source/."""
    for page in list(files.documentation_pages()):
        for path in _outside(Path(page.abs_src_path).read_text(encoding="utf-8"), page.src_uri):
            if files.get_file_from_path(f"source/{path}") is None:
                files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the text of a page with its generated parts."""
    uri = page.file.src_uri
    if uri == "results.md":
        markdown = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    if found := re.fullmatch(r"reference/(\w+)\.md", uri):
        wing = ROOT / "llada_jax" / found[1]
        markdown = f"# {found[1]}\n\n{_rooms(wing)}" if wing.is_dir() else markdown
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", _settings())
    markdown = markdown.replace("](../benchmarks/RESULTS.md", "](results.md")
    for path in _outside(markdown, uri):
        up = "../" * (uri.count("/") + 1)
        markdown = markdown.replace(f"]({up}{path}", f"]({'../' * uri.count('/')}source/{path}")
    return _with_math(re.sub(r"(?<!\[)`((?:\w+/)+\w+)\.py`", _room, markdown))


def _room(found: re.Match) -> str:
    """Turns the name of a room of the package, such as `data/sets.py`, into a link to its description."""
    if not (ROOT / "llada_jax" / f"{found[1]}.py").is_file():
        return found[0]
    return f"[{found[0]}][llada_jax.{found[1].replace('/', '.')}]"


def _outside(markdown: str, uri: str) -> list[str]:
    """Returns the paths, from the root of the repository, of the files outside docs/ that a page links to."""
    up = re.escape("../" * (uri.count("/") + 1))
    found = re.findall(rf"\]\({up}([^)#]+)", markdown)
    return [path for path in dict.fromkeys(found) if (ROOT / path).is_file() and not path.endswith(".md")]


def _with_math(markdown: str) -> str:
    """Turns ```math blocks and $`...`$ into MathML, which browsers show without a script."""

    def block(found: re.Match) -> str:
        return f"\n{latex2mathml.converter.convert(found[1].strip(), display='block')}\n"

    def inline(found: re.Match) -> str:
        # A line that began with <math> would be a block of its own.
        return f"<span>{latex2mathml.converter.convert(found[1])}</span>"

    markdown = re.sub(r"^```math\n(.*?)^```$", block, markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\$`([^`\n]+)`\$", inline, markdown)


def _rooms(folder: Path, top: bool = True) -> str:
    """Returns the description of a wing, or of a folder in it, and of its rooms; the room to start at comes first."""
    name = ".".join(folder.relative_to(ROOT).parts)
    begin = re.findall(r"`(\w+\.py)`", (folder / "__init__.py").read_text(encoding="utf-8"))
    rooms = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    rooms.sort(key=lambda path: begin.index(path.name) if path.name in begin else len(begin))
    under = "" if top else f"{folder.name}/"
    heading = "" if top else _options(show_root_heading=True, show_root_toc_entry=True, heading=under, members=False)
    parts = [f"::: {name}\n{heading or _options(members=False)}"]
    for room in rooms:
        options = _options(show_root_heading=True, show_root_toc_entry=True, heading=under + room.name)
        parts.append(f"::: {name}.{room.stem}\n{options}")
    parts += [_rooms(path.parent, top=False) for path in sorted(folder.glob("*/__init__.py"))]
    return "\n".join(parts)


def _options(**options: bool | str) -> str:
    if "heading" in options:
        options["toc_label"] = options["heading"]
    lines = "".join(f"      {name}: {str(value).lower()}\n" for name, value in options.items())
    return f"    options:\n      show_submodules: false\n{lines}"


def _settings() -> str:
    """Returns a table of the settings of each section of the config tree."""
    found = list(config_help.settings())
    parts = []
    for section, kind in config_help.sections().items():
        name = f"config.{section}" if section else "config"
        parts.append(f"## {name} {{ #{section or 'config'} }}\n\n{_text(inspect.getdoc(kind))}\n")
        rows = ["| setting | default | meaning |", "|---|---|---|"]
        for setting in found:
            if setting.section == section:
                cells = (
                    f'<code class="setting">{setting.name.rpartition(".")[2]}</code><br>'
                    f"<small>{html.escape(setting.type)}</small>",
                    f"`{setting.default!r}`",
                    _text(setting.comment).replace("\n", "<br>"),
                )
                rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _text(comment: str) -> str:
    """Returns a comment of config.py as Markdown. The items of a list in it begin with their name in code."""
    text = html.escape(comment, quote=False)
    text = re.sub(r"^  (\S+)  +", r"`\1`: ", text, flags=re.MULTILINE)
    return text.replace("|", "&#124;").replace("*", "\\*")
