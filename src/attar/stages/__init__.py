"""The stages of the spine, one file or folder each; pipeline.py puts them in order."""
