"""Hidden states of all tokens between two layers, in memory or mapped to a temporary file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..errors import RefusedError


class HiddenStates:
    """Float32 states [T, D] of every real token, laid end to end; padding is never stored.

    The file has no name: it is gone when the process is, however it ends.

    Args:
        tokens: T.
        hidden: D.
        max_memory: bytes above which the states are mapped to a file.
        scratch: where that file goes; the system's temporary folder when None.

    Raises:
        RefusedError: the disk cannot hold the file.
    """

    def __init__(
        self, tokens: int, hidden: int, *, max_memory: int, scratch: Path | None = None
    ) -> None:
        size = tokens * hidden * 4
        self.mapped = size > max_memory
        if not self.mapped:
            self.packed_TD = torch.empty(tokens, hidden, dtype=torch.float32)
            return
        with tempfile.TemporaryFile(dir=scratch) as file:
            try:
                # A sparse file would meet a full disk as a fatal signal in the middle of the run.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                place = scratch or Path(tempfile.gettempdir())
                raise RefusedError(
                    f"{place}: no room for {size} bytes of hidden states ({error.strerror})",
                    hint="use fewer --tokens, or set TMPDIR to a larger disk",
                ) from error
            mapped = np.memmap(file, np.float32, "r+", shape=(tokens, hidden))
        self.packed_TD = torch.from_numpy(mapped)

    def padded(
        self, start: int, stop: int, mask_BT: torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        """The tokens ``start`` to ``stop`` as a batch [B, T, D], padded by 0."""
        hidden = self.packed_TD.shape[1]
        batch_BTD = torch.zeros(*mask_BT.shape, hidden, dtype=dtype, device=mask_BT.device)
        batch_BTD[mask_BT] = self.packed_TD[start:stop].to(batch_BTD)
        return batch_BTD

    def store(self, start: int, stop: int, rows_ND: torch.Tensor) -> None:
        """Replace the tokens ``start`` to ``stop``."""
        self.packed_TD[start:stop].copy_(rows_ND)
