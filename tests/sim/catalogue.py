"""The mutants: each is one rule, check or order of steps turned off. ``mutants`` runs them."""

from tests.sim.mutation import Edit, Mutant

CERTIFICATE = "ledger.core.certificate"
HANDOVER = "ledger.core.handover"
LINEAGE = "ledger.lineage"
RECOVERY = "ledger.core.recovery"
QUORUMS = "ledger.core.quorums"
RULES = "ledger.core.rules"
STATE = "ledger.core.state"
STORE = "ledger.store"
PROMISES = "ledger.promises"
SEATS = "ledger.seats"
VOTING = "ledger.voting"
WALLET = "ledger.wallet"
WITNESS = "ledger.core.witness"

OLD_SEAT = (
    "witness = self._book.state.committees.epoch, self.witness or next(iter(self._seats.values()), None)\n"
    "    epoch = witness.epoch if witness is not None else epoch"
)


def _trace(name: str) -> str:
    """The test built from a trace of LEDGER.md."""
    return f"tests/unit/ledger/test_traces.py::test_the_rules_hold_against_every_trace[{name}]"


def _rules(name: str) -> str:
    return f"tests/unit/ledger/test_rules.py::{name}"


def _here(name: str) -> str:
    return f"tests/sim/test_directed.py::test_{name}"


def _one(name: str, what: str, where: str, old: str, new: str, directed: str = "") -> Mutant:
    return Mutant(name, what, (Edit(where, old, new),), directed)


QUORUM_MUTANTS = (
    _one("quorum-f-plus-1", "f + 1 votes make a certificate", f"{QUORUMS}:quorum_of", "2 * f + 1", "f + 1"),
    _one(
        "not-distinct", "one witness counts several times", f"{QUORUMS}:distinct", "set(witnesses)", "list(witnesses)"
    ),
    _one(
        "committee-not-exact", "more than 3f + 1 witnesses", f"{QUORUMS}:is_exact", "n == 3 * f + 1", "n >= 3 * f + 1"
    ),
    _one(
        "stranger-votes",
        "votes of keys that are in no committee",
        f"{CERTIFICATE}:Verifier._open_header",
        "votes.net != self.genesis.net or votes.witness not in self.committees.of(votes.epoch).members",
        "votes.net != self.genesis.net",
    ),
    _one(
        "votes-of-other-network",
        "votes given in another network",
        f"{CERTIFICATE}:Verifier._open_header",
        "votes.net != self.genesis.net or ",
        "",
    ),
    _one(
        "vote-unsigned",
        "batches nobody signed",
        f"{CERTIFICATE}:Verifier._open_header",
        "if not verify(",
        "if False and not verify(",
    ),
    _one(
        "path-unchecked",
        "a vote for another object counts",
        f"{CERTIFICATE}:_leads_to",
        "if node != header.root:",
        "if False:",
    ),
    _one(
        "vote-epoch-unchecked",
        "votes of different epochs add up",
        f"{CERTIFICATE}:Verifier.check_vote",
        "header.epoch != epoch",
        "False",
        _here("votes_of_two_epochs_do_not_add_up"),
    ),
    _one(
        "author-unchecked",
        "entries that their account did not sign",
        f"{RULES}:check_entry_signature",
        "if not verify(",
        "if False and not verify(",
    ),
)

