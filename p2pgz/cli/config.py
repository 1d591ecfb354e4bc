"""`p2pgz config`."""

from __future__ import annotations

import click
import msgspec

from p2pgz import config as configuration
from p2pgz.cli.context import Settings, json_option, print_json


@click.group()
def config() -> None:
    """Show, check or print the configuration."""


@config.command()
@click.option("--origin", is_flag=True, help="Say where each value came from.")
@json_option
@click.pass_obj
def show(settings: Settings, /, origin: bool, as_json: bool) -> None:
    """Print the configuration in force: flags, environment, file and defaults merged."""
    loaded = settings.load()
    values = configuration.flatten(msgspec.to_builtins(loaded.config))
    if as_json:
        print_json(
            {key: {"value": value, "origin": loaded.origins[key]} for key, value in values.items()}
            if origin
            else values
        )
        return
    for key, value in values.items():
        text = msgspec.json.encode(value).decode()
        click.echo(f"{key} = {text}" + (f"  # {loaded.origins[key]}" if origin else ""))


@config.command()
@click.pass_obj
def check(settings: Settings, /) -> None:
    """Check the configuration file, the environment and the files that they name; says nothing and exits 0 when all is
    right."""
    from p2pgz.node import configcheck

    configcheck.check(settings.load())


@config.command()
def default() -> None:
    """Print a complete configuration file with every default."""
    click.echo(configuration.dump_default())
