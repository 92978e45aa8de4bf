"""Writes scikit-learn's 1,797 handwritten digits as PNG files, with their labels in a file of their own.

    python examples/write_digits.py FOLDER LABELS.csv

The demo reads the folder back like any user's; the labels only judge the result.
"""

import csv
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path, labels: Path) -> None:
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    with labels.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label"])
        for number, (image, label) in enumerate(zip(digits.images, digits.target)):
            path = folder / f"digit-{number:04d}.png"
            if not path.exists():  # an untouched folder keeps its times, so a finished run has nothing to do
                Image.fromarray((image * (255 / 16)).astype("uint8")).save(path)
            rows.writerow([path.name, f"digit {label}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
