"""How fast a run trains: what every line of `speed.jsonl` says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from teachers.cost import count_operations, matmul_rate, peak_memory, reset_peak_memory, synchronize


class Throughput:
    """Counts samples and the seconds from one line of the log to the next, but for what is not training.

    The device has done what it was given by then, since the metrics of the line were read from it.

    Args:
        batch_size: samples a step, over all processes.
        sequence_length: tokens of a sample; 0 where there are none.
        dtype: that of the matrix products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_size: int, sequence_length: int):
        self.device, self.batch_size, self.sequence_length = device, batch_size, sequence_length
        self.rate = matmul_rate(device, dtype)
        reset_peak_memory(device)
        self.flops, self._counted = 0, False  # of a step, on this process
        self._steps, self._since = 0, time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The first step is slow, since its operations are counted."""
        if self._counted:
            yield
        else:
            with count_operations() as counter:
                yield
            self.flops, self._counted = counter.get_total_flops(), True
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within does not count: evaluations, checkpoints."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Since the last time: samples and tokens per second of all processes, model FLOPs utilisation, peak memory.

        `mfu` is the share, on this process, of the rate of a large matrix product; `peak_memory_mib` is that of the
        GPU, or of the process, since the start.
        """
        seconds = time.perf_counter() - self._since
        samples = self._steps * self.batch_size / seconds
        rates = {"samples_per_second": samples}
        if self.sequence_length:
            rates["tokens_per_second"] = samples * self.sequence_length
        rates["mfu"] = self.flops * self._steps / seconds / self.rate
        rates["peak_memory_mib"] = peak_memory(self.device)
        self._steps, self._since = 0, self._since + seconds
        return rates
