"""Facts about architectures that no graph knows. A file here registers what it defines."""
