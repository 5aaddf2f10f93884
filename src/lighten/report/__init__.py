"""A run directory becomes one HTML file that needs nothing else: no network, no other file.

run/*.json, run/look/*.json -> facts -> sections of the page; nothing here writes into a run but
report.html, and nothing here imports torch.
"""
