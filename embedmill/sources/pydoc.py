"""`pydoc:`, the documentation that the running Python carries: a corpus that everybody has, without a download.

- First the topics of `pydoc_data`, cut into sections at paragraph borders with the title repeated in front, then the
  public docstrings of the modules, classes and functions of a fixed list, a passage per paragraph: the qualified name, a
  blank line, the paragraph. One thought a passage is what a small model finds again; the signature is metadata.
- Ids are stable and unique: `topic:with`, `topic:with#2`, `asyncio.gather`. A docstring occurs once, under the first name.
- The same Python version gives the same passages: modules are in a fixed order, names sorted, and default values in
  signatures are shown only where their form is the same in every process.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType

from ..documents import Cursor, SourceDocument, canonical_json

MIN_DOCSTRING_CHARS = 40
MIN_PARAGRAPH_CHARS = 30
MAX_SECTION_CHARS = 1500

# Modules whose import has no side effect and no deprecation warning in any supported version.
MODULES = """
    asyncio asyncio.base_events asyncio.events asyncio.futures asyncio.locks asyncio.protocols asyncio.queues
    asyncio.runners asyncio.streams asyncio.subprocess asyncio.taskgroups asyncio.tasks asyncio.threads
    asyncio.timeouts asyncio.transports builtins collections collections.abc contextlib contextvars functools
    itertools operator copy copyreg heapq bisect queue array weakref types reprlib pprint graphlib enum
    dataclasses abc typing inspect json json.decoder json.encoder re string textwrap difflib unicodedata codecs
    struct html html.parser csv configparser tomllib plistlib pathlib os os.path posixpath sys io stat fileinput
    filecmp fnmatch glob linecache shutil tempfile zipfile tarfile gzip bz2 lzma zlib pickle shelve marshal dbm
    dbm.dumb sqlite3 sysconfig subprocess threading concurrent.futures concurrent.futures.thread
    concurrent.futures.process multiprocessing multiprocessing.connection multiprocessing.context
    multiprocessing.managers multiprocessing.pool multiprocessing.process multiprocessing.queues
    multiprocessing.shared_memory multiprocessing.synchronize sched signal selectors select mmap errno
    faulthandler atexit socket ssl socketserver http http.client http.server http.cookies http.cookiejar
    urllib.parse urllib.request urllib.error urllib.response urllib.robotparser ftplib smtplib xmlrpc.client
    xmlrpc.server ipaddress webbrowser wsgiref.simple_server wsgiref.util email email.charset
    email.contentmanager email.encoders email.errors email.feedparser email.generator email.header
    email.headerregistry email.message email.mime.application email.mime.multipart email.mime.text email.parser
    email.policy email.utils mimetypes base64 binascii quopri xml.dom xml.dom.minidom xml.etree.ElementTree
    xml.sax xml.sax.saxutils hashlib hmac secrets datetime calendar time zoneinfo random statistics math cmath
    decimal fractions numbers colorsys wave locale gettext argparse optparse getopt getpass shlex cmd logging
    logging.config logging.handlers platform ctypes ctypes.util unittest unittest.async_case unittest.case
    unittest.loader unittest.main unittest.mock unittest.result unittest.runner unittest.suite doctest profile
    cProfile pstats timeit trace tracemalloc traceback warnings gc ast dis token tokenize py_compile compileall
    pydoc importlib importlib.machinery importlib.metadata importlib.resources importlib.util pkgutil runpy venv
"""

_PROCESS_BOUND = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the documentation: id, text, and metadata as canonical JSON."""

    id: str
    text: str
    metadata: str


@dataclass(frozen=True, slots=True)
class _Documented:
    """A module, class or function and its docstring."""

    name: str
    docstring: str
    module: str
    kind: str
    signature: str

    def passages(self) -> Iterator[Passage]:
        record = {"module": self.module, "name": self.name, "kind": self.kind}
        metadata = canonical_json(record | ({"signature": self.signature} if self.signature else {}))
        for number, paragraph in enumerate(split_docstring(self.docstring), start=1):
            identity = self.name if number == 1 else f"{self.name}#{number}"
            yield Passage(identity, f"{self.name}\n\n{paragraph}", metadata)


class PydocSource:
    """The passages of `collect_passages` as a source. `Cursor.record` counts them."""

    def __init__(self, *, name: str, push_key: str) -> None:
        self.name = name
        self.push_key = push_key

    def total_bytes(self) -> int:
        return passage_ends()[-1]

    def position_bytes(self, cursor: Cursor) -> int:
        ends = passage_ends()
        return ends[min(cursor.record, len(ends) - 1)]

    def remarks(self) -> list[str]:
        return []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument]:
        """Yield the passages behind `after`. The first call imports the documented modules: a second or so."""
        passages = collect_passages()
        for number in range(after.record if after else 0, len(passages)):
            passage = passages[number]
            place = f"{self.name}{passage.id}"
            yield SourceDocument(passage.id, passage.text, passage.metadata, Cursor(record=number + 1), place)


