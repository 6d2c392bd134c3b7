"""The books under any order of reserving, settling, crediting, budgets and recovery by two gateways, of what ran on as
well: what is refused is what the rules refuse, no balance or budget is overspent, and it all ties."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import books
from gateway.accounts import Accounts
from gateway.audit import OPERATOR
from gateway.billing import budgets
from gateway.billing.reconcile import reconcile
from gateway.books import Batch
from gateway.db import stamps
from gateway.db.migrate import migrate
from gateway.db.session import open_database
from gateway.money import Prices, Reservation, Settlement

PRICES = Prices(1_000_000, 2_000_000)
GATEWAYS = ("here", "there")
KEYS = (0, 1)

small = st.integers(0, 30)
gateway, key = st.sampled_from(GATEWAYS), st.sampled_from(KEYS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), gateway, key, small, small),
        st.tuples(st.just("settle"), gateway, small, small),
        st.tuples(st.just("credit"), st.integers(1, 200)),
        st.tuples(st.just("budget"), st.sampled_from((None, *KEYS)), st.integers(0, 300)),
        st.tuples(st.just("unbudget"), st.sampled_from((None, *KEYS))),
        st.tuples(st.just("recover"), gateway),
        st.tuples(st.just("end_late"), small, small),
    ),
    min_size=5,
    max_size=25,
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Accounts]]:
    """Two gateways' own connections to one database."""
    folder = tmp_path_factory.mktemp("books")
    found = {name: Accounts(open_database("", Path(folder))) for name in GATEWAYS}
    migrate(found["here"].database)
    yield found
    for each in found.values():
        each.database.close()


@dataclass
class Model:
    """What must be true, the simple way. ``limits``: of a key's number, None for the user's."""

    balance: int = 0
    open: dict[str, tuple[Reservation, int]] = field(default_factory=dict)
    lost: dict[str, tuple[Reservation, int]] = field(default_factory=dict)
    charged: list[tuple[int, int]] = field(default_factory=list)
    limits: dict[int | None, int] = field(default_factory=dict)

    def used(self, key: int | None) -> int:
        held = sum(r.microcredits for r, k in self.open.values() if key in (None, k))
        return held + sum(amount for amount, k in self.charged if key in (None, k))

    @property
    def free(self) -> int:
        return self.balance - sum(r.microcredits for r, _ in self.open.values())

    def refuses(self, needed: int, key: int) -> bool:
        rooms = [limit - self.used(k) for k, limit in self.limits.items() if k in (None, key)]
        return needed > self.free or (needed > 0 and any(needed > room for room in rooms))


class Bank:
    """A fresh user with two keys, and the model beside them."""

    def __init__(self, both: dict[str, Accounts]) -> None:
        self.both, self.model = both, Model()
        self.user = both["here"].create_user(stamps.new_id()).id
        self.keys = [both["here"].create_key(self.user, "k").key.id for _ in KEYS]

    def reserve(self, gateway: str, key: int, prompt: int, tokens: int) -> None:
        wanted = Reservation(
            id=stamps.new_id(),
            instance=gateway,
            account_id=f"user:{self.user}",
            user_id=self.user,
            key_id=self.keys[key],
            request_id="r",
            endpoint="chat.completions",
            model="tiny",
            prompt_tokens=prompt,
            max_tokens=tokens,
            prices=PRICES,
        )
        refused = books.write_batch(self.both[gateway].database, Batch(reserve=[wanted]))
        assert bool(refused) == self.model.refuses(wanted.microcredits, key)
        if not refused:
            self.model.open[wanted.id] = wanted, key

    def settle(self, gateway: str, which: int, tokens: int) -> None:
        if not self.model.open:
            return
        name = sorted(self.model.open)[which % len(self.model.open)]
        reservation, key = self.model.open.pop(name)
        self.charge(self.end(gateway, reservation, tokens), key)

    def end(self, gateway: str, reservation: Reservation, tokens: int) -> int:
        done = Settlement(
            reservation=reservation, prompt_tokens=reservation.prompt_tokens, completion_tokens=tokens, outcome="stop"
        )
        for _ in range(2):  # the second one finds nothing to do
            books.write_batch(self.both[gateway].database, Batch(settle=[done]))
        return done.microcredits

    def end_late(self, which: int, tokens: int) -> None:
        """The gateway of what was recovered is alive."""
        if not self.model.lost:
            return
        reservation, key = self.model.lost.pop(sorted(self.model.lost)[which % len(self.model.lost)])
        free = self.model.free
        self.charge(min(self.end(reservation.instance, reservation, tokens), free), key)

    def charge(self, amount: int, key: int) -> None:
        self.model.balance -= amount
        self.model.charged.append((amount, key))

    def credit(self, amount: int) -> None:
        self.both["there"].credit(self.user, amount)
        self.model.balance += amount

    def budget(self, key: int | None, limit: int) -> None:
        name = "" if key is None else self.keys[key]
        wish = budgets.Wish(user_id=self.user, key_id=name, microcredits=limit)
        budgets.set_budget(self.both["here"].database, OPERATOR, wish, None)
        self.model.limits[key] = limit

    def unbudget(self, key: int | None) -> None:
        if self.model.limits.pop(key, None) is None:
            return
        name = None if key is None else self.keys[key]
        database = self.both["there"].database
        with database.read() as connection:
            found = budgets.list_budgets(connection, owner=self.user, limit=10, after="")
        (mine,) = [row for row in found if row["key_id"] == name]
        budgets.remove_budget(database, OPERATOR, mine["id"], None)

    def recover(self, gateway: str) -> None:
        database = self.both[gateway].database
        books.write_batch(database, Batch(settle=books.find_abandoned(database, gateway)))
        for name, (reservation, key) in list(self.model.open.items()):
            if reservation.instance == gateway:
                self.model.lost[name] = self.model.open.pop(name)
                self.charge(0, key)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_order_of_two_gateways_keeps_the_books(both: dict[str, Accounts], steps: list[tuple]) -> None:
    bank = Bank(both)
    bank.credit(100)
    for name, *arguments in steps:
        getattr(bank, name)(*arguments)
        balance = both["here"].balance(bank.user)
        assert balance.balance == bank.model.balance >= balance.reserved
        assert balance.reserved == sum(r.microcredits for r, _ in bank.model.open.values())
    found = reconcile(both["there"].database)
    assert found["ties"], found