ENTRY_MUTANTS = (
    _one(
        "no-scratch",
        "two reclaims of one channel in one entry",
        f"{RULES}:Scratch.closes",
        "any(",
        "False and any(",
        _trace("a_channel_reclaimed_twice_in_one_entry"),
    ),
    _one("no-funds", "entries spend what is not there", f"{RULES}:check_entry", "scratch.spend > balance", "False"),
    _one(
        "own-credit",
        "an entry spends what it grants or pays itself",
        f"{RULES}:check_entry",
        "scratch.spend > balance",
        "scratch.spend > balance + sum(amount for to, amount in scratch.credits if to == entry.account)",
        _here("an_entry_spends_final_credits_only"),
    ),
    _one("no-sequence", "entries of any number", f"{RULES}:check_entry", "entry.seq != seq + 1", "entry.seq <= 0"),
    _one(
        "no-prev",
        "entries that build on nothing",
        f"{RULES}:check_entry",
        "entry.prev != head",
        "False",
        _rules("test_entries_are_refused_by_name"),
    ),
    _one(
        "entry-of-other-network",
        "entries of another network",
        f"{RULES}:check_entry",
        "entry.net != committees.net",
        "False",
    ),
    _one(
        "supply-unchecked",
        "grants above the supply",
        f"{RULES}:_grant",
        "scratch.supply + scratch.granted > scratch.genesis.max_supply",
        "False",
    ),
    _one(
        "supply-per-op",
        "several grants of one entry exceed the supply",
        f"{RULES}:_grant",
        "scratch.supply + scratch.granted > scratch.genesis.max_supply",
        "scratch.supply + op.amount > scratch.genesis.max_supply",
        _here("grants_of_one_entry_add_up_to_the_supply"),
    ),
    _one(
        "anybody-grants",
        "grants by others than the issuer",
        f"{RULES}:_grant",
        "scratch.entry.account not in scratch.committees.issuers",
        "False",
    ),
    _one("dust", "amounts below the minimum", f"{RULES}:Scratch.need_amount", "amount < minimum", "False"),
    _one(
        "foreign-channel",
        "topping up or reclaiming somebody else's channel",
        f"{RULES}:Scratch.own_channel",
        " or channel.payer != self.entry.account",
        "",
        _here("a_channel_belongs_to_its_payer"),
    ),
    _one(
        "reclaimed-twice",
        "a channel is reclaimed again",
        f"{RULES}:Scratch.own_channel",
        "channel.closed_at is not None or self.closes(key)",
        "self.closes(key)",
        _rules("test_freeze_then_reclaim_pays_the_highest_voucher_and_returns_the_rest"),
    ),
    _one(
        "hostile-signer", "a channel for a key of small order", f"{RULES}:_open", "not is_valid_key(op.signer)", "False"
    ),
    _one(
        "reclaim-above-lock",
        "reclaims above the lock",
        f"{RULES}:_reclaim",
        "op.total > lock",
        "False",
        _here("a_reclaim_stays_within_the_lock"),
    ),
    _one(
        "reclaim-below-paid",
        "reclaims below what was paid",
        f"{RULES}:_reclaim",
        "op.total < channel.paid",
        "False",
        _here("a_reclaim_pays_no_less_than_was_claimed"),
    ),
    _one(
        "too-many-reclaims",
        "more than 8 reclaims in an entry",
        f"{RULES}:_reclaim",
        "len(scratch.reclaims) > RECLAIMS_MAX",
        "False",
        _here("an_entry_has_eight_reclaims_at_most"),
    ),
    _one(
        "time-gates-chain",
        "an open that comes late is refused for ever",
        f"{VOTING}:Voting.vote",
        "    body, witness = item.object, self._seats.present()\n",
        "    body, witness = item.object, self._seats.present()\n"
        "    now_ms, ops = self._book.now_ms(), getattr(body, 'ops', ())\n"
        "    if any(getattr(op, 'expiry_ms', now_ms) < now_ms for op in ops):\n"
        "        raise RuleError('expired', 'the channel has expired')\n",
    ),
    _one(
        "any-signature-again",
        "an entry that was voted for is taken with any signature",
        f"{WITNESS}:Witness.consider_entry",
        "voted.signed != item.signed",
        "False",
        _here("an_entry_that_was_voted_for_keeps_its_signature"),
    ),
    _one(
        "grants-of-two-issuers",
        "what a replaced issuer may have granted is granted again",
        f"{WITNESS}:Witness.consider_entry",
        "state.supply + self._promised_grants(entry)",
        "state.supply",
        _here("what_the_replaced_issuer_may_have_granted_is_kept_free"),
    ),
    _one(
        "slots-forgotten",
        "a witness does not remember its votes",
        f"{WITNESS}:Witness.consider_entry",
        "    self._voted.keep(slot, item)\n",
        "",
    ),
)

