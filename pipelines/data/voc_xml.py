"""XML annotations of Pascal VOC folders, in any encoding that Python knows."""

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdpipe.cache.errors import KdpipeError

__all__ = ["VocError", "number_in", "parse_xml", "text_in"]

_DECLARED = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["']""")


class VocError(KdpipeError):
    """A Pascal VOC folder is incomplete, or one of its annotations is malformed."""


def parse_xml(path: Path) -> Element:
    """Parses XML; entities are refused, so that none can be expanded without end.

    Raises:
        VocError: it is not valid, or in an unknown encoding.
    """

    def refuse(*_: Any) -> None:
        raise VocError(f"annotation {path} declares XML entities, which are not read. Save it without.")

    data, encoding = _as_utf8(path)
    builder = TreeBuilder()
    parser = expat.ParserCreate(encoding)
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise VocError(f"annotation {path} is no valid XML: {error}. Correct or remove it.") from error
    return builder.close()


def _as_utf8(path: Path) -> tuple[bytes, str | None]:
    """The bytes of a file that expat can parse, and their encoding where it is not the declared one.

    Expat knows few encodings, and none of Chinese, Japanese or Korean.
    """
    data = path.read_bytes()
    declared = _DECLARED.match(data)
    if declared is None:
        return data, None
    name = declared[1].decode().lower()
    if name.startswith(("utf-16", "utf16")):  # then it would not have been found byte by byte
        return data, "utf-8"
    try:
        return data.decode("gb18030" if name == "gb2312" else name).encode(), "utf-8"
    except (LookupError, UnicodeError) as error:
        raise VocError(
            f"annotation {path} cannot be read as {name}, which it declares: {error}. Correct it."
        ) from error


def text_in(element: Element, name: str, path: Path) -> str:
    """The text of a child.

    Args:
        element: The parent.
        name: Tag of the child.
        path: The file, for messages.

    Raises:
        VocError: there is none.
    """
    text = element.findtext(name)
    if text is None or not text.strip():
        raise VocError(f"annotation {path}: a <{element.tag}> has no <{name}>. Correct the file.")
    return text.strip()


def number_in(element: Element, name: str, path: Path) -> int:
    """The whole number in a child.

    Args:
        element: The parent.
        name: Tag of the child.
        path: The file, for messages.

    Raises:
        VocError: there is none.
    """
    text = text_in(element, name, path)
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise VocError(f"annotation {path}: <{name}> is {text!r}, expected a number. Correct the file.") from error
