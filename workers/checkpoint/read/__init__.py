"""Bytes out of a committed checkpoint, each hash checked: ``blob_reader.py``; all of it at once: ``verify.py``."""