CHANNEL_MUTANTS = (
    _one(
        "claim-above-lock",
        "claims above the lock",
        f"{WITNESS}:Witness.consider_claim",
        "total > channel.lock",
        "False",
        _here("a_claim_stays_within_the_lock_and_off_closed_channels"),
    ),
    _one(
        "claim-above-freeze",
        "claims above the own freeze",
        f"{WITNESS}:Witness.consider_claim",
        "held is not None and total > held.total",
        "False",
        _here("a_freeze_binds_and_stays_what_it_was"),
    ),
    _one(
        "claim-unsigned",
        "claims that the channel's signer did not sign",
        f"{RULES}:check_claim_signatures",
        'not verify(channel.signer, b"", item.id, item.signed.signature)',
        "False",
        _here("a_claim_is_signed_by_the_channel_s_signer"),
    ),
    _one(
        "voucher-unsigned",
        "vouchers that the payer did not sign",
        f"{RULES}:check_voucher_signature",
        "not verify(",
        "False and not verify(",
        _here("a_claim_carries_the_payer_s_voucher"),
    ),
    _one(
        "claim-of-other-network",
        "claims of another network",
        f"{WITNESS}:Witness.consider_claim",
        "claim.voucher.net != genesis.net",
        "False",
    ),
    _one(
        "claim-of-other-channel",
        "claims that name another entry than the one that opened their channel",
        f"{RULES}:check_claim",
        "if claim.voucher.channel != key or",
        "if False and",
        _here("a_claim_names_the_entry_that_opened_its_channel"),
    ),
    _one(
        "claim-on-closed",
        "claims on a reclaimed channel",
        f"{WITNESS}:Witness.consider_claim",
        "channel.closed_at is not None",
        "False",
        _here("a_claim_stays_within_the_lock_and_off_closed_channels"),
    ),
    _one("early-freeze", "freezes before expiry", f"{WITNESS}:Witness.freeze", "now_ms < channel.expiry_ms", "False"),
    _one(
        "freeze-at-nothing",
        "freezes ignore the claims voted for",
        f"{WITNESS}:Witness.freeze",
        "self._best.get(key, (None, None))",
        "(None, None)",
        _here("a_freeze_honours_what_was_voted_for"),
    ),
    _one(
        "freeze-changes",
        "a channel is frozen again at another total",
        f"{WITNESS}:Witness.freeze",
        "if done is not None:",
        "if False:",
        _here("a_freeze_binds_and_stays_what_it_was"),
    ),
    _one(
        "freeze-not-kept",
        "a freeze does not bind",
        f"{WITNESS}:Witness._remember_freeze",
        "self._held[body.channel] = Held(",
        "Held(",
        _here("a_freeze_binds_and_stays_what_it_was"),
    ),
    _one(
        "reclaim-not-highest",
        "a reclaim below the highest freeze",
        f"{RULES}:_check_freeze_set",
        "highest != op.total",
        "False",
        _here("a_reclaim_pays_the_highest_of_its_freezes"),
    ),
    _one(
        "reclaim-no-quorum",
        "a reclaim with too few freezes",
        f"{RULES}:_check_freeze_set",
        "len(witnesses) < needed",
        "False",
        _here("a_reclaim_needs_a_quorum_of_freezes"),
    ),
    _one(
        "freeze-of-other-channel",
        "freezes of another channel",
        f"{RULES}:check_freeze",
        "freeze.channel != channel",
        "False",
        _here("freezes_of_another_channel_free_nothing"),
    ),
    _one(
        "freeze-of-stranger",
        "freezes of keys that are in no committee",
        f"{RULES}:check_freeze",
        " or freeze.witness not in committees.of(freeze.epoch).members",
        "",
        _here("freezes_of_strangers_free_nothing"),
    ),
    _one(
        "freeze-unsigned",
        "freezes nobody signed",
        f"{RULES}:_open_freeze",
        "not verify(",
        "False and not verify(",
        _here("a_freeze_is_signed_by_its_witness"),
    ),
    _one(
        "freeze-without-voucher",
        "freezes at amounts the payer never promised",
        f"{RULES}:proves_total",
        "if total == 0:",
        "if True:",
        _here("a_freeze_above_nothing_carries_the_payer_s_voucher"),
    ),
)

