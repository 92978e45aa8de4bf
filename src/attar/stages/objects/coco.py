"""Objects as COCO JSON, written piece by piece, so that no more than a shard is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attar.records import Objects
from attar.stages.objects import masks


def each(record: Objects) -> Iterator[dict[str, Any]]:
    """One annotation per object: ids from 1, category ids from 1 (kind + 1), box x, y, width, height and mask in pixels of the upright original."""
    number = 0
    sizes = dict(zip(record.images["id"].to_pylist(), zip(record.images["height"].to_pylist(), record.images["width"].to_pylist())))
    for table in record.batches():
        for row in table.to_pylist():
            number += 1
            size = sizes[row["item"]]
            mask = masks.resize(masks.mask_of(np.array(row["counts"]), (row["mask_height"], row["mask_width"])), size)
            yield {
                "id": number,
                "image_id": row["item"],
                "category_id": row["kind"] + 1,
                "bbox": [row["x"], row["y"], row["width"], row["height"]],
                "area": row["area"],
                "segmentation": {"counts": masks.counts_of(mask).tolist(), "size": list(size)},
                "iscrowd": 0,
                "score": round(row["score"], 4),
            }


def write(path: Path, record: Objects) -> None:
    """The whole as one COCO file."""
    images = [
        {"id": row["id"], "file_name": row["path"], "width": row["width"], "height": row["height"]} for row in record.images.to_pylist()
    ]
    kinds = [{"id": kind["kind"] + 1, "name": f"kind {kind['kind'] + 1}", "supercategory": "object"} for kind in record.kinds]
    about = {"description": f"objects found without labels by attar: {record.method}"}
    with path.open("w", encoding="utf-8") as stream:
        head = json.dumps({"info": about, "images": images, "categories": kinds}, ensure_ascii=False)
        stream.write(head[:-1] + ', "annotations": [')
        for number, row in enumerate(each(record)):
            stream.write((",\n" if number else "\n") + json.dumps(row))
        stream.write("\n]}\n")
