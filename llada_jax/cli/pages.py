"""Makes pages that refer to no other file: a page of HTML with its data and its script inside."""

import json
from importlib import resources
from typing import Any

# The places in the .html file where the data, the script, and the style that all pages begin with go.
_DATA, _SCRIPT, _STYLE = "/*DATA*/null", "/*SCRIPT*/", "/*STYLE*/"


def page(package: str, name: str, data: dict[str, Any]) -> str:
    """Returns the page NAME.html of a package, with the script NAME.js and the data in it.

    Args:
      package: The package that the two files belong to.
      name: The name of the files.
      data: A JSON object, which the script sees as `data`. All numbers must be finite.
    """
    html, script = (_read(package, f"{name}.{kind}") for kind in ("html", "js"))
    html = html.replace(_STYLE, _read(__package__, "pages.css").rstrip())
    # "</script" would end the page's script, and "<!--" with "<script" would keep it from ending.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return html.replace(_SCRIPT, script).replace(_DATA, text)


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
