"""Files and folders that cameras, network disks and desktops add to others, and that are no part of a data set."""

from __future__ import annotations

import re

# compared without case, because most of these systems do not tell cases apart
_NAMES = frozenset(
    (
        # macOS
        "__macosx",
        "icon\r",
        "desktop db",
        "desktop df",
        "network trash folder",
        "temporary items",
        "thevolumesettingsfolder",
        # Windows
        "$recycle.bin",
        "$extend",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "iconcache.db",
        "desktop.ini",
        "picasa.ini",
        # Linux, Android and cameras
        "lost+found",
        "lost.dir",
        "zbthumbnail.info",
        # network disks of Synology, QNAP and NetApp
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "@synoresource",
        "@synoeastream",
        "@sharesnap",
        "@sharebin",
        "@transcode",
        "@__thumb",
        "#recycle",
        "#snapshot",
        "~snapshot",
        # programs that keep their files beside the data
        "__pycache__",
    )
)
# chkdsk's folders, and streams that are kept as files: thumbnails' keys, where a file comes from, Synology's attributes
_PATTERN = re.compile(r"found\.\d{3}|thumbs\.db:.*|.*:zone\.identifier|.*@syno(eastream|resource)", re.DOTALL)


def is_system_name(name: str) -> bool:
    """Return whether a file or folder of this name is passed over: hidden ones, and those that systems make."""
    folded = name.casefold()
    return name.startswith(".") or folded in _NAMES or _PATTERN.fullmatch(folded) is not None
