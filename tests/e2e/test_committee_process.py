"""A network founded from public keys whose one witness is replaced by another, by operators on the command line."""

import json

from node.rig import Swarm, rios, wait_for

SECONDS_MAX = 60.0


def test_operators_found_a_network_and_replace_its_witness(tmp_path):
    with Swarm(tmp_path / "swarm") as swarm:
        one = swarm.add("one", {"ledger.witness": True, "ledger.sync_seconds": 1})
        me = json.loads(rios(one, "id", "--json"))["peer_id"]
        genesis = tmp_path / "genesis.json"
        founded = rios(one, "ledger", "genesis", "new", str(genesis), "--issuer", me, "--root", me, "--witness", me)
        assert "no Byzantine tolerance" in founded
        rios(one, "init", "--keep-config", "--genesis", str(genesis))
        swarm.start(one)
        one.ask("ledger.grant", to=me, microcredits=5_000_000)
        seeds = tuple(one.status["network"]["addresses"])
        settings = {"p2p.seeds": seeds, "ledger.witness": True, "ledger.sync_seconds": 1}
        two = swarm.add("two", settings, ("--genesis", str(genesis)))
        key = json.loads(rios(two, "ledger", "epoch-key", "--json"))["key"]
        swarm.start(two)
        entry = json.loads(rios(one, "ledger", "committee", key, "--json"))["entry"]
        assert one.ask("ledger.committee")["epochs"][-1]["epoch"] == 0, "nothing is signed yet"
        rios(one, "ledger", "allow", entry)
        assert entry in rios(one, "ledger", "committee", key, "--submit")
        wait_for(lambda: "this node: voting" in rios(two, "ledger", "committee"), "two to decide", SECONDS_MAX)
        assert list((two.data / "epoch-keys").iterdir())
        one.ask("ledger.transfer", to=two.status["node"]["peer_id"], microcredits=7)
        wait_for(lambda: two.ask("ledger.balance", account="")["balance"] == 7, "the credits", SECONDS_MAX)
        assert two.ask("ledger.verify")["verified"]
        one.kill()
        swarm.start(one)
        newest = one.ask("ledger.committee")
        assert [each["witnesses"][0]["key"] for each in newest["epochs"]] == [me, key]
        assert newest["epochs"][-1]["witnesses"][0]["node"] == two.status["node"]["peer_id"]
        assert newest["witness"]["phase"] == "no seat"
