"""Experts that are elsewhere, as far as layers can tell."""

from dmoe.layers import OwnMeter, local_experts


class LentExperts:
    """A fake swarm: it has every expert in this process."""

    def __init__(self, manifest, store, options):
        self._here = local_experts(manifest, store, options)
        self._meter = OwnMeter(manifest, "them")

    async def run(self, layer, h, routing):
        return await self._here.run(layer, h, routing)

    async def open(self):
        await self._meter.open()

    def begin(self, bills, counts, spare="kept"):
        self._meter.begin(bills, counts, spare)

    def take(self, counts):
        return self._meter.take(counts)