CRASH_MUTANTS = (
    _one(
        "entry-votes-lost",
        "a witness forgets its votes for entries when it restarts",
        f"{PROMISES}:recall",
        "witness.restore_entry_vote(item)",
        "pass",
    ),
    _one(
        "claim-votes-lost",
        "a witness forgets its votes for claims when it restarts",
        f"{PROMISES}:recall",
        "for item in (*voted, *final):",
        "for item in final:",
    ),
    _one(
        "freezes-lost",
        "a witness forgets its freezes when it restarts",
        f"{PROMISES}:recall",
        "witness.restore_freeze(signed)",
        "pass",
    ),
    _one(
        "vote-sent-before-persisted",
        "a vote leaves before it is on the disk",
        f"{VOTING}:Voting._seal",
        "[Voted(item, witness.epoch) for item in batch.items]",
        "[]",
    ),
    Mutant(
        "freeze-sent-before-persisted",
        "a freeze leaves before it is on the disk",
        (
            Edit(
                f"{VOTING}:Voting._freeze",
                "await self._commit(witness, Frozen(channel, frozen.signed, witness.epoch), promise)",
                "pass",
            ),
            Edit(f"{VOTING}:Voting._freeze", "self._lineage.promised(promise)", "pass"),
        ),
    ),
    _one(
        "entry-sent-before-persisted",
        "a wallet sends an entry that is not on the disk",
        f"{WALLET}:Wallet.append",
        "await self._book.writer.commit([Own(entry.seq, signed)])",
        "None",
    ),
    _one(
        "pending-forgotten",
        "a wallet forgets its unfinished entry when it restarts",
        f"{STORE}:Store.wallet",
        "return [",
        "return [][:0] and [",
    ),
    _one(
        "applied-twice",
        "a node applies what it stored twice when it restarts",
        f"{STATE}:State.add",
        "if body.seq == seq + 1 and body.account not in self.waiting_entries:",
        "if body.seq == seq and self.applied < 20 and seq and not self.touched:\n"
        "            for to, amount in [(op.to, op.amount) for op in body.ops if hasattr(op, 'to')]:\n"
        "                self.account(to).balance += amount\n"
        "        if body.seq == seq + 1 and body.account not in self.waiting_entries:",
    ),
)

ORDER_MUTANTS = (
    _one(
        "full-disk-forgets",
        "what was applied while the disk was full is never written",
        "ledger.book:Book._learn",
        "self._unsaved = fresh + self._unsaved",
        "pass",
        "tests/unit/ledger/test_book.py",
    ),
    _one(
        "newest-entry-first",
        "a wallet goes on with the newest of several unfinished entries",
        f"{WALLET}:Wallet._advance",
        "self._later.pop(0)",
        "self._later.pop()",
        "tests/unit/ledger/test_wallet_order.py",
    ),
)

STATE_MUTANTS = (
    _one(
        "claim-adds",
        "a claim is paid on top of the one before",
        f"{STATE}:State._settle",
        "covered - channel.paid",
        "covered",
    ),
    _one(
        "lower-claim-kept",
        "a lower claim replaces a higher one on the disk",
        f"{STATE}:State.add",
        "if body.voucher.cumulative <= self.claimed(channel):",
        "if body.voucher.cumulative == self.claimed(channel):",
        _here("a_lower_claim_is_nothing_new"),
    ),
    _one(
        "reclaim-pays-all",
        "a reclaim pays the total, not the rest",
        f"{STATE}:State._process_entry",
        "total - channel.paid",
        "total",
    ),
    _one("topup-free", "a top-up costs nothing", f"{RULES}:_topup", "scratch.spend += op.amount", "pass"),
    _one(
        "entry-waits-for-ever",
        "an entry that waited is never applied",
        f"{STATE}:State._drain",
        "while slots:",
        "while False:",
    ),
    _one(
        "claims-not-synced",
        "anti-entropy looks at entries only",
        "ledger.core.sync:Digests._line",
        "if channel is not None and channel.closed_at is None:",
        "if False:",
    ),
    _one(
        "no-anti-entropy",
        "what gossip missed never comes",
        "ledger.core.sync:differing",
        "return [",
        "return [][:0] and [",
    ),
)

