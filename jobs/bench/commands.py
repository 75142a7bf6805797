"""The commands of ``palisade bench``. Each uses conf/bench.yaml where no --config is given."""

from __future__ import annotations

import typer

from jobs.options import EVERYWHERE, Quick, Seeds, Write

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks: figures against their targets, exit 0 or 3.")


@bench_app.command("source", epilog=EVERYWHERE)
def bench_source(ctx: typer.Context, quick: Quick = False, seeds: Seeds = None, write: Write = False) -> int:
    """Compare all source methods over domains left out, missing modalities and few sources; resumes by
    itself.

    Uses conf/bench.yaml where no --config is given. --quick: erm and rise, one seed, short fits.
    """
    config = ctx.obj.benchmark
    from jobs.bench.source.run import bench_source

    return bench_source(config, ctx.obj.terminal, quick=quick, seeds=seeds, write=write)


@bench_app.command("site", epilog=EVERYWHERE)
def bench_site(ctx: typer.Context, quick: Quick = False, seeds: Seeds = None, write: Write = False) -> int:
    """Compare all site methods over recorded and rendered streams, hostile ones too; resumes by itself.

    Uses conf/bench.yaml where no --config is given. --quick: four methods, one seed, short streams.
    """
    config = ctx.obj.benchmark
    from jobs.bench.site.run import bench_site

    return bench_site(config, ctx.obj.terminal, quick=quick, seeds=seeds, write=write)


@bench_app.command("fleet", epilog=EVERYWHERE)
def bench_fleet(ctx: typer.Context, quick: Quick = False, write: Write = False) -> int:
    """Measure what adaptation, ingest, Ray, kills and lineage cost, each as a ratio inside one run.

    Uses conf/bench.yaml where no --config is given. --quick: a tenth of the sites.
    """
    config = ctx.obj.benchmark
    from jobs.bench.fleet.run import bench_fleet

    return bench_fleet(config, ctx.obj.terminal, quick=quick, write=write)


@bench_app.command("rollout", epilog=EVERYWHERE)
def bench_rollout(ctx: typer.Context, quick: Quick = False, write: Write = False) -> int:
    """Measure what a rollout costs and what its guards see, and simulate a month of all that can go wrong.

    Uses conf/bench.yaml where no --config is given. --quick: a tenth of the fleet and the month.
    """
    config = ctx.obj.benchmark
    from jobs.bench.rollout.run import bench_rollout

    return bench_rollout(config, ctx.obj.terminal, quick=quick, write=write)
