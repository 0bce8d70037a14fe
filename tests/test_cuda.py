"""What only a CUDA device shows: mixed precision with a real GradScaler, peak memory. Skipped elsewhere."""
import json

import pytest
import torch

from train import Config, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_each_precision_trains_and_stays_close_to_float32(amp, tmp_path):
    if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    flags = dict(task="objects", epochs=1, limit=40, arms="armada", seeds="0", device="cuda",
                 grad_checkpoint="on")
    losses = {}
    for setting in ("off", amp):
        out = tmp_path / setting
        if not out.exists():
            metrics = train(Config(**flags, amp=setting, out=str(out)))["armada"][0]
            assert metrics["peak_memory_mib"] > 0
        rows = [json.loads(line) for line in (out / "armada/0/log.jsonl").read_text().splitlines()]
        losses[setting] = [row["loss"] for row in rows if row.get("role") == "student"]
    assert losses[amp] == pytest.approx(losses["off"], rel=0.02)
