"""The local API on the unix socket, and the translation of its messages."""
