"""Who shall run which stage of a sequence: the planner's chain, with what stands already and without who failed.

Owns: the choice for one sequence. Does not own: the estimates (``core.plan``), what is known (``dmoe.planning``), what
happens after a failure (``caller``).

Invariants:
1. Stages that a sequence has already stay where they are. One at this node may have its experts elsewhere.
2. A peer that the privacy rule keeps from a stage never gets it, whatever stands already or failed.
3. A peer that gave wrong answers is never chosen, one that was not tried out yet only where no other was.
4. A peer that was refused for a stage is not chosen for it; a stage that nobody is left for is named with its layers
   and with who had it, when each was last seen and when it last answered.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import trio

from config.errors import LocalError, RemoteError
from config.vocabulary import PeerId
from dmoe.core.costs import Host, View, shape_of
from dmoe.core.manifest import Manifest
from dmoe.core.plan import Pin, plan
from dmoe.core.privacy import Privacy
from dmoe.core.spans import Ask
from dmoe.planning import Planner
from dmoe.replicas import now_us
from dmoe.sightings import KNOWN_MAX, answered_ago
from dmoe.trust import Trust
from p2p.face import Network

ASK = Ask(prompt_tokens=256, answer_tokens=256)
SHAPES_MAX = 64
GONE_MAX = 4
"""An error tells of so many stages where they have gone."""

Refused = Mapping[int, Collection[PeerId]]
"""Stage -> the peers that shall not be asked for it."""


class Directions:
    """Paths over the stages of a node's models."""

    def __init__(self, planner: Planner, network: Network) -> None:
        self.trust: Trust | None = None
        """Whom this node trusts; None: everybody."""
        self.legs: Counter[PeerId] = Counter()
        """Stages of this node's own sequences at each peer."""
        self._planner = planner
        self._sightings = planner.sightings
        self._me = network.peer_id
        self._directory = network.directory

    @property
    def privacy(self) -> Privacy:
        """The operator's rule."""
        return self._planner.wishes.privacy

    def path(
        self,
        manifest: Manifest,
        fixed: Mapping[int, PeerId],
        refused: Refused,
        *,
        resting: bool = False,
        privacy: Privacy | None = None,
    ) -> list[PeerId]:
        """A peer for each of the model's stages, in order; ``resting``: also of those that rest after failures;
        ``privacy``: the rule in force, the operator's unless a request tightens it. Raises
        RemoteError ``no_replica`` naming stage and layers, LocalError ``unavailable`` for a model without stages."""
        if not manifest.stages:
            raise without_stages(manifest)
        view = self._view(manifest, refused, fixed, resting=resting)
        wishes = self._planner.wishes
        pins = [pin for pin in wishes.pins if not self._is_fixed(manifest, pin, fixed)]
        for stage, peer in fixed.items():
            first, last = manifest.stages[stage].layers
            pins.append(Pin(first, last, self._way_here(manifest, first, last) if peer == self._me else peer))
        hosts = (*wishes.stage_hosts, *fixed.values()) if wishes.stage_hosts else ()
        rule = wishes.privacy if privacy is None else privacy
        wanted = replace(wishes, route="stages", pins=tuple(pins), stage_hosts=hosts, privacy=rule)
        runs = view.runs & {"stages", "mixed"}
        made = plan(shape_of(manifest), replace(view, runs=runs), ASK, wanted)
        if made.chosen is None:
            why = next(each.why_not for each in made.candidates if each.kind == "stages")
            hint = "start a node that serves it, or raise its replica count"
            raise RemoteError("no_replica", f"{manifest.name}: {why}{self._gone(manifest)}", hint)
        return self._peers_of(manifest, made.chosen.spans)

    def ran(self, manifest: Manifest, stage: int, peer: PeerId) -> None:
        """A peer ran a stage just now: it is there, whatever the directory says of it next."""
        shard = manifest.shard_index(manifest.stages[stage].id)
        self._sightings.saw(manifest.model_id, shard, (peer,), trio.current_time())

    def seen(self, manifest: Manifest, stage: int) -> str:
        """Who had a stage, when each was last seen and when it last answered; the latest first."""
        shard = manifest.shard_index(manifest.stages[stage].id)
        return self._sightings.each(manifest.model_id, (shard,), trio.current_time(), self._answered)

    def _answered(self, peer: PeerId) -> str:
        return answered_ago(self._planner.answered_at_us(peer), now_us())

    def _gone(self, manifest: Manifest) -> str:
        """What became of the stages that nobody offers any more."""
        found, now = [], trio.current_time()
        for stage in manifest.stages:
            shard = manifest.shard_index(stage.id)
            if not self._directory.providers(manifest.model_id, shard):
                first, last = stage.layers
                when = self._sightings.gone(manifest.model_id, (shard,), now, self._answered)
                found.append(f"{stage.id} (layers {first} to {last}): {when}")
        more = f"; and {len(found) - GONE_MAX} more stages" if len(found) > GONE_MAX else ""
        return "".join(f"; {each}" for each in found[:GONE_MAX]) + more

    def _way_here(self, manifest: Manifest, first: int, last: int) -> str:
        return "experts" if self._planner.spreads(manifest, first, last) else "here"

    def _peers_of(self, manifest: Manifest, spans: Collection[object]) -> list[PeerId]:
        """A peer per stage; a span here may cover several."""
        found: dict[int, PeerId] = {}
        for span in spans:
            where, peers, first = span.where, span.peers, span.first  # type: ignore[attr-defined]
            found[first] = self._me if where in ("here", "experts") else peers[0]
        return [found[stage.layers[0]] for stage in manifest.stages]

    def _is_fixed(self, manifest: Manifest, pin: Pin, fixed: Mapping[int, PeerId]) -> bool:
        spans = (manifest.stages[stage].layers for stage in fixed)
        return any(pin.first <= last and first <= pin.last for first, last in spans)

    def _view(self, manifest: Manifest, refused: Refused, fixed: Mapping[int, PeerId], *, resting: bool) -> View:
        """What the planner sees, without those who are refused and with this node's own load."""
        without: dict[PeerId, set[int]] = {}
        for stage, peers in refused.items():
            for peer in peers:
                without.setdefault(peer, set()).add(manifest.shard_index(manifest.stages[stage].id))
        view, adverts = self._planner.view(manifest), self._directory.adverts()
        self._remember(manifest, view)
        for peer, shards in self._mistrusted(manifest, view.peers, fixed).items():
            without.setdefault(peer, set()).update(shards)

        def seen(host: Host) -> Host:
            shards = host.shards - without.get(host.peer_id, set())
            barred = "" if resting and not adverts[host.peer_id].paused else host.barred
            queue_rows = host.queue_rows + self.legs[host.peer_id]
            return replace(host, shards=shards, queue_rows=queue_rows, barred=barred)

        return replace(view, peers=tuple(seen(host) for host in view.peers))

    def _remember(self, manifest: Manifest, view: View) -> None:
        """Who offers which stage at this moment."""
        now = trio.current_time()
        for stage in manifest.stages:
            shard = manifest.shard_index(stage.id)
            holders = [host.peer_id for host in view.peers if shard in host.shards]
            self._sightings.saw(manifest.model_id, shard, holders[:KNOWN_MAX], now)

    def _mistrusted(
        self, manifest: Manifest, hosts: Sequence[Host], fixed: Mapping[int, PeerId]
    ) -> Mapping[PeerId, set[int]]:
        """Stages that a peer offers and shall not be asked for: it gave wrong answers, or others were tried out and it
        was not yet."""
        found: dict[PeerId, set[int]] = {}
        if self.trust is None:
            return found
        for number, stage in enumerate(manifest.stages):
            index = manifest.shard_index(stage.id)
            offering = [host for host in hosts if index in host.shards]
            chosen = {host.peer_id for host in self.trust.choose(self._me, manifest.model_id, index, offering)}
            for host in offering:
                stands = fixed.get(number) == host.peer_id and self.trust.trusted(host.peer_id)
                if host.peer_id not in chosen and not stands:
                    found.setdefault(host.peer_id, set()).add(index)
        return found


def without_stages(manifest: Manifest) -> LocalError:
    """What is said of a model that was imported before stages were known."""
    return LocalError("unavailable", f"{manifest.name} has no stages", 'import it again, or use the route "experts"')
