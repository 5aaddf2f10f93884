"""How to pick the compressed weight within a format. A file here registers what it defines."""
