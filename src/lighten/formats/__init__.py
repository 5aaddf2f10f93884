"""Sets of numbers and their bytes. A file here registers what it defines (lighten.registry)."""
