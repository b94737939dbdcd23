"""Whether optimum-intel opens the folder that optimum_artifact.py made, and computes what it should.

python -m tests.exporters.openvino.optimum_opens FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

BOUND = 1e-3  # of a logit
# The CPU plugin's own approximations off: this environment has none of tundish's, so they are spelled here again.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def main(folder: Path) -> None:
    """Exit with a sentence if the logits differ."""
    import torch
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    expected = np.load(folder / "expected.npz")
    opened = OVModelForCausalLM.from_pretrained(folder / "openvino", ov_config=EXACT)
    AutoTokenizer.from_pretrained(folder / "openvino")
    ids = torch.from_numpy(expected["ids"])
    logits = opened(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()[0]
    apart = float(np.abs(logits - expected["logits"]).max())
    if not apart < BOUND:
        sys.exit(f"optimum-intel's logits are {apart:.3g} apart, at most {BOUND:g} is right")
    print(f"optimum-intel opens the artifact; its logits are at most {apart:.1g} apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
