"""Programs that load what we write: each opens a file in a process of its own and reports."""
