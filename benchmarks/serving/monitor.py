"""Monitors a server: process resources, metrics, health."""

import asyncio
import re
import time

import httpx

from serving.process import usage
from serving.servers import Server
from serving.soak_checks import Sample
from serving.soak_load import Load, Tally

SAMPLE_SECONDS = 5.0
IDLE_SECONDS = 20.0
"""Seconds after the load within which all resources must be freed."""
HEALTH_SECONDS = 5.0
FILLING_CALLS = 1000
FILLING_WORDS = 120
FILLED_SHARE = 0.9
"""Share of cached pages that counts as full: the last, partial page of a prompt is not cached."""
SERIES = re.compile(r"^(lowlat:\w+(?:\{[^}]*\})?) (\S+)", re.MULTILINE)
MODEL = re.compile(r',?model_name="[^"]*"')
GAUGES = {
    "running": "lowlat:num_requests_running",
    "waiting": "lowlat:num_requests_waiting",
    "cache_usage": "lowlat:kv_cache_usage_perc",
}


class Watch:
    """Samples of one server while it is under load."""

    def __init__(self, server: Server, client: httpx.AsyncClient, tally: Tally) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._client = client
        self._tally = tally
        self._begin = time.monotonic()

    async def run(self) -> None:
        """Sample until cancelled."""
        self._begin = time.monotonic()
        while True:
            self.samples.append(await self.sample())
            await asyncio.sleep(SAMPLE_SECONDS)

    async def sample(self) -> Sample:
        """The server's current state. Raises ProcessLookupError if it has ended."""
        held, tally = usage(self._server.pid), self._tally
        health, gauges = await self._health(), await self._gauges()
        return Sample(
            seconds=round(time.monotonic() - self._begin, 2),
            rss_bytes=held.rss_bytes,
            descriptors=held.descriptors,
            threads=held.threads,
            processes=held.processes,
            health=health,
            **gauges,
            answered=tally.answered,
            cancelled=tally.cancelled,
            refused=tally.refused,
            busy=tally.busy,
        )

    async def idle(self) -> Sample:
        """Sample the server when all requests are done, or after IDLE_SECONDS."""
        end = time.monotonic() + IDLE_SECONDS
        while True:
            sample = await self.sample()
            is_idle = not (sample.running or sample.waiting or sample.cache_usage)
            if is_idle or time.monotonic() > end:
                return sample
            await asyncio.sleep(0.5)

    async def metrics(self) -> dict[str, float]:
        """Every figure of /metrics by its name and labels but that of the server's one model."""
        text = (await self._client.get("/metrics")).text
        series = ((MODEL.sub("", name), value) for name, value in SERIES.findall(text))
        return {name.removesuffix("{}"): float(value) for name, value in series}

    async def cached_share(self) -> float:
        """Fraction of KV cache pages held by the prefix cache."""
        values = await self.metrics()
        return values["lowlat:kv_cache_pages_cached"] / values["lowlat:kv_cache_pages"]

    async def _health(self) -> int:
        try:
            return (await self._client.get("/health", timeout=HEALTH_SECONDS)).status_code
        except httpx.HTTPError:
            return 0

    async def _gauges(self) -> dict[str, float]:
        values = await self.metrics()
        return {ours: values[name] for ours, name in GAUGES.items()}


async def fill_cache(load: Load, watch: Watch) -> None:
    """Prefill prompts until the KV cache is full, because pages first touched under load would look
    like a leak.
    """
    for _ in range(FILLING_CALLS):
        if await watch.cached_share() >= FILLED_SHARE:
            return
        await load.prefill(FILLING_WORDS)
    print("the KV cache is not full; memory may grow by the rest of it", flush=True)
