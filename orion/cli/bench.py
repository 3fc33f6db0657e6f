"""`orion bench`: one subcommand for each benchmark.

Parses, and hands over to the module that measures. That module is imported only once its benchmark is asked for.
"""

import typer

bench_app = typer.Typer(help="Measures what docs/RESULTS.md reports.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measures what docs/RESULTS.md reports."""
