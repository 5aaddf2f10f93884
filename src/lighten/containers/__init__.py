"""File layouts, byte for byte, and how a file or a folder comes to be whole or not at all.

Exporters and the model reader share these; they import nothing of ours but the errors.
"""