@functools.cache
def passage_ends() -> list[int]:
    """UTF-8 bytes of the first n passages, for every n."""
    return list(accumulate((len(passage.text.encode()) for passage in collect_passages()), initial=0))


@functools.cache
def collect_passages() -> tuple[Passage, ...]:
    """Every passage, in the fixed order, with unique ids."""
    passages: dict[str, Passage] = {}
    for passage in (*topic_passages(), *docstring_passages()):
        passages.setdefault(passage.id, passage)
    return tuple(passages.values())


def topic_passages() -> Iterator[Passage]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        metadata = canonical_json({"module": "pydoc_data.topics", "name": name, "kind": "topic"})
        for number, section in enumerate(split_topic(topics[name]), start=1):
            identity = f"topic:{name}" if number == 1 else f"topic:{name}#{number}"
            yield Passage(identity, section, metadata)


def split_topic(topic: str) -> list[str]:
    """Sections of about MAX_SECTION_CHARS, cut at blank lines only, each with the topic's title in front."""
    title, *paragraphs = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", topic.strip()) if part.strip()]
    title = title.partition("\n")[0].strip()
    sections: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        if sections[-1] and size + len(paragraph) > MAX_SECTION_CHARS:
            sections.append([])
            size = 0
        sections[-1].append(paragraph)
        size += len(paragraph)
    return ["\n\n".join([title, *section]) for section in sections if section]


def docstring_passages() -> Iterator[Passage]:
    seen: set[str] = set()
    for name in MODULES.split():
        module = import_quietly(name)
        if module is None:
            continue
        for documented in documented_things(module, name=name):
            if documented.docstring not in seen:
                seen.add(documented.docstring)
                yield from documented.passages()


def import_quietly(name: str) -> ModuleType | None:
    """The module, or None where this Python or system has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def documented_things(module: ModuleType, *, name: str) -> Iterator[_Documented]:
    """The module, then its public classes and functions, where they have a docstring of their own."""
    things: list[tuple[object, str, str]] = [(module, name, "module")]
    for member_name, member in public_members(module):
        if inspect.isclass(member) or inspect.isroutine(member):
            kind = "class" if inspect.isclass(member) else "function"
            things.append((member, f"{name}.{member_name}", kind))
    for thing, qualified_name, kind in things:
        docstring = own_docstring(thing)
        if len(docstring) >= MIN_DOCSTRING_CHARS and not _PROCESS_BOUND.search(docstring):
            shown = qualified_name.removeprefix("builtins.")
            yield _Documented(shown, docstring, name, kind, show_signature(thing))


def public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """What the module declares as public, or defines where it declares nothing, by name.

    What a package lifts from its own submodules is public too: Python 3.11 forgets `asyncio.TaskGroup` in `__all__`.
    """
    declared = set(getattr(module, "__all__", ()))
    own = () if declared else (module.__name__, f"_{module.__name__}")
    for name in sorted(declared | set(vars(module))):
        if name.startswith("_"):
            continue
        member = quiet_attribute(module, name)
        home = str(getattr(member, "__module__", None))
        if name in declared or home in own or home.startswith(f"{module.__name__}."):
            yield name, member


def quiet_attribute(module: ModuleType, name: str) -> object:
    """The attribute, or None where it is declared and missing. Deprecated ones warn when they are looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, name, None)


def split_docstring(docstring: str) -> list[str]:
    """Its paragraphs; examples, lists and scraps stay with the paragraph before them."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring):
        text = paragraph.strip("\n")
        belongs = not text[:1].isalnum() or len(text) < MIN_PARAGRAPH_CHARS
        if pieces and belongs:
            pieces[-1] += f"\n\n{text}"
        else:
            pieces.append(text)
    return pieces


def own_docstring(thing: object) -> str:
    docstring = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    return inspect.cleandoc(docstring).strip() if isinstance(docstring, str) else ""


def show_signature(thing: object) -> str:
    """`(a, b=1)`, or nothing for modules, properties and what has no signature."""
    if not callable(thing):
        return ""
    try:
        signature = inspect.signature(thing)
        parameters = [
            parameter.replace(annotation=parameter.empty, default=show_default(parameter.default))
            for parameter in signature.parameters.values()
        ]
        return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    except Exception:
        # Signatures of C functions are evaluated from text, which can raise anything: 3.13's select.epoll does.
        return ""


class _Shown:
    """A default value by its written form."""

    def __init__(self, form: str) -> None:
        self._form = form

    def __repr__(self) -> str:
        return self._form


def show_default(value: object) -> object:
    """The default where its form is the same in every process, else `...`."""
    if isinstance(value, str) and len(value) > 1 and Path(value).is_absolute():
        return _Shown("...")
    if value is inspect.Parameter.empty or value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if value == () and isinstance(value, tuple):
        return value
    return _Shown(value.__qualname__ if isinstance(value, type) else "...")
