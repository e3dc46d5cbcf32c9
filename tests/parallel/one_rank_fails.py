"""`rpo` with a verb that fails on rank 1 while the others wait in a collective. argv: the kind of failure."""

import sys
from typing import Any

from rpo_megatron import cli
from rpo_megatron.config import ParallelConfig
from rpo_megatron.config_verbs import MethodsConfig
from rpo_megatron.errors import UserError


def fail(config: Any) -> None:
    from rpo_megatron.distributed import barrier, start

    groups = start(ParallelConfig())
    if groups.rank == 1:
        raise {"user": UserError("file x, line 3: no"), "bug": ZeroDivisionError("a bug of ours")}[config.name]
    barrier()
    barrier()


if __name__ == "__main__":
    run = f"{fail.__module__}:fail"
    cli.VERBS["fail"] = cli.Verb(summary="", run=run, config=MethodsConfig, positional="name", megatron=True)
    sys.exit(cli.main(["fail", sys.argv[1]]))
