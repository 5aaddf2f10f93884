"""Where the bytes go. A file here registers what it defines."""