EPOCH_MUTANTS = (
    Mutant(
        "old-committee-votes",
        "the old committee goes on voting after it handed over",
        (
            Edit(f"{WITNESS}:Witness.may_vote", "self.phase == VOTING", "self.phase != COLLECTING"),
            Edit(f"{WITNESS}:Witness.confirm_handover", "    self._identity = None\n", ""),
            Edit(f"{SEATS}:Seats._hand_over", "    del self._seats[effect.epoch]\n", ""),
            Edit(f"{SEATS}:Seats._hand_over", "    self._keys.erase(effect.witness)\n", ""),
            Edit(f"{SEATS}:Seats.present", "witness = self._book.state.committees.epoch, self.witness", OLD_SEAT),
        ),
    ),
    Mutant(
        "freezes-after-handover",
        "the old committee goes on freezing after it handed over",
        (
            Edit(f"{WITNESS}:Witness.may_freeze", "self.phase == VOTING", "self.phase != COLLECTING"),
            Edit(f"{WITNESS}:Witness.confirm_handover", "    self._identity = None\n", ""),
            Edit(f"{SEATS}:Seats._hand_over", "    del self._seats[effect.epoch]\n", ""),
            Edit(f"{SEATS}:Seats._hand_over", "    self._keys.erase(effect.witness)\n", ""),
            Edit(f"{SEATS}:Seats.present", "witness = self._book.state.committees.epoch, self.witness", OLD_SEAT),
        ),
    ),
    _one(
        "never-stops",
        "the old committee does not stop",
        f"{WITNESS}:Witness.must_stop",
        "return self",
        "return False and self",
    ),
    _one(
        "begins-early",
        "a new witness votes after one handover",
        f"{HANDOVER}:Inheritance.ready",
        "self.counted >= self.old.quorum",
        "self.counted >= 1",
        _trace("two_handovers_are_too_few"),
    ),
    _one(
        "begins-unasked",
        "a new witness votes without any handover",
        f"{WITNESS}:Witness.__init__",
        "COLLECTING if epoch else VOTING",
        "VOTING",
        _here("a_new_committee_waits_for_the_old_one"),
    ),
    _one(
        "no-frontier",
        "a new witness votes before it knows what is final",
        f"{HANDOVER}:_is_applied",
        "if is_account:",
        "if True:\n        return True\n    if is_account:",
        _trace("an_empty_witness_votes"),
    ),
    _one(
        "locks-without-evidence",
        "locks count that no payer signed",
        f"{HANDOVER}:lock_evidence",
        "check_entry_signature(item, entry)",
        "pass",
        _trace("a_lock_without_evidence"),
    ),
    _one(
        "locks-ignored",
        "a new witness ignores what the old ones voted for",
        f"{WITNESS}:Witness.locked_to",
        "if self.inheritance is not None",
        "if False",
    ),
    _one(
        "one-of-two-locks",
        "of two entries that survive the counting, either may be voted for",
        f"{WITNESS}:Witness._check_lock",
        "locked.keys() == {item.id}",
        "item.id in locked",
        _here("where_two_entries_may_be_final_nobody_votes"),
    ),
    _one(
        "votes-not-handed-over",
        "a handover leaves out the own votes",
        f"{WITNESS}:Witness.own_locks",
        "if not self._is_filled(slot)",
        "if False",
        _here("the_handover_says_everything_that_was_signed"),
    ),
    _one(
        "claims-not-handed-over",
        "a handover leaves out the vouchers of claims",
        f"{WITNESS}:Witness._hand_over",
        "tuple(shown),",
        "(),",
        _here("the_handover_says_everything_that_was_signed"),
    ),
    _one(
        "freezes-not-handed-over",
        "a handover leaves out the own freezes",
        f"{WITNESS}:Witness._hand_over",
        "(*self.inherited_freezes(), *self._held.values())",
        "(*self.inherited_freezes(),)",
        _here("the_handover_says_everything_that_was_signed"),
    ),
    _one(
        "inherited-locks-not-handed-on",
        "what was inherited and not voted for is not handed on",
        f"{WITNESS}:Witness.inherited_locks",
        "if not self._is_filled(slot):",
        "if False:",
        _trace("an_inherited_lock_is_forgotten"),
    ),
    _one(
        "inherited-freezes-not-handed-on",
        "freezes that were inherited are not handed on",
        f"{WITNESS}:Witness.inherited_freezes",
        "if self.inheritance is not None",
        "if False",
        _trace("an_inherited_freeze_is_forgotten"),
    ),
    _one(
        "no-ban",
        "claims are voted for where the old committee may have frozen",
        f"{WITNESS}:Witness.is_banned",
        "channel in self.inheritance.bans",
        "False",
        _trace("a_partly_voted_claim_raises_a_freeze"),
    ),
    _one(
        "counting-one",
        "what one handover says counts for ever",
        f"{QUORUMS}:survives",
        "max(1, received - 2 * f)",
        "1",
        _trace("a_liar_invents_a_freeze"),
    ),
    _one(
        "counting-one-more",
        "m - 2f + 1 handovers are needed",
        f"{QUORUMS}:survives",
        "received - 2 * f",
        "received - 2 * f + 1",
        _trace("a_real_freeze_is_reported_once"),
    ),
    _one(
        "counted-once",
        "handovers that come after the beginning do not count",
        f"{WITNESS}:Witness._is_collecting",
        "self.phase in (COLLECTING, VOTING)",
        "self.phase == COLLECTING",
        _here("handovers_that_come_late_still_free_what_a_liar_invented"),
    ),
    _one(
        "shown-forgotten",
        "a voucher shown on a banned channel is not kept",
        f"{WITNESS}:Witness.record_voucher",
        "if self.saw_voucher(voucher, signature):",
        "if False:",
        _here("a_voucher_shown_on_a_banned_channel_is_kept_and_paid"),
    ),
    _one(
        "unlisted-change",
        "root alone changes the committee",
        f"{WITNESS}:Witness.is_listed",
        "item.id in self.listed",
        "True",
        _trace("a_change_that_no_operator_listed"),
    ),
    _one(
        "freezes-of-two-epochs",
        "a reclaim with freezes of several epochs",
        f"{RULES}:_check_freeze_set",
        "freeze.epoch != epoch",
        "False",
        _here("freezes_of_two_epochs_do_not_add_up"),
    ),
    Mutant(
        "handover-not-kept",
        "a handover leaves before it is on the disk",
        (
            Edit(
                f"{SEATS}:Seats._hand_over",
                "await self._book.writer.commit([standing, handed, promise])",
                "self._book.store.promises._early = effect",
            ),
            Edit(f"{SEATS}:Seats._hand_over", "self._lineage.promised(promise)", "pass"),
        ),
    ),
    _one(
        "handover-lost-on-a-full-disk",
        "a handover counts as received though the disk had no room for it",
        f"{SEATS}:Seats.receive",
        "author = witness.author_of(signed)",
        "author = witness.inheritance.receive(signed)",
        "tests/unit/ledger/test_seats_restart.py",
    ),
    Mutant(
        "handover-no-promise",
        "an older copy of a database does not know that its witness handed over",
        (
            Edit(f"{SEATS}:Seats._hand_over", "[standing, handed, promise]", "[standing, handed]"),
            Edit(f"{SEATS}:Seats._hand_over", "self._lineage.promised(promise)", "pass"),
        ),
        "tests/unit/ledger/test_committee_change.py::test_a_witness_that_forgot_its_handover_is_silent",
    ),
    _one(
        "restart-waits",
        "a witness that restarts with enough handovers waits for more",
        f"{SEATS}:Seats.__init__",
        "        self._changed.set()",
        "        pass",
        "tests/unit/ledger/test_seats_restart.py",
    ),
    _one(
        "certificate-of-any-epoch",
        "votes are checked against the newest committee only",
        f"{CERTIFICATE}:Verifier._open_header",
        "self.committees.of(votes.epoch).members",
        "self.committees.current.members",
        _here("certificates_of_earlier_epochs_stay_good"),
    ),
    _one(
        "late-handovers-wait",
        "a handover whose frontier is reached after the beginning never counts",
        f"{SEATS}:Seats._on_final",
        "any(_waits(w) for w in",
        "any(w.phase == COLLECTING for w in",
        "tests/unit/ledger/test_seats_restart.py",
    ),
)

