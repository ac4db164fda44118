"""``python -m fastmem``."""

from fastmem.cli import main

main()
