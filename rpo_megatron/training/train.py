"""`rpo train`: build the parts, then a loop that can be read.

torchrun --nproc-per-node 4 -m rpo_megatron train run.yaml parallel.tensor=2 parallel.pipeline=2
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_megatron import config_io
from rpo_megatron.config import RunConfig
from rpo_megatron.data import sampler
from rpo_megatron.data.loader import Loader
from rpo_megatron.distributed import Groups, on_leader, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import wrap
from rpo_megatron.model.chunks import chunks_of
from rpo_megatron.model.router import take_seen
from rpo_megatron.model.source import newest_checkpoint, read_state
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.training import checkpoint, header
from rpo_megatron.training.evaluate import Evaluation, build_evaluation
from rpo_megatron.training.forward import to_device
from rpo_megatron.training.loaders import make_loader
from rpo_megatron.training.metrics import Metrics, drop_records_after
from rpo_megatron.training.optimizer import build_optimizer, learning_rate
from rpo_megatron.training.policy import build_policy, load_start
from rpo_megatron.training.profile import Profiler, build_profiler, check_profile
from rpo_megatron.training.reference import Fill, build_reference
from rpo_megatron.training.resolve import Plan, resolve
from rpo_megatron.training.resume import RunState, trained
from rpo_megatron.training.score import make_reference
from rpo_megatron.training.sidecar import to_make
from rpo_megatron.training.signals import STOPPED, StopSignals, Vote
from rpo_megatron.training.step import GradientNorms, StepResult, gather_weights, overlaps, train_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run. Only `model` and `optimizer` change while it goes on."""

    plan: Plan
    groups: Groups
    objective: Objective
    loader: Loader
    reference: Fill
    model: Any
    """The policy, or the reward model, in megatron's DDP; it is itself `model.module`."""
    optimizer: Any
    evaluation: Evaluation | None
    metrics: Metrics
    profiler: Profiler
    first_step: int

    @property
    def config(self) -> RunConfig:
        return self.plan.config


def train(config: RunConfig) -> None:
    """Raises UserError before any weight is loaded if the config, the data and the model do not go together, and exits
    with STOPPED when a signal stopped the run."""
    groups = start(config.parallel)
    run = build_run(resolve(config), groups)
    with StopSignals() as signals:
        finished = train_loop(run, signals)
    run.metrics.close()
    stop()
    if not finished:
        sys.exit(STOPPED)


def train_loop(run: Run, signals: StopSignals) -> bool:
    """False if a signal stopped it."""
    stop_vote = Vote(run.groups.device)
    config, num_steps, norms = run.config, run.plan.num_steps, GradientNorms()
    last_step = _last_step(run.plan)
    if run.first_step >= last_step and run.groups.leads:
        print(f"step {run.first_step} is reached already: nothing to train", flush=True)
    for step in range(run.first_step, last_step):
        _evaluate_if_due(run, step)
        done = step + 1
        with run.profiler.step(step):
            lr = learning_rate(config.optimizer, step, num_steps)
            norms.add(done, _train_step(run, step, lr=lr).grad_norm)
            if run.metrics.due(done):
                with run.profiler.phase("logging"):
                    seen_LX = take_seen(chunks_of(run.model))
                    run.metrics.log(done, lr=lr, grad_norm=norms.latest(), seen_LX=seen_LX)
        with run.metrics.paused():
            run.profiler.report()
        stops = stop_vote(signals.received)
        if done == last_step or stops or (config.checkpoint.every and done % config.checkpoint.every == 0):
            norms.latest()  # or the run stops here
            _save(run, done)
        if stops and done < last_step:
            _say_stopped(run, done)
            return False
    if last_step == num_steps:
        _evaluate_if_due(run, num_steps)
    return True


def _say_stopped(run: Run, step: int) -> None:
    if run.groups.leads:
        print(f"stopped by a signal after step {step}; the same command goes on from there", flush=True)


def _train_step(run: Run, step: int, *, lr: float) -> StepResult:
    phase = run.profiler.phase
    with phase("data"):
        data = run.loader.step(step)
        batches = [to_device(row, run.groups.device, cp=run.groups.cp) for row in data.rows]
    with phase("reference"):
        batches = run.reference(batches)
    objective = run.objective.at(step / run.plan.num_steps)
    result = train_step(run.model, run.optimizer, batches, objective, lr=lr, profiler=run.profiler)
    run.metrics.add(result.stats, tokens=sum(row.num_real_tokens for row in data.rows), balance=data.balance)
    return result