RESTORE_MUTANTS = (
    _one(
        "restored-votes",
        "a witness from a backup votes",
        f"{WITNESS}:Witness.is_restored",
        "self.restored",
        "False",
        _trace("restored_witnesses_vote_again"),
    ),
    _one(
        "backup-unnoticed",
        "a database from a backup is not noticed",
        "ledger.mark:Mark.open",
        "known is None or known[0] != lineage or known[1] > promises or known[2] > entries",
        "False",
        "tests/unit/ledger/test_lineage.py",
    ),
    _one(
        "mark-not-kept",
        "the counter outside the database is not written",
        "ledger.mark:Mark.promised",
        "self._write()",
        "pass",
        "tests/unit/ledger/test_lineage.py",
    ),
    _one(
        "mark-not-synced",
        "a loss of power takes the counter outside the database away",
        "ledger.mark:Mark.follow",
        "self._sync()",
        "pass",
        "tests/unit/ledger/test_lineage.py",
    ),
    _one(
        "wallet-signs-anew",
        "a wallet from a backup signs without asking everybody",
        f"{RECOVERY}:Recovery.may_sign_anew",
        "len(committee.keys)",
        "1",
        _trace("a_wallet_signs_after_three_answers"),
    ),
    _one(
        "wallet-does-not-ask",
        "a wallet from a backup does not ask at all",
        "ledger.recovering:Recovering.due",
        "bool(self._lineage.wallet_unsure) or not self._glanced",
        "False",
        "tests/unit/ledger/test_committee_change.py::test_a_wallet_that_lost_its_disk_completes_what_it_had_signed",
    ),
    _one(
        "wallet-sure-in-memory",
        "a wallet is sure of itself though its disk had no room to say so",
        "ledger.recovering:Recovering._keep",
        "await self._book.writer.commit([*records, unsure])",
        "self._lineage.became(unsure); await self._book.writer.commit([*records, unsure])",
        "tests/unit/ledger/test_wallet_order.py",
    ),
    _one(
        "only-the-head",
        "witnesses do not show the entry they voted for",
        f"{VOTING}:Voting._next",
        "if signed is not None",
        "if False",
        "tests/unit/ledger/test_committee_change.py::test_a_wallet_that_lost_its_disk_completes_what_it_had_signed",
    ),
    _one(
        "stale-copy-settles",
        "a wallet's old copy makes an old change of the committee count",
        f"{RECOVERY}:Recovery.__init__",
        "self.began = began",
        "self.began = self._epoch",
        "tests/unit/ledger/test_lineage.py",
    ),
    _one(
        "mark-after-lineage",
        "a first start that dies looks like a restoration",
        f"{LINEAGE}:Lineage.__init__",
        "    mark.follow()  # first: a database that has a lineage has a mark, whenever the process dies\n",
        "    follow_later = mark.follow\n",
        "tests/unit/ledger/test_lineage.py",
    ),
)


