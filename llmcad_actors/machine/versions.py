"""Which versions llmcad was tested with, and which are installed. Reads package metadata; imports none of them."""

import re
import sys
from collections.abc import Callable
from importlib import metadata

TESTED = {"ray": "2.60", "torch": "2.13", "transformers": "5.24"}
"""Minor versions, by package. Newer ones may work; whoever has one is told."""

Lookup = Callable[[str], str | None]
"""A package's name -> its version, None where it is not installed."""


def installed(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """llmcad's own; "unknown" where the package is used without having been installed."""
    return installed("llmcad-actors") or "unknown"


def is_tested(name: str, lookup: Lookup = installed) -> bool:
    """Whether the installed version is of the minor version that was tested."""
    version = lookup(name)
    return version is not None and _minor(version) == _minor(TESTED[name])


def newer_than_tested(lookup: Lookup = installed) -> tuple[str, ...]:
    """One line that names every package whose minor version is newer than the tested one; nothing where none is."""
    newer = [
        f"{name} {version} is newer than {tested}"
        for name, tested in TESTED.items()
        if (version := lookup(name)) and _minor(version) > _minor(tested)
    ]
    if not newer:
        return ()
    packages = " ".join(f"'{name}=={tested}.*'" for name, tested in TESTED.items())
    return (
        f"{', '.join(newer)}, which llmcad {own_version()} was tested with; "
        f"if something breaks, install the tested versions: pip install {packages}",
    )


def summary(lookup: Lookup = installed) -> str:
    """ "llmcad 0.1.0 (Python 3.11.9, ray 2.60.0, torch 2.13.0, transformers 5.24.0)"."""
    others = ", ".join(f"{name} {lookup(name) or 'is missing'}" for name in TESTED)
    return f"llmcad {own_version()} (Python {sys.version.split()[0]}, {others})"


def _minor(version: str) -> tuple[int, int]:
    """ "2.13.0+cpu" -> (2, 13); (0, 0) for what does not begin with two numbers."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