def build_run(plan: Plan, groups: Groups) -> Run:
    """All parts, the weights in place: drawn, read, or restored from the newest checkpoint of the run directory."""
    config = plan.config
    objective = objectives.build(config.objective)
    missing = on_leader(lambda: to_make(plan, plan.stores))  # what does not fit is refused before a weight is loaded
    resume_from = _open_run_dir(config)
    fresh, done = _run_state(plan, step=0), 0
    if resume_from is not None:
        checkpoint.check_fits(resume_from, shape=plan.shape, adapter=plan.adapter, expected=fresh, groups=groups)
        done = read_state(resume_from)["step"]
    check_profile(config.profile, num_steps=_last_step(plan) - done)
    header.show(plan, groups, resume_from=resume_from)
    make_reference(plan, groups, missing)
    policy = build_policy(plan, groups, shape=plan.shape)
    if resume_from is None or plan.adapter is not None:
        load_start(policy, plan, groups)  # of a run with an adapter the checkpoint holds only that
    model = wrap(policy, overlap=overlaps(config.parallel, groups), bucket_size=config.parallel.bucket_size)
    optimizer = build_optimizer(config.optimizer, model, config.precision)
    if resume_from is not None:
        checkpoint.load(policy, optimizer, directory=resume_from, expected=fresh, groups=groups)
    # A run that died before its first checkpoint leaves nothing to go on from, so nothing of its log is kept either.
    on_leader(lambda: _take_over(config, keep_until=-1 if resume_from is None else done))
    reference = build_reference(plan, groups, policy=policy)
    evaluation = None
    if config.evaluation.every:
        evaluation = build_evaluation(plan, groups, fill_reference=reference)
    return Run(
        plan=plan,
        groups=groups,
        objective=objective,
        loader=make_loader(plan, plan.with_reference(plan.train_store), groups),
        reference=reference,
        model=model,
        optimizer=optimizer,
        evaluation=evaluation,
        metrics=Metrics(config.logging, run_dir=config.run_dir, num_steps=plan.num_steps, groups=groups),
        profiler=build_profiler(config, model, groups, first_step=done),
        first_step=done,
    )


def _last_step(plan: Plan) -> int:
    return min(plan.num_steps, plan.config.train.stop_at or plan.num_steps)


def _open_run_dir(config: RunConfig) -> Path | None:
    """Make the run directory and say which checkpoint to go on from."""

    def action() -> Path | None:
        newest = newest_checkpoint(config.run_dir)
        if newest is not None and config.checkpoint.resume == "never":
            raise UserError(
                f"run_dir '{config.run_dir}' has checkpoints already and checkpoint.resume=never; give another "
                f"run_dir, or checkpoint.resume=auto to go on from {newest.name}"
            )
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        return newest

    return on_leader(action)


def _take_over(config: RunConfig, *, keep_until: int) -> None:
    """From here on the run directory is this run's: not earlier, because its checkpoint may have refused the config."""
    drop_records_after(config.run_dir, keep_until)
    config_io.write(config, Path(config.run_dir) / "config.yaml")


def _run_state(plan: Plan, *, step: int) -> RunState:
    reference = plan.reference_identity(plan.train_store) if plan.reference != "none" else None
    return RunState(
        step=step,
        consumed=step * plan.config.train.groups_per_step,
        groups_per_step=plan.config.train.groups_per_step,
        seed=plan.config.seed,
        precision=plan.config.precision,
        data=plan.train_store.fingerprint,
        reference=reference,
        base=plan.base,
        order=sampler.fingerprint(len(plan.train_store), seed=plan.config.seed),
        objective=trained(plan),
    )


def _save(run: Run, step: int) -> None:
    config = run.config
    directory = checkpoint.step_directory(config.run_dir, step)
    gather_weights(run.model)
    with run.metrics.paused():
        checkpoint.save(
            run.model.module,
            run.optimizer,
            directory=directory,
            state=_run_state(run.plan, step=step),
            config_text=config_io.dump(config),
            companions=run.plan.source.hf,
            groups=run.groups,
        )
        on_leader(lambda: checkpoint.make_latest(directory, keep=config.checkpoint.keep))
    if run.groups.leads:
        print(f"checkpoint {directory}", flush=True)


def _evaluate_if_due(run: Run, step: int) -> None:
    evaluation, every = run.evaluation, run.config.evaluation.every
    if evaluation is None or (step % every and step != run.plan.num_steps):
        return
    with run.metrics.paused():
        stats = evaluation.run(run.model, run.objective.at(step / run.plan.num_steps))
        run.metrics.log_evaluation(step, stats, data=evaluation.data, num_groups=evaluation.num_groups)
