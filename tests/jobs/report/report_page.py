"""A report as a reader has it: elements with their classes, tables, curves and images, found by html.parser."""

import re
from base64 import b64decode
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

VOID = ("meta", "img", "input", "br")
LEFT, RIGHT, TOP, BOTTOM = 50, 550, 8, 168


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: "Element | None" = None
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", **attributes: str) -> list["Element"]:
        """Those below, in order; `class_="key"` is one of the element's classes."""
        wanted = {name.strip("_"): value for name, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, Element):
                fits = all(value in child.attributes.get(name, "").split() for name, value in wanted.items())
                found += [child] * (fits and tag in ("", child.tag)) + child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> "Element":
        (found,) = self.all(tag, **attributes)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.at = self.root = Element("root", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        self.at = self.at if tag in VOID else element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Element(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> ends <{self.at.tag}>"
        assert self.at.parent
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def read_page(path: Path) -> Element:
    """Every element is closed where it should be, or this fails."""
    parser = _Parser()
    parser.feed(path.read_text("ascii"))
    parser.close()
    assert parser.at is parser.root
    return parser.root


def titles(page: Element) -> list[str]:
    return [chart.one("figcaption").all("b")[0].text for chart in page.all("figure", class_="chart")]


def chart(page: Element, title: str) -> Element:
    return page.all("figure", class_="chart")[titles(page).index(title)]


def curve(figure: Element, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve, back from its points."""
    first, last, low, high, is_log = map(float, figure.one("svg").attributes["data-frame"].split())
    (line,) = [line for line in figure.all("polyline") if line.attributes["data-name"] == name]
    x, y = np.array([point.split(",") for point in line.attributes["points"].split()], float).T
    share = (BOTTOM - y) / (BOTTOM - TOP)
    values = low * (high / low) ** share if is_log else low + share * (high - low)
    return first + (x - LEFT) / (RIGHT - LEFT) * max(last - first, 1), values


def table(section: Element) -> list[list[str]]:
    """The cells of its only table's body."""
    return [[cell.text for cell in row.all("td")] for row in section.one("tbody").all("tr")]


def pixels(heat: Element) -> np.ndarray:
    """A heat map as RGBA [R, C, 4], decoded by Pillow."""
    content = heat.one("img").attributes["src"].removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(BytesIO(b64decode(content))).convert("RGBA"))


def addresses(page: Element) -> list[str]:
    """All that a browser could be asked to load, or that leads away."""
    names = ("src", "srcset", "href", "xlink:href", "action", "data", "poster")
    found = [one.attributes[name] for one in page.all() for name in names if name in one.attributes]
    styles = [style.text for style in page.all("style")] + [one.attributes.get("style", "") for one in page.all()]
    return found + [address for style in styles for address in re.findall(r"url\(.*?\)|@import.*", style)]
