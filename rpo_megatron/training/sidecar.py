"""What a run with reference.mode=stored finds next to its stores: `rpo config` says it, and who needs it acts on it
(`rpo train`, `rpo eval`, `rpo score --with implicit`).

No torch here.

What was made by another reference is never replaced behind one's back: it may be hours of a large model's work, and a
misspelt path or precision must not cost it. The run is refused, and the message names each difference; `rpo score` is
how one says that it shall be replaced. What belongs to tokens that are no longer there (the store was prepared again)
is of no use to anybody: that, and what is missing, is made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rpo_megatron.data.manifest import ReferenceManifest, read_record
from rpo_megatron.data.store import Store
from rpo_megatron.training.resolve import Plan

State = Literal["there", "missing", "outdated"]


def state(plan: Plan, store: Store) -> State:
    """Whether the store has the log-probabilities that the run reads, none, or those of tokens that it held before.

    Raises UserError when they were made by another reference, or are damaged.
    """
    path = Path(f"{store.prefix}.ref_logp.json")
    if not path.is_file():
        return "missing"
    if read_record(ReferenceManifest, path).tokens != store.token_fingerprint:
        return "outdated"
    plan.with_reference(store)
    return "there"


def to_make(plan: Plan, stores: Sequence[Store]) -> dict[str, State]:
    """The prefixes of those of the run's stores whose log-probabilities have to be made before they can be read, and
    why. Raises as `state`."""
    if plan.reference != "stored":
        return {}
    states = {store.prefix: state(plan, store) for store in stores}
    return {prefix: found for prefix, found in states.items() if found != "there"}