def _idle(name: str, what: str, where: str, old: str, new: str, directed: str) -> Mutant:
    return Mutant(name, what, (Edit(where, old, new),), directed, simulated=False)


DIRECTED_MUTANTS = (
    _idle(
        "own-rows-unread",
        "a repair takes along own rows that are not what was written",
        "ledger.own_rows:is_sound",
        "_CHECKS[table](row, owner)",
        "True",
        "tests/unit/ledger/test_salvage.py",
    ),
    _idle(
        "unseen-keys-remember",
        "a loss noticed by a start without the epoch keys silences only the identity",
        f"{LINEAGE}:Lineage.__init__",
        "self._seen = frozenset(keys)",
        'self._seen = frozenset(keys) - {b""}',
        "tests/unit/ledger/test_lineage.py",
    ),
    _idle(
        "more-is-no-answer",
        "a wallet whose folder was put back hears nobody who knows more than it",
        "ledger.recovering:Recovering._ask",
        "self._heads[witness] = head",
        "pass",
        "tests/unit/ledger/test_wallet_order.py",
    ),
    _idle(
        "mark-lowered-early",
        "a start that dies hides that the database was lost",
        "ledger.mark:Mark.open",
        "{RESTORED: (AHEAD, AHEAD), NEW: (0, 0)}.get(verdict, (promises, entries))",
        "promises, entries",
        "tests/unit/ledger/test_lineage.py",
    ),
    _idle(
        "committee-certifies-itself",
        "a committee is certified by its own members",
        f"{CERTIFICATE}:check_certifier",
        "op.epoch != epoch + 1",
        "False",
        _trace("a_committee_that_its_own_members_certify"),
    ),
    _idle(
        "anybody-changes-committee",
        "others than root change the committee",
        f"{RULES}:_root_alone",
        "scratch.entry.account != scratch.genesis.root",
        "False",
        _rules("test_entries_are_refused_by_name"),
    ),
    _idle(
        "change-not-alone",
        "a change of the committee with other ops beside it",
        f"{RULES}:_root_alone",
        "len(scratch.entry.ops) != 1",
        "False",
        _rules("test_entries_are_refused_by_name"),
    ),
    _idle(
        "epoch-skipped",
        "an epoch is left out",
        "ledger.core.committee:CommitteeChain.check_committee",
        "op.epoch != self.epoch + 1",
        "False",
        _rules("test_entries_are_refused_by_name"),
    ),
    _idle(
        "voucher-falls",
        "a payer signs a lower voucher after a replayed receipt",
        "ledger.core.channel:PayerChannel.pay",
        "max(self.promised, min(self.lock, target))",
        "min(self.lock, target)",
        _here("a_replayed_receipt_lowers_no_voucher"),
    ),
    _idle(
        "lower-voucher-taken",
        "a worker lets a lower voucher replace the one it holds",
        "ledger.core.channel:SellerChannel.check_voucher",
        "voucher.cumulative < self.promised",
        "False",
        "tests/unit/ledger/test_channel.py::test_vouchers_never_fall_and_stay_inside_the_lock",
    ),
    _idle(
        "receipts-unchecked",
        "a payer pays whatever a receipt says",
        "ledger.core.channel:PayerChannel.excess",
        "return max(0, receipt.cumulative",
        "return 0 and max(0, receipt.cumulative",
        "tests/unit/ledger/test_channel.py::test_the_payer_accepts_one_doubtful_call_but_no_more",
    ),
    _idle(
        "voucher-above-lock",
        "a payer signs more than it locked",
        "ledger.core.channel:PayerChannel.pay",
        "min(self.lock, target)",
        "target",
        "tests/unit/ledger/test_channel.py::test_a_payer_never_signs_above_the_lock_nor_far_above_its_count",
    ),
)

