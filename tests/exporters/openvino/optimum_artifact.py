"""An artifact with what it should compute, for optimum_opens.py to open in another environment.

python -m tests.exporters.openvino.optimum_artifact FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

from tests.exporters.openvino.artifacts import write_artifact
from tests.exporters.oracle import random_ids, reference_logits
from tests.exporters.tiny_checkpoints import make_model


def main(folder: Path) -> None:
    """Leave FOLDER/openvino, and FOLDER/expected.npz with ids and their logits."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    model = make_model("phi3_medium_gqa", checkpoint, "int4_g32")
    write_artifact(model, folder)
    ids = random_ids(model.graph, 15)
    np.savez(folder / "expected.npz", ids=np.array([ids], np.int64), logits=reference_logits(model.graph, ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
