"""The command line. Modules of commands are imported when their command runs, so that `--help` stays fast.

Results go to standard output, logs and progress to standard error; `--json` prints one document. Every failure is a
P2pgzError with an exit code (docs/reference/exit-codes.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import os
import sys
from typing import Any, NoReturn

import click

from p2pgz import __version__

# command -> (module, one line for --help: importing the module for it would cost the whole start-up)
COMMANDS = {
    "mount": ("mount", "Mount an image lazily at a directory."),
    "umount": ("mount", "Unmount an image."),
    "ls": ("files", "List files of an image without mounting it."),
    "cat": ("files", "Print a file of an image without mounting it."),
    "get": ("files", "Print the bytes that a digest names."),
    "verify": ("files", "Check every byte of an image against its digest."),
    "find": ("find", "Show who provides what a digest names."),
    "drill": ("drill", "Say what of an image would be lost without its registry."),
    "why": ("why", "Show where a mounted file's bytes came from."),
    "seed": ("seed", "Keep images whole on this node and give them to its peers."),
    "export": ("exports", "Write an image into a file, for hosts without a registry."),
    "import": ("exports", "Take an image out of such a file."),
    "inventory": ("exports", "Write down what this host has, for exports to leave out."),
    "convert": ("convert", "Make an image lazily mountable."),
    "optimize": ("optimize", "Write how an image starts into it."),
    "status": ("status", "Show the node, its mounts and where bytes came from."),
    "doctor": ("doctor", "Check this host, its node, and the way to peers and registries."),
    "pool": ("pool", "Show and keep this host's chunk pool."),
    "config": ("config", "Show, check or print the configuration."),
    "node": ("node", "Run the node daemon."),
    "snapshotter": ("snapshotter", "Serve containerd: containers start before their images are here."),
    "upgrade": ("upgrade", "Go on as the installed version, keeping all mounts."),
    "bench": ("bench", "Measure how fast lazy images are on this host."),
    "demo": ("demo", "Show on this machine what p2pgz does."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"p2pgz.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name + "_" * keyword.iskeyword(cmd_name))
        _accept_globals(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"no command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "P2PGZ"}
)
@click.version_option(__version__, prog_name="p2pgz")
def cli() -> None:
    """Lazy, verified, peer-to-peer distribution of container images.

    \b
    p2pgz mount python:3.12 /mnt        an image's files, bytes on demand
    p2pgz ls python:3.12 /usr/bin       look without mounting
    p2pgz convert python:3.12 oci:out   make an image lazily mountable
    p2pgz doctor                        what this host lacks, if anything
    p2pgz demo                          a small cluster on this machine
    """


def _global_options() -> list[click.Option]:
    """What every command takes, before or behind its name; behind wins."""
    return [
        click.Option(
            ["--state-dir"],
            metavar="DIR",
            help="State directory: selects the node.",
            envvar="P2PGZ_STATE_DIR",
            expose_value=False,
            callback=_set_global,
        ),
        click.Option(
            ["--config", "config_file"],
            metavar="FILE",
            help="Configuration file.",
            envvar="P2PGZ_CONFIG",
            expose_value=False,
            callback=_set_global,
        ),
        click.Option(
            ["-q", "--quiet"], is_flag=True, help="No progress.", expose_value=False, callback=_set_global
        ),
        click.Option(
            ["-v", "--verbose"], is_flag=True, help="Log more.", expose_value=False, callback=_set_global
        ),
    ]


def _set_global(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    from p2pgz.cli.context import Settings

    assert param.name is not None
    settings = ctx.obj or Settings()
    source = ctx.get_parameter_source(param.name)
    given = source is not None and source.name == "COMMANDLINE"
    # behind the command's name only what was typed there counts: the environment has been looked at before
    if value and (given or ctx.parent is None):
        settings = dataclasses.replace(settings, **{param.name: value})
    ctx.obj = settings


def _accept_globals(command: click.Command) -> None:
    """Give a command, and those in it, the global options, once."""
    if not any(param.name == "state_dir" for param in command.params):
        command.params += _global_options()
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _accept_globals(inner)


cli.params += _global_options()


def main() -> NoReturn:
    """Entry point of the `p2pgz` script: runs the command and turns every failure into message and exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    from p2pgz.errors import P2pgzError, UsageError

    as_json = "--json" in arguments
    try:
        cli.main(arguments, prog_name="p2pgz", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    except click.ClickException as error:
        if as_json:
            return _fail_json(UsageError.exit_code, error.format_message())
        error.show()
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.exceptions.Exit as error:
        return error.exit_code
    except P2pgzError as error:
        if as_json:
            return _fail_json(error.exit_code, str(error))
        click.echo(f"p2pgz: {error.what}", err=True)
        if error.hint:
            click.echo(f"       {error.hint}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # the reader of our output has seen enough (`p2pgz ls | head`); the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _fail_json(code: int, message: str) -> int:
    import json

    click.echo(json.dumps({"message_type": "exit_error", "code": code, "message": message}), err=True)
    return code
