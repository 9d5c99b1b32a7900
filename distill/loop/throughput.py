"""How fast a run trains: what every line of `speed.jsonl` says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from teachers.cost import count_operations, matmul_rate, peak_memory, reset_peak_memory


class Throughput:
    """Counts samples and the seconds spent on them, from one line of the log to the next.

    Args:
        batch_size: samples a step, over all processes.
        sequence_length: tokens of a sample; 0 where there are none.
        dtype: that of the matrix products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_size: int, sequence_length: int):
        self.device, self.batch_size, self.sequence_length = device, batch_size, sequence_length
        self.rate = matmul_rate(device, dtype)
        reset_peak_memory(device)
        self.flops = 0  # of a step, on this process
        self._steps, self._seconds = 0, 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The first step that is timed is slow, since its operations are counted."""
        start = time.perf_counter()
        if self.flops:
            yield
        else:
            with count_operations() as counter:
                yield
            self.flops = counter.get_total_flops()
        self._steps, self._seconds = self._steps + 1, self._seconds + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Since the last time: samples and tokens per second of all processes, model FLOPs utilisation, peak memory.

        `mfu` is the share, on this process, of the rate of a large matrix product; `peak_memory_mib` is that of the
        GPU, or of the process, since the start.
        """
        samples = self._steps * self.batch_size / self._seconds
        rates = {"samples_per_second": samples}
        if self.sequence_length:
            rates["tokens_per_second"] = samples * self.sequence_length
        rates["mfu"] = self.flops * self._steps / self._seconds / self.rate
        rates["peak_memory_mib"] = peak_memory(self.device)
        self._steps, self._seconds = 0, 0.0
        return rates
