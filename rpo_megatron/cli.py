"""The command line: `rpo VERB [FILE.yaml] [key.path=value ...]`. A verb is a row of VERBS; there is no other parser.

    rpo train run.yaml objective.beta=0.05
    torchrun --nproc-per-node 4 -m rpo_megatron train run.yaml parallel.tensor=2 parallel.pipeline=2

Exit codes: 0 done, 2 bad input (one message, from the first process that found it), 1 a bug (traceback) or problems
that `rpo doctor` found, 75 training was stopped by SIGTERM or SIGUSR1, with a checkpoint to go on from, 130 Ctrl-C.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from rpo_megatron import __version__, config, config_io, config_verbs, knobs
from rpo_megatron.errors import UserError, nearest

NOISY = ("megatron", "torch", "transformers")
"""Libraries whose warnings are for their own developers, tens of lines on each process; what matters of them to a run,
its header says."""
GRACE_SECONDS = 10.0
"""How long a process that leaves an error to another to report stays alive under torchrun."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What a word on the command line does."""

    summary: str
    run: str
    """`module:function`, imported only when the verb is used; the function takes the config, and returns nothing or an
    exit code."""
    config: type
    positional: str | None = None
    """Key that a bare word sets, for verbs whose main argument is a path."""
    takes_run: bool = False
    """True if a word that ends in .yaml is not this verb's own config but that of a run, which the key `run` names."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options that read better than the key they set: `--with value` is `score.what=value`."""
    megatron: bool = False
    """True if it imports megatron-core, which must then be able to run without CUDA."""


VERBS: dict[str, Verb] = {
    "prepare": Verb(
        summary="preference data (jsonl, parquet, datasets) -> a store",
        run="rpo_megatron.data.prepare:prepare",
        config=config_verbs.PrepareConfig,
    ),
    "inspect": Verb(
        summary="counts, histograms and decoded examples of a store",
        run="rpo_megatron.data.show:inspect",
        config=config_verbs.InspectConfig,
        positional="prefix",
    ),
    "config": Verb(
        summary="print the resolved config of a run and the sizes that follow from it",
        run="rpo_megatron.training.describe:print_config",
        config=config.RunConfig,
    ),
    "methods": Verb(
        summary="print the table of objectives and their knobs",
        run="rpo_megatron.objectives.show:print_methods",
        config=config_verbs.MethodsConfig,
        positional="name",
    ),
    "score": Verb(
        summary="write the reference's log-probabilities, or a model's rewards, next to the stores of a run",
        run="rpo_megatron.training.score:score",
        config=config.RunConfig,
        options={"--with": "score.what"},
        megatron=True,
    ),
    "train": Verb(
        summary="train a policy or a reward model",
        run="rpo_megatron.training.train:train",
        config=config.RunConfig,
        megatron=True,
    ),
    "eval": Verb(
        summary="evaluate a checkpoint (or the starting weights) on the held-out store",
        run="rpo_megatron.training.evaluate:evaluate_run",
        config=config.RunConfig,
        megatron=True,
    ),
    "export": Verb(
        summary="a checkpoint -> a Hugging Face directory",
        run="rpo_megatron.training.convert:export",
        config=config_verbs.ExportConfig,
        positional="load",
        megatron=True,
    ),
    "import": Verb(
        summary="a Hugging Face directory -> a checkpoint",
        run="rpo_megatron.training.convert:import_",
        config=config_verbs.ImportConfig,
        positional="load",
        megatron=True,
    ),
    "plan": Verb(
        summary="which layouts fit on how many GPUs, their memory and speed (an estimate)",
        run="rpo_megatron.planning.show:print_plan",
        config=config_verbs.PlanConfig,
        positional="run",
        takes_run=True,
    ),
    "doctor": Verb(
        summary="what is installed, what will be used, and what on this machine would make a run fail",
        run="rpo_megatron.doctor.report:examine",
        config=config_verbs.DoctorConfig,
    ),
}


def entry() -> NoReturn:
    """The console script."""
    _quieten()
    leave(main())


