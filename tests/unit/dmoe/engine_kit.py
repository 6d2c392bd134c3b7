"""An engine for tests that need not say when it runs."""

import trio

from dmoe.engine import Engine


class SelfRunningEngine(Engine):
    """Runs from the first request to the end of the test's event loop."""

    async def prepare(self, request):
        await self._start()
        return await super().prepare(request)

    async def prepare_embeddings(self, request):
        await self._start()
        return await super().prepare_embeddings(request)

    async def _start(self):
        if self._nursery is None:
            trio.lowlevel.spawn_system_task(self.run)
            while self._nursery is None:
                await trio.lowlevel.checkpoint()
