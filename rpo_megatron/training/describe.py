"""What follows from a config, in words: the lines of `rpo config` and of a run's header. No torch."""

from collections.abc import Callable

from rpo_megatron import config_io
from rpo_megatron.config import RunConfig
from rpo_megatron.data.store import Store
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError
from rpo_megatron.model.layout import chunk_layers
from rpo_megatron.model.shape import num_parameters, padded_vocab
from rpo_megatron.objectives import catalogue
from rpo_megatron.training import adapters
from rpo_megatron.training.checks import READS_REWARD, check_config
from rpo_megatron.training.resolve import Plan
from rpo_megatron.training.sidecar import state


def print_config(config: RunConfig) -> None:
    """`rpo config`: the resolved config as yaml, then what follows from it (as far as the files are there).

    Raises UserError, as `rpo train` does, where the model cannot be split, or the data not gone through, as the config
    says.
    """
    print(config_io.dump(config))
    check_config(config)
    plan = Plan(config=config)
    if _is_there(lambda: plan.shape):
        plan.check_shape(plan.shape)
    if _is_there(lambda: plan.train_store):
        _ = plan.num_steps
    for name, describe in _DERIVED.items():
        text = _or_reason(lambda describe=describe: describe(plan))  # type: ignore[misc]
        print(f"# {name:<12} {text}".replace("\n", "\n# " + " " * 13))


def _is_there(read: Callable[[], object]) -> bool:
    try:
        read()
    except UserError:  # its row says why not
        return False
    return True


def _or_reason(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except UserError as error:
        return f"not known yet: {error}"


def model(plan: Plan) -> str:
    shape = plan.shape
    embeddings = "tied" if shape.tied_embeddings else "untied"
    head = "value head (reward model)" if shape.head == "value" else f"{embeddings} embeddings"
    further = f"; without the last {shape.further_layers}, for further tokens" if shape.further_layers else ""
    return (
        f"{shape.family}, {num_parameters(shape):,} parameters, {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_heads} heads ({shape.num_kv_heads} kv), vocabulary {shape.vocab_size} (padded to "
        f"{padded_vocab(shape)}), {head}{further}"
    )


def experts(plan: Plan) -> str:
    found = plan.shape.experts
    if found is None:
        return "none"
    losses = [f"{name} {value:g}" for name, value in vars(plan.config.moe).items() if value]
    layers = plan.shape.num_layers - len(found.dense_layers)
    shared = ", and a shared one" * (found.shared_ffn_size > 0)
    return (
        f"{found.per_token} of {found.count} for a token{shared}, in {layers} layers; losses of their routers: "
        f"{', '.join(losses) or 'none, the objective alone trains them'}"
    )


def adapter(plan: Plan) -> str:
    if plan.adapter is None:
        return "none: the weights themselves are trained"
    return adapters.describe(plan.adapter, plan.config.lora, plan.shape)


def layout(plan: Plan) -> str:
    parallel = plan.config.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    context = f" x context {parallel.context}" * (parallel.context > 1)
    experts = f", experts over {parallel.expert}" * (parallel.expert > 1)
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} ({stages(plan)}){context}{experts}{sequence}; "
        f"data = processes / {model_ranks}"
    )


def stages(plan: Plan) -> str:
    parallel = plan.config.parallel
    chunks = "+".join(map(str, chunk_layers(plan.shape, parallel.pipeline, parallel.virtual)))
    return f"{chunks} layers" + f", {parallel.virtual} chunks on each" * (parallel.virtual > 1)


def objective(plan: Plan) -> str:
    return catalogue.describe(plan.config.objective.method, knobs=plan.knobs)


def rewards(plan: Plan) -> str:
    """Which numbers the objective sees as rewards."""
    if not plan.reads & READS_REWARD:
        return f"none: {plan.config.objective.method} reads no rewards"
    view = plan.view
    assert view is not None
    text = f"{_columns(view, plan.reads)}, {_standardised(view)}"
    if view.clip is not None:
        text += f", then cut off at -{view.clip:g} and {view.clip:g}"
    if view.source_column is not None:
        text += f"; of other models where '{view.source_column}' is not 0"
    return text


def _columns(view: RewardView, reads: frozenset[str]) -> str:
    names = ", ".join(view.columns)
    if len(view.columns) == 1:
        return f"column {names}"
    if "rewards" not in reads:
        return f"mean of the columns {names}"
    return f"columns {names}, each by itself" + " and their mean" * ("reward" in reads)


def _standardised(view: RewardView) -> str:
    if view.standardise == "group":
        return "standardised within each group"
    if view.standardise == "none":
        return "as stored"
    numbers = zip(view.columns, view.mean_M, view.std_M, strict=True)
    moments = "; ".join(f"{name}: mean {mean:.4g}, std {std:.4g}" for name, mean, std in numbers)
    return f"standardised by the training store ({moments})"


def store(opened: Store) -> str:
    manifest = opened.manifest
    counts = sorted(manifest.responses_per_group)
    widths = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    columns = [f"{name} {c.statistics.mean:.3g} +- {c.statistics.std:.3g}" for name, c in opened.columns.items()]
    return (
        f"{opened.prefix}: {len(opened):,} groups of {widths} responses, {manifest.tokens:,} tokens, "
        f"{', '.join(columns) or 'no rewards'}, fingerprint {opened.fingerprint[:12]}"
    )


def valid_store(plan: Plan) -> str:
    return "none" if plan.valid_store is None else store(plan.valid_store)


def reference(plan: Plan) -> str:
    if plan.reference == "none":
        return f"none: {plan.config.objective.method} reads no reference"
    text: str = "the policy without its adapter" if plan.reference_is_base else plan.reference
    text += f", {plan.reference_source.path}, weights {plan.reference_fingerprint[:12]}"
    if plan.config.reference.offload:
        text += ", in host memory between its passes"
    return f"{text}; {_role(plan.reads)}{_sidecars(plan)}"


def _sidecars(plan: Plan) -> str:
    """A line for each store: whether the stored reference is there."""
    if plan.reference != "stored":
        return ""
    words = {
        "there": "is there",
        "missing": "is not there: `rpo train` makes it, with one pass over the store",
        "outdated": "belongs to tokens that are no longer there: `rpo train` makes it, with one pass over the store",
    }
    return "".join(f"\n{store.prefix}.ref_logp {words[state(plan, store)]}" for store in plan.stores)


def _role(reads: frozenset[str]) -> str:
    roles = {
        "ref_logp": "its log-probability of each response",
        "token_kl": "its distribution at each token of a response, for the KL over the vocabulary",
    }
    return "; ".join(role for column, role in roles.items() if column in reads)


def steps(plan: Plan) -> str:
    per_step = plan.config.train.groups_per_step
    passes = plan.num_steps * per_step / len(plan.train_store)
    again = "; the store has fewer groups: each step takes some of them again" * (per_step > len(plan.train_store))
    return f"{plan.num_steps} of {per_step:,} groups ({passes:.2f} passes over the data{again})"


_DERIVED: dict[str, Callable[[Plan], str]] = {
    "model": model,
    "experts": experts,
    "adapter": adapter,
    "layout": layout,
    "objective": objective,
    "rewards": rewards,
    "reference": reference,
    "train data": lambda plan: store(plan.train_store),
    "valid data": valid_store,
    "steps": steps,
}