def _quieten() -> None:
    """Pass over the warnings of NOISY, from before the first import on, unless -W or PYTHONWARNINGS says what to
    show."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({'|'.join(NOISY)})(\.|$)")


def leave(code: int) -> NoReturn:
    """End the process. A failed one leaves at once: the threads of a process group that nobody closed would abort it on
    the way out, and hide its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb_name = argv[0] if argv else "help"
    try:
        code = _run(verb_name, argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is no error; at exit it would be one
        return code
    except UserError as error:
        return _report(f"rpo {verb_name}: error: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `rpo inspect x | head` is not an error
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception:
        if _speaks():
            raise
        print(f"rank {os.environ.get('RANK')}: stopped, because another process failed", file=sys.stderr, flush=True)
        _leave_time_to_speak()
        return 1


def _run(verb_name: str, words: list[str]) -> int:
    if verb_name in ("help", "-h", "--help"):
        print(_usage())
        return 0
    if verb_name == "--version":
        print(__version__)
        return 0
    if verb_name not in VERBS:
        raise UserError(f"there is no verb '{verb_name}'{nearest(verb_name, VERBS)} (verbs: {', '.join(VERBS)})")
    verb = VERBS[verb_name]
    if any(word in ("-h", "--help") for word in words):
        print(_verb_usage(verb_name, verb))
        return 0
    loaded = _load(verb, words)
    if verb.megatron:
        _enable_cpu()
    return _resolve(verb.run)(loaded) or 0


def _load(verb: Verb, words: list[str]) -> Any:
    file: str | None = None
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if word.endswith((".yaml", ".yml")) and "=" not in word and not verb.takes_run:
            if file is not None:
                raise UserError(f"two config files: '{file}' and '{word}'; give one, and overrides as key.path=value")
            file = word
        elif option in verb.options:
            value = value if equals else next(rest, "")
            if not value:
                raise UserError(f"{option} needs a word after it; it sets {verb.options[option]}")
            overrides.append(f"{verb.options[option]}={value}")
        elif "=" in word and not word.startswith("-"):
            _check_override(verb, option)
            overrides.append(word)
        elif verb.positional is not None and not word.startswith("-"):
            overrides.append(f"{verb.positional}={word}")
        else:
            raise UserError(f"cannot read '{word}': expected FILE.yaml or key.path=value")
    return config_io.load(verb.config, file, overrides)


def _check_override(verb: Verb, key: str) -> None:
    """Of a verb that takes a run, `key` must not be one of the run's alone."""
    section = key.partition(".")[0]
    own = {spec.name for spec in fields(verb.config)}
    if verb.takes_run and section not in own and section in {spec.name for spec in fields(config.RunConfig)}:
        raise UserError(
            f"'{key}' belongs to the run: change it in the run's file, or in a copy of that; what can be given here is "
            f"{', '.join(sorted(own))}"
        )


def _enable_cpu() -> None:
    from rpo_megatron import cpu

    cpu.enable()


def _resolve(path: str) -> Callable[[Any], int | None]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _report(message: str) -> int:
    """Print a message once, though every process of the job may have met the same error."""
    if _speaks():
        print(message, file=sys.stderr, flush=True)
        _tell_torchrun(message)
    else:
        _leave_time_to_speak()
    return 2


def _leave_time_to_speak() -> None:
    """torchrun kills the other processes when one ends: that must not be before the message is out."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(GRACE_SECONDS)


def _speaks() -> bool:
    """True on the first process of the job to fail: the others fail for the same reason, or because of it."""
    distributed = sys.modules.get("rpo_megatron.distributed")
    return os.environ.get("LOCAL_RANK", "0") == "0" if distributed is None else distributed.first_to_fail()


def _tell_torchrun(message: str) -> None:
    """torchrun ends its own report of a failure with the text in this file: let it be ours."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": str(int(time.time()))}, file)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"rpo {__version__}: reward-aware preference optimization on Megatron-core\n\n"
        f"usage: rpo VERB [FILE.yaml] [key.path=value ...]\n       rpo VERB --help\n\n{verbs}\n\n"
        f"On several processes: torchrun --nproc-per-node N -m rpo_megatron VERB ..."
    )


def _verb_usage(name: str, verb: Verb) -> str:
    word = f" {_positional(verb, verb.positional)}" if verb.positional else " [FILE.yaml]"
    options = "".join(f" [{option} WORD]" for option in verb.options)
    same = "".join(f"{option} WORD is {key}=WORD.\n\n" for option, key in verb.options.items())
    usage = f"usage: rpo {name}{word}{options} [key.path=value ...]"
    return f"{usage}\n\n{verb.summary}\n\n{same}{knobs.describe(verb.config)}"


def _positional(verb: Verb, key: str) -> str:
    word = key.upper() + ".yaml" * verb.takes_run
    return word if knobs.is_mandatory(verb.config, key) else f"[{word}]"
