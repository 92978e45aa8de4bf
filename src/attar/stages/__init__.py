"""The stages of the spine, one file or folder each; pipeline.py says what each is made from."""

STAGES = {
    "scan": "read every item, set aside what is broken, split by content",
    "embed": "turn items into vectors, with a given model or one learned from them",
    "cluster": "group the vectors",
    "curate": "find duplicates, outliers and a core set",
    "augment": "find how strongly items can be transformed",
    "train": "settle the original that is compressed",
    "compress": "prune, repair, distil and quantise to the budget",
    "evaluate": "measure on items nothing has seen",
    "export": "write RUN/model",
    "report": "write RUN/report.html",
}
"""What each stage does, in their order."""