METERING_MUTANTS = (
    _one(
        "doubt-forgotten",
        "answers that overtake a receipt bring an old doubt back",
        "ledger.core.channel:PayerChannel.pay",
        "self.doubt_nano += grown",
        "self.doubt_nano = max(0, receipt.cumulative * NANO - self.nano)",
        "tests/unit/ledger/test_channel.py::test_a_receipt_that_answers_overtook_brings_no_old_doubt_back",
    ),
    _one(
        "doubt-not-kept",
        "a payer that restarts forgets what was in doubt before",
        "ledger.core.channel:PayerChannel.resume",
        "self.doubt_nano = max(0, self.receipt_cumulative * NANO - self.nano)",
        "self.doubt_nano = 0",
        "tests/unit/ledger/test_channel.py::test_a_payer_that_is_restarted_again_and_again_keeps_its_doubt",
    ),
    _one(
        "answers-known-once",
        "answers of a receipt whose voucher was lost have never come the second time",
        "ledger.core.proof:Answers._fresh",
        "leaves[:count] == self._last",
        "not count",
        "tests/unit/ledger/test_proof.py::test_a_receipt_whose_voucher_was_lost_lists_its_answers_again",
    ),
    _one(
        "voucher-not-kept",
        "a voucher leaves before it is on the disk",
        "ledger.buying:Buying._persist",
        "await self._book.writer.commit([self._row(worker, channel, signed)])",
        "pass",
        "tests/unit/ledger/test_network.py::test_restart_of_worker_and_payer_keeps_vouchers_and_counts",
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *QUORUM_MUTANTS,
    *ENTRY_MUTANTS,
    *CHANNEL_MUTANTS,
    *CRASH_MUTANTS,
    *ORDER_MUTANTS,
    *STATE_MUTANTS,
    *EPOCH_MUTANTS,
    *RESTORE_MUTANTS,
    *METERING_MUTANTS,
    *DIRECTED_MUTANTS,
)
