"""Sub-MoE's intra-expert form, held against its explicit joint decomposition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle.helpers import operate, stock, tensors
from tests.oracle.test_merge import decisions, name
from tests.oracle.test_reconstruct import rows_of

Checkpoint = Callable[..., Path]
Sampler = Callable[..., Path]


@pytest.mark.parametrize("rank", [5, 1000])
def test_sub_moe_truncates_what_the_inputs_see(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, rank: int
) -> None:
    """The intra-expert form by an explicit joint SVD of whitened matrices; at full rank it is the mean."""
    source = checkpoint("qwen3_moe")
    statistics = sampled(source)
    given: dict[str, Any] = {"experts": 3, "calibration": statistics, "sample": 600}
    operate("merge", "sub-moe", source, tmp_path / "low", rank=rank, **given)
    stored, low = tensors(source), tensors(tmp_path / "low")
    model = stock(source)
    rows = rows_of(statistics, 1)
    mixture = model.model.layers[1].mlp
    with torch.no_grad():
        chosen = mixture.gate(rows)[2]
    decided = decisions(tmp_path / "low")["1"]
    for slot, (group, weights) in enumerate(
        zip(decided["groups"], decided["weights"], strict=True)
    ):
        for projection in ("gate", "up", "down"):
            whitened, inverse, members = [], [], []
            for expert in group:
                gate, up, down = (
                    stored[name("other", 1, expert, part)].double()
                    for part in ("gate", "up", "down")
                )
                picked = (chosen == expert).any(1)
                inputs = rows[picked if picked.any() else slice(None)].double()
                if projection == "down":
                    inputs = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
                gram = inputs.T @ inputs
                damping = 1e-4 * gram.trace() / len(gram) * torch.eye(len(gram)).double()
                root = torch.linalg.cholesky((gram if picked.any() else 0 * gram) + damping)
                member = {"gate": gate, "up": up, "down": down}[projection]
                members.append(member)
                whitened.append(member @ root)
                inverse.append(torch.linalg.inv(root))
            u, s, vt = torch.linalg.svd(torch.cat(whitened, dim=1), full_matrices=False)
            kept = min(rank, len(s))
            blocks = vt[:kept].split(members[0].shape[1], dim=1)
            pairs = zip(weights, blocks, inverse, strict=True)
            mixed = sum(weight * block @ back for weight, block, back in pairs)
            expected = u[:, :kept] @ torch.diag(s[:kept]) @ mixed
            found = low[name("other", 1, slot, projection)].double()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            if rank == 1000:
                mean = sum(w * member for w, member in zip(weights, members, strict=True))
                torch.testing.assert_close(found, mean, atol=1e-6, rtol=1e-5)
